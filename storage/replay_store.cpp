// SPDX-License-Identifier: Apache-2.0
#include "storage/replay_store.h"

#include <algorithm>
#include <array>
#include <future>
#include <random>

#include "storage/record.h"
#include "storage/replay_format.h"
#include "storage/replay_state.h"

namespace ds {
namespace {

constexpr size_t kMaxBatchItems = 1024;
constexpr size_t kMaxBatchBytes = 16u << 20;
constexpr int64_t kBusyRetryMs = 50;
constexpr int64_t kFullRetryMs = 1000;

constexpr std::string_view kStates[] = {"stored",      "queued", "trained", "served",  "reverted",
                                        "quarantined", "held",   "waiting", "expired", "erased"};

std::string new_uuid() {
  std::random_device device;
  std::array<uint8_t, 16> bytes;
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(device());
  bytes[6] = static_cast<uint8_t>((bytes[6] & 0x0f) | 0x40);  // RFC 4122: version 4
  bytes[8] = static_cast<uint8_t>((bytes[8] & 0x3f) | 0x80);  // and its variant
  std::string text = to_hex(bytes);
  for (const size_t dash : {8, 13, 18, 23}) text.insert(dash, 1, '-');
  return text;
}

Refusal bad_record(const Status& why) { return {"bad_record", why.message(), 0, 0}; }

Refusal storage_full(const Status& why) { return {"storage_full", why.message(), 0, kFullRetryMs}; }

Result<uint64_t> get_number_or(const Batch& batch, Column column, const std::string& key,
                               uint64_t fallback) {
  DS_ASSIGN(const std::optional<std::string> value, batch.get(column, key));
  if (!value) return fallback;
  return from_big_endian(*value);
}

void put_json(Batch& batch, Column column, const std::string& key, const Json& value) {
  value.is_null() ? batch.erase(column, key) : batch.put(column, key, dump_json(value));
}

}  // namespace

Status add_count(Batch& batch, std::string_view group, std::string_view name, int64_t change) {
  const std::string key = count_key(group, name);
  DS_ASSIGN(const uint64_t before, get_number_or(batch, Column::kMeta, key, 0));
  const uint64_t after = before + static_cast<uint64_t>(change);
  after == 0 ? batch.erase(Column::kMeta, key) : batch.put(Column::kMeta, key, big_endian(after));
  return {};
}

ReplayStore::ReplayStore() : state_(std::make_unique<State>()) {}

Result<std::unique_ptr<ReplayStore>> ReplayStore::open(const Options& options) {
  std::unique_ptr<ReplayStore> store(new ReplayStore());
  State& state = *store->state_;
  state.options = options;
  if (!state.options.fs) state.options.fs = &posix_file_system();
  if (!state.options.clock) state.options.clock = &system_clock_seam();
  if (options.reservoir_slots == 0) return invalid("reservoir_slots is 0, expected at least 1");
  DS_TRY(state.options.fs->make_directories(options.directory));
  DS_ASSIGN(state.lock, DirectoryLock::take(options.directory));
  DS_ASSIGN(state.columns, ColumnStore::open(options.directory + "/db", options.disk));
  DS_TRY(state.options.fs->sync_directory(options.directory));
  DS_TRY(state.prepare().in(options.directory));
  state.writer = std::thread([&state] { state.write_loop(); });
  return store;
}

ReplayStore::~ReplayStore() {
  if (!state_->writer.joinable()) return;  // open() failed before there was one
  {
    std::lock_guard lock(state_->queue_mutex);
    state_->stopping = true;
  }
  state_->queue_ready.notify_all();
  state_->writer.join();
}

Status ReplayStore::State::prepare() {
  Batch batch(*columns);
  DS_ASSIGN(const uint64_t format, get_number_or(batch, Column::kMeta, "format", 0));
  if (format > kStoreFormat) {
    return unsupported("the store has format " + std::to_string(format) +
                       ", this program knows formats up to " + std::to_string(kStoreFormat));
  }
  if (format == 0) {
    batch.put(Column::kMeta, "format", big_endian(kStoreFormat));
    batch.put(Column::kMeta, "store_id", new_uuid());
    batch.put(Column::kMeta, "seed", big_endian(options.seed));
  }
  DS_ASSIGN(const uint64_t seed, get_number_or(batch, Column::kMeta, "seed", options.seed));
  if (seed != options.seed) {
    DS_TRY(resort_reservoirs(batch));
    batch.put(Column::kMeta, "seed", big_endian(options.seed));
  }
  DS_ASSIGN(const std::optional<std::string> id, batch.get(Column::kMeta, "store_id"));
  if (!id) return corrupt("the store has no id");
  store_id = *id;
  DS_ASSIGN(const uint64_t last, get_number_or(batch, Column::kMeta, "last_offset", 0));
  last_offset = last;
  if (!batch.empty()) DS_TRY(columns->write(batch, ColumnStore::Durability::kSynced));
  return sum_traces();
}

Status ReplayStore::State::resort_reservoirs(Batch& batch) const {
  Status bad;
  DS_TRY(columns->scan(Column::kExample, "", "", ColumnStore::Order::kAscending,
                       [&](std::string_view key, std::string_view value) {
                         const auto example = read_example(key, value);
                         if (!example.ok()) {
                           bad = example.status();
                           return false;
                         }
                         batch.erase(Column::kExample, std::string(key));
                         batch.put(Column::kExample,
                                   example_key(example->domain, options.seed, example->draw_key),
                                   std::string(value));
                         return true;
                       }));
  return bad;
}

Status ReplayStore::State::sum_traces() {
  return columns->scan(Column::kTrace, "t", "u", ColumnStore::Order::kAscending,
                       [&](std::string_view, std::string_view value) {
                         const auto bytes = from_big_endian(value);
                         traces += 1;
                         trace_bytes += bytes.ok() ? *bytes : 0;
                         return true;
                       });
}

// --- submissions ---

std::optional<Refusal> ReplayStore::State::enqueue(Queued queued) {
  const size_t record_bytes = queued.canonical.size();
  if (record_bytes > options.max_record_bytes) {
    return bad_record(invalid("the record has " + std::to_string(record_bytes) +
                              " bytes, the limit is " + std::to_string(options.max_record_bytes)));
  }
  queued.bytes = record_bytes;
  for (size_t i = 0; i < queued.submission.attachments.size(); ++i) {
    const size_t bytes = queued.submission.attachments[i].size();
    if (bytes > options.max_attachment_bytes) {
      return bad_record(invalid("attachment " + std::to_string(i) + " has " +
                                std::to_string(bytes) + " bytes, the limit is " +
                                std::to_string(options.max_attachment_bytes)));
    }
    queued.bytes += bytes;
  }
  std::lock_guard lock(queue_mutex);
  if (stopping) return Refusal{"shutting_down", "the store is closing", 0, 0};
  const bool full = pending_items >= options.max_pending_items ||
                    (pending_items > 0 && pending_bytes + queued.bytes > options.max_pending_bytes);
  if (full) {
    return Refusal{"busy",
                   std::to_string(pending_items) + " submissions with " +
                       std::to_string(pending_bytes) + " bytes wait for the disk",
                   0, kBusyRetryMs};
  }
  pending_items += 1;
  pending_bytes += queued.bytes;
  queue.push_back(std::move(queued));
  queue_ready.notify_one();
  return std::nullopt;
}

void ReplayStore::submit(Submission submission, SubmitCallback callback) {
  State::Queued queued;
  queued.canonical = canonical_json(submission.record);
  queued.submission = std::move(submission);
  queued.callback = callback;
  if (const auto refusal = state_->enqueue(std::move(queued))) callback(nullptr, &*refusal);
}

Result<Ack> ReplayStore::submit_and_wait(Submission submission) {
  std::promise<Result<Ack>> promise;
  submit(std::move(submission), [&](const Ack* ack, const Refusal* refusal) {
    if (ack) return promise.set_value(*ack);
    Code code = Code::kConflict;  // seq_conflict, seq_gap, stale_epoch
    if (refusal->code == "bad_record") code = Code::kInvalid;
    if (refusal->code == "forbidden") code = Code::kPermission;
    if (refusal->code == "storage_full") code = Code::kIo;
    if (refusal->code == "busy") code = Code::kBusy;
    if (refusal->code == "shutting_down") code = Code::kUnavailable;
    promise.set_value(Status(code, refusal->code + ": " + refusal->message));
  });
  return promise.get_future().get();
}

/// Group commit: everything queued while the last batch was syncing goes into the next one.
void ReplayStore::State::write_loop() {
  std::vector<Queued> group;
  while (true) {
    group.clear();
    size_t bytes = 0;
    {
      std::unique_lock lock(queue_mutex);
      queue_ready.wait(lock, [&] { return stopping || !queue.empty(); });
      if (queue.empty()) return;
      while (!queue.empty() && group.size() < kMaxBatchItems &&
             (group.empty() || bytes + queue.front().bytes <= kMaxBatchBytes)) {
        bytes += queue.front().bytes;
        group.push_back(std::move(queue.front()));
        queue.pop_front();
      }
    }
    const std::vector<Outcome> outcomes = append(group);
    {
      std::lock_guard lock(queue_mutex);
      pending_items -= group.size();
      pending_bytes -= bytes;
    }
    for (size_t i = 0; i < group.size(); ++i) {
      const Outcome& outcome = outcomes[i];
      outcome.ack ? group[i].callback(&*outcome.ack, nullptr)
                  : group[i].callback(nullptr, &outcome.refusal);
    }
  }
}

/// Judges, writes and syncs one group. Nothing in it may be acknowledged before the write returned.
std::vector<ReplayStore::State::Outcome> ReplayStore::State::append(
    const std::vector<Queued>& group) {
  std::lock_guard lock(write_mutex);
  Batch batch(*columns);
  const int64_t now_ms = options.clock->unix_ms();
  std::vector<Outcome> outcomes;
  Status status = columns->ensure_writable();
  uint64_t first_offset = 0, next_offset = 0;
  if (status.ok()) {
    const auto last = get_number_or(batch, Column::kMeta, "last_offset", 0);
    status = last.status();
    if (last.ok()) first_offset = next_offset = *last + 1;
  }
  for (const Queued& queued : group) {
    if (!status.ok()) break;
    auto outcome = admit(batch, queued, next_offset, now_ms);
    if (!outcome.ok()) {
      status = outcome.status();
      break;
    }
    outcomes.push_back(std::move(*outcome));
  }
  if (status.ok() && !batch.empty()) {
    batch.put(Column::kMeta, "last_offset", big_endian(next_offset - 1));
    status = columns->write(batch, ColumnStore::Durability::kSynced);
  }
  if (!status.ok()) {
    // Judgements of this group may rest on members that were not stored: none of them stands.
    return std::vector<Outcome>(group.size(), Outcome{std::nullopt, storage_full(status)});
  }
  appended += next_offset - first_offset;
  batches += 1;
  last_offset = next_offset - 1;
  return outcomes;
}

/// One submission against the store and the batch so far. A failed Result is the disk's, and ends
/// the batch; a refusal is the submission's own.
Result<ReplayStore::State::Outcome> ReplayStore::State::admit(Batch& batch, const Queued& queued,
                                                              uint64_t& next_offset,
                                                              int64_t now_ms) {
  const Submission& sent = queued.submission;
  Status form = check_label("client", sent.client);
  if (form.ok() && (sent.epoch < 0 || sent.seq < 1)) {
    form = invalid("epoch " + std::to_string(sent.epoch) + ", seq " + std::to_string(sent.seq) +
                   ", expected an epoch from 0 and a seq from 1");
  }
  if (!form.ok()) return Outcome{std::nullopt, bad_record(form)};
  const Sha256Digest payload = payload_hash_of_text(queued.canonical, sent.attachments);
  DS_ASSIGN(std::optional<Outcome> known, judge_sequence(batch, queued, payload));
  if (known) return std::move(*known);

  auto record = check_record(sent.record, sent.attachments);
  if (!record.ok()) return Outcome{std::nullopt, bad_record(record.status())};
  FeedbackItem item;
  item.draw_key = ds::draw_key(*record, sent.attachments);
  DS_ASSIGN(const std::optional<Refusal> unresolved, resolve(batch, sent, *record));
  if (unresolved) return Outcome{std::nullopt, *unresolved};
  item.offset = next_offset;
  item.id = feedback_id(sent.client, sent.epoch, sent.seq);
  item.client = sent.client;
  item.epoch = sent.epoch;
  item.seq = sent.seq;
  item.received_ms = now_ms;
  item.kind = (*record)["kind"];
  DS_ASSIGN(item.source, get_string(*record, "source", sent.client));
  DS_ASSIGN(item.domain, get_string(*record, "domain", "default"));
  item.attachments = sent.attachments;
  item.record = std::move(*record);
  DS_TRY(insert(batch, item, payload));
  next_offset += 1;
  return Outcome{Ack{item.offset, item.id, false}, {}};
}

/// Null = the next one of its client, to be judged by its content. A stale epoch wins over a
/// duplicate, and a duplicate over everything the record says: what was once stored is acknowledged
/// for ever.
Result<std::optional<ReplayStore::State::Outcome>> ReplayStore::State::judge_sequence(
    const Batch& batch, const Queued& queued, const Sha256Digest& payload) const {
  const Submission& sent = queued.submission;
  ClientMark mark;
  DS_ASSIGN(const std::optional<std::string> stored,
            batch.get(Column::kDedup, dedup_client_key(sent.client)));
  if (stored) {
    DS_ASSIGN(mark, decode_client_mark(*stored));
  }
  const auto refuse = [](std::string code, std::string message, int64_t expected = 0) {
    return std::optional<Outcome>(
        Outcome{std::nullopt, Refusal{std::move(code), std::move(message), expected, 0}});
  };
  if (sent.epoch < mark.epoch) {
    return refuse("stale_epoch", "epoch " + std::to_string(sent.epoch) + " of " + sent.client +
                                     " ended, the present one is " + std::to_string(mark.epoch));
  }
  const int64_t last = sent.epoch == mark.epoch ? mark.seq : 0;
  if (sent.seq == last + 1) return std::optional<Outcome>();
  if (sent.seq > last) {
    return refuse("seq_gap",
                  "seq " + std::to_string(sent.seq) + ", expected " + std::to_string(last + 1),
                  last + 1);
  }
  DS_ASSIGN(const std::optional<std::string> entry_bytes,
            batch.get(Column::kDedup, dedup_key(sent.client, sent.epoch, sent.seq)));
  if (!entry_bytes) {
    return corrupt("seq " + std::to_string(sent.seq) + " of " + sent.client +
                   " is below its mark but not stored");
  }
  DS_ASSIGN(const DedupEntry entry, decode_dedup_entry(*entry_bytes));
  if (entry.payload != payload) {
    return refuse("seq_conflict",
                  "seq " + std::to_string(sent.seq) + " is stored with another payload");
  }
  const std::string id = feedback_id(sent.client, sent.epoch, sent.seq);
  return std::optional<Outcome>(Outcome{Ack{entry.offset, id, true}, {}});
}

/// What the record cites must be there: the response of a correction, rating or preference without
/// messages (joined from its trace, since traces expire), the target of a retraction.
Result<std::optional<Refusal>> ReplayStore::State::resolve(const Batch& batch, const Submission& sent,
                                                           Json& record) const {
  const std::string kind = record["kind"];
  if (kind == "retract") return judge_retraction(batch, sent, record);
  const Json* cited = find(record, "response_id");
  const bool joins = kind == "correction" || kind == "rating" || kind == "preference";
  if (!joins || !cited || find(record, "messages")) return std::optional<Refusal>();
  const std::string response_id = *cited;
  DS_ASSIGN(const std::optional<std::string> bytes,
            batch.get(Column::kTrace, trace_key(response_id)));
  if (bytes) {
    DS_ASSIGN(const Trace trace, decode_trace(response_id, *bytes));
    if (trace.at_ms + options.trace_ttl_ms > options.clock->unix_ms()) {
      record["joined"] = {
          {"messages", trace.messages}, {"rejected", trace.answer}, {"version", trace.version}};
      return std::optional<Refusal>();
    }
  }
  return std::optional<Refusal>(
      bad_record(not_found("unknown_response: no trace of " + response_id +
                           ", and the record has no messages of its own")));
}

/// The target must be there and, unless an admin asks, of the retraction's own source.
Result<std::optional<Refusal>> ReplayStore::State::judge_retraction(const Batch& batch,
                                                                    const Submission& sent,
                                                                    const Json& record) const {
  DS_ASSIGN(const std::string target, get_string(record, "target"));
  DS_ASSIGN(const std::optional<std::string> offset, batch.get(Column::kId, target));
  if (!offset) {
    return std::optional<Refusal>(bad_record(not_found("unknown_target: no feedback " + target)));
  }
  if (sent.admin) return std::optional<Refusal>();
  DS_ASSIGN(const std::string source, get_string(record, "source", sent.client));
  DS_ASSIGN(const std::optional<std::string> key, batch.get(Column::kOffset, *offset));
  if (key && key->starts_with(name_prefix(source))) return std::optional<Refusal>();
  return std::optional<Refusal>(
      Refusal{"forbidden",
              target + " is not of the source \"" + source +
                  "\", and a source may retract only its own; an admin may retract any: "
                  "dsctl feedback rm " + target,
              0, 0});
}

Status ReplayStore::State::insert(Batch& batch, FeedbackItem& item, const Sha256Digest& payload) {
  DS_ASSIGN(const uint64_t occurrence, get_number_or(batch, Column::kDraw, item.draw_key, 0));
  batch.put(Column::kDraw, item.draw_key, big_endian(occurrence + 1));
  item.draw_key += "#" + std::to_string(occurrence);
  FateEntry fate;
  fate.state = "stored";
  fate.at_ms = item.received_ms;
  if (item.kind == "rating") {
    fate.state = "waiting";
    fate.reason = "ratings are learned by a later learner";
  }
  const std::string key = log_key(item.source, item.offset), offset = big_endian(item.offset);
  batch.put(Column::kLog, key, encode_item(item));
  batch.put(Column::kOffset, offset, key);
  batch.put(Column::kId, item.id, offset);
  batch.put(Column::kDedup, dedup_client_key(item.client),
            encode(ClientMark{item.epoch, item.seq}));
  batch.put(Column::kDedup, dedup_key(item.client, item.epoch, item.seq),
            encode(DedupEntry{item.offset, payload}));
  batch.put(Column::kState, state_key(fate.state, item.offset), item.kind);
  DS_TRY(add_count(batch, "state", fate.state, 1));
  DS_TRY(add_count(batch, "kind", item.kind, 1));
  DS_TRY(add_count(batch, "source", item.source, 1));
  DS_TRY(add_count(batch, "domain", item.domain, 1));
  batch.put(Column::kFate, offset, encode_fate({fate}));
  return {};
}

// --- commits ---

Status ReplayStore::commit(const Commit& commit) {
  std::lock_guard lock(state_->write_mutex);
  DS_TRY(state_->columns->ensure_writable());
  Batch batch(*state_->columns);
  for (const FateChange& change : commit.fates) DS_TRY(state_->change_fate(batch, change));
  DS_TRY(state_->change_reservoirs(batch, commit));
  for (const auto& [number, round] : commit.rounds) {
    put_json(batch, Column::kRound, big_endian(number), round);
  }
  for (const auto& [name, value] : commit.meta) {
    put_json(batch, Column::kMeta, user_meta_key(name), value);
  }
  for (const auto& [name, value] : commit.hold) put_json(batch, Column::kHold, name, value);
  for (const auto& [name, value] : commit.drift) put_json(batch, Column::kDrift, name, value);
  if (batch.empty()) return {};
  return state_->columns->write(batch, ColumnStore::Durability::kSynced);
}

Status ReplayStore::State::change_fate(Batch& batch, const FateChange& change) const {
  const std::string& state = change.entry.state;
  if (std::find(std::begin(kStates), std::end(kStates), state) == std::end(kStates)) {
    return invalid("\"" + state + "\" is no state of feedback");
  }
  const std::string key = big_endian(change.offset);
  DS_ASSIGN(const std::optional<std::string> bytes, batch.get(Column::kFate, key));
  if (!bytes) return not_found("no feedback at offset " + std::to_string(change.offset));
  DS_ASSIGN(std::vector<FateEntry> fate, decode_fate(*bytes));
  const std::string before = fate.back().state;
  fate.push_back(change.entry);
  batch.put(Column::kFate, key, encode_fate(fate));
  if (before == state) return {};
  const std::string old_key = state_key(before, change.offset);
  DS_ASSIGN(const std::optional<std::string> kind, batch.get(Column::kState, old_key));
  batch.erase(Column::kState, old_key);
  batch.put(Column::kState, state_key(state, change.offset), kind.value_or(""));
  DS_TRY(add_count(batch, "state", before, -1));
  return add_count(batch, "state", state, 1);
}

Status ReplayStore::State::change_reservoirs(Batch& batch, const Commit& commit) const {
  std::map<std::string, std::map<std::string, std::string>> domains;  // domain -> key -> offset
  for (const auto* list : {&commit.insert, &commit.remove}) {
    for (const Example& example : *list) {
      DS_TRY(check_label("the domain of an example", example.domain));
      domains[example.domain];
    }
  }
  for (auto& [domain, slots] : domains) {
    const std::string prefix = name_prefix(domain);
    DS_TRY(columns->scan(Column::kExample, prefix, prefix_end(prefix),
                         ColumnStore::Order::kAscending,
                         [&slots = slots](std::string_view key, std::string_view value) {
                           slots.emplace(key, value);
                           return true;
                         }));
    const std::map<std::string, std::string> before = slots;
    for (const Example& example : commit.remove) {
      if (example.domain != domain) continue;
      slots.erase(example_key(domain, options.seed, example.draw_key));
    }
    for (const Example& example : commit.insert) {
      if (example.domain != domain) continue;
      slots[example_key(domain, options.seed, example.draw_key)] = big_endian(example.offset);
    }
    while (slots.size() > options.reservoir_slots) slots.erase(std::prev(slots.end()));
    for (const auto& [key, offset] : before) {
      if (!slots.contains(key)) batch.erase(Column::kExample, key);
    }
    for (const auto& [key, offset] : slots) {
      const auto old = before.find(key);
      if (old == before.end() || old->second != offset) batch.put(Column::kExample, key, offset);
    }
  }
  return {};
}

}  // namespace ds
