// SPDX-License-Identifier: Apache-2.0
// What only shows on a terminal: full screens, the REPL, questions, colour, Ctrl-C. On a
// pseudo-terminal.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include "ctl_fixture.h"

namespace ds::test {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::Not;

/// Takes a question and leaves it open.
void never_answer(FakeControl& daemon) {
  daemon.on("GET /ready", R"({"ready":true,"version":"v1"})");
  daemon.on("GET /ds/v1/versions", R"({"current":"v1"})");
  Canned hang;
  hang.hang = true;
  daemon.on("POST /v1/chat/completions", hang);
}

class CtlTerminal : public testing::Test {
 protected:
  void SetUp() override {
    daemon_.on("GET /ready", R"({"ready":true,"version":"v1"})");
    daemon_.on("GET /ds/v1/status", R"({"uptime_s":5,"host":"alpha","serving":{"version":"v1"},
"learning":{"state":"idle","enabled":true}})");
    daemon_.on("GET /ds/v1/ps", R"({"items":[{"id":"chatcmpl-1","state":"running"}]})");
    daemon_.on("GET /ds/v1/learn", R"({"state":"training","round":3,"step":20,"loss":1.5,
"rounds":[{"round":2,"outcome":"published","version":"v2"}]})");
    std::string steps;
    for (int i = 1; i <= 20; ++i) {
      steps += (i > 1 ? "," : "") + std::string(R"({"number":)") + std::to_string(i) +
               R"(,"topic":"step","at_ms":1000,"loss":)" + std::to_string(4.0 / i) + "}";
    }
    daemon_.on("GET /ds/v1/events", R"({"items":[)" + steps + "]}");
    daemon_.on("GET /ds/v1/versions", R"({"current":"v2","pinned":null,"items":[
{"version":"v2","state":"current","created_ms":1000}]})");
    daemon_.on("POST /v1/chat/completions",
               Canned{200,
                      "data: "
                      "{\"id\":\"chatcmpl-7\",\"system_fingerprint\":\"ds-v1-aabbccdd\","
                      "\"choices\":[{\"delta\":"
                      "{\"content\":\"On "
                      "\\u001b[2JTuesday.\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n",
                      "text/event-stream"});
    daemon_.on("POST /ds/v1/feedback",
               R"({"id":"fb_a","state":"stored","offset":1,"duplicate":false})");
    const std::string stored = R"({"state":"stored","at_ms":1000})";
    daemon_.on("GET /ds/v1/feedback/fb_a", R"({"fate":[)" + stored + "]}");
    daemon_.on("GET /ds/v1/feedback/fb_a",
               R"({"fate":[)" + stored + R"(,{"state":"trained","at_ms":9000,"version":"v2"}]})");
    daemon_.on("GET /ds/v1/feedback/fb_a",
               R"({"fate":[)" + stored + R"(,{"state":"served","at_ms":13000,"version":"v2"}]})");
    daemon_.on("DELETE /ds/v1/feedback/fb_a", R"({"id":"fb_a","state":"reverted","version":"v3"})");
  }
  std::vector<std::string> with(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--run", run_.path()});
    return arguments;
  }
  ScratchFolder run_;
  FakeControl daemon_{run_.path()};
};

TEST_F(CtlTerminal, TopTakesTheScreenAndGivesItBack) {
  Terminal terminal(with({"top", "--interval", "0.1"}));
  ASSERT_TRUE(terminal.wait_for("\033[?1049h")) << terminal.output();
  ASSERT_TRUE(terminal.wait_for("host alpha"));
  ASSERT_TRUE(terminal.wait_for("chatcmpl-1"));
  ASSERT_TRUE(terminal.wait_for("host alpha")) << "it is drawn again";
  terminal.type("q");
  EXPECT_EQ(terminal.finish(), 0);
  EXPECT_THAT(terminal.output(), HasSubstr("\033[?25h\033[?1049l"));
}

TEST_F(CtlTerminal, TopEndsOnCtrlC) {
  Terminal terminal(with({"top"}));
  ASSERT_TRUE(terminal.wait_for("chatcmpl-1"));
  terminal.type("\x03");
  EXPECT_EQ(terminal.finish(), 130);
  EXPECT_THAT(terminal.output(), HasSubstr("\033[?1049l"));
}

TEST_F(CtlTerminal, TopSaysWhenTheDaemonGoesAway) {
  daemon_.on("GET /ds/v1/ps", Canned{503, R"({"error":{"message":"draining"}})"});
  Terminal terminal(with({"top", "--interval", "0.1"}));
  EXPECT_EQ(terminal.finish(), 5);
  EXPECT_THAT(terminal.output(), HasSubstr("\033[?1049ldsctl: draining"));
}

TEST_F(CtlTerminal, LearnWatchDrawsTheLossInBraille) {
  Terminal terminal(with({"learn", "watch"}));
  ASSERT_TRUE(terminal.wait_for("round 3"));
  ASSERT_TRUE(terminal.wait_for("loss of the last 20 steps")) << terminal.output();
  ASSERT_TRUE(terminal.wait_for("round 2  published  v2"));
  terminal.type("q");
  EXPECT_EQ(terminal.finish(), 0);
  EXPECT_THAT(terminal.output(), HasSubstr("⠑⠒⠤⠤⢄⣀⣀"));
  EXPECT_THAT(daemon_.requests(), Contains("GET /ds/v1/events?topic=step&since=0"));
}

TEST_F(CtlTerminal, LearnWatchOnceIsOneFrame) {
  Terminal terminal(with({"learn", "watch", "--once"}));
  EXPECT_EQ(terminal.finish(), 0);
  EXPECT_THAT(terminal.output(), HasSubstr("loss of the last 20 steps"));
  EXPECT_THAT(terminal.output(), Not(HasSubstr("\033[?1049h")));
}

TEST_F(CtlTerminal, TalkCorrectSeeItLearnedUndo) {
  Terminal terminal(with({"run"}), {"XDG_STATE_HOME=" + run_.path()});
  ASSERT_TRUE(terminal.wait_for("v1 serves"));
  ASSERT_TRUE(terminal.wait_for("> "));
  terminal.type("When?\n");
  ASSERT_TRUE(terminal.wait_for("On \xEF\xBF\xBD[2JTuesday.")) << "no cursor moves from the model";
  ASSERT_TRUE(terminal.wait_for("> "));
  terminal.type("/fix On Monday, grüß Gott.\n");
  ASSERT_TRUE(terminal.wait_for("stored fb_a"));
  ASSERT_TRUE(terminal.wait_for("learned in v2 (12 s)")) << terminal.output();
  ASSERT_TRUE(terminal.wait_for("> "));
  terminal.type("/why\n");
  ASSERT_TRUE(terminal.wait_for("was given by v1"));
  ASSERT_TRUE(terminal.wait_for("after 12s"));
  terminal.type("/version\n");
  ASSERT_TRUE(terminal.wait_for("v2 serves"));
  terminal.type("/undo\n");
  ASSERT_TRUE(terminal.wait_for("reverted, v3 serves"));
  terminal.type("/good\n");
  ASSERT_TRUE(terminal.wait_for("stored fb_a"));
  terminal.type("/nonsense\n");
  ASSERT_TRUE(terminal.wait_for("unknown command /nonsense"));
  terminal.type("/quit\n");
  EXPECT_EQ(terminal.finish(), 0);
  EXPECT_THAT(daemon_.requests(),
              Contains(R"(POST /ds/v1/feedback {"correction":"On Monday, grüß Gott.",)"
                       R"("kind":"correction","response_id":"chatcmpl-7"})"));
  EXPECT_THAT(
      daemon_.requests(),
      Contains(R"(POST /ds/v1/feedback {"kind":"rating","rating":1,"response_id":"chatcmpl-7"})"));
  EXPECT_THAT(daemon_.requests(), Contains("DELETE /ds/v1/feedback/fb_a"));
}

TEST_F(CtlTerminal, TheTalkGoesOnAfterCtrlC) {
  Terminal terminal(with({"run"}), {"XDG_STATE_HOME=" + run_.path()});
  ASSERT_TRUE(terminal.wait_for("> "));
  terminal.type("half a line\x03");
  terminal.type("/version\n");
  ASSERT_TRUE(terminal.wait_for("v2 serves")) << terminal.output();
  terminal.type("\x04");
  EXPECT_EQ(terminal.finish(), 0);
}

TEST_F(CtlTerminal, KeysTypedDuringAnAnswerBelongToTheNextLine) {
  const ScratchFolder run;
  FakeControl daemon(run.path());
  never_answer(daemon);
  Terminal terminal({"--run", run.path(), "--timeout", "2", "run"},
                    {"XDG_STATE_HOME=" + run.path()});
  ASSERT_TRUE(terminal.wait_for("> "));
  terminal.type("When?\n");
  while (daemon.requests().size() < 2) std::this_thread::yield();
  terminal.type("/version\n\x04");
  ASSERT_TRUE(terminal.wait_for("v1 serves")) << terminal.output();
  EXPECT_EQ(terminal.finish(), 0);
}

TEST_F(CtlTerminal, AnAnswerCanBeInterrupted) {
  const ScratchFolder run;
  FakeControl daemon(run.path());
  never_answer(daemon);
  Terminal terminal({"--run", run.path(), "run"}, {"XDG_STATE_HOME=" + run.path()});
  ASSERT_TRUE(terminal.wait_for("> "));
  terminal.type("When?\n");
  while (daemon.requests().size() < 2) std::this_thread::yield();
  terminal.type("\x03");
  terminal.type("/version\n");
  ASSERT_TRUE(terminal.wait_for("v1 serves")) << terminal.output();
  terminal.type("\x04");
  EXPECT_EQ(terminal.finish(), 0);
}

TEST_F(CtlTerminal, RemovalAsksOnATerminal) {
  Terminal no(with({"feedback", "rm", "fb_a"}));
  ASSERT_TRUE(no.wait_for("undo fb_a? [y/N]"));
  no.type("n\n");
  EXPECT_EQ(no.finish(), 1);
  EXPECT_THAT(daemon_.requests(), Not(Contains("DELETE /ds/v1/feedback/fb_a")));

  Terminal yes(with({"feedback", "rm", "fb_a"}));
  ASSERT_TRUE(yes.wait_for("[y/N]"));
  yes.type("y\n");
  ASSERT_TRUE(yes.wait_for("reverted, v3 serves"));
  EXPECT_EQ(yes.finish(), 0);
}

TEST_F(CtlTerminal, ColourOnlyOnATerminalWithoutNoColor) {
  Terminal plain(with({"version", "ls"}), {"NO_COLOR=1"});
  EXPECT_EQ(plain.finish(), 0);
  EXPECT_THAT(plain.output(), Not(HasSubstr("\033[")));
  Terminal coloured(with({"version", "ls"}));
  EXPECT_EQ(coloured.finish(), 0);
  EXPECT_THAT(coloured.output(), HasSubstr("\033[32mcurrent\033[0m"));
}

TEST_F(CtlTerminal, PushDrawsABar) {
  const std::string file = run_.path() + "/f.jsonl";
  FILE* out = std::fopen(file.c_str(), "w");
  for (int i = 0; i < 200; ++i) std::fprintf(out, "{\"text\":\"t%d\"}\n", i);
  std::fclose(out);
  const ScratchFolder run;
  FakeControl daemon(run.path());
  std::string acks;
  for (int i = 0; i < 64; ++i) acks += (i ? "," : "") + std::string(R"({"id":"fb_x"})");
  daemon.on("POST /ds/v1/feedback", R"({"items":[)" + acks + "]}");
  Terminal terminal({"--run", run.path(), "feedback", "push", file});
  EXPECT_EQ(terminal.finish(), 0);
  EXPECT_THAT(terminal.output(), HasSubstr("━"));
  EXPECT_THAT(terminal.output(), HasSubstr("200/200"));
}

TEST_F(CtlTerminal, ScriptsCanTalkToo) {
  const Ran ran = run_dsctl(with({"run"}), "When?\n/fix On Monday.\n/quit\n");
  EXPECT_EQ(ran.exit, 0);
  EXPECT_THAT(ran.out, HasSubstr("Tuesday.\nstored fb_a\nlearned in v2 (12 s)\n"));
}

}  // namespace
}  // namespace ds::test
