// SPDX-License-Identifier: Apache-2.0
// A plugin's tool over HTTP: the built-in cppcheck with a program of that name that the test wrote.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "plugin/plugins.h"
#include "serve_fixture.h"

namespace ds::test {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class ServeTools : public testing::Test {
 protected:
  ServeTools() {
    fs::create_directory(bin());
    setenv("PATH", (bin().string() + ":" + path_).c_str(), 1);  // looked at when a tool is made
    auto opened = Plugins::open(
        {std::string(DS_BIN_DIR) + "/../modules", folder_.path() + "/plugins", Json::object()}, {},
        posix_file_system(), system_clock_seam());
    DS_CHECK(opened.ok());
    plugins_ = std::move(*opened);
    served_ = std::make_unique<Served>(nullptr, plugins_.get());
  }
  ~ServeTools() override { setenv("PATH", path_.c_str(), 1); }
  fs::path bin() const { return folder_.path() + "/bin"; }
  /// What the program does; its report goes to standard error.
  void program(const std::string& script) {
    std::ofstream(bin() / "cppcheck") << "#!/bin/sh\n" << script;
    fs::permissions(bin() / "cppcheck", fs::perms::owner_all);
  }
  HttpAnswer find(const Json& body, const std::string& tool = "cppcheck") {
    return served_->tcp().post("/ds/v1/tools/" + tool, body);
  }

  const std::string path_ = std::getenv("PATH");
  ScratchFolder folder_;
  std::unique_ptr<Plugins> plugins_;
  std::unique_ptr<Served> served_;
};

const Json kBody = {{"language", "c"}, {"path", "a.c"}, {"text", "int x;\n"}};

TEST_F(ServeTools, AnswersWithFindings) {
  program(
      "cat >&2 <<'END'\n<results version=\"2\"><errors><error id=\"oops\" severity=\"error\" "
      "msg=\"bad &lt;x&gt;\"><location file=\"text.c\" line=\"1\" column=\"5\"/></error>"
      "</errors></results>\nEND\n");
  const HttpAnswer answer = find(kBody);
  ASSERT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(answer.json(), Json::parse(R"({"tool":"cppcheck","truncated":false,"findings":[
      {"path":"a.c","line":1,"column":5,"severity":"error","rule":"oops","message":"bad <x>",
       "confidence":1.0}]})"));
}

TEST_F(ServeTools, KeepsAtMostTenThousand) {
  program(
      "{ echo '<results version=\"2\"><errors>'; i=0; while [ $i -lt 10001 ]; do "
      "echo '<error id=\"i\" severity=\"style\" msg=\"m\"/>'; i=$((i+1)); done; "
      "echo '</errors></results>'; } >&2\n");
  const HttpAnswer answer = find(kBody);
  ASSERT_EQ(answer.status, 200) << answer.body.substr(0, 500);
  EXPECT_EQ(answer.json()["findings"].size(), 10'000u);
  EXPECT_EQ(answer.json()["findings"][0]["severity"], "note");
  EXPECT_EQ(answer.json()["truncated"], true);
}

TEST_F(ServeTools, SaysWhatIsWrong) {
  program("exit 3\n");
  const HttpAnswer failed = find(kBody);
  EXPECT_EQ(failed.status, 500);
  EXPECT_THAT(failed.error("message"), HasSubstr("exit status 3"));
  const HttpAnswer unknown = find(kBody, "lint");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_THAT(unknown.error("message"), HasSubstr("cppcheck"));
  const HttpAnswer language = find({{"language", "python"}, {"text", ""}});
  EXPECT_EQ(language.status, 501);
  EXPECT_THAT(language.error("message"), HasSubstr("\"python\", expected"));
  const HttpAnswer textless = find({{"language", "c"}});
  EXPECT_EQ(textless.status, 400);
  EXPECT_THAT(textless.error("message"), HasSubstr("text"));
  EXPECT_EQ(served_->tcp().get("/ds/v1/tools/cppcheck").status, 405);
}

std::string report_of(const char* id) {
  return std::string("cat >&2 <<'END'\n<results version=\"2\"><errors><error id=\"") + id +
         "\" severity=\"error\" msg=\"m\"/></errors></results>\nEND\n";
}

TEST_F(ServeTools, WhatItFoundIsWhatTheNextGenerationIsHeldTo) {
  program(report_of("first"));
  ASSERT_EQ(find(kBody).status, 200);
  const auto admin = [&](const char* verb, const Json& body) {
    return served_->unix_socket().post("/ds/v1/plugins/" + std::string(verb), body);
  };
  const HttpAnswer bench = admin("bench", {{"name", "cppcheck"}, {"seconds", 0.05}});
  ASSERT_EQ(bench.status, 200) << bench.body;
  EXPECT_EQ(bench.json()["calls"][0]["call"], "analyse");
  EXPECT_EQ(bench.json()["calls"][0]["size"], "7 bytes");
  EXPECT_EQ(admin("reload", {{"name", "cppcheck"}, {"shadow", "refuse"}}).status, 200);
  program(report_of("second"));
  const HttpAnswer refused = admin("reload", {{"name", "cppcheck"}, {"shadow", "refuse"}});
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_THAT(refused.error("message"), HasSubstr("1 finding is gone, 1 finding is new"));
  const HttpAnswer reported = admin("reload", {{"name", "cppcheck"}});
  ASSERT_EQ(reported.status, 200) << reported.body;
  EXPECT_EQ(reported.json()["generation"], 3);
  EXPECT_EQ(reported.json()["shadow"]["differing"], 1);
  const HttpAnswer diff = admin("diff", {{"a", "cppcheck"}});
  ASSERT_EQ(diff.status, 200) << diff.body;
  EXPECT_EQ(diff.json()["differing"], 0) << "both run the program as it is now";
  EXPECT_EQ(admin("reload", {{"name", "cppcheck"}, {"shadow", "maybe"}}).status, 400);
  EXPECT_EQ(served_->tcp().post("/ds/v1/plugins/bench", {{"name", "cppcheck"}}).status, 403);
}

/// A server that stops does not wait for a tool's own limit (30 s here).
TEST_F(ServeTools, AStoppingServerEndsTheTool) {
  const std::string mark = folder_.path() + "/started";
  program(": >" + mark + "; sleep 1000\n");
  std::thread caller([this] { find(kBody); });
  EXPECT_TRUE(eventually([&] { return fs::exists(mark); }));
  const auto begin = std::chrono::steady_clock::now();
  served_->server->stop(0);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(15));
  caller.join();
}

}  // namespace
}  // namespace ds::test
