// SPDX-License-Identifier: Apache-2.0
// Which part of a GPU training gets, in virtual time; that it waits where it gets none; how often
// its stream is marked. Nothing here needs a GPU.
#include "kernels/gpu_share.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "kernels/cuda/pace.h"
#include "kernels/pool.h"

namespace ds {
namespace {

constexpr int64_t kMs = 1'000'000;

/// Steps of `step` every `period`, from *now on, for `span`; leaves *now after the last one's end.
void serve(GpuShare& share, int64_t* now, int64_t step, int64_t period, int64_t span,
           int64_t waiting = 0) {
  for (const int64_t end = *now + span; *now < end; *now += period - step) {
    share.begin_step(*now, waiting);
    *now += step;
    share.end_step(*now);
  }
  *now -= period - step;
}

TEST(TrainingPart, HasTheWholeGpuBetweenStepsOfLightLoads) {
  for (const double busy : {0.0, 0.04, 0.3, 0.39}) {
    EXPECT_EQ(training_part({false, busy, 0}, 0), GpuPart::kWhole) << busy;
    EXPECT_EQ(training_part({true, busy, 0}, 0), GpuPart::kHalf) << busy;
  }
}

TEST(TrainingPart, ShrinksAsServingNeedsMore) {
  EXPECT_EQ(training_part({true, 0.6, 0}, 0), GpuPart::kThreeQuarters);
  EXPECT_EQ(training_part({true, 1.0, 0}, 0), GpuPart::kHalf);
  EXPECT_EQ(training_part({true, 0.3, 4}, 0), GpuPart::kHalf);
  EXPECT_EQ(training_part({true, 1.0, 4}, 0), GpuPart::kNone);
  EXPECT_EQ(training_part({false, 1.0, 4}, 0), GpuPart::kHalf);
  for (const bool in_step : {false, true}) {
    GpuPart before = GpuPart::kWhole;
    for (double busy = in_step ? 0.4 : 0; busy <= 1; busy += 0.01) {
      const GpuPart part = training_part({in_step, busy, 0}, 0);
      EXPECT_LE(part, before) << busy;
      before = part;
    }
  }
}

/// What training gets of a second in which steps take `busy`.
double share_over_time(double busy, int64_t waiting, double owed) {
  return busy * share_of(training_part({true, busy, waiting}, owed)) +
         (1 - busy) * share_of(training_part({false, busy, waiting}, owed));
}

TEST(TrainingPart, IsAtLeastWhatIsOwed) {
  for (const double owed : {0.1, 0.5, 0.6, 0.75, 0.8}) {
    for (const double busy : {0.0, 0.3, 0.6, 1.0}) {
      for (const int64_t waiting : {0, 100})
        EXPECT_GE(share_over_time(busy, waiting, owed), owed - 1e-9) << busy << " of " << owed;
    }
  }
  EXPECT_EQ(training_part({true, 1.0, 100}, 0.3), GpuPart::kHalf);
  EXPECT_EQ(training_part({true, 1.0, 100}, 1.0), GpuPart::kMost);  // never what serving works on
  EXPECT_EQ(training_part({true, 0.3, 0}, 0.4), GpuPart::kHalf);    // no less than without
}

TEST(GpuShare, LoadIsThePartOfTheLastTenthOfASecond) {
  GpuShare share;
  int64_t now = 5000 * kMs;
  EXPECT_EQ(share.load(now).busy, 0);
  serve(share, &now, 1 * kMs, 4 * kMs, 1000 * kMs);
  EXPECT_NEAR(share.load(now).busy, 0.25, 0.02);
  EXPECT_EQ(share.part(now), GpuPart::kWhole);
  serve(share, &now, 2 * kMs, 4 * kMs, 1000 * kMs);
  EXPECT_NEAR(share.load(now).busy, 0.5, 0.02);
  EXPECT_EQ(share.part(now), GpuPart::kThreeQuarters);
  serve(share, &now, 39 * kMs / 10, 4 * kMs, 1000 * kMs);
  EXPECT_NEAR(share.load(now).busy, 0.98, 0.02);
  EXPECT_EQ(share.part(now), GpuPart::kHalf);
  EXPECT_NEAR(share.load(now + 100 * kMs).busy, 0.36, 0.02);
}

TEST(GpuShare, AFirstStepTakesHalfTheGpuAtOnce) {
  GpuShare share;
  const int64_t now = 5000 * kMs;
  EXPECT_EQ(share.part(now), GpuPart::kWhole);
  share.begin_step(now, 0);
  EXPECT_EQ(share.part(now), GpuPart::kHalf);
  share.end_step(now + kMs);
  EXPECT_EQ(share.part(now + kMs), GpuPart::kWhole);  // one step is no load
}

TEST(GpuShare, TheWholeGpuComesBackWhenServingIsOver) {
  GpuShare share;
  int64_t now = 5000 * kMs;
  serve(share, &now, 1 * kMs, 3 * kMs, 500 * kMs, 7);
  EXPECT_EQ(share.part(now), GpuPart::kHalf);
  EXPECT_EQ(share.part(now + 500 * kMs), GpuPart::kWhole);  // nobody tells that none waits now
}

TEST(GpuShare, StepsBackToBackPauseTrainingWhereRequestsWaitUnlessItIsOwed) {
  GpuShare share;
  int64_t now = 5000 * kMs;
  serve(share, &now, 10 * kMs, 10 * kMs, 1000 * kMs, 3);
  share.begin_step(now, 3);
  EXPECT_EQ(share.part(now), GpuPart::kNone);
  share.set_min_share(0.5);
  EXPECT_EQ(share.part(now), GpuPart::kHalf);
  share.set_min_share(0);
  share.end_step(now += 10 * kMs);
  EXPECT_EQ(share.part(now), GpuPart::kHalf);
}

TEST(GpuShare, TrainingWaitsForTheEndOfAStepAndGoesOn) {
  GpuShare share;
  share.hold(GpuPart::kNone);
  const StreamGate gate = share.gate();
  EXPECT_EQ(gate.pass(gate.user), GpuPart::kWhole);
  std::atomic<bool> stop{false}, in_step{false};
  std::atomic<int> ops{0}, within{0};
  std::thread trainer([&] {
    while (!stop) {
      gate.pass(gate.user);
      // One may have passed just before the step began.
      if (in_step && ++within > 1) within = 100;
      ++ops;
    }
  });
  int64_t now = 5000 * kMs;
  for (int step = 0; step < 50; ++step) {
    const int before = ops;
    while (ops < before + 5) std::this_thread::yield();
    share.begin_step(now, 0);
    within = 0;
    in_step = true;
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
    while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
    EXPECT_LE(within, 1);
    in_step = false;
    share.end_step(now += kMs);
  }
  stop = true;
  trainer.join();
}

TEST(GpuShare, ThePoolTellsItOfStepsAndOfWhatIsOwed) {
  Pool pool(1);
  GpuShare& share = pool.gpu_share();
  pool.begin_engine_step(4);
  EXPECT_TRUE(share.load(0).in_step);
  EXPECT_EQ(share.load(0).waiting, 4);
  share.hold(GpuPart::kMost);
  EXPECT_EQ(share.pass(), GpuPart::kMost);
  pool.end_engine_step();
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  EXPECT_FALSE(share.load(now / std::chrono::nanoseconds(1)).in_step);
}

TEST(Pace, MarksStretchesOfAHundredMicroseconds) {
  cuda::Pace pace;
  int64_t ops = 0, marks = 0;
  for (; marks < 50; ++ops) {
    if (!pace.mark_due()) continue;
    ++marks;
    pace.reached(true, 12.5 * static_cast<double>(pace.ops()));  // every op takes 12.5 us
  }
  EXPECT_EQ(pace.ops(), 8);
  for (int i = 0; i < 10; ++i) pace.reached(true, 500);
  EXPECT_EQ(pace.ops(), 1);  // ops that are too long come alone
  for (int i = 0; i < 10; ++i) pace.reached(false, 500);
  EXPECT_EQ(pace.ops(), cuda::Pace::kMostOps);  // the GPU waits for the host: few marks
}

TEST(Pace, OneLongStretchHalvesThemOnly) {
  cuda::Pace pace;
  for (int i = 0; i < 10; ++i) pace.reached(false, 0);
  pace.reached(true, 10'000);
  EXPECT_EQ(pace.ops(), cuda::Pace::kMostOps / 2);
}

TEST(Pace, MarksComeBeforeEachStretchButTheFirst) {
  cuda::Pace pace;
  int64_t before_first = 0;
  while (!pace.mark_due()) ++before_first;
  EXPECT_EQ(before_first, pace.ops());
  int64_t between = 1;
  while (!pace.mark_due()) ++between;
  EXPECT_EQ(between, pace.ops());
}

}  // namespace
}  // namespace ds
