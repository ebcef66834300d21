// SPDX-License-Identifier: Apache-2.0
// Attention of training, forward and backward, FP32. The forward is attend() over blocks of the
// packed sequence behind its frozen prefix. The backward recomputes p from lse in two passes (Dao
// et al. 2022, section 3.1): by query rows for dq, by key blocks for dk and dv, so that every
// gradient is summed by one task in a fixed order. With D = dout . out: ds = p (dout . v - D)
// scale.
#pragma once

#include "kernels/cpu/attention.h"
#include "kernels/cpu/linear.h"

namespace ds::DS_ISA {

constexpr int64_t kTrainRows = 32;  // query rows of a task, and keys of a block

/// One sequence and kv head: where its rows and its blocks of keys are.
struct TrainHead {
  const TrainAttentionArgs& a;
  const TrainSequence& s;
  int64_t head, group, width, kv_width;

  TrainHead(const TrainAttentionArgs& args, const TrainSequence& sequence, int64_t kv_head)
      : a(args),
        s(sequence),
        head(kv_head),
        group(args.n_heads / args.n_kv_heads),
        width(args.n_heads * args.head_dim),
        kv_width(args.n_kv_heads * args.head_dim) {}

  int64_t prefix_blocks() const { return ceil_div(s.prefix, kKeys); }
  /// Offset of a row's first query head of this kv head.
  int64_t query(int64_t row) const { return (s.row0 + row) * width + head * group * a.head_dim; }
  int64_t key(int64_t row) const { return (s.row0 + row) * kv_width + head * a.head_dim; }
  int64_t stat(int64_t row) const { return (s.row0 + row) * a.n_heads + head * group; }

  /// Positions count from the sequence's first own row; prefix keys come before all of them.
  KeyBlock block(int64_t i, int64_t rows_end) const {
    if (i < prefix_blocks()) {
      const int64_t at = i * kKeys * kv_width + head * a.head_dim;
      return {KvDtype::kF32,
              s.prefix_k + at,
              s.prefix_v + at,
              kv_width,
              smaller(kKeys, s.prefix - i * kKeys),
              -kKeys - 1};
    }
    const int64_t first = (i - prefix_blocks()) * kKeys;
    return {KvDtype::kF32,
            a.k + key(first),
            a.v + key(first),
            kv_width,
            smaller(kKeys, rows_end - first),
            first};
  }
};

/// f(head, row block) over all sequences, kv heads and blocks of 32 rows.
template <typename F>
void for_train_blocks(const OpContext& context, const TrainAttentionArgs& a, const F& f) {
  int64_t tasks = 0;
  const auto tasks_of = [&](const TrainSequence& s) {
    return ceil_div(s.n_rows, kTrainRows) * a.n_kv_heads;
  };
  for (int64_t s = 0; s < a.n_sequences; ++s) tasks += tasks_of(a.sequences[s]);
  parallel_for(context, tasks, [&](int64_t i) {
    const TrainSequence* s = a.sequences;
    for (; i >= tasks_of(*s); ++s) i -= tasks_of(*s);
    f(TrainHead(a, *s, i % a.n_kv_heads), i / a.n_kv_heads);
  });
}

inline void attention_train(const OpContext& context, const TrainAttentionArgs& a) {
  for_train_blocks(context, a, [&](const TrainHead& h, int64_t row_block) {
    const int64_t row = row_block * kTrainRows;
    const int64_t rows = smaller(kTrainRows, h.s.n_rows - row);
    const QueryRows q{a.q + h.query(row), h.width, a.head_dim, h.group, rows, row, a.scale};
    attend(
        q, h.prefix_blocks() + ceil_div(row + rows, kKeys),
        [&](int64_t i) { return h.block(i, row + rows); }, a.out + h.query(row),
        a.lse != nullptr ? a.lse + h.stat(row) : nullptr, a.n_heads);
  });
}

/// D = dout . out of one unit.
DS_INLINE float output_dot(const float* dout, const float* out, int64_t d) {
  return sum_lanes(d, [&](int64_t i, int64_t n, F16 s) {
    return fma(load_n(dout + i, n), load_n(out + i, n), s);
  });
}

/// p [32] and ds [32] of one unit against a block of transposed keys and values.
DS_INLINE void score_gradient(const float* keys, const float* values, int64_t d, const float* q,
                              const float* dout, float scale, float lse, float dot, int64_t visible,
                              float* p, float* ds) {
  F16 score[1][2], dp[1][2];
  dot_keys<1>(keys, d, &q, scale, score);
  dot_keys<1>(values, d, &dout, 1.0f, dp);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int64_t lanes = i == 0 ? smaller(visible, 16) : larger(visible - 16, 0);
    const F16 prob = splice(exp(score[0][i] - set(lse)), zero(), lanes);
    const F16 back = prob * (dp[0][i] - set(dot)) * set(scale);
    store(p + i * 16, prob);
    store(ds + i * 16, splice(back, zero(), lanes));
  }
}

inline void query_gradient_task(const TrainHead& h, int64_t row_block) {
  const TrainAttentionArgs& a = h.a;
  const int64_t d = a.head_dim, step = padded(d);
  const int64_t row = row_block * kTrainRows, rows = smaller(kTrainRows, h.s.n_rows - row);
  const int64_t units = rows * h.group;
  const auto floats = static_cast<size_t>(3 * kKeys * step + units * (step + 1 + 2 * kKeys));
  float* keys_t = task_scratch(floats);
  float* values_t = keys_t + kKeys * step;
  float* keys = values_t + kKeys * step;
  float* dq = keys + kKeys * step;
  float* ds = dq + units * step;
  float* p = ds + units * kKeys;
  float* dots = p + units * kKeys;
  for (int64_t i = 0; i < units * step; ++i) dq[i] = 0.0f;
  for (int64_t i = 0; i < kKeys * step; ++i) keys[i] = 0.0f;
  for (int64_t u = 0; u < units; ++u) {
    const int64_t at = h.query(row + u / h.group) + u % h.group * d;
    dots[u] = output_dot(a.dout + at, a.out + at, d);
  }
  for (int64_t i = 0; i < h.prefix_blocks() + ceil_div(row + rows, kKeys); ++i) {
    const KeyBlock b = h.block(i, row + rows);
    transpose_block(b, b.k, d, keys_t);
    transpose_block(b, b.v, d, values_t);
    expand_values(b, b.k, d, keys);
    for (int64_t u = 0; u < units; ++u) {
      const int64_t r = row + u / h.group, at = h.query(r) + u % h.group * d;
      const int64_t visible = smaller(b.count, larger(0, r - b.first_position + 1));
      score_gradient(keys_t, values_t, d, a.q + at, a.dout + at, a.scale,
                     a.lse[h.stat(r) + u % h.group], dots[u], visible, p + u * kKeys,
                     ds + u * kKeys);
    }
    for (int64_t i0 = 0; i0 < step; i0 += kGroupLanes) {
      const int panels = static_cast<int>(smaller(kGroupLanes, step - i0) / 16);
      multiply<true>({keys + i0, step, ds, kKeys, 1, b.count, dq + i0, step, false}, units, panels);
    }
  }
  for (int64_t u = 0; u < units; ++u) {
    float* to = a.dq + h.query(row + u / h.group) + u % h.group * d;
    for_lanes(0, d, [&](int64_t i, int64_t n) { store_n(to + i, load(dq + u * step + i), n); });
  }
}

/// dk and dv of one block of keys: units (row, head) ascending.
inline void key_gradient_task(const TrainHead& h, int64_t key_block) {
  const TrainAttentionArgs& a = h.a;
  const int64_t d = a.head_dim, step = padded(d), n_rows = h.s.n_rows;
  const int64_t first = key_block * kKeys;
  const int64_t chunk = kTrainRows * h.group;
  const auto floats = static_cast<size_t>(4 * kKeys * step + 2 * chunk * (step + kKeys));
  float* keys_t = task_scratch(floats);
  float* values_t = keys_t + kKeys * step;
  float* dk = values_t + kKeys * step;
  float* dv = dk + kKeys * step;
  float* q = dv + kKeys * step;
  float* dout = q + chunk * step;
  float* p = dout + chunk * step;
  float* ds = p + chunk * kKeys;
  for (int64_t i = 0; i < 2 * kKeys * step; ++i) dk[i] = 0.0f;
  for (int64_t i = 0; i < 2 * chunk * step; ++i) q[i] = 0.0f;
  const KeyBlock b = h.block(h.prefix_blocks() + key_block, n_rows);
  transpose_block(b, b.k, d, keys_t);
  transpose_block(b, b.v, d, values_t);
  for (int64_t row = first; row < n_rows; row += kTrainRows) {
    const int64_t units = smaller(kTrainRows, n_rows - row) * h.group;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t r = row + u / h.group, at = h.query(r) + u % h.group * d;
      for_lanes(0, d, [&](int64_t i, int64_t n) {
        store(q + u * step + i, load_n(a.q + at + i, n));
        store(dout + u * step + i, load_n(a.dout + at + i, n));
      });
      score_gradient(keys_t, values_t, d, a.q + at, a.dout + at, a.scale,
                     a.lse[h.stat(r) + u % h.group], output_dot(a.dout + at, a.out + at, d),
                     smaller(b.count, r - first + 1), p + u * kKeys, ds + u * kKeys);
    }
    for (int64_t i0 = 0; i0 < step; i0 += kGroupLanes) {
      const int panels = static_cast<int>(smaller(kGroupLanes, step - i0) / 16);
      multiply<false>({q + i0, step, ds, 1, kKeys, units, dk + i0, step, false}, b.count, panels);
      multiply<false>({dout + i0, step, p, 1, kKeys, units, dv + i0, step, false}, b.count, panels);
    }
  }
  for (int64_t j = 0; j < b.count; ++j) {
    for_lanes(0, d, [&](int64_t i, int64_t n) {
      store_n(a.dk + h.key(first + j) + i, load(dk + j * step + i), n);
      store_n(a.dv + h.key(first + j) + i, load(dv + j * step + i), n);
    });
  }
}

inline void attention_train_backward(const OpContext& context, const TrainAttentionArgs& a) {
  for_train_blocks(context, a, [](const TrainHead& h, int64_t i) { query_gradient_task(h, i); });
  for_train_blocks(context, a, [](const TrainHead& h, int64_t i) { key_gradient_task(h, i); });
}

}  // namespace ds::DS_ISA
