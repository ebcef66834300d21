// SPDX-License-Identifier: Apache-2.0
#include "storage/replay_format.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>

namespace ds {
namespace {

constexpr char kRecordFormat = 1;
constexpr int kMaxStoredDepth = 128;

void append_little_endian(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i));
}

uint64_t checksum(std::string_view key, std::string_view body) {
  return XXH3_64bits_withSeed(body.data(), body.size(), XXH3_64bits(key.data(), key.size()));
}

/// Reads from the front of `rest`; false when it is too short.
bool take_little_endian(std::string_view& rest, int bytes, uint64_t& value) {
  if (rest.size() < static_cast<size_t>(bytes)) return false;
  value = 0;
  for (int i = 0; i < bytes; ++i) {
    value |= static_cast<uint64_t>(static_cast<uint8_t>(rest[static_cast<size_t>(i)])) << (8 * i);
  }
  rest.remove_prefix(static_cast<size_t>(bytes));
  return true;
}

bool take_bytes(std::string_view& rest, int length_bytes, std::string_view& bytes) {
  uint64_t length = 0;
  if (!take_little_endian(rest, length_bytes, length) || rest.size() < length) return false;
  bytes = rest.substr(0, length);
  rest.remove_prefix(length);
  return true;
}

Status read_envelope(const Json& envelope, FeedbackItem& item) {
  DS_ASSIGN(item.id, get_string(envelope, "id"));
  DS_ASSIGN(item.client, get_string(envelope, "client"));
  DS_ASSIGN(item.source, get_string(envelope, "source"));
  DS_ASSIGN(item.kind, get_string(envelope, "kind"));
  DS_ASSIGN(item.domain, get_string(envelope, "domain"));
  DS_ASSIGN(item.draw_key, get_string(envelope, "draw_key"));
  DS_ASSIGN(item.epoch, get_int(envelope, "epoch"));
  DS_ASSIGN(item.seq, get_int(envelope, "seq"));
  DS_ASSIGN(item.received_ms, get_int(envelope, "received_ms"));
  DS_ASSIGN(const int64_t offset, get_int(envelope, "offset"));
  item.offset = static_cast<uint64_t>(offset);
  const Json* record = find(envelope, "record");
  if (!record || !record->is_object()) return corrupt("the envelope holds no record");
  item.record = *record;
  return {};
}

}  // namespace

std::string big_endian(uint64_t value) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (56 - 8 * i));
  return bytes;
}

Result<uint64_t> from_big_endian(std::string_view bytes) {
  if (bytes.size() != 8) {
    return corrupt("a number of " + std::to_string(bytes.size()) + " bytes, expected 8");
  }
  uint64_t value = 0;
  for (const char byte : bytes) value = value << 8 | static_cast<uint8_t>(byte);
  return value;
}

std::string name_prefix(std::string_view name) { return std::string(name) + '\0'; }

std::string log_key(std::string_view source, uint64_t offset) {
  return name_prefix(source) + big_endian(offset);
}

std::string dedup_client_key(std::string_view client) { return name_prefix(client); }

std::string dedup_key(std::string_view client, int64_t epoch, int64_t seq) {
  return name_prefix(client) + big_endian(static_cast<uint64_t>(epoch)) +
         big_endian(static_cast<uint64_t>(seq));
}

std::string state_key(std::string_view state, uint64_t offset) {
  return name_prefix(state) + big_endian(offset);
}

std::string trace_key(std::string_view response_id) { return "r" + std::string(response_id); }

std::string trace_time_key(int64_t at_ms, std::string_view response_id) {
  return "t" + big_endian(static_cast<uint64_t>(at_ms)) + std::string(response_id);
}

std::string count_key(std::string_view group, std::string_view name) {
  return "count/" + std::string(group) + "/" + std::string(name);
}

std::string user_meta_key(std::string_view name) { return "user/" + std::string(name); }

std::string example_key(std::string_view domain, uint64_t seed, std::string_view draw_key) {
  const uint64_t draw = Rng::mix(seed, XXH3_64bits(draw_key.data(), draw_key.size()));
  return name_prefix(domain) + big_endian(draw) + std::string(draw_key);
}

Result<Example> read_example(std::string_view key, std::string_view value) {
  const size_t end = key.find('\0');
  if (end == key.npos || key.size() < end + 9) return corrupt("a reservoir key is too short");
  Example example;
  example.domain = key.substr(0, end);
  example.draw_key = key.substr(end + 9);
  DS_ASSIGN(example.offset, from_big_endian(value));
  return example;
}

std::string encode(const ClientMark& mark) {
  return big_endian(static_cast<uint64_t>(mark.epoch)) +
         big_endian(static_cast<uint64_t>(mark.seq));
}

Result<ClientMark> decode_client_mark(std::string_view bytes) {
  if (bytes.size() != 16) return corrupt("a client mark is not 16 bytes");
  DS_ASSIGN(const uint64_t epoch, from_big_endian(bytes.substr(0, 8)));
  DS_ASSIGN(const uint64_t seq, from_big_endian(bytes.substr(8)));
  return ClientMark{static_cast<int64_t>(epoch), static_cast<int64_t>(seq)};
}

std::string encode(const DedupEntry& entry) {
  return big_endian(entry.offset) +
         std::string(reinterpret_cast<const char*>(entry.payload.data()), entry.payload.size());
}

Result<DedupEntry> decode_dedup_entry(std::string_view bytes) {
  DedupEntry entry;
  if (bytes.size() != 8 + entry.payload.size()) return corrupt("a dedup entry is not 40 bytes");
  DS_ASSIGN(entry.offset, from_big_endian(bytes.substr(0, 8)));
  std::memcpy(entry.payload.data(), bytes.data() + 8, entry.payload.size());
  return entry;
}

std::string encode_item(const FeedbackItem& item) {
  const Json envelope = {{"id", item.id},         {"client", item.client},
                         {"source", item.source}, {"kind", item.kind},
                         {"domain", item.domain}, {"draw_key", item.draw_key},
                         {"epoch", item.epoch},   {"seq", item.seq},
                         {"offset", item.offset}, {"received_ms", item.received_ms},
                         {"record", item.record}};
  const std::string text = dump_json(envelope);
  std::string body(1, kRecordFormat);
  append_little_endian(body, text.size(), 4);
  body += text;
  append_little_endian(body, item.attachments.size(), 4);
  for (const std::string& bytes : item.attachments) {
    append_little_endian(body, bytes.size(), 8);
    body += bytes;
  }
  append_little_endian(body, checksum(log_key(item.source, item.offset), body), 8);
  return body;
}

Result<FeedbackItem> decode_item(std::string_view key, std::string_view bytes) {
  if (bytes.size() < 9) return corrupt("a record of " + std::to_string(bytes.size()) + " bytes");
  std::string_view body = bytes.substr(0, bytes.size() - 8), seal = bytes.substr(body.size());
  uint64_t stored = 0;
  (void)take_little_endian(seal, 8, stored);
  if (stored != checksum(key, body)) return corrupt("the checksum of a record does not match");
  if (body[0] != kRecordFormat) {
    return unsupported("record format " + std::to_string(body[0]) + ", this program knows 1");
  }
  body.remove_prefix(1);
  std::string_view text;
  uint64_t attachments = 0;
  if (!take_bytes(body, 4, text) || !take_little_endian(body, 4, attachments)) {
    return corrupt("a record ends early");
  }
  DS_ASSIGN(const Json envelope, parse_stored(text));
  FeedbackItem item;
  DS_TRY(read_envelope(envelope, item));
  for (uint64_t i = 0; i < attachments; ++i) {
    std::string_view attachment;
    if (!take_bytes(body, 8, attachment)) return corrupt("an attachment ends early");
    item.attachments.emplace_back(attachment);
  }
  return item;
}

std::string encode_fate(const std::vector<FateEntry>& fate) {
  Json list = Json::array();
  for (const FateEntry& entry : fate) {
    Json one = {{"state", entry.state}, {"at_ms", entry.at_ms}};
    if (!entry.version.empty()) one["version"] = entry.version;
    if (entry.step != 0) one["step"] = entry.step;
    if (!entry.reason.empty()) one["reason"] = entry.reason;
    list.push_back(std::move(one));
  }
  return dump_json(list);
}

Result<std::vector<FateEntry>> decode_fate(std::string_view bytes) {
  DS_ASSIGN(const Json list, parse_stored(bytes));
  if (!list.is_array() || list.empty()) return corrupt("a fate is no list of states");
  std::vector<FateEntry> fate;
  for (const Json& one : list) {
    FateEntry entry;
    DS_ASSIGN(entry.state, get_string(one, "state"));
    DS_ASSIGN(entry.at_ms, get_int(one, "at_ms"));
    DS_ASSIGN(entry.version, get_string(one, "version", ""));
    DS_ASSIGN(entry.step, get_int(one, "step", 0));
    DS_ASSIGN(entry.reason, get_string(one, "reason", ""));
    fate.push_back(std::move(entry));
  }
  return fate;
}

std::string encode_trace(const Trace& trace) {
  return dump_json({{"version", trace.version},
                    {"source", trace.source},
                    {"at_ms", trace.at_ms},
                    {"messages", trace.messages},
                    {"answer", trace.answer}});
}

Result<Trace> decode_trace(std::string_view response_id, std::string_view bytes) {
  DS_ASSIGN(const Json stored, parse_stored(bytes));
  Trace trace;
  trace.response_id = response_id;
  DS_ASSIGN(trace.version, get_string(stored, "version"));
  DS_ASSIGN(trace.source, get_string(stored, "source"));
  DS_ASSIGN(trace.at_ms, get_int(stored, "at_ms"));
  DS_ASSIGN(trace.answer, get_string(stored, "answer"));
  if (const Json* messages = find(stored, "messages")) trace.messages = *messages;
  return trace;
}

Result<Json> parse_stored(std::string_view text) { return parse_json(text, kMaxStoredDepth); }

}  // namespace ds
