// SPDX-License-Identifier: Apache-2.0
// The reading half of the replay store, and the traces (which are written without a sync).
#include <algorithm>

#include "storage/record.h"
#include "storage/replay_format.h"
#include "storage/replay_state.h"

namespace ds {
namespace {

using Order = ColumnStore::Order;

constexpr int kMaxTrimmedPerPut = 64;  // a put adds one trace, so the backlog only shrinks

/// The number that ends a key of offset, log or state.
uint64_t offset_of(std::string_view key) {
  if (key.size() < 8) return 0;
  return *from_big_endian(key.substr(key.size() - 8));
}

std::vector<std::pair<std::string, Json>> named_values(const ColumnStore& columns, Column column) {
  std::vector<std::pair<std::string, Json>> found;
  (void)columns.scan(column, "", "", Order::kAscending,
                     [&](std::string_view key, std::string_view value) {
                       if (auto json = parse_stored(value); json.ok()) {
                         found.emplace_back(key, std::move(*json));
                       }
                       return true;
                     });
  return found;
}

}  // namespace

std::string ReplayStore::store_id() const { return state_->store_id; }
uint64_t ReplayStore::last_offset() const { return state_->last_offset; }
Status ReplayStore::health() const { return state_->columns->health(); }

int64_t ReplayStore::last_seq(const std::string& client, int64_t epoch) const {
  if (epoch < 0) return 0;
  int64_t last = 0;
  // Dedup entries are never removed, so the newest of an epoch is its last sequence number.
  (void)state_->columns->scan(Column::kDedup, dedup_key(client, epoch, 0),
                              dedup_key(client, epoch, INT64_MAX), Order::kDescending,
                              [&](std::string_view key, std::string_view) {
                                last = static_cast<int64_t>(offset_of(key));
                                return false;
                              });
  return last;
}

// --- items ---

Result<FeedbackItem> ReplayStore::State::read_item(std::string_view key) const {
  const std::string where = "record at offset " + std::to_string(offset_of(key));
  DS_ASSIGN(const std::optional<std::string> bytes, columns->get(Column::kLog, key));
  if (!bytes) return not_found(where + ": none");
  auto item = decode_item(key, *bytes);
  if (!item.ok()) return item.status().in(where);
  DS_ASSIGN(const std::optional<std::string> fate,
            columns->get(Column::kFate, big_endian(item->offset)));
  if (!fate) return corrupt(where + " has no fate");
  auto entries = decode_fate(*fate);
  if (!entries.ok()) return entries.status().in(where);
  item->fate = std::move(*entries);
  return item;
}

Result<FeedbackItem> ReplayStore::get(uint64_t offset) const {
  DS_ASSIGN(const std::optional<std::string> key,
            state_->columns->get(Column::kOffset, big_endian(offset)));
  if (!key) return not_found("no feedback at offset " + std::to_string(offset));
  return state_->read_item(*key);
}

Result<FeedbackItem> ReplayStore::get(const std::string& id) const {
  DS_ASSIGN(const std::optional<std::string> offset, state_->columns->get(Column::kId, id));
  if (!offset) return not_found("no feedback with id " + id);
  DS_ASSIGN(const uint64_t number, from_big_endian(*offset));
  return get(number);
}

std::vector<FeedbackItem> ReplayStore::list(const FeedbackFilter& filter) const {
  // Three indexes end in the offset; the narrowest given one is walked.
  Column column = Column::kOffset;
  std::string prefix;
  if (!filter.state.empty()) {
    column = Column::kState;
    prefix = name_prefix(filter.state);
  } else if (!filter.source.empty()) {
    column = Column::kLog;
    prefix = name_prefix(filter.source);
  }
  std::string from = prefix, to = prefix_end(prefix);
  if (filter.after_offset > 0) {
    filter.newest_first ? to = prefix + big_endian(filter.after_offset)
                        : from = prefix + big_endian(filter.after_offset + 1);
  }
  std::vector<FeedbackItem> items;
  if (filter.limit <= 0) return items;
  const auto visit = [&](std::string_view key, std::string_view) {
    auto item = get(offset_of(key));
    if (!item.ok() && item.status().code() == Code::kNotFound) return true;
    if (!item.ok()) {  // shown, not hidden: a damaged record is news
      FeedbackItem damaged;
      damaged.offset = offset_of(key);
      damaged.kind = "corrupt";
      damaged.record = {{"error", item.status().message()}};
      items.push_back(std::move(damaged));
    } else if ((filter.source.empty() || item->source == filter.source) &&
               (filter.kind.empty() || item->kind == filter.kind)) {
      items.push_back(std::move(*item));
    }
    return items.size() < static_cast<size_t>(filter.limit);
  };
  (void)state_->columns->scan(column, from, to,
                              filter.newest_first ? Order::kDescending : Order::kAscending, visit);
  return items;
}

std::vector<uint64_t> ReplayStore::offsets_in_state(const std::string& state) const {
  std::vector<uint64_t> offsets;
  const std::string prefix = name_prefix(state);
  (void)state_->columns->scan(Column::kState, prefix, prefix_end(prefix), Order::kAscending,
                              [&](std::string_view key, std::string_view) {
                                offsets.push_back(offset_of(key));
                                return true;
                              });
  return offsets;
}

std::vector<std::pair<uint64_t, std::string>> ReplayStore::kinds_in_state(
    const std::string& state) const {
  std::vector<std::pair<uint64_t, std::string>> found;
  const std::string prefix = name_prefix(state);
  (void)state_->columns->scan(Column::kState, prefix, prefix_end(prefix), Order::kAscending,
                              [&](std::string_view key, std::string_view kind) {
                                found.emplace_back(offset_of(key), kind);
                                return true;
                              });
  for (auto& [offset, kind] : found) {
    if (!kind.empty()) continue;
    if (const auto item = get(offset); item.ok()) kind = item->kind;
  }
  return found;
}

// --- reservoirs, rounds, named values ---

std::vector<Example> ReplayStore::examples(const std::string& domain) const {
  std::vector<Example> found;
  const std::string prefix = name_prefix(domain);
  (void)state_->columns->scan(Column::kExample, prefix, prefix_end(prefix), Order::kAscending,
                              [&](std::string_view key, std::string_view value) {
                                if (auto example = read_example(key, value); example.ok()) {
                                  found.push_back(std::move(*example));
                                }
                                return true;
                              });
  std::sort(found.begin(), found.end(),
            [](const Example& a, const Example& b) { return a.draw_key < b.draw_key; });
  return found;
}

std::vector<std::string> ReplayStore::domains() const {
  std::vector<std::string> found;
  std::string from;
  bool more = true;
  while (more) {  // one seek per domain, whatever its size
    more = false;
    (void)state_->columns->scan(Column::kExample, from, "", Order::kAscending,
                                [&](std::string_view key, std::string_view) {
                                  found.emplace_back(key.substr(0, key.find('\0')));
                                  from = prefix_end(name_prefix(found.back()));
                                  more = true;
                                  return false;
                                });
  }
  return found;
}

Result<Json> ReplayStore::round(uint64_t number) const {
  DS_ASSIGN(const std::optional<std::string> bytes,
            state_->columns->get(Column::kRound, big_endian(number)));
  if (!bytes) return not_found("no round " + std::to_string(number));
  return parse_stored(*bytes);
}

std::vector<std::pair<uint64_t, Json>> ReplayStore::rounds(uint64_t from) const {
  std::vector<std::pair<uint64_t, Json>> found;
  (void)state_->columns->scan(Column::kRound, big_endian(from), "", Order::kAscending,
                              [&](std::string_view key, std::string_view value) {
                                if (auto json = parse_stored(value); json.ok()) {
                                  found.emplace_back(offset_of(key), std::move(*json));
                                }
                                return true;
                              });
  return found;
}

uint64_t ReplayStore::last_round() const {
  uint64_t last = 0;
  (void)state_->columns->scan(Column::kRound, "", "", Order::kDescending,
                              [&](std::string_view key, std::string_view) {
                                last = offset_of(key);
                                return false;
                              });
  return last;
}

std::optional<Json> ReplayStore::meta(const std::string& name) const {
  const auto bytes = state_->columns->get(Column::kMeta, user_meta_key(name));
  if (!bytes.ok() || !*bytes) return std::nullopt;
  auto json = parse_stored(**bytes);
  if (!json.ok()) return std::nullopt;
  return std::move(*json);
}

std::vector<std::pair<std::string, Json>> ReplayStore::hold() const {
  return named_values(*state_->columns, Column::kHold);
}

std::vector<std::pair<std::string, Json>> ReplayStore::drift() const {
  return named_values(*state_->columns, Column::kDrift);
}

// --- traces ---

Status ReplayStore::put_trace(const Trace& trace) {
  DS_TRY(check_label("response_id", trace.response_id));
  State& state = *state_;
  std::lock_guard lock(state.trace_mutex);
  Batch batch(*state.columns);
  uint64_t count = state.traces, bytes = state.trace_bytes;
  const std::string key = trace_key(trace.response_id);
  DS_ASSIGN(const std::optional<std::string> old, batch.get(Column::kTrace, key));
  if (old) {
    DS_ASSIGN(const Trace before, decode_trace(trace.response_id, *old));
    batch.erase(Column::kTrace, trace_time_key(before.at_ms, trace.response_id));
    count -= 1;
    bytes -= std::min<uint64_t>(bytes, old->size());
  }
  std::string value = encode_trace(trace);
  count += 1;
  bytes += value.size();
  batch.put(Column::kTrace, trace_time_key(trace.at_ms, trace.response_id),
            big_endian(value.size()));
  batch.put(Column::kTrace, key, std::move(value));
  DS_TRY(state.trim_traces(batch, count, bytes));
  DS_TRY(state.columns->write(batch, ColumnStore::Durability::kUnsynced));
  state.traces = count;
  state.trace_bytes = bytes;
  return {};
}

/// Drops the oldest traces while they are expired or all together are too big.
Status ReplayStore::State::trim_traces(Batch& batch, uint64_t& count, uint64_t& bytes) const {
  const int64_t oldest_kept_ms = options.clock->unix_ms() - options.trace_ttl_ms;
  int trimmed = 0;
  return columns->scan(
      Column::kTrace, "t", "u", Order::kAscending,
      [&](std::string_view key, std::string_view value) {
        const auto at_ms = static_cast<int64_t>(*from_big_endian(key.substr(1, 8)));
        const bool expired = at_ms <= oldest_kept_ms;
        if ((!expired && bytes <= options.trace_max_bytes) || trimmed == kMaxTrimmedPerPut) {
          return false;
        }
        const auto size = from_big_endian(value);
        batch.erase(Column::kTrace, std::string(key));
        batch.erase(Column::kTrace, trace_key(key.substr(9)));
        bytes -= std::min(bytes, size.ok() ? *size : 0);
        count -= std::min<uint64_t>(count, 1);
        trimmed += 1;
        return true;
      });
}

Result<Trace> ReplayStore::get_trace(const std::string& response_id) const {
  DS_ASSIGN(const std::optional<std::string> bytes,
            state_->columns->get(Column::kTrace, trace_key(response_id)));
  if (bytes) {
    DS_ASSIGN(Trace trace, decode_trace(response_id, *bytes));
    const int64_t now_ms = state_->options.clock->unix_ms();
    if (trace.at_ms + state_->options.trace_ttl_ms > now_ms) return trace;
  }
  return not_found("unknown_response: no trace of " + response_id);
}

// --- the store as a whole ---

Result<std::vector<std::pair<std::string, uint64_t>>> ReplayStore::State::counts(
    const std::string& group) const {
  std::vector<std::pair<std::string, uint64_t>> found;
  const std::string prefix = count_key(group, "");
  DS_TRY(columns->scan(Column::kMeta, prefix, prefix_end(prefix), Order::kAscending,
                       [&](std::string_view key, std::string_view value) {
                         const auto count = from_big_endian(value);
                         found.emplace_back(key.substr(prefix.size()), count.ok() ? *count : 0);
                         return true;
                       }));
  return found;
}

Json ReplayStore::stats() const {
  State& state = *state_;
  Json stats = {{"store", state.store_id},
                {"last_offset", state.last_offset.load()},
                {"bytes", state.columns->bytes()},
                {"batches", state.batches.load()},
                {"appended", state.appended.load()}};
  for (const char* group : {"state", "kind", "source", "domain"}) {
    Json& counts = stats[group] = Json::object();
    if (const auto found = state.counts(group); found.ok()) {
      for (const auto& [name, count] : *found) counts[name] = count;
    }
  }
  {
    std::lock_guard lock(state.queue_mutex);
    stats["pending"] = {{"items", state.pending_items}, {"bytes", state.pending_bytes}};
  }
  {
    std::lock_guard lock(state.trace_mutex);
    stats["traces"] = {{"items", state.traces}, {"bytes", state.trace_bytes}};
  }
  if (const Status health = state.columns->health(); !health.ok()) {
    stats["failure"] = health.message();
  }
  return stats;
}

Status ReplayStore::verify() const {
  DS_TRY(state_->columns->verify());
  Status bad;
  DS_TRY(state_->columns->scan(Column::kOffset, "", "", Order::kAscending,
                               [&](std::string_view offset, std::string_view key) {
                                 const auto item = state_->read_item(key);
                                 if (!item.ok()) {
                                   bad = item.status();
                                 } else if (item->offset != offset_of(offset)) {
                                   bad = corrupt("offset " + std::to_string(offset_of(offset)) +
                                                 " leads to the record of " +
                                                 std::to_string(item->offset));
                                 }
                                 return bad.ok();
                               }));
  return bad;
}

Status ReplayStore::backup(const std::string& directory) const {
  FileSystem& fs = *state_->options.fs;
  if (fs.exists(directory)) return conflict(directory + " exists already");
  DS_TRY(fs.make_directories(directory));
  DS_TRY(state_->columns->checkpoint(directory + "/db"));
  return fs.sync_directory(directory);
}

}  // namespace ds
