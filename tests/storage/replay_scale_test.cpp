// SPDX-License-Identifier: Apache-2.0
// 100,000 records: how fast four pipelining clients append them, and how soon a store of that size
// is open again and knows which of them wait. Prints what it measured.
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <thread>

#include "storage/replay_store.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

constexpr int kClients = 4, kPerClient = 25000, kWindow = 256;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// 25,000 demonstrations of about 400 bytes, 256 unanswered at a time.
void append_all(ReplayStore& store, int client) {
  std::mutex mutex;
  std::condition_variable answered;
  int open = 0, refused = 0;
  const std::string name = "client-" + std::to_string(client);
  for (int seq = 1; seq <= kPerClient; ++seq) {
    {
      std::unique_lock lock(mutex);
      answered.wait(lock, [&] { return open < kWindow; });
      open += 1;
    }
    const std::string number = std::to_string(client) + "." + std::to_string(seq);
    Json record = {{"kind", "demonstration"},
                   {"prompt", "Question number " + number + ": " + std::string(150, 'q')},
                   {"completion", "Answer number " + number + ": " + std::string(150, 'a')}};
    store.submit({name, 1, seq, std::move(record), {}}, [&](const Ack* ack, const Refusal*) {
      std::lock_guard lock(mutex);
      refused += ack == nullptr;
      open -= 1;
      answered.notify_one();
    });
  }
  std::unique_lock lock(mutex);
  answered.wait(lock, [&] { return open == 0; });
  EXPECT_EQ(refused, 0);
}

TEST(ReplayScale, HundredThousandRecords) {
  ScratchFolder folder;
  ReplayStore::Options options;
  options.directory = folder / "replay";
  {
    auto store = ReplayStore::open(options);
    ASSERT_TRUE(store.ok()) << store.status().message();
    const std::clock_t cpu = std::clock();
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> clients;
    for (int c = 0; c < kClients; ++c) clients.emplace_back([&, c] { append_all(**store, c); });
    for (std::thread& client : clients) client.join();
    const double seconds = seconds_since(start);
    const double cpu_seconds = static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC;
    const Json stats = (*store)->stats();
    std::printf(
        "append: %.0f records/s (%d clients, window %d), %.1f us of CPU each, "
        "%d records in %d synced batches\n",
        kClients * kPerClient / seconds, kClients, kWindow,
        cpu_seconds / kClients / kPerClient * 1e6, stats["appended"].get<int>(),
        stats["batches"].get<int>());
    // As a learner leaves it: most are past "stored".
    for (uint64_t from = 1; from <= 90000; from += 1000) {
      Commit commit;
      for (uint64_t offset = from; offset < from + 1000; ++offset) {
        commit.fates.push_back({offset, {"trained", 1, "v2", 1, ""}});
      }
      ASSERT_TRUE((*store)->commit(commit).ok());
    }
  }
  const std::clock_t cpu = std::clock();
  const auto start = std::chrono::steady_clock::now();
  auto store = ReplayStore::open(options);
  ASSERT_TRUE(store.ok()) << store.status().message();
  const size_t waiting = (*store)->offsets_in_state("stored").size();
  const double cpu_seconds = static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC;
  std::printf("start-up with 100000 records: %.3f s, %.3f s of CPU\n", seconds_since(start),
              cpu_seconds);
  EXPECT_EQ(waiting, 10000u);
  EXPECT_EQ((*store)->last_offset(), 100000u);
  EXPECT_LE(cpu_seconds, 3.0) << "of CPU: how busy the machine is says nothing about the store";
  const auto lookups = std::chrono::steady_clock::now();
  for (uint64_t offset = 1; offset <= 1000; ++offset) {
    ASSERT_TRUE((*store)->get(offset * 97).ok());
  }
  std::printf("get by offset: %.1f us\n", seconds_since(lookups) * 1000);
}

}  // namespace
}  // namespace ds
