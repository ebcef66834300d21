// SPDX-License-Identifier: Apache-2.0
// Every rule of the replay store, on real RocksDB in a scratch folder and with a clock that stands
// still.
#include "storage/replay_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <future>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "storage/column_store.h"
#include "storage/record.h"
#include "storage/replay_format.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

class StandingClock final : public Clock {
 public:
  int64_t unix_ms() const override { return now_ms; }
  int64_t monotonic_ns() const override { return now_ms * 1000000; }
  std::atomic<int64_t> now_ms{1'700'000'000'000};
};

Json text_record(const std::string& text) { return {{"kind", "text"}, {"text", text}}; }

Json demonstration(const std::string& question, const std::string& answer) {
  return {{"kind", "demonstration"},
          {"messages", Json::array({{{"role", "user"}, {"content", question}},
                                    {{"role", "assistant"}, {"content", answer}}})}};
}

struct Answer {
  std::optional<Ack> ack;
  Refusal refusal;
};

/// Queues all, then waits for all: they share batches.
std::vector<Answer> submit_all(ReplayStore& store, const std::vector<Submission>& submissions) {
  std::mutex mutex;
  std::condition_variable done;
  size_t answered = 0;
  std::vector<Answer> answers(submissions.size());
  for (size_t i = 0; i < submissions.size(); ++i) {
    store.submit(submissions[i], [&, i](const Ack* ack, const Refusal* refusal) {
      std::lock_guard lock(mutex);
      EXPECT_NE(ack == nullptr, refusal == nullptr);
      if (ack) answers[i].ack = *ack;
      if (refusal) answers[i].refusal = *refusal;
      answered += 1;
      done.notify_one();
    });
  }
  std::unique_lock lock(mutex);
  done.wait(lock, [&] { return answered == submissions.size(); });
  return answers;
}

class ReplayStoreTest : public testing::Test {
 protected:
  void SetUp() override { open(); }

  void open() {
    options_.directory = folder_ / "replay";
    options_.clock = &clock_;
    auto store = ReplayStore::open(options_);
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(*store);
  }
  void reopen() {
    store_.reset();
    open();
  }
  Answer submit(const std::string& client, int64_t epoch, int64_t seq, Json record) {
    return submit_all(*store_, {{client, epoch, seq, std::move(record), {}}})[0];
  }
  /// Stores a text and gives its offset.
  uint64_t append(const std::string& client, const std::string& text, int64_t epoch = 1) {
    const auto answer =
        submit(client, epoch, store_->last_seq(client, epoch) + 1, text_record(text));
    EXPECT_TRUE(answer.ack) << answer.refusal.message;
    return answer.ack ? answer.ack->offset : 0;
  }
  static FateChange fate(uint64_t offset, const std::string& state) {
    return {offset, {state, 5, "v2", 3, "because"}};
  }

  ScratchFolder folder_;
  StandingClock clock_;
  ReplayStore::Options options_;
  std::unique_ptr<ReplayStore> store_;
};

TEST_F(ReplayStoreTest, KeepsWhatItAcknowledged) {
  Json record = demonstration("2+2?", "4");
  record["domain"] = "sums";
  record["extra"] = 7;
  const std::string bytes("\0\xff binary", 9);
  const auto answers = submit_all(*store_, {{"acme", 3, 1, record, {bytes, ""}}});
  ASSERT_TRUE(answers[0].ack) << answers[0].refusal.message;
  EXPECT_EQ(answers[0].ack->offset, 1u);
  EXPECT_EQ(answers[0].ack->id, feedback_id("acme", 3, 1));
  reopen();
  const auto item = store_->get(answers[0].ack->id);
  ASSERT_TRUE(item.ok()) << item.status().message();
  EXPECT_EQ(item->offset, 1u);
  EXPECT_EQ(item->client, "acme");
  EXPECT_EQ(item->source, "acme");
  EXPECT_EQ(item->kind, "demonstration");
  EXPECT_EQ(item->domain, "sums");
  EXPECT_EQ(item->epoch, 3);
  EXPECT_EQ(item->seq, 1);
  EXPECT_EQ(item->received_ms, clock_.now_ms);
  EXPECT_EQ(item->record, record);
  EXPECT_EQ(item->attachments, (std::vector<std::string>{bytes, ""}));
  ASSERT_EQ(item->fate.size(), 1u);
  EXPECT_EQ(item->fate[0].state, "stored");
  EXPECT_EQ(item->fate[0].at_ms, clock_.now_ms);
  EXPECT_TRUE(store_->verify().ok()) << store_->verify().message();
}

TEST_F(ReplayStoreTest, DuplicatesGetTheSameOffsetHoweverOld) {
  const auto first = submit("a", 1, 1, text_record("one"));
  for (int i = 2; i <= 50; ++i) submit("a", 1, i, text_record(std::to_string(i)));
  reopen();
  const auto again = submit("a", 1, 1, text_record("one"));
  ASSERT_TRUE(again.ack) << again.refusal.message;
  EXPECT_TRUE(again.ack->duplicate);
  EXPECT_FALSE(first.ack->duplicate);
  EXPECT_EQ(again.ack->offset, first.ack->offset);
  EXPECT_EQ(again.ack->id, first.ack->id);
  EXPECT_EQ(store_->last_offset(), 50u);
}

TEST_F(ReplayStoreTest, SameNumberOtherPayloadIsAConflict) {
  submit("a", 1, 1, text_record("one"));
  EXPECT_EQ(submit("a", 1, 1, text_record("other")).refusal.code, "seq_conflict");
  const auto attached = submit_all(*store_, {{"a", 1, 1, text_record("one"), {"x"}}});
  EXPECT_EQ(attached[0].refusal.code, "seq_conflict") << "attachments are part of the payload";
  // Equal values are equal payloads, however the keys were ordered or numbers spelled.
  Json spelled = text_record("two");
  spelled["n"] = 1.0;
  Json respelled = text_record("two");
  respelled["n"] = 1;
  EXPECT_TRUE(submit("a", 1, 2, spelled).ack);
  EXPECT_TRUE(submit("a", 1, 2, respelled).ack->duplicate);
}

TEST_F(ReplayStoreTest, GapsAndEpochs) {
  EXPECT_EQ(submit("a", 5, 2, text_record("x")).refusal.expected_seq, 1);
  submit("a", 5, 1, text_record("x"));
  const auto gap = submit("a", 5, 4, text_record("y"));
  EXPECT_EQ(gap.refusal.code, "seq_gap");
  EXPECT_EQ(gap.refusal.expected_seq, 2);
  EXPECT_EQ(submit("a", 6, 1, text_record("z")).ack->offset, 2u) << "a new epoch starts at 1";
  EXPECT_EQ(submit("a", 5, 1, text_record("x")).refusal.code, "stale_epoch")
      << "stale wins over duplicate";
  EXPECT_EQ(submit("a", 5, 2, text_record("x")).refusal.code, "stale_epoch");
  EXPECT_TRUE(submit("b", 5, 1, text_record("x")).ack) << "epochs are each client's own";
  EXPECT_EQ(store_->last_seq("a", 5), 1);
  EXPECT_EQ(store_->last_seq("a", 6), 1);
  EXPECT_EQ(store_->last_seq("a", 7), 0);
  EXPECT_EQ(store_->last_seq("nobody", 0), 0);
}

TEST_F(ReplayStoreTest, PipelinedSubmissionsSeeEachOther) {
  const auto answers = submit_all(*store_, {{"a", 1, 1, text_record("1"), {}},
                                            {"a", 1, 2, text_record("2"), {}},
                                            {"a", 1, 2, text_record("2"), {}},
                                            {"a", 1, 2, text_record("other"), {}},
                                            {"a", 1, 4, text_record("4"), {}},
                                            {"a", 2, 1, text_record("5"), {}},
                                            {"a", 1, 3, text_record("3"), {}}});
  EXPECT_EQ(answers[1].ack->offset, 2u);
  EXPECT_TRUE(answers[2].ack->duplicate);
  EXPECT_EQ(answers[2].ack->offset, 2u);
  EXPECT_EQ(answers[3].refusal.code, "seq_conflict");
  EXPECT_EQ(answers[4].refusal.expected_seq, 3);
  EXPECT_EQ(answers[5].ack->offset, 3u);
  EXPECT_EQ(answers[6].refusal.code, "stale_epoch");
}

TEST_F(ReplayStoreTest, RefusedRecordsUseNoNumber) {
  const auto bad = submit("a", 1, 1, {{"kind", "text"}});
  EXPECT_EQ(bad.refusal.code, "bad_record");
  EXPECT_EQ(bad.refusal.retry_after_ms, 0);
  EXPECT_NE(bad.refusal.message.find("\"text\" is missing"), std::string::npos);
  EXPECT_EQ(submit("a", 1, 1, text_record("good")).ack->offset, 1u);
  EXPECT_EQ(submit("", 1, 1, text_record("x")).refusal.code, "bad_record");
  EXPECT_EQ(submit("new\nline", 1, 1, text_record("x")).refusal.code, "bad_record");
  EXPECT_EQ(submit("a", -1, 1, text_record("x")).refusal.code, "bad_record");
  EXPECT_EQ(submit("a", 1, 0, text_record("x")).refusal.code, "bad_record");
  EXPECT_EQ(store_->last_offset(), 1u);
}

TEST_F(ReplayStoreTest, LimitsOnBytesAndItems) {
  store_.reset();
  options_.max_record_bytes = 100;
  options_.max_attachment_bytes = 10;
  options_.max_pending_items = 3;
  open();
  EXPECT_EQ(submit("a", 1, 1, text_record(std::string(100, 'x'))).refusal.code, "bad_record");
  EXPECT_EQ(
      submit_all(*store_, {{"a", 1, 1, text_record("x"), {std::string(11, 'x')}}})[0].refusal.code,
      "bad_record");
  // The writer is held in a callback while the queue fills to its limit.
  std::mutex held;
  held.lock();
  std::promise<void> entered;
  store_->submit({"a", 1, 1, text_record("x"), {}}, [&](const Ack*, const Refusal*) {
    entered.set_value();
    std::lock_guard wait(held);
  });
  entered.get_future().wait();
  std::atomic<int> stored{0};
  const auto count = [&](const Ack* ack, const Refusal*) { stored += ack != nullptr; };
  for (int seq = 2; seq <= 4; ++seq) {
    store_->submit({"a", 1, seq, text_record("x"), {}}, count);
  }
  Refusal busy;
  store_->submit({"a", 1, 5, text_record("x"), {}},
                 [&](const Ack*, const Refusal* refusal) { busy = *refusal; });
  EXPECT_EQ(busy.code, "busy");
  EXPECT_GT(busy.retry_after_ms, 0);
  held.unlock();
  store_.reset();  // finishes what it accepted
  EXPECT_EQ(stored, 3);
}

TEST_F(ReplayStoreTest, OffsetsNeverRepeatAcrossRestarts) {
  EXPECT_EQ(append("a", "1"), 1u);
  reopen();
  EXPECT_EQ(append("b", "2"), 2u);
  const std::string id = store_->store_id();
  reopen();
  EXPECT_EQ(append("a", "3"), 3u);
  EXPECT_EQ(store_->store_id(), id);
  EXPECT_EQ(id.size(), 36u);
}

TEST_F(ReplayStoreTest, FatesAreKeptInOrderAndIndexedByState) {
  const uint64_t a = append("a", "1"), b = append("a", "2"), c = append("a", "3");
  Commit commit;
  commit.fates = {fate(a, "queued"), fate(a, "trained"), fate(c, "queued")};
  ASSERT_TRUE(store_->commit(commit).ok());
  reopen();
  EXPECT_EQ(store_->offsets_in_state("stored"), std::vector<uint64_t>{b});
  EXPECT_EQ(store_->offsets_in_state("queued"), std::vector<uint64_t>{c});
  EXPECT_EQ(store_->offsets_in_state("trained"), std::vector<uint64_t>{a});
  const auto item = store_->get(a);
  ASSERT_EQ(item->fate.size(), 3u);
  EXPECT_EQ(item->fate[1].state, "queued");
  EXPECT_EQ(item->fate[2].version, "v2");
  EXPECT_EQ(item->fate[2].step, 3);
  EXPECT_EQ(item->fate[2].reason, "because");
  EXPECT_EQ(store_->stats()["state"], Json({{"stored", 1}, {"queued", 1}, {"trained", 1}}));
}

TEST_F(ReplayStoreTest, ACommitIsAllOrNothing) {
  const uint64_t a = append("a", "1");
  Commit commit;
  commit.fates = {fate(a, "queued"), fate(99, "queued")};
  commit.meta = {{"cursor", 7}};
  EXPECT_EQ(store_->commit(commit).code(), Code::kNotFound);
  EXPECT_FALSE(store_->meta("cursor"));
  EXPECT_EQ(store_->offsets_in_state("stored"), std::vector<uint64_t>{a});
  commit.fates = {fate(a, "eaten")};
  EXPECT_EQ(store_->commit(commit).code(), Code::kInvalid);
}

TEST_F(ReplayStoreTest, RoundsMetaHoldAndDriftSurvive) {
  Commit commit;
  commit.rounds = {{1, {{"seed", 5}}}, {2, {{"seed", 6}}}, {300, {{"seed", 7}}}};
  commit.meta = {{"cursor", {{"offset", 4}}}, {"gone", 1}};
  commit.hold = {{"h", 1}};
  commit.drift = {{"d", 0.5}};
  ASSERT_TRUE(store_->commit(commit).ok());
  Commit erase;
  erase.meta = {{"gone", nullptr}};
  ASSERT_TRUE(store_->commit(erase).ok());
  reopen();
  EXPECT_EQ((*store_->meta("cursor"))["offset"], 4);
  EXPECT_FALSE(store_->meta("gone"));
  EXPECT_FALSE(store_->meta("format")) << "the store's own entries are apart";
  EXPECT_EQ((*store_->round(2))["seed"], 6);
  EXPECT_EQ(store_->round(3).status().code(), Code::kNotFound);
  EXPECT_EQ(store_->last_round(), 300u);
  const auto rounds = store_->rounds(2);
  ASSERT_EQ(rounds.size(), 2u);
  EXPECT_EQ(rounds[1].first, 300u);
  EXPECT_EQ(store_->hold().at(0).first, "h");
  EXPECT_EQ(store_->drift().at(0).second, 0.5);
}

TEST_F(ReplayStoreTest, RatingsWaitAndRetractionsNeedTheirTarget) {
  Json rating = {{"kind", "rating"}, {"rating", 1}};
  rating["messages"] = demonstration("q", "a")["messages"];
  const auto rated = submit("a", 1, 1, rating);
  ASSERT_TRUE(rated.ack) << rated.refusal.message;
  const auto item = store_->get(rated.ack->offset);
  EXPECT_EQ(item->fate[0].state, "waiting");
  EXPECT_EQ(item->fate[0].reason, "ratings are learned by a later learner");
  EXPECT_EQ(store_->offsets_in_state("waiting"), std::vector<uint64_t>{1});

  const Json unknown = {{"kind", "retract"}, {"target", feedback_id("b", 1, 1)}, {"source", "b"}};
  EXPECT_EQ(submit("a", 1, 2, unknown).refusal.code, "bad_record");
  // The target may be in the same batch.
  const auto pair =
      submit_all(*store_, {{"b", 1, 1, text_record("x"), {}}, {"a", 1, 2, unknown, {}}});
  ASSERT_TRUE(pair[1].ack) << pair[1].refusal.message;
  EXPECT_EQ(store_->get(pair[1].ack->offset)->fate[0].state, "stored");
}

TEST_F(ReplayStoreTest, CorrectionsAreJoinedWithTheirTrace) {
  Trace trace;
  trace.response_id = "chatcmpl-1";
  trace.version = "v4";
  trace.source = "a";
  trace.at_ms = clock_.now_ms;
  trace.messages = Json::array({{{"role", "user"}, {"content", "capital of Peru?"}}});
  trace.answer = "Quito";
  ASSERT_TRUE(store_->put_trace(trace).ok());
  const Json correction = {
      {"kind", "correction"}, {"response_id", "chatcmpl-1"}, {"correction", "Lima"}};
  const auto answer = submit("a", 1, 1, correction);
  ASSERT_TRUE(answer.ack) << answer.refusal.message;

  Json unknown = correction;
  unknown["response_id"] = "chatcmpl-2";
  const auto refused = submit("a", 1, 2, unknown);
  EXPECT_EQ(refused.refusal.code, "bad_record");
  EXPECT_NE(refused.refusal.message.find("unknown_response"), std::string::npos);
  unknown["messages"] = trace.messages;
  EXPECT_TRUE(submit("a", 1, 2, unknown).ack) << "it brings its own messages";

  clock_.now_ms += options_.trace_ttl_ms;
  EXPECT_EQ(store_->get_trace("chatcmpl-1").status().code(), Code::kNotFound);
  Json late = correction;
  late["correction"] = "Cusco";
  EXPECT_EQ(submit("a", 1, 3, late).refusal.code, "bad_record") << "traces expire";
  EXPECT_TRUE(submit("a", 1, 1, correction).ack->duplicate) << "but not what was stored";

  reopen();
  const auto item = store_->get(answer.ack->offset);
  EXPECT_EQ(item->record["joined"]["messages"], trace.messages);
  EXPECT_EQ(item->record["joined"]["rejected"], "Quito");
  EXPECT_EQ(item->record["joined"]["version"], "v4");
  EXPECT_EQ(item->draw_key, draw_key(correction) + "#0") << "the join is not part of what it says";
}

TEST_F(ReplayStoreTest, OldTracesMakeRoom) {
  store_.reset();
  options_.trace_max_bytes = 2000;
  open();
  for (int i = 0; i < 20; ++i) {
    Trace trace;
    trace.response_id = "r" + std::to_string(i);
    trace.at_ms = clock_.now_ms + i;
    trace.answer = std::string(300, 'x');
    ASSERT_TRUE(store_->put_trace(trace).ok());
    ASSERT_TRUE(store_->put_trace(trace).ok());  // again: replaces, counts once
  }
  EXPECT_FALSE(store_->get_trace("r0").ok());
  EXPECT_TRUE(store_->get_trace("r19").ok());
  const Json traces = store_->stats()["traces"];
  EXPECT_LE(traces["bytes"], 2000);
  EXPECT_GE(traces["items"], 4);
  reopen();
  EXPECT_EQ(store_->stats()["traces"], traces);
}

TEST_F(ReplayStoreTest, DrawKeysNumberEqualRecords) {
  Json record = text_record("same");
  record["ts"] = 1;
  const auto first = submit("a", 1, 1, record);
  record["ts"] = 2;
  const auto second = submit("b", 1, 1, record);
  const std::string key = draw_key(record);
  EXPECT_EQ(store_->get(first.ack->offset)->draw_key, key + "#0");
  EXPECT_EQ(store_->get(second.ack->offset)->draw_key, key + "#1");
}

TEST_F(ReplayStoreTest, ReservoirsKeepTheSmallestDrawsInAnyOrder) {
  const auto fill = [&](const std::string& name, const std::vector<int>& order, uint64_t seed) {
    ReplayStore::Options options = options_;
    options.directory = folder_ / name;
    options.reservoir_slots = 8;
    options.seed = seed;
    auto store = ReplayStore::open(options);
    for (const int i : order) {
      Commit commit;
      commit.insert = {{"d", "key" + std::to_string(i), static_cast<uint64_t>(i)}};
      EXPECT_TRUE((*store)->commit(commit).ok());
    }
    std::vector<std::string> kept;
    for (const Example& example : (*store)->examples("d")) kept.push_back(example.draw_key);
    return kept;
  };
  std::vector<int> order(50);
  for (int i = 0; i < 50; ++i) order[i] = i;
  const auto forwards = fill("f", order, 1);
  std::reverse(order.begin(), order.end());
  std::map<std::string, std::string> by_draw;
  for (const int i : order) {
    const std::string key = "key" + std::to_string(i);
    by_draw[example_key("d", 1, key)] = key;
  }
  std::vector<std::string> smallest;
  for (auto it = by_draw.begin(); smallest.size() < 8; ++it) smallest.push_back(it->second);
  std::sort(smallest.begin(), smallest.end());
  EXPECT_EQ(forwards, smallest);
  EXPECT_EQ(fill("b", order, 1), forwards);
  EXPECT_NE(fill("s", order, 2), forwards) << "another seed draws others";
}

TEST_F(ReplayStoreTest, ReservoirsOfDomainsAndRemovals) {
  Commit commit;
  commit.insert = {{"a", "k1", 1}, {"a", "k2", 2}, {"ab", "k3", 3}, {"b", "k4", 4}};
  ASSERT_TRUE(store_->commit(commit).ok());
  EXPECT_EQ(store_->domains(), (std::vector<std::string>{"a", "ab", "b"}));
  Commit change;
  change.remove = {{"a", "k1", 1}};
  change.insert = {{"a", "k2", 9}};
  ASSERT_TRUE(store_->commit(change).ok());
  store_.reset();
  options_.seed = 77;  // re-sorted, nothing lost
  open();
  const auto left = store_->examples("a");
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left[0].draw_key, "k2");
  EXPECT_EQ(left[0].offset, 9u);
  change = {};
  change.remove = {{"a", "k2", 9}};
  ASSERT_TRUE(store_->commit(change).ok());
  EXPECT_EQ(store_->domains(), (std::vector<std::string>{"ab", "b"}));
}

TEST_F(ReplayStoreTest, ListsByStateSourceAndKindInPages) {
  for (int i = 0; i < 10; ++i) append(i % 2 ? "odd" : "even", std::to_string(i));
  Json rating = {
      {"kind", "rating"}, {"rating", -1}, {"messages", demonstration("q", "a")["messages"]}};
  submit("odd", 1, 6, rating);
  const auto offsets = [&](FeedbackFilter filter) {
    std::vector<uint64_t> found;
    for (const auto& item : store_->list(filter)) found.push_back(item.offset);
    return found;
  };
  using Offsets = std::vector<uint64_t>;
  EXPECT_EQ(offsets({"", "odd", "", 0, 3, false}), (Offsets{2, 4, 6}));
  EXPECT_EQ(offsets({"", "odd", "", 6, 3, false}), (Offsets{8, 10, 11}));
  EXPECT_EQ(offsets({"", "odd", "text", 0, 3, true}), (Offsets{10, 8, 6}));
  EXPECT_EQ(offsets({"", "", "", 6, 3, true}), (Offsets{5, 4, 3}));
  EXPECT_EQ(offsets({"waiting", "", "", 0, 10, false}), (Offsets{11}));
  EXPECT_EQ(offsets({"stored", "even", "", 3, 2, false}), (Offsets{5, 7}));
  EXPECT_EQ(offsets({"", "eve", "", 0, 10, false}), Offsets{});
  const Json stats = store_->stats();
  EXPECT_EQ(stats["kind"], Json({{"rating", 1}, {"text", 10}}));
  EXPECT_EQ(stats["source"], Json({{"even", 5}, {"odd", 6}}));
  EXPECT_EQ(stats["domain"], Json({{"default", 11}}));
}

TEST_F(ReplayStoreTest, ASecondOwnerIsRefusedByNameAndPid) {
  const auto second = ReplayStore::open(options_);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kConflict);
  EXPECT_NE(second.status().message().find(options_.directory), std::string::npos);
  EXPECT_NE(second.status().message().find(std::to_string(getpid())), std::string::npos)
      << second.status().message();
}

TEST_F(ReplayStoreTest, ANewerFormatIsRefused) {
  store_.reset();
  {
    auto columns = ColumnStore::open(options_.directory + "/db", nullptr);
    Batch batch(**columns);
    batch.put(Column::kMeta, "format", big_endian(kStoreFormat + 1));
    ASSERT_TRUE((*columns)->write(batch, ColumnStore::Durability::kSynced).ok());
  }
  const auto opened = ReplayStore::open(options_);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), Code::kUnsupported);
  EXPECT_NE(opened.status().message().find("format 2"), std::string::npos);
  EXPECT_NE(opened.status().message().find("up to 1"), std::string::npos);
}

TEST_F(ReplayStoreTest, ADamagedRecordIsNeverHandedOut) {
  for (const char* text : {"one", "two", "three"}) append("a", text);
  store_.reset();
  {
    auto columns = ColumnStore::open(options_.directory + "/db", nullptr);
    Batch batch(**columns);
    std::string one = **(*columns)->get(Column::kLog, log_key("a", 1));
    one[one.size() / 2] = static_cast<char>(one[one.size() / 2] ^ 1);
    batch.put(Column::kLog, log_key("a", 1), one);
    // Another's record, whole, under the key of the third.
    batch.put(Column::kLog, log_key("a", 3), **(*columns)->get(Column::kLog, log_key("a", 2)));
    ASSERT_TRUE((*columns)->write(batch, ColumnStore::Durability::kSynced).ok());
  }
  open();
  EXPECT_EQ(store_->get(1).status().code(), Code::kCorrupt);
  EXPECT_TRUE(store_->get(2).ok());
  EXPECT_EQ(store_->get(3).status().code(), Code::kCorrupt);
  EXPECT_NE(store_->verify().message().find("offset 1"), std::string::npos)
      << store_->verify().message();
  const auto listed = store_->list({});
  ASSERT_EQ(listed.size(), 3u);
  EXPECT_EQ(listed[0].kind, "corrupt");
  EXPECT_EQ(listed[1].kind, "text");
}

/// A model of the rules in memory, against random submissions, most of them wrong.
TEST_F(ReplayStoreTest, AgreesWithAModelOnRandomSubmissions) {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  RecordProperty("seed", std::to_string(seed));
  std::mt19937_64 random(seed);
  struct Known {
    uint64_t offset;
    int payload;
  };
  std::map<std::string, std::pair<int64_t, int64_t>> marks;
  std::map<std::tuple<std::string, int64_t, int64_t>, Known> stored;
  uint64_t last = 0;
  for (int batch = 0; batch < 60; ++batch) {
    if (batch % 20 == 19) reopen();
    std::vector<Submission> sent;
    std::vector<std::string> expected;
    for (int i = 0; i < 40; ++i) {
      const std::string client = "c" + std::to_string(random() % 3);
      auto& [epoch, seq] = marks.try_emplace(client, 0, 0).first->second;
      int64_t e = epoch, s = seq + 1;
      int payload = static_cast<int>(random() % 3);
      const uint64_t kind = random() % 10;  // a gap, an old epoch, a new one, a repeat, the next
      if (kind == 0) s = seq + 2;
      if (kind == 1) e = epoch - 1;
      if (kind == 2) e = epoch + 1, s = 1;
      if (kind >= 3 && kind <= 5) s = 1 + static_cast<int64_t>(random() % (seq + 1));
      const auto key = std::make_tuple(client, e, s);
      std::string answer;
      if (e < 0) {
        answer = "bad_record";
      } else if (e < epoch) {
        answer = "stale_epoch";
      } else if (const auto it = stored.find(key); it != stored.end()) {
        if (random() % 2) payload = it->second.payload;
        answer = payload == it->second.payload ? "dup " + std::to_string(it->second.offset)
                                               : "seq_conflict";
      } else if (s != (e == epoch ? seq : 0) + 1) {
        answer = "seq_gap " + std::to_string((e == epoch ? seq : 0) + 1);
      } else {
        stored[key] = {++last, payload};
        epoch = e, seq = s;
        answer = "new " + std::to_string(last);
      }
      sent.push_back({client, e, s, text_record(std::to_string(payload)), {}});
      expected.push_back(answer);
    }
    const auto answers = submit_all(*store_, sent);
    for (size_t i = 0; i < sent.size(); ++i) {
      std::string got = answers[i].refusal.code;
      if (got == "seq_gap") got += " " + std::to_string(answers[i].refusal.expected_seq);
      if (answers[i].ack) {
        got =
            (answers[i].ack->duplicate ? "dup " : "new ") + std::to_string(answers[i].ack->offset);
      }
      ASSERT_EQ(got, expected[i]) << "seed " << seed << " batch " << batch << " item " << i;
    }
  }
  EXPECT_EQ(store_->last_offset(), last);
  EXPECT_EQ(store_->offsets_in_state("stored").size(), last);
  EXPECT_TRUE(store_->verify().ok()) << store_->verify().message();
}

}  // namespace
}  // namespace ds
