// SPDX-License-Identifier: Apache-2.0
// Replies of a helper process. The first byte says to which call; whatever the others are, the
// reader gives a verdict, stays inside what it was given to write, and lets no NaN, text that is
// not UTF-8 or number beyond a limit pass.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "plugin/abi.h"
#include "plugin/isolated_replies.h"
#include "plugin/tensor_view.h"
#include "plugin/utf8.h"

namespace {

using namespace ds;

void require(bool good) {
  if (!good) std::abort();
}
bool finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}
/// A call's own status and log lines are judged, too.
JudgedReply judge(std::string_view reply, const ReplyReader& read) {
  ds_status st{};
  const auto log = [](int32_t level, std::string_view line) {
    require(level >= DS_LOG_TRACE && level <= DS_LOG_ERROR && valid_utf8(line));
  };
  const JudgedReply judged = judge_reply(reply, log, read, &st);
  if (judged.garbage.empty()) {
    require(judged.code >= DS_OK && judged.code <= DS_E_INTERNAL && st.len <= sizeof st.text);
    require(valid_utf8({st.text, st.len}));
  }
  return judged;
}
bool believed(const JudgedReply& judged) { return judged.garbage.empty() && judged.code == DS_OK; }

ds_code take_text(void*, const void* bytes, uint64_t n) {
  require(valid_utf8({static_cast<const char*>(bytes), static_cast<size_t>(n)}));
  return DS_OK;
}
ds_code take_bytes(void* ctx, const void* bytes, uint64_t n) {
  static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
  return DS_OK;
}
ds_code take_finding(void*, const ds_finding* f) {
  for (const ds_str text : {f->rule, f->message, f->fix}) require(valid_utf8(text_of(text)));
  require(f->severity >= DS_SEVERITY_ERROR && f->severity <= DS_SEVERITY_NOTE);
  require(f->confidence >= 0 && f->confidence <= 1);
  return DS_OK;
}

void texts(std::string_view reply, bool text) {
  std::string state;
  const ds_sink sink{sizeof sink, 0, &state, text ? &take_text : &take_bytes};
  judge(reply, [&](FlatReader& from) {
    return text ? read_text_sink(from, &sink) : read_sink(from, &sink);
  });
}

void hits(std::string_view reply) {
  constexpr uint64_t kMost = 5;
  std::vector<ds_hit> out(kMost);
  uint64_t n = 0;
  const auto judged =
      judge(reply, [&](FlatReader& from) { return read_hits(from, out.data(), kMost, &n); });
  require(n <= kMost);
  for (uint64_t i = 0; believed(judged) && i < n; ++i) require(std::isfinite(out[i].score));
}

void curriculum(std::string_view reply, bool picks) {
  std::vector<uint64_t> keys(4);
  std::vector<float> difficulty(4);
  uint64_t n = 0;
  const auto judged = judge(reply, [&](FlatReader& from) {
    return picks ? read_picks(from, keys.size(), keys.data(), &n)
                 : read_difficulties(from, difficulty.data(), difficulty.size());
  });
  require(n <= keys.size() && (!believed(judged) || finite(difficulty)));
}

void quantizer(std::string_view reply, unsigned call) {
  ds_qformat format{};
  format.size = sizeof format;
  format.packed_bytes = 24, format.scale_bytes = 8, format.zero_bytes = 0;
  std::vector<char> packed(24), scales(8);
  const ds_qweight weight{sizeof weight, 0, 2, 3, &format, packed.data(), scales.data(), nullptr};
  std::vector<float> w(6);
  const TensorView w_t(w.data(), kAbiF32, {2, 3});
  ds_qformat said{};
  said.size = sizeof said;
  const auto judged = judge(reply, [&](FlatReader& from) {
    return call == 0   ? read_format(from, &said)
           : call == 1 ? read_weight(from, weight)
                       : read_finite(from, *w_t.get(), "a weight is NaN or infinity");
  });
  if (!believed(judged)) return;
  require(std::isfinite(said.rel_tol) && said.fused == 0 && said.size == sizeof said);
  require(finite(w));
}

void encoder_plan(std::string_view reply) {
  constexpr uint64_t kMost = 1 << 20;
  ds_plan plan{};
  plan.size = sizeof plan;
  const auto judged =
      judge(reply, [&](FlatReader& from) { return read_encoder_plan(from, kMost, &plan); });
  if (!believed(judged)) return;
  require(plan.shape[0] >= 0 && plan.shape[1] > 0 && plan.workspace_bytes == 0);
  require(plan.shape[0] <= static_cast<int64_t>(kMost) &&
          plan.shape[0] * plan.shape[1] * 4 <= static_cast<int64_t>(kMost));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view reply(reinterpret_cast<const char*>(data) + 1, size - 1);
  uint64_t version = 0;
  switch (data[0] % 12) {
    case 0:
      judge(reply, {});  // create, put, erase ...: no results
      break;
    case 1:
    case 2:
      texts(reply, data[0] % 12 == 1);
      break;
    case 3:
      judge(reply, [&](FlatReader& from) { return read_findings(from, nullptr, &take_finding); });
      break;
    case 4:
      judge(reply, [&](FlatReader& from) { return read_version(from, &version); });
      break;
    case 5:
      hits(reply);
      break;
    case 6:
    case 7:
      curriculum(reply, data[0] % 12 == 6);
      break;
    case 8:
    case 9:
    case 10:
      quantizer(reply, data[0] % 12 - 8u);
      break;
    default:
      encoder_plan(reply);
  }
  return 0;
}
