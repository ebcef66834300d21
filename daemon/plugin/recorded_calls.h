// SPDX-License-Identifier: Apache-2.0
// The last few real calls of a component with what they gave: what a new generation is compared on,
// two components are told apart by, and a component is timed with. In memory only, bounded in
// number and bytes, and sampled: a call that is not kept reads and writes a counter, or reads
// one flag when recording is off.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "ds/plugin.h"
#include "kernels/buffer.h"
#include "storage/json.h"

namespace ds {

enum class CallSort { kPrefill, kDecode, kLinear, kAnalyse };
constexpr size_t kCallSorts = 4;

/// The last `rows` rows of one sequence, which then has `keys` keys.
struct AttentionCall {
  bool decode = false;
  uint32_t layer = 0;
  int64_t rows = 0, keys = 0, heads = 0, kv_heads = 0, dim = 0;
  float scale = 0, softcap = 0;
  ds_dtype element{};    ///< of the pages
  std::vector<float> q;  ///< [rows, heads, dim]
  Buffer k, v;           ///< [ceil(keys / page_tokens), kv_heads, page_tokens, dim]
  uint32_t page_tokens = 0;
};
/// y = x W^T with the first rows of a weight.
struct LinearCall {
  int64_t rows = 0, n = 0, k = 0;
  std::vector<float> x;  ///< [rows, k]
  std::vector<float> w;  ///< [n, k], as dequantized
};
struct ToolCall {
  std::string language, path, text;
};

struct CallInput {
  std::variant<AttentionCall, LinearCall, ToolCall> of;
  CallSort sort() const;
  const char* name() const;  ///< "prefill", "decode", "linear", "analyse"
  std::string size() const;  ///< "3 rows, 300 keys"
  size_t bytes() const;
};
struct CallOutput {
  std::vector<float> values;   ///< attention [rows, heads, dim], linear [rows, n]
  std::vector<float> weights;  ///< linear: [n, k] as kept by the quantizer
  Json findings = Json::array();
};
struct RecordedCall {
  std::shared_ptr<const CallInput> input;  ///< shared by the generations that answered it
  CallOutput output;
};
using RecordedCalls = std::vector<std::shared_ptr<const RecordedCall>>;

/// Inputs that a component of the kind answers in microseconds; none for kinds without such.
std::vector<CallInput> small_calls(uint32_t kind);

/// Thread-safe.
class CallRecorder {
 public:
  static constexpr size_t kMostOfASort = 4;               ///< calls
  static constexpr size_t kMostBytes = size_t{16} << 20;  ///< of all, the newest call always fits

  /// Off: what was kept stays.
  void turn(bool on) { on_.store(on, std::memory_order_relaxed); }
  /// Whether the caller is to keep this call. Dense at first, then one in kEvery.
  bool due(CallSort sort) {
    if (!on_.load(std::memory_order_relaxed)) return false;
    Turn& turn = turns_[static_cast<size_t>(sort)];
    // Loaded and stored apart: a count lost between threads costs less than a locked instruction.
    const uint64_t n = turn.seen.load(std::memory_order_relaxed);
    turn.seen.store(n + 1, std::memory_order_relaxed);
    uint64_t next = turn.next.load(std::memory_order_relaxed);
    return n >= next && pick(turn, sort, n, next);
  }
  void keep(RecordedCall call);
  void keep(CallInput input, CallOutput output) {
    keep({std::make_shared<const CallInput>(std::move(input)), std::move(output)});
  }
  RecordedCalls calls() const;  ///< oldest first

 private:
  static constexpr uint64_t kEvery = 16'411;  // a prime: not always the same layer
  struct Turn {
    std::atomic<uint64_t> seen{0}, next{0};
  };
  static bool pick(Turn& turn, CallSort sort, uint64_t n, uint64_t next);

  std::atomic<bool> on_{false};
  std::array<Turn, kCallSorts> turns_;
  mutable std::mutex mutex_;
  std::deque<std::shared_ptr<const RecordedCall>> calls_;
};

}  // namespace ds
