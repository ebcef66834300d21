// SPDX-License-Identifier: Apache-2.0
// Inputs of an attention, and the operations on them: serving over a paged cache, training,
// explain.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "check/check.h"

namespace ds::check {

/// Sequences with the keys that they have; the last `rows` of them are this call's queries (all of
/// them when training, behind `prefix` frozen ones).
struct AttentionCase {
  struct Sequence {
    int64_t rows = 0, keys = 0;
  };
  int64_t heads = 4, kv_heads = 2, head_dim = 16;
  float scale = 0.3f;  ///< not 1 / sqrt(head_dim), which a plugin might assume
  bool bf16 = false;
  std::vector<Sequence> sequences;
  std::vector<float> q;     ///< [all rows, heads, head_dim]
  std::vector<float> k, v;  ///< [all keys, kv_heads, head_dim], sequence after sequence

  int64_t rows() const;
  int64_t keys() const;
  int64_t max_keys() const;
  std::vector<int32_t> row_starts() const;  ///< [sequences + 1]
  int64_t first_key(size_t sequence) const;
};

/// Values in -1..1; keys and values that bf16 holds exactly if `bf16`.
AttentionCase random_case(std::vector<AttentionCase::Sequence> sequences, uint64_t seed, bool bf16);
/// One sequence of it alone, or its rows [from, to) with only the keys up to them.
AttentionCase part_of(const AttentionCase& whole, size_t sequence, int64_t from, int64_t to);

/// [rows, heads, head_dim], or empty if a call failed. `decode`: through decode, one row each.
std::vector<float> serve(Trial& trial, const AttentionCase& c, bool decode = false);
/// [rows, heads, max_keys]: what explain says.
std::vector<uint8_t> explain(Trial& trial, const AttentionCase& c);

struct TrainResult {
  std::vector<float> out, dq, dk, dv;
};
/// prefill for training, then backward of `dout` if the plugin has it and dout is not empty.
TrainResult train(Trial& trial, const AttentionCase& c, const std::vector<float>& dout);

}  // namespace ds::check
