// SPDX-License-Identifier: Apache-2.0
// When the rounds of task models open: the rule is the language model's, the time is the test's.
#include "learn/task_models.h"

#include <gtest/gtest.h>

#include "reference_model.h"
#include "tests/storage/scratch_folder.h"
#include "tests/storage/test_seams.h"

namespace ds {
namespace {

class TaskModelsTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const auto& [name, value] : {std::pair{"learn.min_items", "3"},
                                      {"learn.settle", "2s"},
                                      {"learn.max_wait", "30s"},
                                      {"gate.max_drop", "10"}})
      ASSERT_TRUE(config_.set(name, value, "test").ok());
    ReplayStore::Options options;
    options.directory = folder_ / "replay";
    options.fs = &posix_file_system();
    options.clock = &clock_;
    auto store = ReplayStore::open(options);
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(*store);
    models_ = std::make_unique<TaskModels>(*store_, files_, config_, test::modules(), machine_.pool,
                                           *machine_.compute.ops, events_, clock_);
    ASSERT_TRUE(models_->create("signs", {4, 8, 2}).ok());
  }

  /// Label 1 where the first input is the greater one.
  void tell(const std::string& model = "signs") {
    const int label = static_cast<int>(++seq_ % 2);
    const Json record = {
        {"kind", "label"}, {"model", model}, {"input", {label, 1 - label, 0, 0}}, {"label", label}};
    const auto ack = store_->submit_and_wait({"teacher", 1, seq_, record, {}});
    ASSERT_TRUE(ack.ok()) << ack.status().message();
  }
  size_t trained() const { return store_->offsets_in_state("served").size(); }

  ScratchFolder folder_;
  HandClock clock_;
  test::Machine machine_;
  Config config_;
  EventBus events_{clock_};
  FillingDisk disk_;  // of the versions
  VersionStore files_{disk_, folder_.path()};
  std::unique_ptr<ReplayStore> store_;
  std::unique_ptr<TaskModels> models_;
  int64_t seq_ = 0;
};

TEST_F(TaskModelsTest, ARoundOpensOnceItsItemsHaveSettled) {
  EXPECT_EQ(models_->train(false), -1) << "nothing waits";
  tell();
  EXPECT_EQ(models_->train(false), 30'000) << "fewer than min_items: only max_wait opens it";
  clock_.now_ms = 1000;
  tell(), tell();
  EXPECT_EQ(models_->train(false), 2000) << "three wait, the last came just now";
  clock_.now_ms = 2500;
  tell();
  EXPECT_EQ(models_->train(false), 2000) << "a new one: the wait begins anew";
  clock_.now_ms = 4499;
  EXPECT_EQ(models_->train(false), 1);
  EXPECT_EQ(trained(), 0u);
  clock_.now_ms = 4500;
  EXPECT_EQ(models_->train(false), 0);
  EXPECT_EQ(trained(), 4u);
  EXPECT_EQ((*models_->infer("signs", {1, 0, 0, 0}))["version"], "signs@v2");
  EXPECT_EQ(models_->train(false), -1);
}

TEST_F(TaskModelsTest, MaxWaitOpensItWhateverArrives) {
  for (; clock_.now_ms < 30'000; clock_.now_ms += 1000) {
    tell();
    const int64_t wait_ms = models_->train(false);
    ASSERT_GT(wait_ms, 0) << clock_.now_ms;
    ASSERT_LE(wait_ms, 30'000 - clock_.now_ms);
  }
  EXPECT_EQ(models_->train(false), 0);
  EXPECT_EQ(trained(), 30u);
}

TEST_F(TaskModelsTest, ItOpensAtOnceWhenAskedTo) {
  tell();
  EXPECT_EQ(models_->train(true), 0);
  EXPECT_EQ(trained(), 1u);
  EXPECT_EQ(models_->train(true), -1);
}

TEST_F(TaskModelsTest, LabelsOfNoModelAreQuarantinedWithTheRound) {
  tell("nothing"), tell("nothing");
  EXPECT_EQ(models_->train(false), 30'000);
  clock_.now_ms = 30'000;
  EXPECT_EQ(models_->train(false), 0);
  EXPECT_EQ(store_->offsets_in_state("quarantined").size(), 2u);
  EXPECT_EQ(models_->train(false), -1);
}

TEST_F(TaskModelsTest, AFullDiskIsAskedAgainAfterMaxWait) {
  tell(), tell(), tell();
  clock_.now_ms = 2000;
  disk_.full = true;
  EXPECT_EQ(models_->train(false), 30'000);
  EXPECT_EQ(store_->offsets_in_state("stored").size(), 3u) << "they wait on";
  disk_.full = false;
  clock_.now_ms = 31'999;
  EXPECT_EQ(models_->train(false), 1);
  EXPECT_EQ(trained(), 0u);
  clock_.now_ms = 32'000;
  EXPECT_EQ(models_->train(false), 0);
  EXPECT_EQ(trained(), 3u);

  disk_.full = true;
  tell();
  EXPECT_EQ(models_->train(true), 30'000);
  disk_.full = false;
  EXPECT_EQ(models_->train(true), 0) << "a step does not wait";
}

TEST_F(TaskModelsTest, TheSettingsMayChangeMeanwhile) {
  tell();
  EXPECT_EQ(models_->train(false), 30'000);
  ASSERT_TRUE(config_.set_live("learn.min_items", "1").ok());
  EXPECT_EQ(models_->train(false), 2000);
  ASSERT_TRUE(config_.set_live("learn.settle", "0").ok());
  EXPECT_EQ(models_->train(false), 0);
}

}  // namespace
}  // namespace ds
