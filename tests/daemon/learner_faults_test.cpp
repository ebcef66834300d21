// SPDX-License-Identifier: Apache-2.0
// The learner on a device that has not enough memory, or fails: what people said waits, and is
// learned when it can be.
#include <gtest/gtest.h>

#include "faulty_device.h"
#include "learner_house.h"

namespace ds {
namespace {

using test::FaultyDevice;
using test::House;
using test::lesson;
using test::Settings;

/// Shared: the model lies in its memory.
FaultyDevice& device() {
  static FaultyDevice once;
  test::world();
  return once;
}

/// Rounds open when they are asked for alone.
Settings on_demand(Settings more = {}) {
  more["learn.enabled"] = "false";
  return more;
}

class LearnerFaults : public testing::Test {
 protected:
  void SetUp() override { device()->reset(); }
  void TearDown() override { device()->reset(); }
  DeviceState state{system_clock_seam()};
};

Json a_lesson(int n) {
  return lesson("Which gate does ferry " + std::to_string(n) + " leave from?",
                "Gate " + std::to_string(n + 40) + ".");
}

/// A lesson for every `stride`th allocation of a round, which is refused.
void refuse_in_turn(const Settings& settings, int64_t stride) {
  House house(on_demand(settings));
  for (int64_t n = 1;; n += stride) {
    device()->refuse_at_allocation = n;
    const std::string id = house.say(a_lesson(static_cast<int>(n)));
    for (int round = 0; round < 5 && house.fate(id).state != "served"; ++round) house.step();
    EXPECT_EQ(house.fate(id).state, "served") << "allocation " << n << ": " << house.last_round();
    if (device()->refuse_at_allocation > 0) break;
    ASSERT_LT(n, 400);
  }
}

TEST_F(LearnerFaults, ARoundThatFindsNoMemoryOnceIsDoneSmallerOrAgain) { refuse_in_turn({}, 4); }

TEST_F(LearnerFaults, SoIsOneOfAllWeights) {
  refuse_in_turn({{"learn.method", "full"},
                  {"learn.lr", "0.04"},
                  {"gate.max_kl", "100"},
                  {"gate.max_drop", "10"}},
                 7);
}

TEST_F(LearnerFaults, AStepIsHalvedUntilThereIsMemory) {
  House house(on_demand());
  house.teach(a_lesson(1));  // all that rounds need once is there
  device()->refuse_from_bytes = 200'000;
  device()->refuse_at_allocation = 1;
  const std::string id = house.say(a_lesson(2));
  const Json round = house.step();
  EXPECT_EQ(round["outcome"], "published") << round;
  EXPECT_EQ(house.fate(id).state, "served");
  EXPECT_GT(device()->refused, 0) << "nothing so large was asked for";
}

TEST_F(LearnerFaults, WithoutMemoryItemsWaitWithTheReason) {
  House house(on_demand());
  house.teach(a_lesson(1));
  const std::string before = house.hash();
  device()->limit_bytes = 1;
  const std::string id = house.say(a_lesson(2));
  const Json round = house.step();
  EXPECT_NE(round.dump().find("no memory"), std::string::npos) << round;
  EXPECT_EQ(house.fate(id).state, "queued");
  EXPECT_EQ(house.hash(), before);
  device()->limit_bytes = 0;
  house.learn_all();
  EXPECT_EQ(house.fate(id).state, "served");
}

/// Last: the model is gone with the device.
TEST_F(LearnerFaults, WhatADeviceLosesInARoundWaits) {
  House house(on_demand({{"learn.max_steps", "1000"}}));
  house.close();
  house.device = &state;
  house.reopen();
  std::promise<void> trains;
  house.on_step = [&](int64_t step) {
    if (step != 2) return;
    device()->fail_at_call = 30;
    trains.set_value();
  };
  const std::string id = house.say(a_lesson(7));
  const Json round = house.step();
  trains.get_future().wait();
  EXPECT_NE(round.dump().find("an illegal address"), std::string::npos) << round;
  EXPECT_EQ(house.fate(id).state, "queued");
  EXPECT_TRUE(state.lost());
  EXPECT_EQ(house.learner->status()["state"], "device lost, feedback waits");
  const std::string later = house.say(a_lesson(8));
  EXPECT_NE(house.step().dump().find("wait for a new start"), std::string::npos);
  EXPECT_EQ(house.fate(later).state, "stored");
  const auto undone = house.undo(later);
  EXPECT_TRUE(undone.ok()) << undone.status().message();  // it was never trained
  EXPECT_EQ(house.fate(later).state, "reverted");
  EXPECT_EQ(house.versions->current_number(), 1);
}

}  // namespace
}  // namespace ds
