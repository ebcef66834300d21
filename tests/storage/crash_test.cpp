// SPDX-License-Identifier: Apache-2.0
// Power cuts and full disks. The child process (this program with `child` as its first argument)
// appends with four pipelining clients and commits fates, on a disk that loses what was not synced;
// it reports every acknowledgement through a pipe. The parent kills it, takes the unsynced bytes
// and names away, opens the store and compares it with its own ledger.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "storage/replay_store.h"
#include "tests/storage/scratch_folder.h"
#include "tests/storage/test_disk.h"

namespace ds {
namespace {

constexpr int kClients = 4;
constexpr int kWindow = 32;
constexpr int kResent = 5;

/// What client c sends as number s: so that the parent knows it too.
std::string text_of(int client, int64_t seq) {
  return "client " + std::to_string(client) + " says " + std::to_string(seq) + " " +
         std::string(static_cast<size_t>((seq * 37 + client * 11) % 900), 'x');
}

std::string name_of(int client) { return "c" + std::to_string(client); }

Submission submission_of(int client, int64_t seq) {
  return {name_of(client), 1, seq, {{"kind", "text"}, {"text", text_of(client, seq)}}, {}};
}

// --- the child ---

void report(const std::string& line) {
  const std::string text = line + "\n";
  if (::write(STDOUT_FILENO, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    std::_Exit(3);
  }
}

std::atomic<uint64_t> answers = 0;  ///< to all clients

/// Sends for ever with a window of unanswered submissions, beginning with some already stored.
/// After a refusal it waits for the rest of the window and begins again behind the last one stored.
void run_client(ReplayStore& store, int client, bool refusals_expected) {
  std::mutex mutex;
  std::condition_variable answered;
  int open = 0;
  bool refused = false;
  int64_t seq = std::max<int64_t>(0, store.last_seq(name_of(client), 1) - kResent);
  while (true) {
    std::unique_lock lock(mutex);
    answered.wait(lock, [&] { return refused ? open == 0 : open < kWindow; });
    if (refused) seq = store.last_seq(name_of(client), 1);
    refused = false;
    open += 1;
    lock.unlock();
    seq += 1;
    store.submit(submission_of(client, seq), [&, seq](const Ack* ack, const Refusal* refusal) {
      if (ack) {
        report("A " + std::to_string(client) + " " + std::to_string(seq) + " " +
               std::to_string(ack->offset));
      } else {
        report((refusals_expected ? "F " : "X ") + refusal->code + " " + refusal->message);
      }
      std::lock_guard guard(mutex);
      open -= 1;
      refused = refused || refusal;
      answered.notify_one();
      answers += 1;
      answers.notify_one();
    });
  }
}

/// Queues what is stored, forty at a time, with an example each.
void run_learner(ReplayStore& store, bool refusals_expected) {
  while (true) {
    const uint64_t before = answers;
    Commit commit;
    for (const FeedbackItem& item : store.list({"stored", "", "", 0, 40, false})) {
      commit.fates.push_back({item.offset, {"queued", 1, "", 0, ""}});
      commit.insert.push_back({item.domain, item.draw_key, item.offset});
    }
    if (commit.fates.empty()) {
      answers.wait(before);
      continue;
    }
    const Status done = store.commit(commit);
    if (!done.ok()) {
      report((refusals_expected ? "F commit " : "X commit ") + done.message());
      continue;
    }
    for (const FateChange& change : commit.fates) report("Q " + std::to_string(change.offset));
  }
}

/// Fills the disk at random places and empties it again, for ever.
void run_filler(const ReplayStore& store, DiskFaults& faults) {
  std::mt19937_64 random(std::random_device{}());
  while (true) {
    faults.free_bytes = static_cast<int64_t>(random() % 30000);
    while (store.health().ok()) std::this_thread::yield();
    faults.free_bytes = INT64_MAX;
    while (!store.health().ok()) std::this_thread::yield();
  }
}

int child_main(const std::string& folder, bool filling) {
  auto faults = std::make_shared<DiskFaults>();
  faults->lose_unsynced = true;
  faults->journal_folder = folder + "/journal";
  ReplayStore::Options options;
  options.directory = folder + "/replay";
  options.disk = make_test_disk(faults);
  report("O");
  auto store = ReplayStore::open(options);
  if (!store.ok()) {
    report("X open " + store.status().message());
    return 1;
  }
  std::vector<std::thread> threads;
  for (int c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] { run_client(**store, c, filling); });
  }
  threads.emplace_back([&] { run_learner(**store, filling); });
  if (filling) threads.emplace_back([&] { run_filler(**store, *faults); });
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// --- the parent ---

struct Ledger {
  std::map<std::pair<int, int64_t>, uint64_t> acks;  // (client, seq) -> offset
  std::set<uint64_t> queued;
  std::vector<std::string> errors;
  int successes = 0, refusals = 0;

  void read(const std::string& line) {
    std::istringstream words(line);
    char kind = 0;
    words >> kind;
    successes += kind == 'A' || kind == 'Q';
    if (kind == 'A') {
      int client = 0;
      int64_t seq = 0;
      uint64_t offset = 0;
      words >> client >> seq >> offset;
      const auto [it, fresh] = acks.try_emplace({client, seq}, offset);
      if (!fresh && it->second != offset) {
        errors.push_back(line + ": acknowledged before at " + std::to_string(it->second));
      }
    } else if (kind == 'Q') {
      uint64_t offset = 0;
      words >> offset;
      queued.insert(offset);
    } else if (kind == 'X') {
      errors.push_back(line);
    } else if (kind == 'F') {
      refusals += 1;
    }
  }
};

/// Runs the child until it has reported `successes`, kills it, reads the rest.
void run_and_kill(const std::string& folder, const char* mode, int successes, Ledger& ledger) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::close(ends[0]);
    ::close(ends[1]);
    ::execl("/proc/self/exe", "crash_test", mode, folder.c_str(), nullptr);
    ::_exit(9);
  }
  ::close(ends[1]);
  const int stop_at = ledger.successes + successes;
  bool started = false;
  std::string rest;
  char buffer[65536];
  bool killed = false;
  while (true) {
    if (!killed && started && ledger.successes >= stop_at) {
      ::kill(pid, SIGKILL);
      killed = true;
    }
    const ssize_t n = ::read(ends[0], buffer, sizeof buffer);
    if (n <= 0) break;
    started = true;
    rest.append(buffer, static_cast<size_t>(n));
    size_t begin = 0;
    for (size_t end; (end = rest.find('\n', begin)) != rest.npos; begin = end + 1) {
      ledger.read(rest.substr(begin, end - begin));
    }
    rest.erase(0, begin);
  }
  ::close(ends[0]);
  int status = 0;
  ::waitpid(pid, &status, 0);
  EXPECT_TRUE(killed && WIFSIGNALED(status)) << "the child ended by itself, status " << status;
}

void compare(const ReplayStore& store, const Ledger& ledger, bool all) {
  // Every (client, seq) has one offset, and offsets are used without holes: equal sums say that
  // nothing is there twice.
  int64_t sum = 0;
  std::array<int64_t, kClients> last{};
  for (int c = 0; c < kClients; ++c) sum += last[c] = store.last_seq(name_of(c), 1);
  EXPECT_EQ(static_cast<uint64_t>(sum), store.last_offset());
  int checked = 0;
  for (auto it = ledger.acks.rbegin(); it != ledger.acks.rend(); ++it) {
    const auto& [client_seq, offset] = *it;
    const auto& [client, seq] = client_seq;
    ASSERT_GE(last[client], seq) << "lost an acknowledged record";
    if (!all && ++checked % 16 != 0) continue;
    const auto item = store.get(offset);
    ASSERT_TRUE(item.ok()) << item.status().message();
    EXPECT_EQ(item->client, name_of(client));
    EXPECT_EQ(item->seq, seq);
    EXPECT_EQ(item->record["text"], text_of(client, seq));
  }
  const auto queued = store.offsets_in_state("queued"), stored = store.offsets_in_state("stored");
  EXPECT_EQ(queued.size() + stored.size(), store.last_offset());
  const std::set<uint64_t> now(queued.begin(), queued.end());
  for (const uint64_t offset : ledger.queued) {
    ASSERT_TRUE(now.contains(offset)) << "lost a committed fate of " << offset;
  }
}

/// At most `successes` before each kill; DS_TEST_POWER_CUTS=N: fewer kills.
void cut_power(const char* mode, int kills, int successes) {
  if (const char* fewer = std::getenv("DS_TEST_POWER_CUTS")) kills = std::atoi(fewer);
  const char* given = std::getenv("DS_TEST_SEED");
  const uint64_t seed = given ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  std::printf("seed %lu, %d power cuts\n", static_cast<unsigned long>(seed), kills);
  std::mt19937_64 random(seed);
  ScratchFolder folder;
  Ledger ledger;
  for (int kill = 0; kill < kills && !testing::Test::HasFailure(); ++kill) {
    // From right at the start (while opening and recovering) to some thousand acknowledgements.
    const int at = kill % 5 == 0 ? 0 : 1 + static_cast<int>(random() % successes);
    run_and_kill(folder.path(), mode, at, ledger);
    ASSERT_TRUE(ledger.errors.empty()) << ledger.errors[0] << ", seed " << seed;
    lose_unsynced_names(folder / "journal");
    ReplayStore::Options options;
    options.directory = folder / "replay";
    const auto store = ReplayStore::open(options);
    ASSERT_TRUE(store.ok()) << store.status().message() << ", seed " << seed << " kill " << kill;
    compare(**store, ledger, kill + 1 == kills);
    if (kill + 1 == kills) {
      EXPECT_TRUE((*store)->verify().ok()) << (*store)->verify().message();
    }
  }
  std::printf("%zu acknowledgements, %zu fates compared; %d refusals\n", ledger.acks.size(),
              ledger.queued.size(), ledger.refusals);
  EXPECT_GT(ledger.acks.size(), 100u);
}

TEST(Crash, PowerCutsLoseNothingAcknowledged) { cut_power("child", 20, 4000); }

/// The disk fills up and empties all the time, and the power goes in between.
TEST(Crash, PowerCutsOnAFullDisk) { cut_power("filling-child", 10, 1000); }

// --- full and failing disks ---

class DiskTest : public testing::Test {
 protected:
  void open() {
    options_.directory = folder_ / "replay";
    options_.disk = make_test_disk(faults_);
    auto store = ReplayStore::open(options_);
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(*store);
  }
  Result<Ack> send(int64_t seq) { return store_->submit_and_wait(submission_of(0, seq)); }

  ScratchFolder folder_;
  std::shared_ptr<DiskFaults> faults_ = std::make_shared<DiskFaults>();
  ReplayStore::Options options_;
  std::unique_ptr<ReplayStore> store_;
};

/// Fills the disk at every byte count of a range, so that records tear at many places, the first of
/// a fresh log too; each time space returns, appending goes on without a restart.
TEST_F(DiskTest, AFullDiskRefusesAndThenGoesOn) {
  open();
  int64_t seq = 0;
  int refused = 0;
  for (int round = 0; round < 12; ++round) {
    faults_->free_bytes = round * 211;
    Status failure;
    while (failure.ok()) {
      const auto ack = send(seq + 1);
      if (ack.ok()) {
        seq += 1;
      } else {
        failure = ack.status();
      }
    }
    EXPECT_EQ(failure.code(), Code::kIo);
    EXPECT_NE(failure.message().find("storage_full"), std::string::npos) << failure.message();
    EXPECT_FALSE(store_->health().ok());
    EXPECT_FALSE(send(seq + 1).ok()) << "still full";
    EXPECT_TRUE(seq == 0 || store_->get(static_cast<uint64_t>(seq)).ok()) << "reading goes on";
    refused += 1;
    faults_->free_bytes = INT64_MAX;
    const auto again = send(seq + 1);
    ASSERT_TRUE(again.ok()) << again.status().message() << " in round " << round;
    EXPECT_FALSE(again->duplicate);
    seq += 1;
    EXPECT_TRUE(store_->health().ok());
    if (round % 4 == 3) {
      store_.reset();
      open();
    }
  }
  store_.reset();
  open();
  EXPECT_EQ(store_->last_seq("c0", 1), seq);
  for (int64_t s = 1; s <= seq; ++s) {
    const auto item = store_->get(static_cast<uint64_t>(s));
    ASSERT_TRUE(item.ok()) << item.status().message();
    EXPECT_EQ(item->record["text"], text_of(0, s));
  }
  EXPECT_TRUE(store_->verify().ok()) << store_->verify().message();
  EXPECT_EQ(refused, 12);
}

/// After a failed sync nobody knows what reached the device; the kernel may report success next
/// time. So: no acknowledgement until a restart has recovered from the log.
TEST_F(DiskTest, AFailedSyncIsNeverRetried) {
  open();
  ASSERT_TRUE(send(1).ok());
  faults_->syncs_fail = true;
  EXPECT_EQ(send(2).status().code(), Code::kIo);
  faults_->syncs_fail = false;
  EXPECT_EQ(send(2).status().code(), Code::kIo) << "this process cannot know what is on the disk";
  EXPECT_EQ(store_->health().code(), Code::kIo);
  store_.reset();
  open();
  const auto ack = send(2);
  ASSERT_TRUE(ack.ok()) << ack.status().message();
  EXPECT_EQ(ack->offset, 2u);
}

}  // namespace
}  // namespace ds

int main(int argc, char** argv) {
  const std::string mode = argc == 3 ? argv[1] : "";
  if (mode == "child" || mode == "filling-child") {
    return ds::child_main(argv[2], mode == "filling-child");
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
