// SPDX-License-Identifier: Apache-2.0
// Faults planted one by one; doctor must find each, and nothing where nothing is wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "ctl/doctor.h"
#include "ctl_fixture.h"
#include "storage/hash.h"
#include "storage/model_file.h"
#include "storage/seams.h"

namespace ds::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

/// A TCP port on loopback that was free a moment ago; listening while `open`.
class Port {
 public:
  explicit Port(bool open) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (bind(fd_, reinterpret_cast<sockaddr*>(&address), size) != 0) std::abort();
    if (open && listen(fd_, 8) != 0) std::abort();  // bound without listening: refused
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    name_ = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  }
  ~Port() { close(fd_); }
  const std::string& name() const { return name_; }

 private:
  int fd_;
  std::string name_;
};

int dead_pid() {
  const int pid = fork();
  if (pid == 0) _exit(0);
  waitpid(pid, nullptr, 0);
  return pid;
}

class DoctorTest : public testing::Test {
 protected:
  /// The codes found, in order.
  std::vector<std::string> found(std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {"--run", run_.path(), "-o", "json", "doctor"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ran ran = run_dsctl(arguments, "", {"XDG_CONFIG_HOME=" + run_.path()});
    const auto document = parse_json(ran.out);
    std::vector<std::string> codes;
    if (!document.ok()) return {ran.out + ran.err};
    for (const Json& item : (*document)["items"]) {
      codes.push_back(item["code"]);
      EXPECT_GT(item["why"].get<std::string>().size(), 10u);
      EXPECT_GT(item["mend"].get<std::string>().size(), 10u);
    }
    EXPECT_EQ(ran.exit, codes.empty() ? 0 : 8);
    return codes;
  }

  void write_ready(int pid, const std::string& http) {
    std::ofstream(run_.path() + "/ready.json") << dump_json(Json{{"pid", pid}, {"http", http}});
  }

  /// A daemon with nothing wrong.
  void be_well(FakeControl& daemon) {
    daemon.on("GET /health", R"({"status":"ok"})");
    daemon.on("GET /ready", R"({"ready":true,"version":"v1"})");
    daemon.on("GET /ds/v1/status", R"({"learning":{"state":"idle","enabled":true,"queued":0}})");
    daemon.on("GET /ds/v1/versions", R"({"current":"v1","pinned":null,"items":[]})");
    daemon.on("GET /ds/v1/feedback", R"({"items":[]})");
  }

  ScratchFolder run_;
};

TEST_F(DoctorTest, FindsNothingWhenAllIsWell) {
  const Port http(true);
  write_ready(getpid(), http.name());
  FakeControl daemon(run_.path());
  be_well(daemon);
  EXPECT_THAT(found(), ElementsAre());
}

TEST_F(DoctorTest, NoRunFolder) {
  const Ran ran = run_dsctl({"--run", run_.path() + "/none", "doctor"});
  EXPECT_EQ(ran.exit, 8);
  EXPECT_THAT(ran.out, HasSubstr("run_dir_missing"));
  EXPECT_THAT(ran.out, HasSubstr("mend  start dsd with --run " + run_.path() + "/none"));
}

TEST_F(DoctorTest, RunFolderThatAnyoneMayWrite) {
  chmod(run_.path().c_str(), 0777);
  EXPECT_THAT(found(), ElementsAre("run_dir_open", "socket_missing"));
}

TEST_F(DoctorTest, ReadyFileOfADeadDaemon) {
  write_ready(dead_pid(), "");
  EXPECT_THAT(found(), ElementsAre("ready_stale", "socket_missing"));
}

TEST_F(DoctorTest, DamagedReadyFile) {
  std::ofstream(run_.path() + "/ready.json") << "{\"pid\":";
  EXPECT_THAT(found(), ElementsAre("ready_damaged", "socket_missing"));
}

TEST_F(DoctorTest, HttpPortThatDoesNotAnswer) {
  const Port closed(false);
  write_ready(getpid(), closed.name());
  FakeControl daemon(run_.path());
  be_well(daemon);
  EXPECT_THAT(found(), ElementsAre("http_unreachable"));
}

TEST_F(DoctorTest, SocketWithoutListener) {
  const std::string path = run_.path() + "/control.sock";
  { const FakeControl gone(run_.path()); }  // leaves its socket file, as a killed daemon does
  ASSERT_EQ(access(path.c_str(), F_OK), 0);
  EXPECT_THAT(found(), ElementsAre("socket_stale"));
}

TEST_F(DoctorTest, SocketOpenToEveryone) {
  FakeControl daemon(run_.path());
  be_well(daemon);
  chmod((run_.path() + "/control.sock").c_str(), 0777);
  EXPECT_THAT(found(), ElementsAre("socket_open"));
}

TEST_F(DoctorTest, DaemonThatDoesNotAnswer) {
  FakeControl daemon(run_.path());
  Canned nonsense;
  nonsense.raw = "220 hello\r\n\r\n";
  daemon.on("GET /health", nonsense);
  EXPECT_THAT(found(), ElementsAre("not_answering"));
}

TEST_F(DoctorTest, DaemonThatIsNotReady) {
  FakeControl daemon(run_.path());
  daemon.on("GET /ready", Canned{503, R"({"error":{"message":"loading"}})"});
  be_well(daemon);
  EXPECT_THAT(found(), ElementsAre("not_ready"));
}

TEST_F(DoctorTest, LearningPausedDisabledHeldQuarantinedPinned) {
  {
    FakeControl daemon(run_.path());
    daemon.on("GET /ds/v1/status", R"({"learning":{"state":"paused","enabled":true,"queued":4}})");
    daemon.on("GET /ds/v1/versions", R"({"current":"v1","pinned":"v1"})");
    daemon.on("GET /ds/v1/feedback?state=held&limit=1000", R"({"items":[{"id":"fb_a"}]})");
    daemon.on("GET /ds/v1/feedback?state=quarantined&limit=1000", R"({"items":[{"id":"fb_b"}]})");
    be_well(daemon);
    EXPECT_THAT(found(), ElementsAre("learning_paused", "version_pinned", "items_held",
                                     "items_quarantined"));
  }
  FakeControl daemon(run_.path());
  daemon.on("GET /ds/v1/status", R"({"learning":{"state":"idle","enabled":false}})");
  be_well(daemon);
  EXPECT_THAT(found(), ElementsAre("learning_disabled"));
}

TEST_F(DoctorTest, ConfigFileWithAnUnknownKey) {
  FakeControl daemon(run_.path());
  be_well(daemon);
  mkdir((run_.path() + "/driftstone").c_str(), 0700);
  const std::string file = run_.path() + "/driftstone/dsd.toml";
  std::ofstream(file) << "[learn]\nrnak = 4\n";
  EXPECT_THAT(found(), ElementsAre("config_invalid"));
  const Ran ran = run_dsctl({"--run", run_.path(), "doctor", "--config", file});
  EXPECT_THAT(
      ran.out,
      HasSubstr(file + ":2: unknown setting learn.rnak, the nearest known one is learn.rank"));
}

TEST_F(DoctorTest, DamagedStoreWhenAskedToLookDeep) {
  FakeControl daemon(run_.path());
  be_well(daemon);
  daemon.on("POST /ds/v1/replay/verify",
            Canned{500, R"({"error":{"message":"log 17: checksum"}})"});
  EXPECT_THAT(found(), ElementsAre());
  EXPECT_THAT(found({"--deep"}), ElementsAre("store_damaged"));
}

TEST_F(DoctorTest, MissingDataFolder) {
  FakeControl daemon(run_.path());
  be_well(daemon);
  EXPECT_THAT(found({"--data", run_.path() + "/none"}), ElementsAre("data_dir_missing"));
}

// The model file against what serves, and the daemon's clock against this one.
class DoctorStatusTest : public DoctorTest {
 protected:
  std::vector<std::string> found_with(const Json& status) {
    FakeControl daemon(run_.path());
    daemon.on("GET /ds/v1/status", dump_json(status));
    be_well(daemon);
    return found();
  }
  Json status_of(const std::string& path) {
    const auto digest = ModelFile::digest(path);
    EXPECT_TRUE(digest.ok()) << digest.status().message();
    return {{"model", {{"path", path}, {"sha256", digest.ok() ? *digest : ""}}}};
  }
};

TEST_F(DoctorStatusTest, ModelFileThatIsNotTheOneServed) {
  const std::string path = run_.path() + "/m.gguf";
  std::ofstream(path) << std::string(3'000'000, 'w');
  const Json status = status_of(path);
  EXPECT_EQ(status["model"]["sha256"], to_hex(sha256(std::string(3'000'000, 'w'))));
  EXPECT_THAT(found_with(status), ElementsAre());
  std::ofstream(path, std::ios::app) << "x";
  EXPECT_THAT(found_with(status), ElementsAre("model_changed"));
  std::remove(path.c_str());
  EXPECT_THAT(found_with(status), ElementsAre("model_missing"));
}

TEST_F(DoctorStatusTest, ModelFolderThatIsNotTheOneServed) {
  const std::string folder = run_.path() + "/model";
  mkdir(folder.c_str(), 0700);
  std::ofstream(folder + "/model.safetensors") << "weights";
  const Json status = status_of(folder);
  EXPECT_THAT(found_with(status), ElementsAre());
  std::ofstream(folder + "/model.safetensors") << "others";
  EXPECT_THAT(found_with(status), ElementsAre("model_changed"));
}

TEST_F(DoctorStatusTest, ClocksThatDisagree) {
  const int64_t now_ms = system_clock_seam().unix_ms();
  EXPECT_THAT(found_with({{"now_ms", now_ms}}), ElementsAre());
  EXPECT_THAT(found_with({{"now_ms", now_ms + 3'600'000}}), ElementsAre("clock_skew"));
  EXPECT_THAT(found_with({{"now_ms", now_ms - 3'600'000}}), ElementsAre("clock_skew"));
}

TEST(DoctorJudgement, ClocksMayDifferBySeconds) {
  EXPECT_FALSE(ctl::judge_clock(100'000, 104'000, 104'100));
  EXPECT_FALSE(ctl::judge_clock(109'000, 104'000, 104'100));
  const auto behind = ctl::judge_clock(100'000, 106'000, 106'000);
  ASSERT_TRUE(behind);
  EXPECT_THAT(behind->what, HasSubstr("6.0s behind"));
}

TEST(DoctorJudgement, DiskNearlyFull) {
  constexpr double kGiB = 1024.0 * 1024 * 1024;
  EXPECT_FALSE(ctl::judge_disk("/d", 50 * kGiB, 100 * kGiB));
  EXPECT_TRUE(ctl::judge_disk("/d", 4.9 * kGiB, 100 * kGiB)) << "below 5 %";
  EXPECT_TRUE(ctl::judge_disk("/d", 0.9 * kGiB, 2 * kGiB)) << "below 1 GiB";
  const auto finding = ctl::judge_disk("/d", 0, 100 * kGiB);
  ASSERT_TRUE(finding);
  EXPECT_EQ(finding->code, "disk_low");
  EXPECT_THAT(finding->what, HasSubstr("0 B free of 100 GiB"));
}

TEST(DoctorJudgement, MissingAnswersAreNoFindings) {
  const Json nothing = Json::object();
  EXPECT_TRUE(ctl::judge_daemon(nothing, nothing, nothing, nothing).empty());
}

}  // namespace
}  // namespace ds::test
