// SPDX-License-Identifier: Apache-2.0
#include "plugin/isolated_replies.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>

#include "plugin/abi.h"
#include "plugin/utf8.h"

namespace ds {
namespace {

constexpr uint64_t kMostFindings = 100'000;
constexpr ds_code kLastCode = DS_E_INTERNAL;

/// `n` values of T into `out`.
template <class T>
void read_array(FlatReader& from, T* out, uint64_t n) {
  for (uint64_t i = 0; i < n && from.ok(); ++i) out[i] = from.get<T>();
}

void read_bytes(FlatReader& from, void* out, uint64_t n) {
  const std::string_view bytes = from.get_text();
  if (bytes.size() != n) from.fail("a buffer has another size");
  if (from.ok() && n != 0) std::memcpy(out, bytes.data(), n);
}

std::string_view read_utf8(FlatReader& from, const char* broken) {
  const std::string_view text = from.get_text();
  if (!valid_utf8(text)) from.fail(broken);
  return text;
}

void read_logs(FlatReader& from, const HelperLog& log) {
  const uint64_t lines = from.get_count(sizeof(int32_t) + sizeof(uint64_t));
  if (lines > kMostHelperLogs) from.fail("it has too many log lines");
  for (uint64_t i = 0; i < lines && from.ok(); ++i) {
    const auto level = from.get<int32_t>();
    const std::string_view line = read_utf8(from, "a log line is broken");
    if (level < DS_LOG_TRACE || level > DS_LOG_ERROR) from.fail("a log line is broken");
    if (from.ok() && log) log(level, line);
  }
}

}  // namespace

ds_code isolated_error(ds_status* st, ds_code code, std::string_view text, uint32_t flags) {
  if (st == nullptr) return code;
  *st = {};
  st->code = code;
  st->flags = flags;
  size_t n = std::min(text.size(), sizeof st->text);
  while (n < text.size() && n > 0 && (text[n] & 0xc0) == 0x80) --n;  // no piece of a UTF-8 letter
  st->len = static_cast<uint32_t>(n);
  std::memcpy(st->text, text.data(), st->len);
  return code;
}

JudgedReply judge_reply(std::string_view reply, const HelperLog& log, const ReplyReader& read,
                        ds_status* st) {
  FlatReader from(reply);
  const auto code = from.get<ds_code>();
  const auto native = from.get<int32_t>();
  const auto flags = from.get<uint32_t>();
  const std::string_view text = from.get_text();
  if (code < DS_OK || code > kLastCode) from.fail("its code is none of the ABI's");
  if (text.size() > sizeof st->text || !valid_utf8(text)) from.fail("its text is broken");
  read_logs(from, log);
  ds_code ours = code;
  if (from.ok() && code == DS_OK && read) ours = read(from);
  if (from.ok() && code == DS_OK && ours == DS_OK && !from.at_end())
    from.fail("something follows it");
  if (!from.ok()) return {DS_E_INTERNAL, std::string("reply: ") + from.why()};
  if (code != DS_OK) {
    isolated_error(st, code, text, flags);
    if (st != nullptr) st->native = native;
  } else if (ours != DS_OK) {
    isolated_error(st, ours, "stopped by its caller");
  }
  return {ours, {}};
}

ds_code read_sink(FlatReader& from, const ds_sink* sink) {
  const std::string_view bytes = from.get_text();
  return from.ok() ? sink->write(sink->ctx, bytes.data(), bytes.size()) : DS_E_INTERNAL;
}

ds_code read_text_sink(FlatReader& from, const ds_sink* sink) {
  const std::string_view text = read_utf8(from, "a text is not UTF-8");
  return from.ok() ? sink->write(sink->ctx, text.data(), text.size()) : DS_E_INTERNAL;
}

ds_code read_findings(FlatReader& from, void* ctx, ds_code (*emit)(void*, const ds_finding*)) {
  constexpr uint64_t kLeast = 5 * sizeof(uint32_t) + 3 * sizeof(uint64_t) + sizeof(float);
  const uint64_t n = from.get_count(kLeast);
  if (n > kMostFindings) from.fail("it has too many findings");
  for (uint64_t i = 0; i < n; ++i) {
    ds_finding f{};
    f.size = sizeof f;
    f.severity = from.get<uint32_t>();
    f.line = from.get<uint32_t>();
    f.column = from.get<uint32_t>();
    f.end_line = from.get<uint32_t>();
    f.end_column = from.get<uint32_t>();
    for (ds_str* text : {&f.rule, &f.message, &f.fix})
      *text = abi_str(read_utf8(from, "a finding's text is not UTF-8"));
    f.confidence = from.get<float>();
    if (f.severity < DS_SEVERITY_ERROR || f.severity > DS_SEVERITY_NOTE)
      from.fail("a finding's severity is none of the ABI's");
    if (!(f.confidence >= 0 && f.confidence <= 1))
      from.fail("a finding's confidence is not within 0 and 1");
    if (!from.ok()) return DS_E_INTERNAL;
    if (const ds_code code = emit(ctx, &f); code != DS_OK) return code;
  }
  return DS_OK;
}

ds_code read_version(FlatReader& from, uint64_t* version) {
  read_array(from, version, 1);
  return DS_OK;
}

ds_code read_hits(FlatReader& from, ds_hit* out, uint64_t max, uint64_t* n) {
  const uint64_t count = from.get_count(sizeof(uint64_t) + sizeof(float) + sizeof(uint32_t));
  if (count > max) from.fail("it has more hits than were asked for");
  for (uint64_t i = 0; i < count && from.ok(); ++i) {
    out[i].id = from.get<uint64_t>();
    out[i].score = from.get<float>();
    out[i].flags = from.get<uint32_t>();
    if (!std::isfinite(out[i].score)) from.fail("a hit's score is NaN or infinity");
  }
  *n = from.ok() ? count : 0;
  return DS_OK;
}

ds_code read_picks(FlatReader& from, uint64_t budget, uint64_t* keys, uint64_t* n) {
  const uint64_t count = from.get_count(sizeof(uint64_t));
  if (count > budget) from.fail("it picks more than the budget");
  read_array(from, keys, from.ok() ? count : 0);
  *n = from.ok() ? count : 0;
  return DS_OK;
}

ds_code read_difficulties(FlatReader& from, float* difficulty, uint64_t n) {
  read_array(from, difficulty, n);
  for (const float d : std::span(difficulty, from.ok() ? n : 0)) {
    if (!std::isfinite(d)) from.fail("a difficulty is NaN or infinity");
  }
  return DS_OK;
}

ds_code read_format(FlatReader& from, ds_qformat* out) {
  ds_qformat f{};
  const std::string_view bytes = from.get_text();
  if (bytes.size() != sizeof f) from.fail("a format has another size");
  if (!from.ok()) return DS_E_INTERNAL;
  std::memcpy(&f, bytes.data(), sizeof f);
  if (!std::isfinite(f.rel_tol)) from.fail("a format's tolerance is NaN or infinity");
  f.fused = 0;
  f.size = std::min<uint32_t>(out->size, sizeof f);
  std::memcpy(out, &f, f.size);
  return DS_OK;
}

ds_code read_weight(FlatReader& from, const ds_qweight& out) {
  const ds_qformat f = full_struct(out.format);
  read_bytes(from, out.packed, f.packed_bytes);
  read_bytes(from, out.scales, f.scale_bytes);
  read_bytes(from, out.zeros, f.zero_bytes);
  return DS_OK;
}

ds_code read_encoder_plan(FlatReader& from, uint64_t most_bytes, ds_plan* out) {
  const auto tokens = from.get<int64_t>(), width = from.get<int64_t>();
  const uint64_t most = most_bytes / sizeof(float);
  if (from.ok() && (tokens < 0 || width <= 0 ||
                    static_cast<uint64_t>(tokens) > most / static_cast<uint64_t>(width)))
    from.fail("an output's shape is not positive or too large");
  if (!from.ok()) return DS_E_INTERNAL;
  ds_plan plan{};
  plan.size = std::min<uint32_t>(out->size, sizeof plan);
  plan.shape[0] = tokens;
  plan.shape[1] = width;
  std::memcpy(out, &plan, plan.size);
  return DS_OK;
}

ds_code read_finite(FlatReader& from, const ds_tensor& out, const char* not_finite) {
  read_bytes(from, out.data, out.bytes);
  const auto* values = static_cast<const float*>(out.data);
  for (const float v : std::span(values, from.ok() ? out.bytes / sizeof(float) : 0)) {
    if (std::isfinite(v)) continue;
    from.fail(not_finite);
    break;
  }
  return DS_OK;
}

}  // namespace ds
