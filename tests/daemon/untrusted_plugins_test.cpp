// SPDX-License-Identifier: Apache-2.0
// Files that nobody trusts, loaded with --isolated: they serve from helper processes, now and after
// a restart, and none of their code runs in this one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "plugin/plugins.h"
#include "plugin/tool_run.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class UntrustedPluginsTest : public testing::Test {
 protected:
  void SetUp() override {
    setenv("TMPDIR", folder_.path().c_str(), 1);
    open();
  }
  void TearDown() override { unsetenv("TMPDIR"); }
  /// As a daemon that starts does.
  void open(Json places = Json::object()) {
    plugins_.reset();
    PluginOptions with;
    fs::create_directories(folder_ / "modules");
    with.modules = folder_ / "modules";
    with.data = folder_ / "plugins";
    with.isolation.program = std::string(DS_BIN_DIR) + "/ds-plugin-helper";
    with.isolation.arena_bytes = 1 << 22;
    with.isolation.restart.first_wait_ns = 0;
    with.places = std::move(places);
    auto opened = Plugins::open(with, {}, posix_file_system(), system_clock_seam());
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    plugins_ = std::move(*opened);
  }
  std::string copy(const std::string& from, const std::string& name) {
    const std::string to = folder_ / name;
    fs::copy_file(from, to, fs::copy_options::overwrite_existing);
    fs::permissions(to, fs::perms::owner_all);
    return to;
  }
  std::string refusal(const std::string& path) {
    const auto loaded = plugins_->load_isolated(path, Json());
    return loaded.ok() ? "loaded" : loaded.status().message();
  }
  /// The one finding in a text, or why there is none.
  Json finding(const std::string& text = "x") {
    const auto found = plugins_->find(DS_KIND_TOOL, "untrusted");
    if (!found.ok()) return found.status().message();
    ToolRequest request;
    request.text = text;
    const auto answer = run_tool(*found->instance, request);
    if (!answer.ok()) return answer.status().message();
    if (found->instance->recorded().due(CallSort::kAnalyse))
      record_tool(*found->instance, request, *answer);
    return (*answer)["findings"][0];
  }
  Json shown() { return plugins_->show("untrusted").value(); }
  bool ran_here() const {
    std::ifstream in(folder_ / "constructed");
    for (pid_t pid = 0; in >> pid;) {
      if (pid == getpid()) return true;
    }
    return false;
  }

  ScratchFolder folder_;
  std::unique_ptr<Plugins> plugins_;
};

TEST_F(UntrustedPluginsTest, ServesFromAHelperNowAndAfterARestart) {
  const std::string file = copy(DS_UNTRUSTED_PLUGIN, "tool.so");
  EXPECT_THAT(plugins_->load(file, false, Json()).status().message(),
              HasSubstr("--isolated runs it in helper processes only"));
  const auto loaded = plugins_->load_isolated(file, Json{{"word", "river"}});
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ((*loaded)["trusted_by"], "nobody");
  EXPECT_EQ((*loaded)["components"][0]["isolated"], true);
  for (int start = 0; start < 2; ++start) {
    const Json found = finding();
    ASSERT_TRUE(found.is_object()) << found;
    EXPECT_EQ(found["message"], "river");
    EXPECT_EQ(shown()["pid"], found["line"]);
    EXPECT_NE(found["line"], getpid());
    EXPECT_EQ(shown()["isolated"], true);
    EXPECT_EQ(shown()["trusted_by"], "nobody");
    EXPECT_EQ(shown()["runs_in"], "process");
    EXPECT_EQ(shown()["config_schema"]["type"], "object");
    open();
    EXPECT_TRUE(plugins_->list()["refused"].empty()) << plugins_->list()["refused"];
  }
  EXPECT_FALSE(ran_here());
}

TEST_F(UntrustedPluginsTest, IsHeldToItsConfigSchemaAllTheSame) {
  const std::string file = copy(DS_UNTRUSTED_PLUGIN, "tool.so");
  ASSERT_EQ(refusal(file), "loaded");
  ASSERT_TRUE(finding().is_object());
  ASSERT_TRUE(plugins_->configure("untrusted", {{"word", "bye"}}).ok());
  EXPECT_EQ(finding()["message"], "bye");
  const auto wrong = plugins_->configure("untrusted", {{"word", "NO"}});
  ASSERT_FALSE(wrong.ok());
  EXPECT_THAT(wrong.status().message(), HasSubstr("config"));
  EXPECT_EQ(finding()["message"], "bye");
}

TEST_F(UntrustedPluginsTest, AFileThatEndsItsProcessIsRefusedAndTheOthersStay) {
  ASSERT_EQ(refusal(copy(DS_UNTRUSTED_PLUGIN, "tool.so")), "loaded");
  const std::string ends = copy(DS_UNTRUSTED_ENDS, "ends.so");
  EXPECT_EQ(refusal(ends), ends + ": its helper process died while it loaded it (signal 9)");
  EXPECT_TRUE(finding().is_object());
  open();
  EXPECT_TRUE(plugins_->list()["refused"].empty()) << plugins_->list()["refused"];
  EXPECT_TRUE(finding().is_object());
  EXPECT_FALSE(ran_here());
}

TEST_F(UntrustedPluginsTest, WhatCannotRunIsolatedIsRefusedByName) {
  const std::string modules = DS_MODULES_DIR;
  EXPECT_THAT(
      refusal(copy(modules + "/attention_dense.so", "attention.so")),
      HasSubstr("/attention.so: attention dense cannot run isolated: attention reads the cache"));
  EXPECT_THAT(refusal(copy(modules + "/learner_naive.so", "learner.so")),
              HasSubstr("learner naive cannot run isolated: a learner works on the weights"));
  EXPECT_THAT(refusal(copy(modules + "/encoder_text.so", "encoder.so")),
              HasSubstr("encoder text cannot run isolated: "));
  EXPECT_THAT(refusal(copy(DS_PROBE_PLUGIN, "probe.so")),
              HasSubstr("tool probe cannot run isolated: it does not say DS_CAP_OUT_OF_PROCESS"));
  EXPECT_TRUE(plugins_->list()["plugins"].empty());
  EXPECT_EQ(refusal(copy(modules + "/quantizer_int8.so", "quantizer.so")), "loaded");
  const auto found = plugins_->find(DS_KIND_QUANTIZER, "int8");
  ASSERT_TRUE(found.ok()) << found.status().message();
  EXPECT_EQ(found->instance->table<ds_quantizer>().linear, nullptr);
}

TEST_F(UntrustedPluginsTest, TheDaemonIsNoPlaceForIt) {
  const std::string file = copy(DS_UNTRUSTED_PLUGIN, "tool.so");
  open({{"untrusted", "daemon"}});
  const std::string why = "plugins.isolation says \"daemon\" for untrusted, but its file was";
  EXPECT_THAT(refusal(file), HasSubstr(why));
  open({{"untrusted", "process"}});
  ASSERT_EQ(refusal(file), "loaded");
  open({{"untrusted", "daemon"}});
  EXPECT_THAT(dump_json(plugins_->list()["refused"][0]["reason"]),
              HasSubstr("plugins.isolation says"));
  EXPECT_FALSE(plugins_->find(DS_KIND_TOOL, "untrusted").ok());
  EXPECT_FALSE(ran_here());
  const auto trusted = plugins_->load(file, true, Json());  // now it may
  ASSERT_TRUE(trusted.ok()) << trusted.status().message();
  EXPECT_EQ(finding()["line"], getpid());
  EXPECT_EQ(shown()["isolated"], false);
  EXPECT_TRUE(ran_here());  // what the other tests see is meaningful
}

TEST_F(UntrustedPluginsTest, OwnerAndModesCountAllTheSame) {
  const std::string file = copy(DS_UNTRUSTED_PLUGIN, "tool.so");
  chmod(file.c_str(), 0666);
  EXPECT_THAT(refusal(file), HasSubstr("mode 0666, group or others may write"));
  std::ofstream(file, std::ios::trunc) << "no plugin";
  chmod(file.c_str(), 0600);
  EXPECT_NE(refusal(file), "loaded");
}

TEST_F(UntrustedPluginsTest, ReloadsReplaysAndRollsBackInHelpers) {
  const std::string file = copy(DS_UNTRUSTED_PLUGIN, "tool.so");
  ASSERT_EQ(refusal(file), "loaded");
  const Json first = finding();
  ASSERT_TRUE(first.is_object()) << first;
  copy(DS_UNTRUSTED_NEXT, "tool.so");
  const auto reloaded = plugins_->reload("untrusted", "", Json(), Shadow::kReport);
  ASSERT_TRUE(reloaded.ok()) << reloaded.status().message();
  EXPECT_EQ((*reloaded)["version"], "1.1.0");
  EXPECT_EQ((*reloaded)["isolated"], true);
  EXPECT_EQ((*reloaded)["shadow"]["source"], "recorded") << *reloaded;
  EXPECT_NE(finding()["line"], first["line"]);
  const auto back = plugins_->rollback("untrusted");
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ((*back)["version"], "1.0.0");
  EXPECT_EQ(finding()["line"], first["line"]);
  ASSERT_TRUE(plugins_->retire("untrusted").ok());
  copy(DS_UNTRUSTED_ENDS, "tool.so");
  const auto broken = plugins_->reload("untrusted", "", Json());
  EXPECT_THAT(broken.status().message(), HasSubstr("died while it loaded it"));
  EXPECT_EQ(finding()["line"], first["line"]);
  open();
  EXPECT_TRUE(finding().is_object());
  EXPECT_EQ(shown()["version"], "1.1.0") << "the file that was loaded last";
  EXPECT_FALSE(ran_here());
}

TEST_F(UntrustedPluginsTest, ADeathIsCountedAndTheNextCallIsAnswered) {
  ASSERT_EQ(refusal(copy(DS_UNTRUSTED_PLUGIN, "tool.so")), "loaded");
  ASSERT_TRUE(finding().is_object());
  EXPECT_THAT(dump_json(finding("abort")), HasSubstr("died in the call (signal 6)"));
  EXPECT_TRUE(finding().is_object());
  EXPECT_EQ(shown()["deaths"], 1);
  for (int i = 0; i < 2; ++i) finding("abort");
  EXPECT_EQ(shown()["breaker"], "open");
}

TEST_F(UntrustedPluginsTest, ReachesNeitherTheDaemonNorTheKernel) {
  ASSERT_EQ(refusal(copy(DS_UNTRUSTED_PLUGIN, "tool.so")), "loaded");
  const Json found = finding("reach out");
  ASSERT_TRUE(found.is_object()) << found;
  EXPECT_EQ(found["message"], "nothing");
}

TEST_F(UntrustedPluginsTest, ExplainSaysThatItNeedsNoTrustIsolated) {
  const Json tool = plugins_->explain(copy(DS_UNTRUSTED_PLUGIN, "tool.so"));
  EXPECT_EQ(tool["loads"], false);
  EXPECT_EQ(tool["loads_isolated"], true);
  EXPECT_EQ(tool["steps"][3]["step"], "isolated");
  EXPECT_EQ(tool["steps"][3]["ok"], true);
  const Json attention =
      plugins_->explain(copy(std::string(DS_MODULES_DIR) + "/attention_dense.so", "attention.so"));
  EXPECT_EQ(attention["loads_isolated"], false);
  EXPECT_THAT(attention["steps"][3]["text"].get<std::string>(), HasSubstr("attention reads"));
}

}  // namespace
}  // namespace ds
