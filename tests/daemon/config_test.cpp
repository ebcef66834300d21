// SPDX-License-Identifier: Apache-2.0
#include "config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>

namespace ds {
namespace {

using testing::HasSubstr;

class ConfigTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/ds-config-XXXXXX";
    folder_ = mkdtemp(name);
    path_ = folder_ + "/dsd.toml";
  }
  void TearDown() override {
    std::remove(path_.c_str());
    std::remove(folder_.c_str());
  }
  Status load(const std::string& toml) {
    std::ofstream(path_) << toml;
    return config_.load_toml(path_);
  }
  std::string origin(const std::string& name) const {
    for (const Json& item : config_.show()) {
      if (item["name"] == name) return item["origin"];
    }
    return "";
  }
  std::string folder_, path_;
  Config config_;
};

TEST_F(ConfigTest, EveryDefaultIsValidAndNamesAreUnique) {
  std::set<std::string> names;
  for (const Setting& setting : settings()) {
    EXPECT_TRUE(names.insert(setting.name).second) << setting.name;
    EXPECT_TRUE(config_.set(setting.name, setting.fallback, "flag").ok()) << setting.name;
    EXPECT_GT(std::string(setting.help).size(), 8u) << setting.name;
  }
  EXPECT_EQ(config_.show().size(), settings().size());
}

TEST_F(ConfigTest, DefaultsAreAsDocumented) {
  EXPECT_TRUE(config_.flag("learn.enabled"));
  EXPECT_EQ(config_.text("learn.method"), "lora");
  EXPECT_EQ(config_.integer("learn.settle"), 2000);
  EXPECT_EQ(config_.integer("learn.max_wait"), 30000);
  EXPECT_EQ(config_.number("learn.min_share"), 0.5);
  EXPECT_EQ(config_.number("gate.max_kl"), 0.10);
  EXPECT_EQ(config_.integer("trace.ttl"), 7LL * 86400000);
  EXPECT_EQ(config_.integer("trace.max"), 256 << 20);
  EXPECT_EQ(config_.text("data.endpoint"), "");
  EXPECT_EQ(config_.number("learn.rank"), 8);
}

TEST_F(ConfigTest, ReadsTomlTablesDottedKeysAndLists) {
  ASSERT_TRUE(load("serve.context = 512\n"
                   "[learn]\n"
                   "settle = \"250ms\"\n"
                   "min_share = 0\n"
                   "lr = 1e-3\n"
                   "[limits]\n"
                   "max_body = \"1.5MiB\"\n"
                   "max_record = 65536\n"
                   "[auth]\n"
                   "origins = [\"a.example\", \"b.example\"]\n")
                  .ok());
  EXPECT_EQ(config_.integer("serve.context"), 512);
  EXPECT_EQ(config_.integer("learn.settle"), 250);
  EXPECT_EQ(config_.number("learn.min_share"), 0.0);
  EXPECT_EQ(config_.number("learn.lr"), 0.001);
  EXPECT_EQ(config_.integer("limits.max_body"), 3 << 19);
  EXPECT_EQ(config_.integer("limits.max_record"), 65536);
  EXPECT_EQ(config_.text("auth.origins"), "a.example,b.example");
  EXPECT_EQ(origin("learn.settle"), path_ + ":3");
  EXPECT_EQ(origin("learn.rank"), "default");
}

TEST_F(ConfigTest, UnknownKeyNamesTheNearestOneAndTheLine) {
  const Status status = load("[learn]\nrank = 4\nmin_itmes = 2\n");
  EXPECT_EQ(status.code(), Code::kInvalid);
  EXPECT_THAT(status.message(), HasSubstr(path_ + ":3: unknown setting learn.min_itmes"));
  EXPECT_THAT(status.message(), HasSubstr("learn.min_items"));
  EXPECT_EQ(config_.integer("learn.rank"), 8) << "a file with an error changes nothing";
}

TEST_F(ConfigTest, ErrorsSayGotAndExpected) {
  const std::pair<const char*, const char*> cases[] = {
      {"[learn]\nrank = 17\n", ":2: learn.rank: got 17, expected 1 to 16"},
      {"[learn]\nrank = 2.5\n",
       ":2: learn.rank: got a number with a fraction, expected an integer"},
      {"[learn]\nenabled = 1\n", "learn.enabled: got an integer, expected true or false"},
      {"[learn]\nenabled = \"yes\"\n", "got the string \"yes\", expected true or false"},
      {"[learn]\nsettle = 3\n", "learn.settle: got \"3\", expected a duration like 250ms"},
      {"[learn]\nsettle = \"8 days\"\n", "got \"8 days\", expected a duration"},
      {"[learn]\nmethod = \"qlora\"\n", "learn.method: got qlora, expected lora, full"},
      {"[trace]\nmax = \"1kb\"\n", "trace.max: got \"1kb\", expected a size"},
      {"[trace]\nmax = \"1B\"\n", "trace.max: got 1B, expected 1MiB to"},
      {"[gate]\nmax_kl = nan\n", "gate.max_kl"},
      {"[learn]\nrank = 1979-05-27\n", "got a date or time, expected an integer"},
      {"learn = 3\n", "unknown setting learn, the nearest known one is"},
      {"[learn\n", ":1: "},
  };
  for (const auto& [toml, message] : cases) {
    const Status status = load(toml);
    EXPECT_EQ(status.code(), Code::kInvalid) << toml;
    EXPECT_THAT(status.message(), HasSubstr(message)) << toml;
  }
}

TEST_F(ConfigTest, MissingFileIsNotFound) {
  EXPECT_EQ(config_.load_toml(folder_ + "/none.toml").code(), Code::kNotFound);
}

TEST_F(ConfigTest, FlagBeatsEnvironmentBeatsFileInAnyOrder) {
  std::string context = "DS_SERVE_CONTEXT=256", rank = "DS_LEARN_RANK=4";
  char* environment[] = {context.data(), rank.data(), nullptr};
  ASSERT_TRUE(config_.set("serve.context", "128", "flag").ok());
  ASSERT_TRUE(config_.load_environment(environment).ok());
  ASSERT_TRUE(load("[serve]\ncontext = 1024\n[learn]\nrank = 2\nseed = 7\n").ok());
  EXPECT_EQ(config_.integer("serve.context"), 128);
  EXPECT_EQ(config_.integer("learn.rank"), 4);
  EXPECT_EQ(config_.integer("learn.seed"), 7);
  EXPECT_EQ(origin("serve.context"), "flag");
  EXPECT_EQ(origin("learn.rank"), "env DS_LEARN_RANK");
}

TEST_F(ConfigTest, EnvironmentRefusesUnknownNamesOfKnownSectionsOnly) {
  std::string strange = "DS_LEARN_ELAN=1";
  char* refused[] = {strange.data(), nullptr};
  const Status status = config_.load_environment(refused);
  EXPECT_EQ(status.code(), Code::kInvalid);
  EXPECT_THAT(status.message(), HasSubstr("DS_LEARN_ELAN: unknown setting learn.elan"));

  std::string run = "DS_RUN_DIR=/x", model = "DS_MODEL=/y", other = "PATH=/bin", bare = "DS_";
  char* accepted[] = {run.data(), model.data(), other.data(), bare.data(), nullptr};
  EXPECT_TRUE(config_.load_environment(accepted).ok());
}

TEST_F(ConfigTest, LiveChangesRunListenersAndOthersAreRefused) {
  int calls = 0;
  config_.on_change("learn.settle", [&] { ++calls; });
  ASSERT_TRUE(config_.set_live("learn.settle", "5s").ok());
  EXPECT_EQ(config_.integer("learn.settle"), 5000);
  EXPECT_EQ(origin("learn.settle"), "live");
  EXPECT_EQ(calls, 1);

  EXPECT_EQ(config_.set_live("learn.settle", "soon").code(), Code::kInvalid);
  EXPECT_EQ(calls, 1);
  const Status status = config_.set_live("learn.rank", "4");
  EXPECT_EQ(status.code(), Code::kConflict);
  EXPECT_THAT(status.message(), HasSubstr("--set learn.rank=4"));
  EXPECT_EQ(config_.integer("learn.rank"), 8);
  EXPECT_EQ(config_.set_live("learn.nothing", "4").code(), Code::kInvalid);
}

TEST_F(ConfigTest, LiveChangeBeatsAFlag) {
  ASSERT_TRUE(config_.set("learn.settle", "1s", "flag").ok());
  ASSERT_TRUE(config_.set_live("learn.settle", "5s").ok());
  EXPECT_EQ(config_.integer("learn.settle"), 5000);
}

TEST_F(ConfigTest, NearestSettingFindsSlips) {
  EXPECT_EQ(nearest_setting("learn.min_item"), "learn.min_items");
  EXPECT_EQ(nearest_setting("gate.maxdrop"), "gate.max_drop");
  EXPECT_EQ(nearest_setting("serve.contxt"), "serve.context");
}

TEST_F(ConfigTest, DurationsAndSizes) {
  EXPECT_EQ(*parse_duration_ms("7d"), 7LL * 86400000);
  EXPECT_EQ(*parse_duration_ms("1.5h"), 5400000);
  EXPECT_EQ(*parse_duration_ms("0"), 0);
  for (const char* bad : {"", "5", "s", "-1s", "1e3s", "1s ", "99999999999999d", "1.2.3s", "nan"}) {
    EXPECT_FALSE(parse_duration_ms(bad).ok()) << bad;
  }
  EXPECT_EQ(*parse_bytes("2GiB"), 2LL << 30);
  EXPECT_EQ(*parse_bytes("12"), 12);
  for (const char* bad : {"", "MiB", "-1", "1MB", "99999999TiB"}) {
    EXPECT_FALSE(parse_bytes(bad).ok()) << bad;
  }
}

TEST_F(ConfigTest, TheTableHasEverySetting) {
  const std::string table = settings_markdown();
  for (const Setting& setting : settings()) EXPECT_THAT(table, HasSubstr(setting.name));
  EXPECT_THAT(table, HasSubstr("| `learn.rank` | `8` | 1 to 16 | restart |"));
}

TEST(ConfigDeathTest, AskingForAnotherTypeIsABug) {
  const Config config;
  EXPECT_DEATH(config.integer("learn.method"), "check failed");
  EXPECT_DEATH(config.flag("no.such"), "check failed");
}

}  // namespace
}  // namespace ds
