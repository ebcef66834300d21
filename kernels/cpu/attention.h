// SPDX-License-Identifier: Apache-2.0
// Causal attention with an online softmax over blocks of 32 keys in ascending order (Milakov and
// Gimelshein 2018; Dao et al. 2022). A block of K is transposed and expanded to FP32 once per task
// and shared by all rows and query heads of the task. Per (row, head) the arithmetic is the same
// however rows are grouped: scores sum over d ascending in one lane per key, values over keys
// ascending in one lane per d, and masked keys are never added.
#pragma once

#include "kernels/cpu/loss.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scratch.h"

namespace ds::DS_ISA {

constexpr int64_t kKeys = kKvPageTokens;

/// Up to 32 keys and values of one kv head, row j at k + j * stride.
struct KeyBlock {
  KvDtype dtype;
  const void *k, *v;
  int64_t stride, count;
  int64_t first_position;  ///< of key 0; a row sees keys up to its own position
};

/// Lanes of one head in FP32 scratch.
DS_INLINE int64_t padded(int64_t head_dim) { return ceil_div(head_dim, 16) * 16; }

DS_INLINE F16 load_head(const KeyBlock& b, const void* base, int64_t row, int64_t i, int64_t n) {
  const int64_t at = row * b.stride + i;
  return b.dtype == KvDtype::kF32 ? load_n(static_cast<const float*>(base) + at, n)
                                  : load_bf16_n(static_cast<const uint16_t*>(base) + at, n);
}

/// [count][d] -> out [d][32], zero beyond count.
inline void transpose_block(const KeyBlock& b, const void* base, int64_t d, float* out) {
  for (int64_t half = 0; half < 2; ++half) {
    int64_t i = 0;
    U16 m[16];
    if (b.dtype == KvDtype::kBF16) {
      for (; i + 32 <= d; i += 32) {  // a word holds two neighbouring dimensions
        for (int64_t j = 0; j < 16; ++j) {
          const auto* row = static_cast<const uint16_t*>(base) + (half * 16 + j) * b.stride + i;
          m[j] =
              half * 16 + j < b.count ? load_u(reinterpret_cast<const uint32_t*>(row)) : zero_u();
        }
        transpose(m);
        for (int64_t j = 0; j < 16; ++j) {
          store(out + (i + 2 * j) * kKeys + half * 16, even(m[j]));
          store(out + (i + 2 * j + 1) * kKeys + half * 16, odd(m[j]));
        }
      }
    }
    for (; i < d; i += 16) {
      const int64_t n = smaller(16, d - i);
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t key = half * 16 + j;
        m[j] = key < b.count ? bits(load_head(b, base, key, i, n)) : zero_u();
      }
      transpose(m);
      for (int64_t j = 0; j < n; ++j) store(out + (i + j) * kKeys + half * 16, as_float(m[j]));
    }
  }
}

/// [count][d] -> out [count][padded(d)].
inline void expand_values(const KeyBlock& b, const void* base, int64_t d, float* out) {
  const int64_t step = padded(d);
  for (int64_t j = 0; j < b.count; ++j) {
    for_lanes(0, d, [&](int64_t i, int64_t n) {
      store(out + j * step + i, load_head(b, base, j, i, n));
    });
  }
}

/// scores[t][32] = scale * q_t . K for T (row, head) units.
template <int T>
DS_INLINE void dot_keys(const float* keys, int64_t d, const float* const* q, float scale,
                        F16 (&s)[T][2]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) s[t][0] = s[t][1] = zero();
  for (int64_t i = 0; i < d; ++i) {
    const F16 a = load(keys + i * kKeys), b = load(keys + i * kKeys + 16);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const F16 x = set(q[t][i]);
      s[t][0] = fma(a, x, s[t][0]);
      s[t][1] = fma(b, x, s[t][1]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    s[t][0] = s[t][0] * set(scale);
    s[t][1] = s[t][1] * set(scale);
  }
}

/// out_t[lanes] = out_t[lanes] * keep_t + sum over keys [j0, j1) of p_t[j] * values[j].
template <int T, int C>
DS_INLINE void add_values_lanes(const float* values, int64_t step, const float* const* p,
                                const float* keep, float* const* out, int64_t j0, int64_t j1) {
  F16 o[T][C];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) o[t][c] = load(out[t] + c * 16);
    if (keep != nullptr) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) o[t][c] = o[t][c] * set(keep[t]);
    }
  }
  for (int64_t j = j0; j < j1; ++j) {
    F16 v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) v[c] = load(values + j * step + c * 16);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const F16 x = set(p[t][j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) o[t][c] = fma(v[c], x, o[t][c]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out[t] + c * 16, o[t][c]);
  }
}

template <int T>
DS_INLINE void add_values(const float* values, int64_t step, const float* const* p,
                          const float* keep, float* const* out, int64_t j0, int64_t j1) {
  float* at[T];
  for (int64_t i = 0; i < step;) {
    for (int t = 0; t < T; ++t) at[t] = out[t] + i;
    if (kTilePanels >= 4 && i + 64 <= step) {
      add_values_lanes<T, 4>(values + i, step, p, keep, at, j0, j1);
      i += 64;
    } else {
      add_values_lanes<T, 1>(values + i, step, p, keep, at, j0, j1);
      i += 16;
    }
  }
}

/// Sums of up to each unit's own count of keys: together as far as all go, then one by one.
template <int T>
DS_INLINE void add_visible_values(const float* values, int64_t step, const float* const* p,
                                  const float* keep, float* const* out, const int64_t* visible) {
  int64_t together = visible[0];
  for (int t = 1; t < T; ++t) together = smaller(together, visible[t]);
  add_values<T>(values, step, p, keep, out, 0, together);
  for (int t = 0; t < T; ++t) {
    if (visible[t] > together) {
      add_values<1>(values, step, p + t, nullptr, out + t, together, visible[t]);
    }
  }
}

/// State of the units (rows x heads of one group) of a task.
struct SoftmaxState {
  float *max, *sum, *out;  ///< [units], [units], [units][padded(d)]
};

template <int T>
DS_INLINE void softmax_tile(const float* keys, const float* values, int64_t d,
                            const float* const* q, float scale, const int64_t* visible,
                            const SoftmaxState& s, int64_t unit) {
  const F16 hidden = set(-__builtin_inff());
  F16 score[T][2];
  dot_keys<T>(keys, d, q, scale, score);
  // In phases over the units, so that their long chains of dependent instructions overlap.
  alignas(64) float fall[16] = {}, keep[16];
  float new_max[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const int64_t n = visible[t];
    if (n < kKeys) {
      score[t][0] = splice(score[t][0], hidden, smaller(n, 16));
      score[t][1] = splice(score[t][1], hidden, larger(n - 16, 0));
    }
    const float old_max = s.max[unit + t];
    const float block_max = reduce_max(max(score[t][0], score[t][1]));
    new_max[t] = block_max > old_max ? block_max : old_max;
    fall[t] = old_max - new_max[t];
    s.max[unit + t] = new_max[t];
  }
  store(keep, exp(load(fall)));
  alignas(64) float p[T][kKeys];
  F16 sum[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const F16 p0 = exp(score[t][0] - set(new_max[t])), p1 = exp(score[t][1] - set(new_max[t]));
    store(p[t], p0);
    store(p[t] + 16, p1);
    sum[t] = p0 + p1;
  }
  const float* p_at[T];
  float* out[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    s.sum[unit + t] = s.sum[unit + t] * keep[t] + reduce_add(sum[t]);
    p_at[t] = p[t];
    out[t] = s.out + (unit + t) * padded(d);
  }
  add_visible_values<T>(values, padded(d), p_at, keep, out, visible);
}

/// The rows of one task: query heads [head0, head0 + group) of rows [row, row + rows).
struct QueryRows {
  const float* q;  ///< of the first row and head
  int64_t row_step, d, group, rows;
  int64_t position;  ///< of the first row
  float scale;
};

/// One key block for all units that see it.
inline void softmax_block(const QueryRows& a, const KeyBlock& b, const float* keys,
                          const float* values, const SoftmaxState& s) {
  const int64_t units = a.rows * a.group;
  const int64_t first_row = larger(0, b.first_position - a.position);
  for (int64_t u = first_row * a.group; u < units;) {
    const float* q[6];
    int64_t visible[6];
    const int64_t n = smaller(6, units - u);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t row = (u + t) / a.group, head = (u + t) % a.group;
      q[t] = a.q + row * a.row_step + head * a.d;
      visible[t] = smaller(b.count, a.position + row - b.first_position + 1);
    }
    if (n == 6) {
      softmax_tile<6>(keys, values, a.d, q, a.scale, visible, s, u);
      u += 6;
    } else if (n >= 3) {
      softmax_tile<3>(keys, values, a.d, q, a.scale, visible, s, u);
      u += 3;
    } else {
      softmax_tile<1>(keys, values, a.d, q, a.scale, visible, s, u);
      u += 1;
    }
  }
}

/// Attention of one task's rows over key blocks [0, n_blocks); block(i) describes one. Writes out,
/// and lse [rows][lse_step] if not null.
template <typename Block>
inline void attend(const QueryRows& a, int64_t n_blocks, const Block& block, float* out, float* lse,
                   int64_t lse_step) {
  const int64_t units = a.rows * a.group, step = padded(a.d);
  float* keys = task_scratch(static_cast<size_t>(2 * kKeys * step + units * (step + 2) + 64));
  float* values = keys + kKeys * step;
  float* memory = values + kKeys * step;
  const SoftmaxState s{memory + units * step, memory + units * (step + 1), memory};
  for (int64_t i = 0; i < units * step; ++i) s.out[i] = 0.0f;
  if (a.d % 16 != 0) {
    for (int64_t i = 0; i < kKeys * step; ++i) values[i] = 0.0f;
  }
  for (int64_t u = 0; u < units; ++u) {
    s.max[u] = -__builtin_inff();
    s.sum[u] = 0.0f;
  }
  for (int64_t i = 0; i < n_blocks; ++i) {
    const KeyBlock b = block(i);
    transpose_block(b, b.k, a.d, keys);
    expand_values(b, b.v, a.d, values);
    softmax_block(a, b, keys, values, s);
  }
  for (int64_t u = 0; u < units; ++u) {
    const int64_t row = u / a.group, head = u % a.group;
    const F16 sum = set(s.sum[u]);
    float* to = out + row * a.row_step + head * a.d;
    for_lanes(0, a.d,
              [&](int64_t i, int64_t n) { store_n(to + i, load(s.out + u * step + i) / sum, n); });
    if (lse != nullptr) {
      const double log_sum = natural_log(static_cast<double>(s.sum[u]));
      lse[row * lse_step + head] = static_cast<float>(static_cast<double>(s.max[u]) + log_sum);
    }
  }
}

/// Rows of a task so that it lasts about 200 us: ~60 multiply-adds per ns, two products per key.
DS_INLINE int64_t attention_rows(int64_t keys, int64_t group, int64_t d) {
  const int64_t ns_per_row = larger(1, group * keys * d * 2 / 60);
  return larger(8, smaller(64, 200'000 / ns_per_row));
}

/// One sequence's part of a batch.
struct SequenceRows {
  int64_t row0, n_rows, position0;
  const int32_t* pages;
};

DS_INLINE SequenceRows sequence_rows(const AttentionArgs& a, int64_t s) {
  const int64_t n = a.starts[s + 1] - a.starts[s];
  return {a.starts[s], n, a.lengths[s] - n, a.table + s * a.table_width};
}

/// Calls run(sequence, i) for each i of [0, tasks_of(sequence)) of each sequence, in parallel.
template <typename TasksOf, typename Run>
inline void for_sequence_tasks(const OpContext& context, const AttentionArgs& a,
                               const TasksOf& tasks_of, const Run& run) {
  int64_t tasks = 0;
  for (int64_t s = 0; s < a.batch; ++s) tasks += tasks_of(sequence_rows(a, s));
  parallel_for(context, tasks, [&](int64_t i) {
    int64_t s = 0;
    for (; i >= tasks_of(sequence_rows(a, s)); ++s) i -= tasks_of(sequence_rows(a, s));
    run(sequence_rows(a, s), i);
  });
}

inline void attention(const OpContext& context, const AttentionArgs& a) {
  const KvView& kv = a.kv;
  const int64_t d = kv.head_dim, group = a.n_heads / kv.n_kv_heads, width = a.n_heads * d;
  const int64_t element = kv.dtype == KvDtype::kF32 ? 4 : 2;
  const auto rows_each = [&](const SequenceRows& s) {
    return attention_rows(s.position0 + s.n_rows, group, d);
  };
  const auto tasks_of = [&](const SequenceRows& s) {
    return ceil_div(s.n_rows, rows_each(s)) * kv.n_kv_heads;
  };
  for_sequence_tasks(context, a, tasks_of, [&](const SequenceRows& s, int64_t i) {
    const int64_t head = i % kv.n_kv_heads, each = rows_each(s);
    // Long rows first: the last rows of a sequence see the most keys.
    const int64_t first = (ceil_div(s.n_rows, each) - 1 - i / kv.n_kv_heads) * each;
    const int64_t rows = smaller(each, s.n_rows - first);
    const int64_t position = s.position0 + first;
    const int64_t at = (s.row0 + first) * width + head * group * d;
    const QueryRows q{a.q + at, width, d, group, rows, position, a.scale};
    const auto block = [&](int64_t b) {
      const int64_t to = (s.pages[b] * kv.n_kv_heads + head) * kKeys * d * element;
      return KeyBlock{kv.dtype,
                      static_cast<const char*>(kv.k) + to,
                      static_cast<const char*>(kv.v) + to,
                      d,
                      smaller(kKeys, position + rows - b * kKeys),
                      b * kKeys};
    };
    attend(q, ceil_div(position + rows, kKeys), block, a.out + at, nullptr, 0);
  });
}

}  // namespace ds::DS_ISA
