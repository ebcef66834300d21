// SPDX-License-Identifier: Apache-2.0
// Losses over a vocabulary: three passes over a row that stays in L2 (maximum, sum of exponentials,
// gradient). Sums run in FP32 lanes inside chunks of 1024 and in double across them.
//
#pragma once

#include "kernels/cpu/rows.h"
#include "kernels/cpu/scratch.h"

namespace ds::DS_ISA {

DS_INLINE double natural_log(double x) { return __builtin_log(x); }

DS_INLINE float row_max(const float* x, int64_t n) {
  F16 m[4];
  for (F16& v : m) v = set(-__builtin_inff());
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) m[j] = max(m[j], load(x + i + j * 16));
  }
  for_lanes(i, n, [&](int64_t at, int64_t lanes) {
    m[0] = max(m[0], splice(load_n(x + at, lanes), m[0], lanes));
  });
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

/// First index that holds `value`, which must be in the row; 0 if none does (a row of NaN).
DS_INLINE int32_t first_index(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t lanes = smaller(16, n - i);
    const uint32_t hits = equal_lanes(load_n(x + i, lanes), set(value)) & ((1u << lanes) - 1);
    if (hits != 0) return static_cast<int32_t>(i) + __builtin_ctz(hits);
  }
  return 0;
}

/// Sum of exp(x - max); with kKeep the terms replace x, for the gradient.
template <bool kKeep>
DS_INLINE double sum_exp(float* x, int64_t n, float max_value) {
  constexpr int64_t kChunk = 1024;
  const F16 shift = set(max_value);
  double total = 0.0;
  for (int64_t c = 0; c < n; c += kChunk) {
    float* at = x + c;
    total +=
        static_cast<double>(sum_lanes(smaller(kChunk, n - c), [&](int64_t i, int64_t m, F16 s) {
          const F16 term = exp(load_n(at + i, m) - shift);
          if (kKeep) store_n(at + i, term, m);
          return s + (m == kLanes ? term : splice(term, zero(), m));
        }));
  }
  return total;
}

DS_INLINE void scale_row(float* x, int64_t n, float factor) {
  for_lanes(0, n, [&](int64_t i, int64_t m) { store_n(x + i, load_n(x + i, m) * set(factor), m); });
}

inline void cross_entropy_row(const CrossEntropyArgs& a, int64_t r) {
  float* x = a.logits + r * a.stride;
  const float top = row_max(x, a.vocab);
  if (a.argmax != nullptr) a.argmax[r] = first_index(x, a.vocab, top);
  const int32_t target = a.target[r];
  const double lead = static_cast<double>(x[target]) - static_cast<double>(top);
  const double sum = a.gradient ? sum_exp<true>(x, a.vocab, top) : sum_exp<false>(x, a.vocab, top);
  a.logprob[r] = static_cast<float>(lead - natural_log(sum));
  if (!a.gradient) return;
  const float weight = a.weight[r];
  scale_row(x, a.vocab, static_cast<float>(static_cast<double>(weight) / sum));
  x[target] -= weight;
}

DS_INLINE int64_t loss_rows_per_task(int64_t vocab) {
  return larger(1, 131'072 / larger(1, vocab));
}

inline void cross_entropy(const OpContext& context, const CrossEntropyArgs& a) {
  parallel_blocks(context, a.rows, loss_rows_per_task(a.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) cross_entropy_row(a, r);
  });
  if (a.prepared != nullptr) prepare(context, a.rows, a.vocab, a.logits, a.stride, {a.prepared});
}

/// The rest's mass is summed without the top k (their logits are -inf meanwhile), never as 1 - sum:
/// that would cancel when the student is sure. With q = softmax, P = sum p + p_rest:
/// d/dx_j = P q_j - p_j for j in the top k, q_j (P - p_rest / q_rest) for the others.
inline void kl_topk_row(const KlTopkArgs& a, int64_t r) {
  float* x = a.logits + r * a.stride;
  const int32_t* index = a.index + r * a.top_k;
  const float* stored = a.logprob + r * a.top_k;
  float* kept = task_scratch(static_cast<size_t>(a.top_k + 1));
  const float top = row_max(x, a.vocab);
  double p_sum = 0.0, q_sum = 0.0;
  for (int64_t i = 0; i < a.top_k; ++i) {
    kept[i] = x[index[i]];
    x[index[i]] = -__builtin_inff();
    p_sum += static_cast<double>(exp_1(stored[i]));
    q_sum += static_cast<double>(exp_1(kept[i] - top));
  }
  const double rest = at_least(
      a.gradient ? sum_exp<true>(x, a.vocab, top) : sum_exp<false>(x, a.vocab, top), 1e-30);
  const double log_all = natural_log(rest + q_sum);
  const double p_rest = at_least(1.0 - p_sum, 0.0);
  double kl = p_rest > 1e-9 ? p_rest * (natural_log(p_rest) - natural_log(rest) + log_all) : 0.0;
  for (int64_t i = 0; i < a.top_k; ++i) {
    const double log_q = static_cast<double>(kept[i]) - static_cast<double>(top) - log_all;
    kl += static_cast<double>(exp_1(stored[i])) * (static_cast<double>(stored[i]) - log_q);
  }
  a.kl[r] = static_cast<float>(kl);
  const double weight = static_cast<double>(a.weight[r]);
  const double mass = p_sum + p_rest, all = rest + q_sum;
  if (a.gradient) {
    scale_row(x, a.vocab, static_cast<float>(weight * (mass / all - p_rest / rest)));
  }
  for (int64_t i = 0; i < a.top_k; ++i) {
    const double q = static_cast<double>(exp_1(kept[i] - top)) / all;
    const double p = static_cast<double>(exp_1(stored[i]));
    x[index[i]] = a.gradient ? static_cast<float>(weight * (mass * q - p)) : kept[i];
  }
}

inline void kl_topk(const OpContext& context, const KlTopkArgs& a) {
  parallel_blocks(context, a.rows, loss_rows_per_task(a.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kl_topk_row(a, r);
  });
  if (a.prepared != nullptr) prepare(context, a.rows, a.vocab, a.logits, a.stride, {a.prepared});
}

}  // namespace ds::DS_ISA
