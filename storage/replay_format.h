// SPDX-License-Identifier: Apache-2.0
// Keys and values of the replay store as bytes. FORMAT.md describes them; a change here is a new
// kStoreFormat. Numbers in keys are big-endian, so that keys sort as numbers do.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "storage/hash.h"
#include "storage/replay_store.h"

namespace ds {

inline constexpr int kStoreFormat = 1;

std::string big_endian(uint64_t value);
/// kCorrupt unless `bytes` are 8.
Result<uint64_t> from_big_endian(std::string_view bytes);

std::string log_key(std::string_view source, uint64_t offset);
std::string dedup_client_key(std::string_view client);                       ///< -> ClientMark
std::string dedup_key(std::string_view client, int64_t epoch, int64_t seq);  ///< -> DedupEntry
std::string state_key(std::string_view state, uint64_t offset);
std::string trace_key(std::string_view response_id);
std::string trace_time_key(int64_t at_ms, std::string_view response_id);
std::string count_key(std::string_view group, std::string_view name);
std::string user_meta_key(std::string_view name);
/// Key prefix of one name in log, state, ex and dedup: the name and NUL.
std::string name_prefix(std::string_view name);
/// Sorts a reservoir by its draw: the smallest stay. See Options::seed.
std::string example_key(std::string_view domain, uint64_t seed, std::string_view draw_key);
/// The parts of example_key(); the offset is the value.
Result<Example> read_example(std::string_view key, std::string_view value);

/// The newest epoch of a client and the last sequence number stored in it.
struct ClientMark {
  int64_t epoch = -1, seq = 0;
};
std::string encode(const ClientMark& mark);
Result<ClientMark> decode_client_mark(std::string_view bytes);

struct DedupEntry {
  uint64_t offset = 0;
  Sha256Digest payload{};
};
std::string encode(const DedupEntry& entry);
Result<DedupEntry> decode_dedup_entry(std::string_view bytes);

/// The record of `item` (without its fate), sealed with a checksum over its key and bytes.
std::string encode_item(const FeedbackItem& item);
/// `key` as in the log: the checksum fails when the value belongs to another one.
Result<FeedbackItem> decode_item(std::string_view key, std::string_view bytes);

std::string encode_fate(const std::vector<FateEntry>& fate);
Result<std::vector<FateEntry>> decode_fate(std::string_view bytes);

std::string encode_trace(const Trace& trace);
Result<Trace> decode_trace(std::string_view response_id, std::string_view bytes);

/// Stored JSON nests up to what the door allows, plus the envelope.
Result<Json> parse_stored(std::string_view text);

}  // namespace ds
