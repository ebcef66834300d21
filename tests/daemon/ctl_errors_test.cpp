// SPDX-License-Identifier: Apache-2.0
// Exit codes, error lines and hints; what is sent; interrupts and time limits.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>

#include "ctl_fixture.h"
#include "storage/json.h"

namespace ds::test {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::StartsWith;

class CtlErrors : public testing::Test {
 protected:
  Ran dsctl(std::vector<std::string> arguments, const std::string& input = "") {
    arguments.insert(arguments.begin(), {"--run", run_.path()});
    return run_dsctl(arguments, input);
  }
  ScratchFolder run_;
  FakeControl daemon_{run_.path()};
};

TEST_F(CtlErrors, HttpStatusDecidesTheExitCode) {
  const std::pair<int, int> cases[] = {{400, 1}, {401, 6}, {403, 6}, {404, 3}, {409, 4}, {413, 1},
                                       {429, 4}, {500, 1}, {501, 1}, {503, 5}, {504, 7}};
  for (const auto& [status, exit] : cases) {
    const std::string target = "/ds/v1/versions/v" + std::to_string(status);
    daemon_.on("GET " + target,
               Canned{status, R"({"error":{"message":"no, because","code":"reason"}})"});
    const Ran ran = dsctl({"version", "show", std::to_string(status)});
    EXPECT_EQ(ran.exit, exit) << status;
    EXPECT_EQ(ran.out, "") << status;
    EXPECT_THAT(ran.err, StartsWith("dsctl: no, because\nhint: ")) << status;
    EXPECT_EQ(std::count(ran.err.begin(), ran.err.end(), '\n'), 2) << ran.err;
  }
}

TEST_F(CtlErrors, JsonErrorsCarryTheDaemonsCode) {
  daemon_.on("GET /ds/v1/learn",
             Canned{409, R"({"error":{"message":"busy here","code":"round_open"}})"});
  const Ran ran = dsctl({"learn", "status", "-o", "json"});
  EXPECT_EQ(ran.exit, 4);
  EXPECT_EQ(ran.err, "");
  const auto error = parse_json(ran.out);
  ASSERT_TRUE(error.ok()) << ran.out;
  EXPECT_EQ((*error)["error"]["code"], "round_open");
  EXPECT_EQ((*error)["error"]["message"], "busy here");
  EXPECT_FALSE((*error)["error"]["hint"].get<std::string>().empty());
}

TEST_F(CtlErrors, WrongUsageIsTwo) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{},
                                             {"frobnicate"},
                                             {"version"},
                                             {"version", "frobnicate"},
                                             {"status", "--no-such-flag"},
                                             {"feedback", "push"},
                                             {"feedback", "push", "f", "--correct", "a", "b"},
                                             {"learn", "step", "extra"},
                                             {"-o", "yaml", "status"},
                                             {"--timeout", "-1", "status"},
                                             {"model", "new", "digits"},
                                             {"model", "new", "digits", "--mlp", "784,x"},
                                             {"config", "set", "learn.settle"},
                                             {"metrics", "--grep", "("}}) {
    const Ran ran = dsctl(arguments);
    EXPECT_EQ(ran.exit, 2) << testing::PrintToString(arguments);
    EXPECT_THAT(ran.err, testing::AllOf(StartsWith("dsctl: "), HasSubstr("\nhint: ")))
        << testing::PrintToString(arguments);
  }
  EXPECT_THAT(dsctl({"frobnicate"}).err, StartsWith("dsctl: frobnicate: no such command"));
}

TEST(CtlUnreachable, NoDaemonIsFive) {
  const ScratchFolder run;
  const Ran ran = run_dsctl({"--run", run.path(), "status"});
  EXPECT_EQ(ran.exit, 5);
  EXPECT_THAT(ran.err, HasSubstr(run.path() + "/control.sock"));
  EXPECT_THAT(ran.err, HasSubstr("\nhint: start it with dsd"));
}

TEST(CtlUnreachable, TheRunFolderIsFoundInOrder) {
  const ScratchFolder runtime, named;
  std::filesystem::create_directory(runtime.path() + "/driftstone");
  const std::vector<std::string> both = {"XDG_RUNTIME_DIR=" + runtime.path(),
                                         "DS_RUN_DIR=" + named.path()};
  EXPECT_THAT(run_dsctl({"status"}, "", both).err, HasSubstr(named.path() + "/control.sock"));
  EXPECT_THAT(run_dsctl({"status"}, "", {both[0]}).err,
              HasSubstr(runtime.path() + "/driftstone/control.sock"));
  EXPECT_THAT(run_dsctl({"--run", "/x", "status"}, "", both).err, HasSubstr("/x/control.sock"));
}

TEST_F(CtlErrors, TimeoutIsSeven) {
  Canned hang;
  hang.hang = true;
  daemon_.on("GET /ds/v1/status", hang);
  const Ran ran = dsctl({"--timeout", "0.05", "status"});
  EXPECT_EQ(ran.exit, 7);
  EXPECT_THAT(ran.err, HasSubstr("--timeout"));
}

TEST_F(CtlErrors, OutcomesOfARoundDecideTheExitCode) {
  for (const auto& [outcome, exit] : std::vector<std::pair<std::string, int>>{
           {"published", 0}, {"empty", 0}, {"held", 8}, {"dropped", 4}, {"failed", 1}}) {
    const ScratchFolder run;
    FakeControl daemon(run.path());
    daemon.on("POST /ds/v1/learn/step",
              R"({"round":1,"outcome":")" + outcome + R"(","reason":"r"})");
    EXPECT_EQ(run_dsctl({"--run", run.path(), "learn", "step"}).exit, exit) << outcome;
    EXPECT_THAT(daemon.requests(), Contains(R"(POST /ds/v1/learn/step {"wait":true})"));
  }
}

TEST_F(CtlErrors, DamageIsEight) {
  daemon_.on("POST /ds/v1/replay/verify",
             Canned{500, R"({"error":{"message":"log 17: checksum","code":"corrupt"}})"});
  const Ran ran = dsctl({"replay", "verify"});
  EXPECT_EQ(ran.exit, 8);
  EXPECT_THAT(ran.err, HasSubstr("log 17: checksum"));
}

TEST_F(CtlErrors, DegradedStatusIsEightWhenAsked) {
  daemon_.on("GET /ds/v1/status", R"({"learning":{"state":"paused","enabled":true}})");
  EXPECT_EQ(dsctl({"status"}).exit, 0);
  const Ran ran = dsctl({"status", "--exit-code"});
  EXPECT_EQ(ran.exit, 8);
  EXPECT_THAT(ran.out, HasSubstr("degraded: learning paused"));
}

TEST_F(CtlErrors, AskSendsWhatItWasTold) {
  daemon_.on("POST /v1/chat/completions",
             R"({"id":"chatcmpl-7","system_fingerprint":"ds-v3-aabbccdd","choices":[{"message":
{"role":"assistant","content":"Yes."},"finish_reason":"stop"}],"usage":{"completion_tokens":2}})");
  const Ran ran = dsctl({"ask", "-", "-m", "v3", "--system", "Be short.", "--max-tokens", "8",
                         "--temperature", "0.5", "--seed", "7", "-o", "json"},
                        "Is it?");
  ASSERT_EQ(ran.exit, 0) << ran.out;
  EXPECT_THAT(
      daemon_.requests(),
      Contains(R"(POST /v1/chat/completions {"max_tokens":8,"messages":[{"content":"Be short.",)"
               R"("role":"system"},{"content":"Is it?","role":"user"}],"model":"v3","seed":7,)"
               R"("temperature":0.5})"));
  const auto answer = parse_json(ran.out);
  ASSERT_TRUE(answer.ok());
  EXPECT_EQ((*answer)["text"], "Yes.");
  EXPECT_EQ((*answer)["version"], "v3");
  EXPECT_EQ((*answer)["schema"], "ds.Answer/1");
}

TEST_F(CtlErrors, AskPrintsStatisticsAside) {
  daemon_.on(
      "POST /v1/chat/completions",
      Canned{200,
             "data: "
             "{\"id\":\"chatcmpl-7\",\"system_fingerprint\":\"ds-v3-aabbccdd\",\"choices\":[{"
             "\"delta\":"
             "{\"content\":\"Yes\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":20,"
             "\"completion_tokens\":5}}\n\ndata: [DONE]\n\n",
             "text/event-stream"});
  const Ran ran = dsctl({"ask", "Is it?", "--stats"});
  EXPECT_EQ(ran.exit, 0);
  EXPECT_EQ(ran.out, "Yes\n");
  EXPECT_THAT(ran.err, testing::MatchesRegex(
                           "5 tokens in .*tokens/s, first after .*, prompt 20, v3, chatcmpl-7\n"));
}

TEST_F(CtlErrors, AnAnswerCutShortIsAnError) {
  daemon_.on("POST /v1/chat/completions",
             Canned{200, "data: {\"choices\":[{\"delta\":{\"content\":\"Ye\"}}]}\n\n",
                    "text/event-stream"});
  const Ran ran = dsctl({"ask", "Is it?"});
  EXPECT_EQ(ran.exit, 5);
  EXPECT_THAT(ran.err, HasSubstr("ended before it was complete"));
}

TEST_F(CtlErrors, PushRetriesWhatWasBusyAndKeepsLineNumbers) {
  daemon_.on(
      "POST /ds/v1/feedback",
      R"({"items":[{"id":"fb_a","state":"stored"},{"error":{"code":"busy","message":"full"}}]})");
  daemon_.on("POST /ds/v1/feedback", Canned{429, R"({"error":{"message":"full","code":"busy"}})"});
  daemon_.on("POST /ds/v1/feedback",
             R"({"items":[{"error":{"code":"bad_record","message":"odd"}}]})");
  const Ran ran = dsctl({"feedback", "push", "-"}, "{\"text\":\"one\"}\n\n{\"text\":\"two\"}\n");
  EXPECT_EQ(ran.exit, 1);
  EXPECT_EQ(ran.out, "stored 1, duplicate 0, refused 1\nfb_a\n");
  EXPECT_EQ(ran.err, "line 3: odd\n");
  EXPECT_EQ(daemon_.requests().size(), 3u);
}

TEST_F(CtlErrors, PushSendsBatches) {
  std::string lines, acks;
  for (int i = 0; i < 64; ++i) {
    lines += "{\"text\":\"line " + std::to_string(i) + "\"}\n";
    acks += (i ? "," : "") + std::string(R"({"id":"fb_x","state":"stored"})");
  }
  daemon_.on("POST /ds/v1/feedback", R"({"items":[)" + acks + "]}");
  const Ran ran = dsctl({"feedback", "push", "-"}, lines + lines + lines);
  EXPECT_EQ(ran.out, "stored 192, duplicate 0, refused 0\n");
  EXPECT_EQ(daemon_.requests().size(), 3u);
}

TEST_F(CtlErrors, PushOfNoFileIsThree) {
  EXPECT_EQ(dsctl({"feedback", "push", run_.path() + "/none"}).exit, 3);
  EXPECT_TRUE(daemon_.requests().empty());
}

TEST_F(CtlErrors, CorrectionsCiteTheResponse) {
  daemon_.on("POST /ds/v1/feedback",
             R"({"id":"fb_a","offset":1,"state":"stored","duplicate":false})");
  EXPECT_EQ(dsctl({"feedback", "push", "--correct", "chatcmpl-7", "On Monday."}).out,
            "stored fb_a\n");
  EXPECT_THAT(
      daemon_.requests(),
      Contains(
          R"(POST /ds/v1/feedback {"correction":"On Monday.",)"
          R"("kind":"correction","response_id":"chatcmpl-7"})"));
}

TEST_F(CtlErrors, RemovalNeedsAYes) {
  EXPECT_EQ(dsctl({"feedback", "rm", "fb_a"}).exit, 2);
  EXPECT_TRUE(daemon_.requests().empty());
}

TEST_F(CtlErrors, CtrlCIsOneHundredAndThirty) {
  Canned hang;
  hang.hang = true;
  daemon_.on("GET /ds/v1/events", hang);
  Terminal terminal({"--run", run_.path(), "events", "-f"});
  while (daemon_.requests().empty()) std::this_thread::yield();
  terminal.type("\x03");
  EXPECT_EQ(terminal.finish(), 130);
}

TEST_F(CtlErrors, NamesAreEncodedInPaths) {
  dsctl({"feedback", "show", "a/../b?c"});
  EXPECT_THAT(daemon_.requests(), Contains("GET /ds/v1/feedback/a%2F..%2Fb%3Fc"));
}

TEST_F(CtlErrors, QueriesReachTheDaemon) {
  dsctl({"feedback", "ls", "--state", "held", "--kind", "text", "--source", "a b", "--limit", "5",
         "--after", "9", "--oldest"});
  EXPECT_THAT(daemon_.requests(),
              Contains("GET /ds/v1/feedback?limit=5&state=held&source=a%20b&kind=text&after=9"));
  dsctl({"version", "rollback", "--to", "3", "--reason", "worse"});
  EXPECT_THAT(daemon_.requests(),
              Contains(R"(POST /ds/v1/versions/rollback {"reason":"worse","to":"v3"})"));
  dsctl({"model", "new", "digits", "--mlp", "4,3,2"});
  EXPECT_THAT(daemon_.requests(),
              Contains(R"(POST /ds/v1/models {"mlp":[4,3,2],"name":"digits"})"));
}

}  // namespace
}  // namespace ds::test
