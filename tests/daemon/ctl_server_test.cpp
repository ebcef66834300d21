// SPDX-License-Identifier: Apache-2.0
// The real dsctl against the real server over a tiny model: what the golden tests' scripted daemon
// says must be what the daemon says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ctl_fixture.h"
#include "serve_fixture.h"

namespace ds::test {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;
using testing::StartsWith;

class CtlServer : public testing::Test {
 protected:
  Ran dsctl(std::vector<std::string> arguments, const std::string& input = "") {
    arguments.insert(arguments.begin(), {"--run", served_.run.path()});
    return run_dsctl(arguments, input);
  }
  /// Runs with -o json; the document, or null with a failed test.
  Json document(std::vector<std::string> arguments, const std::string& input = "") {
    arguments.insert(arguments.end(), {"-o", "json"});
    const Ran ran = dsctl(arguments, input);
    EXPECT_EQ(ran.exit, 0) << ran.out << ran.err;
    const auto parsed = parse_json(ran.out);
    EXPECT_TRUE(parsed.ok()) << ran.out;
    return parsed.ok() ? *parsed : Json();
  }
  Served served_;
};

TEST_F(CtlServer, AnswersQuestions) {
  const Ran ran = dsctl({"ask", "a b c", "--max-tokens", "4", "--temperature", "0", "--stats"});
  EXPECT_EQ(ran.exit, 0) << ran.err;
  EXPECT_THAT(ran.err, ContainsRegex("4 tokens in .* v[0-9]+, chatcmpl-"));
  const Json answer = document({"ask", "a b c", "--max-tokens", "4", "--temperature", "0"});
  EXPECT_EQ(answer["text"].get<std::string>() + "\n", ran.out);
  EXPECT_THAT(answer["version"].get<std::string>(), StartsWith("v"));
  EXPECT_EQ(dsctl({"ask", "a", "--max-tokens", "-3"}).exit, 1);
  EXPECT_EQ(dsctl({"ask", "a", "-m", "v999"}).exit, 3);
}

TEST_F(CtlServer, TokenizesAsTheServerDoes) {
  const Json tokens = document({"tokenize", "a b c"});
  EXPECT_EQ(tokens["count"], tokens["ids"].size());
  EXPECT_GT(tokens["ids"].size(), 0u);
}

TEST_F(CtlServer, ShowsStatusVersionsModelsConfigAndMetrics) {
  const Ran status = dsctl({"status"});
  EXPECT_EQ(status.exit, 0) << status.err;
  EXPECT_THAT(status.out, ContainsRegex("serving   v[0-9]+ \\([0-9a-f]{8}\\)  since [0-9]+s ago"));
  EXPECT_THAT(status.out, ContainsRegex("kv [0-9]+%"));
  const Json versions = document({"version", "ls"});
  const std::string current = versions["current"];
  EXPECT_THAT(dsctl({"version", "ls"}).out, ContainsRegex(current + " .* current"));
  EXPECT_THAT(dsctl({"version", "show", current}).out, HasSubstr("version      " + current));
  EXPECT_EQ(dsctl({"version", "show", "v999"}).exit, 3);
  EXPECT_THAT(dsctl({"model", "ls"}).out, HasSubstr("language"));
  EXPECT_EQ(document({"config", "show"})["items"].size(), settings().size());
  EXPECT_EQ(dsctl({"config", "set", "learn.settle=5s"}).exit, 0);
  EXPECT_THAT(dsctl({"config", "show", "--origin"}).out,
              ContainsRegex("learn.settle +5s +2s +at once +live"));
  EXPECT_EQ(dsctl({"config", "set", "learn.rank=4"}).exit, 4);
  EXPECT_EQ(dsctl({"config", "set", "learn.nothing=4"}).exit, 1);
  EXPECT_THAT(dsctl({"metrics", "--grep", "^ds_build_info"}).out, HasSubstr("ds_build_info{"));
  EXPECT_EQ(dsctl({"ps"}).exit, 0);
  EXPECT_EQ(dsctl({"cancel", "nope"}).exit, 3);
  EXPECT_EQ(dsctl({"events"}).exit, 0);
  EXPECT_EQ(dsctl({"logs"}).exit, 0);
  EXPECT_EQ(dsctl({"top", "--once"}).exit, 0);
}

TEST_F(CtlServer, MovesBetweenVersions) {
  served_.model.publish_up_to(3);
  const std::string current = document({"version", "ls"})["current"];
  EXPECT_EQ(current, "v3");
  const Json back = document({"version", "rollback"});
  EXPECT_EQ(back["current"], "v2");
  EXPECT_EQ(back["pinned"], back["current"]);
  EXPECT_EQ(document({"version", "diff", back["current"], current})["b"], current);
  EXPECT_EQ(document({"version", "promote", current})["current"], current);
  EXPECT_EQ(document({"version", "pin", current})["pinned"], current);
  EXPECT_TRUE(document({"version", "unpin"})["pinned"].is_null());
}

TEST_F(CtlServer, TakesFeedbackAndTellsItsFate) {
  const std::string lines =
      "{\"prompt\":\"When?\",\"completion\":\"Monday\"}\n{\"kind\":\"text\",\"text\":\"kept\"}"
      "\nnot json\n";
  const Ran ran = dsctl({"feedback", "push", "-"}, lines);
  EXPECT_EQ(ran.exit, 1);
  EXPECT_EQ(ran.out, "stored 2, duplicate 0, refused 1\n");
  EXPECT_THAT(ran.err, StartsWith("line 3: "));
  const Json items = document({"feedback", "ls"})["items"];
  ASSERT_EQ(items.size(), 2u);
  const std::string id = items[0]["id"];
  const Ran shown = dsctl({"feedback", "show", id});
  EXPECT_THAT(shown.out, HasSubstr("id      " + id));
  EXPECT_THAT(shown.out, ContainsRegex("[0-9]{2}:[0-9]{2}:[0-9]{2}  stored"));
  EXPECT_EQ(dsctl({"feedback", "show", "fb_00000000000000000000"}).exit, 3);
  EXPECT_THAT(dsctl({"feedback", "rm", id, "--yes"}).out, HasSubstr("reverted"));
  EXPECT_THAT(dsctl({"feedback", "stats"}).out, ContainsRegex("kind +text +1"));
  EXPECT_EQ(dsctl({"feedback", "push", "--correct", "chatcmpl-unknown", "x"}).exit, 1);
}

TEST_F(CtlServer, ACorrectionOfAnAnswerIsTaken) {
  const Json answer = document({"ask", "a b c", "--max-tokens", "4"});
  const Ran ran = dsctl({"feedback", "push", "--correct", answer["id"], "On Monday."});
  EXPECT_EQ(ran.exit, 0) << ran.err;
  EXPECT_THAT(ran.out, StartsWith("stored fb_"));
}

TEST_F(CtlServer, SteersTheLearner) {
  EXPECT_EQ(dsctl({"learn", "status"}).exit, 0);
  EXPECT_EQ(dsctl({"learn", "pause"}).exit, 0);
  EXPECT_TRUE(served_.paused);
  EXPECT_EQ(dsctl({"learn", "resume"}).exit, 0);
  EXPECT_FALSE(served_.paused);
  EXPECT_EQ(document({"learn", "step"})["outcome"], "empty");
  EXPECT_EQ(dsctl({"replay", "stats"}).exit, 0);
  EXPECT_EQ(dsctl({"replay", "verify"}).exit, 0);
}

TEST_F(CtlServer, FollowsEvents) {
  Terminal terminal({"--run", served_.run.path(), "events", "-f", "--since", "0", "-o", "json"});
  served_.events.publish("step", {{"loss", 1.5}});
  EXPECT_TRUE(terminal.wait_for("\"loss\":1.5")) << terminal.output();
  terminal.type("\x03");
  EXPECT_EQ(terminal.finish(), 130);
}

TEST_F(CtlServer, DoctorFindsNothingButWhatIsPlanted) {
  const std::vector<std::string> nothing = {"--run", served_.run.path(), "doctor"};
  const Ran well = run_dsctl(nothing);
  EXPECT_EQ(well.exit, 0) << well.out;
  served_.model.publish_up_to(2);
  ASSERT_EQ(dsctl({"version", "rollback"}).exit, 0);
  ASSERT_EQ(dsctl({"learn", "pause"}).exit, 0);
  const Ran ill = run_dsctl(nothing);
  EXPECT_EQ(ill.exit, 8);
  EXPECT_THAT(ill.out, HasSubstr("version_pinned"));
}

}  // namespace
}  // namespace ds::test
