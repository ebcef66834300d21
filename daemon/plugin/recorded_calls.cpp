// SPDX-License-Identifier: Apache-2.0
#include "plugin/recorded_calls.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "plugin/tensor_view.h"

namespace ds {
namespace {

std::vector<float> waves(size_t n, float step) {
  std::vector<float> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = std::sin(step * static_cast<float>(i + 1));
  return out;
}

Buffer bytes_of(const std::vector<float>& values) {
  Buffer out(values.size() * sizeof(float));
  std::memcpy(out.data(), values.data(), out.bytes());
  return out;
}

/// Rows of one sequence of three tokens on one page of an FP32 cache.
AttentionCall small_attention(int64_t rows) {
  AttentionCall call;
  call.decode = rows == 1;
  call.rows = rows, call.keys = 3, call.heads = 2, call.kv_heads = 1, call.dim = 16;
  call.scale = 0.25f;
  call.element = kAbiF32;
  call.page_tokens = 32;
  call.q = waves(static_cast<size_t>(rows * call.heads * call.dim), 0.3f);
  const auto page = static_cast<size_t>(call.kv_heads * call.page_tokens * call.dim);
  call.k = bytes_of(waves(page, 0.7f));
  call.v = bytes_of(waves(page, 1.1f));
  return call;
}

LinearCall small_linear() {
  LinearCall call;
  call.rows = 2, call.n = 16, call.k = 64;
  call.x = waves(static_cast<size_t>(call.rows * call.k), 0.5f);
  call.w = waves(static_cast<size_t>(call.n * call.k), 0.9f);
  return call;
}

std::string rows(int64_t n) { return std::to_string(n) + (n == 1 ? " row, " : " rows, "); }

size_t bytes_of(const RecordedCall& call) {
  constexpr size_t kFinding = 512;  // about
  return call.input->bytes() + call.output.findings.size() * kFinding +
         (call.output.values.size() + call.output.weights.size()) * 4;
}

}  // namespace

CallSort CallInput::sort() const {
  if (const auto* attention = std::get_if<AttentionCall>(&of))
    return attention->decode ? CallSort::kDecode : CallSort::kPrefill;
  return std::holds_alternative<LinearCall>(of) ? CallSort::kLinear : CallSort::kAnalyse;
}

const char* CallInput::name() const {
  static constexpr const char* names[kCallSorts] = {"prefill", "decode", "linear", "analyse"};
  return names[static_cast<size_t>(sort())];
}

std::string CallInput::size() const {
  if (const auto* a = std::get_if<AttentionCall>(&of))
    return rows(a->rows) + std::to_string(a->keys) + " keys";
  if (const auto* l = std::get_if<LinearCall>(&of))
    return rows(l->rows) + std::to_string(l->n) + " x " + std::to_string(l->k);
  return std::to_string(std::get<ToolCall>(of).text.size()) + " bytes";
}

size_t CallInput::bytes() const {
  if (const auto* a = std::get_if<AttentionCall>(&of))
    return a->q.size() * 4 + a->k.bytes() + a->v.bytes();
  if (const auto* l = std::get_if<LinearCall>(&of)) return (l->x.size() + l->w.size()) * 4;
  return std::get<ToolCall>(of).text.size();
}

std::vector<CallInput> small_calls(uint32_t kind) {
  std::vector<CallInput> out;
  if (kind == DS_KIND_ATTENTION) {
    out.push_back({small_attention(3)});
    out.push_back({small_attention(1)});
  }
  if (kind == DS_KIND_QUANTIZER) out.push_back({small_linear()});
  return out;
}

bool CallRecorder::pick(Turn& turn, CallSort sort, uint64_t n, uint64_t next) {
  const uint64_t step = sort == CallSort::kAnalyse ? 1 : std::min(3 * n + 1, kEvery);
  return turn.next.compare_exchange_strong(next, n + step, std::memory_order_relaxed);
}

void CallRecorder::keep(RecordedCall call) {
  auto kept = std::make_shared<const RecordedCall>(std::move(call));
  std::lock_guard lock(mutex_);
  const CallSort sort = kept->input->sort();
  calls_.push_back(std::move(kept));
  const auto same = [sort](const auto& c) { return c->input->sort() == sort; };
  if (std::count_if(calls_.begin(), calls_.end(), same) > std::ptrdiff_t{kMostOfASort})
    calls_.erase(std::find_if(calls_.begin(), calls_.end(), same));
  size_t bytes = 0;
  for (const auto& c : calls_) bytes += bytes_of(*c);
  for (; bytes > kMostBytes && calls_.size() > 1; calls_.pop_front())
    bytes -= bytes_of(*calls_.front());
}

RecordedCalls CallRecorder::calls() const {
  std::lock_guard lock(mutex_);
  return {calls_.begin(), calls_.end()};
}

}  // namespace ds
