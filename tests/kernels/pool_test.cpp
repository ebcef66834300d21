// SPDX-License-Identifier: Apache-2.0
// The pool: completeness, yielding to the engine, the background's share. Tasks tell each other how
// far they are by counters; nothing sleeps.
#include "kernels/pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace ds {
namespace {

void run(const ds_parallel* p, int64_t count, const std::function<void(int64_t)>& f) {
  p->run(
      p->ctx, count,
      [](void* user, int64_t i) { (*static_cast<std::function<void(int64_t)>*>(user))(i); },
      const_cast<std::function<void(int64_t)>*>(&f));
}

void burn(std::chrono::microseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
  }
}

TEST(Pool, RunsEachIndexOnce) {
  for (int threads : {1, 2, 5}) {
    Pool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const ds_parallel* master : {pool.engine(), pool.background()}) {
      EXPECT_EQ(master->threads, static_cast<uint32_t>(threads));
      for (int64_t count : {0, 1, 2, 3, 17, 1000}) {
        std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
        run(master, count, [&](int64_t i) { seen[i].fetch_add(1); });
        for (const auto& n : seen) EXPECT_EQ(n.load(), 1);
      }
    }
  }
}

TEST(Pool, ManySmallRunsNeverLoseAWakeup) {
  Pool pool(3);
  std::atomic<int64_t> total{0};
  for (int i = 0; i < 2000; ++i) run(pool.engine(), 7, [&](int64_t k) { total += k; });
  EXPECT_EQ(total.load(), 2000 * 21);
}

TEST(Pool, BothMastersAtOnce) {
  Pool pool(2);
  std::atomic<int64_t> front{0}, back{0};
  std::thread trainer([&] {
    for (int i = 0; i < 300; ++i) run(pool.background(), 9, [&](int64_t k) { back += k; });
  });
  for (int i = 0; i < 300; ++i) {
    pool.begin_engine_step();
    run(pool.engine(), 5, [&](int64_t k) { front += k; });
    run(pool.engine(), 6, [&](int64_t k) { front += k; });
    pool.end_engine_step();
    run(pool.engine(), 2, [&](int64_t k) { front += k; });  // outside a step: one of its own
  }
  trainer.join();
  EXPECT_EQ(front.load(), 300 * (10 + 15 + 1));
  EXPECT_EQ(back.load(), 300 * 36);
}

/// Inside a step no background task runs, and the interrupted runs complete after it.
TEST(Pool, BackgroundYieldsToAStep) {
  Pool pool(2);
  std::atomic<bool> in_step{false}, violated{false}, stop{false};
  std::atomic<int64_t> ran{0};
  int64_t runs = 0;
  std::thread trainer([&] {
    for (; !stop.load(); ++runs) {
      run(pool.background(), 100, [&](int64_t) {
        if (in_step.load()) violated = true;
        burn(std::chrono::microseconds(5));
        if (in_step.load()) violated = true;
        ran += 1;
      });
    }
  });
  while (ran.load() == 0) std::this_thread::yield();
  for (int step = 0; step < 20; ++step) {
    pool.begin_engine_step();
    in_step = true;
    const int64_t before = ran.load();
    run(pool.engine(), 4, [](int64_t) { burn(std::chrono::microseconds(20)); });
    while (pool.times().yields == 0) std::this_thread::yield();  // the trainer has noticed once
    EXPECT_EQ(ran.load(), before);
    in_step = false;
    pool.end_engine_step();
  }
  stop = true;
  trainer.join();
  EXPECT_FALSE(violated.load());
  EXPECT_EQ(ran.load(), 100 * runs);
  EXPECT_EQ(pool.times().background_tasks, 100 * runs);
  EXPECT_GE(pool.times().engine_ns, 20 * 40'000);
}

/// With a share of one half, the background gets the time of a step before the next one starts.
TEST(Pool, ShareKeepsTheBackgroundAlive) {
  Pool pool(2);
  pool.set_background_share(0.5);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> ran{0};
  std::thread trainer([&] {
    while (!stop.load()) {
      run(pool.background(), 8, [&](int64_t) {
        burn(std::chrono::microseconds(50));
        ran += 1;
      });
    }
  });
  while (ran.load() == 0) std::this_thread::yield();
  constexpr int kSteps = 30;
  int fed = 0;
  for (int step = 0; step < kSteps; ++step) {
    const int64_t before = ran.load();
    pool.begin_engine_step();
    if (step > 0 && ran.load() - before >= 5) ++fed;  // 1 ms owed: 20 tasks on one thread
    run(pool.engine(), 2, [](int64_t) { burn(std::chrono::microseconds(500)); });
    burn(std::chrono::microseconds(500));
    pool.end_engine_step();
  }
  stop = true;
  trainer.join();
  EXPECT_GE(fed, kSteps * 3 / 4);
}

/// Without a share, steps back to back leave it nothing but the task in flight.
TEST(Pool, NoShareNoWait) {
  Pool pool(2);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> ran{0};
  std::thread trainer([&] {
    while (!stop.load()) run(pool.background(), 8, [&](int64_t) { ran += 1; });
  });
  while (ran.load() == 0) std::this_thread::yield();
  pool.begin_engine_step();
  const int64_t before = ran.load();
  burn(std::chrono::microseconds(2000));
  EXPECT_EQ(ran.load(), before);
  pool.end_engine_step();
  stop = true;
  trainer.join();
}

/// A share is owed only to work that is there.
TEST(Pool, ShareDoesNotWaitForAnIdleTrainer) {
  Pool pool(2);
  pool.set_background_share(0.9);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; ++i) {
    pool.begin_engine_step();
    burn(std::chrono::microseconds(10'000));
    pool.end_engine_step();
  }
  // Paying 0.9 would take nine times the steps' 100 ms.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(500));
}

// Both masters' tasks run at once on the same threads, each on behalf of its own caller.
TEST(Pool, TasksRunOnBehalfOfTheirCaller) {
  Pool pool(3);
  pool.set_background_share(0.5);
  static constexpr char kServed[] = "served", kTrained[] = "trained";
  std::atomic<int> wrong = 0;
  const auto watch = [&](const ds_parallel* master, const char* behalf) {
    on_behalf_of = behalf;
    for (int i = 0; i < 200; ++i)
      run(master, 64, [&](int64_t) { wrong += on_behalf_of != behalf; });
    wrong += on_behalf_of != behalf;
  };
  std::thread trainer([&] { watch(pool.background(), kTrained); });
  std::thread engine([&] { watch(pool.engine(), kServed); });
  trainer.join();
  engine.join();
  run(pool.engine(), 64, [&](int64_t) { wrong += on_behalf_of != nullptr; });
  EXPECT_EQ(wrong, 0);
}

using PoolDeathTest = testing::Test;

TEST(PoolDeathTest, RefusesNestedRunsAndSteps) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(
      {
        Pool pool(1);
        run(pool.engine(), 1, [&](int64_t) { run(pool.background(), 1, [](int64_t) {}); });
      },
      "inside_task");
  EXPECT_DEATH(
      {
        Pool pool(1);
        pool.begin_engine_step();
        pool.begin_engine_step();
      },
      "step_active");
}

}  // namespace
}  // namespace ds
