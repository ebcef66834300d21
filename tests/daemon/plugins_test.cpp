// SPDX-License-Identifier: Apache-2.0
// The plugin host on real files: what it loads, generations, configs. What it refuses is in
// hostile_plugin_files_test.cpp.
#include "plugin/plugins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "engine/attention.h"
#include "storage/signature.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

const std::string kModules = std::string(DS_BIN_DIR) + "/../modules";
const std::string kProbe = DS_PROBE_PLUGIN;  // its constructor writes the file $DS_PROBE_MARK

class PluginsTest : public testing::Test {
 protected:
  void SetUp() override {
    mark_ = folder_.path() + "/constructor_ran";
    setenv("DS_PROBE_MARK", mark_.c_str(), 1);
    open(kModules);
  }
  void open(const std::string& modules, Json config = Json::object()) {
    plugins_.reset();
    auto opened = Plugins::open({modules, folder_.path() + "/plugins", std::move(config)}, {},
                                posix_file_system(), system_clock_seam());
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    plugins_ = std::move(*opened);
  }
  /// A copy of the probe that may be damaged.
  std::string copy(const std::string& name = "probe.so") {
    const std::string to = folder_.path() + "/" + name;
    fs::copy_file(kProbe, to, fs::copy_options::overwrite_existing);
    fs::permissions(to, fs::perms::owner_all);
    return to;
  }
  std::string refusal(const std::string& path, bool trust = true) {
    const auto loaded = plugins_->load(path, trust, Json());
    return loaded.ok() ? "loaded" : loaded.status().message();
  }
  bool constructor_ran() const { return fs::exists(mark_); }

  ScratchFolder folder_;
  std::string mark_;
  std::unique_ptr<Plugins> plugins_;
};

TEST_F(PluginsTest, FindsTheBuiltInModulesByName) {
  const auto found = plugins_->find(DS_KIND_ATTENTION, "dense");
  ASSERT_TRUE(found.ok()) << found.status().message();
  EXPECT_EQ(found->instance->name(), "dense");
  EXPECT_EQ(found->generation, 1u);
  EXPECT_TRUE(plugins_->list()["refused"].empty()) << dump_json(plugins_->list()["refused"]);

  const auto unknown = plugins_->find(DS_KIND_ATTENTION, "flash");
  ASSERT_FALSE(unknown.ok());
  EXPECT_THAT(unknown.status().message(), HasSubstr("attention \"flash\": no such plugin"));
  EXPECT_THAT(unknown.status().message(), HasSubstr("dense"));
}

TEST_F(PluginsTest, LoadsNothingThatNobodyTrusts) {
  const std::string file = copy();
  EXPECT_THAT(refusal(file, false), HasSubstr("is not allowed and the file has no signature"));
  EXPECT_FALSE(constructor_ran());
  EXPECT_EQ(refusal(file, true), "loaded");
  EXPECT_TRUE(constructor_ran());  // the probe works: what follows is meaningful
  EXPECT_EQ(refusal(file, false), "loaded") << "trusted once, its hash is trusted";
  open(kModules);
  EXPECT_TRUE(plugins_->find(DS_KIND_TOOL, "probe").ok()) << "installed: there after a restart";
}

TEST_F(PluginsTest, AcceptsASignatureOfATrustedKey) {
  const std::string file = copy();
  const auto mine = make_ed25519();
  ASSERT_TRUE(mine.ok());
  fs::create_directories(folder_.path() + "/plugins/keys");
  std::ofstream(folder_.path() + "/plugins/keys/release.pem") << mine->public_pem;
  const auto bytes = posix_file_system().read(file);
  std::ofstream(file + ".sig", std::ios::binary) << *sign_ed25519(mine->private_pem, *bytes);
  open(kModules);
  EXPECT_EQ(refusal(file, false), "loaded");
  const auto shown = plugins_->show("probe");
  ASSERT_TRUE(shown.ok());
  EXPECT_EQ((*shown)["trusted_by"], "signature of key release");
}

TEST_F(PluginsTest, AStickyFolderIsAsGoodAsTmp) {
  const std::string shared = folder_.path() + "/shared";
  fs::create_directory(shared);
  const std::string inside = copy("shared/probe.so");
  chmod(shared.c_str(), 01777);
  EXPECT_EQ(refusal(inside), "loaded");
  EXPECT_THAT(refusal(folder_.path() + "/none.so"), HasSubstr("no such file"));
}

TEST_F(PluginsTest, ConfigIsHeldToTheSchema) {
  const std::string file = copy();
  const auto load = [&](const Json& config) {
    const auto loaded = plugins_->load(file, true, config);
    if (!loaded.ok()) return loaded.status().message();
    const auto found = plugins_->find(DS_KIND_TOOL, "probe");
    return found.ok() ? std::string("made") : found.status().message();
  };
  EXPECT_THAT(load({{"sise", 3}}), HasSubstr("sise"));
  open(kModules);
  EXPECT_THAT(load({{"size", "big"}}), HasSubstr("config"));
  open(kModules);
  EXPECT_EQ(load({{"size", 3}}), "made");
  EXPECT_EQ((*plugins_->show("probe"))["config"]["word"], "hello") << "the schema's default";

  const auto live = plugins_->configure("probe", {{"word", "bye"}});
  ASSERT_TRUE(live.ok()) << live.status().message();
  EXPECT_EQ((*live)["config"]["word"], "bye");
  const auto fixed = plugins_->configure("probe", {{"size", 4}});
  ASSERT_FALSE(fixed.ok());
  EXPECT_THAT(fixed.status().message(), HasSubstr("size cannot change while it runs"));
}

TEST_F(PluginsTest, AGenerationReplacesTheOneBeforeAndBack) {
  const std::string file = copy();
  ASSERT_EQ(refusal(file), "loaded");
  auto first = plugins_->find(DS_KIND_TOOL, "probe");
  ASSERT_TRUE(first.ok());
  std::vector<uint64_t> swaps;
  plugins_->on_swap([&](uint32_t, const std::string& name, const Plugins::Serving& next) {
    EXPECT_EQ(name, "probe");
    swaps.push_back(next.generation);
  });
  const auto text = [](const PluginInstance& p) {
    const auto state = p.save();
    return state.ok() ? *state : state.status().message();
  };
  ASSERT_TRUE(std::const_pointer_cast<PluginInstance>(first->instance)
                  ->restore("remembered", "1.0.0")
                  .ok());
  const auto reloaded = plugins_->reload("probe", "", Json());
  ASSERT_TRUE(reloaded.ok()) << reloaded.status().message();
  const auto second = plugins_->find(DS_KIND_TOOL, "probe");
  EXPECT_EQ(second->generation, 2u);
  EXPECT_NE(second->instance, first->instance);
  EXPECT_EQ(text(*second->instance), "remembered") << "state is handed over";
  EXPECT_EQ((*plugins_->show("probe"))["generations"][0]["state"], "draining");
  first = Plugins::Serving{};
  EXPECT_EQ((*plugins_->show("probe"))["generations"][0]["state"], "kept");

  ASSERT_TRUE(plugins_->rollback("probe").ok());
  EXPECT_EQ(plugins_->find(DS_KIND_TOOL, "probe")->generation, 1u);
  ASSERT_TRUE(plugins_->retire("probe").ok());
  EXPECT_FALSE(plugins_->rollback("probe").ok()) << "nothing is left to go back to";
  EXPECT_EQ(swaps, (std::vector<uint64_t>{2, 1}));

  // A file that cannot serve leaves the one that does alone.
  std::ofstream(file, std::ios::binary | std::ios::trunc) << "no plugin";
  EXPECT_FALSE(plugins_->reload("probe", "", Json()).ok());
  EXPECT_EQ(plugins_->find(DS_KIND_TOOL, "probe")->generation, 1u);
}

TEST_F(PluginsTest, ExplainsStepByStepWithoutRunningAnything) {
  const Json unknown = plugins_->explain(copy());
  EXPECT_EQ(unknown["loads"], false);
  EXPECT_EQ(unknown["steps"][0]["ok"], true);
  EXPECT_THAT(unknown["steps"][1]["text"].get<std::string>(), HasSubstr("org.driftstone.probe"));
  EXPECT_EQ(unknown["steps"][2]["step"], "trust");
  EXPECT_EQ(unknown["steps"][2]["ok"], false);
  EXPECT_FALSE(constructor_ran());
}

}  // namespace
}  // namespace ds
