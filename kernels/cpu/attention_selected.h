// SPDX-License-Identifier: Apache-2.0
// Attention over chosen keys of each row: gathered 32 at a time into FP32 scratch, then the same
// online softmax as over whole blocks. A row's arithmetic depends on its own list alone. The
// backward pass recomputes p from lse, rows ascending within one task per sequence and kv head, so
// that each key's gradient is summed in a fixed order.
#pragma once

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_train.h"

namespace ds::DS_ISA {

/// The keys that one row reads for one kv head, ascending.
struct ChosenKeys {
  const int32_t* positions;
  int64_t count;
};

DS_INLINE ChosenKeys chosen_keys(const KeySelection& s, int64_t row, int64_t n_kv_heads,
                                 int64_t head) {
  const int64_t at = row * n_kv_heads + head;
  return {s.keys + at * s.stride, s.counts[at]};
}

/// Scratch of 32 gathered keys and values, as rows [32][step] and transposed [d][32].
struct Gathered {
  float *k, *v, *k_t, *v_t;
  int64_t d, step;

  static int64_t floats(int64_t d) { return 4 * kKeys * padded(d); }
  Gathered(float* memory, int64_t head_dim) : d(head_dim), step(padded(head_dim)) {
    k = memory;
    v = k + kKeys * step;
    k_t = v + kKeys * step;
    v_t = k_t + kKeys * step;
    for (int64_t i = 0; i < 2 * kKeys * step; ++i) k[i] = 0.0f;  // lanes beyond d stay zero
  }

  /// Keys [first, first + n) of the list; `row_at(position)` is where a key is.
  template <typename RowAt>
  KeyBlock fill(const ChosenKeys& chosen, int64_t first, const RowAt& row_at) {
    const int64_t n = smaller(kKeys, chosen.count - first);
    for (int64_t j = 0; j < n; ++j) {
      const KeyBlock from = row_at(chosen.positions[first + j]);
      for_lanes(0, d, [&](int64_t i, int64_t lanes) {
        store(k + j * step + i, load_head(from, from.k, 0, i, lanes));
        store(v + j * step + i, load_head(from, from.v, 0, i, lanes));
      });
    }
    const KeyBlock block{KvDtype::kF32, k, v, step, n, -kKeys - 1};  // all of it is visible
    transpose_block(block, k, d, k_t);
    return block;
  }
};

/// One row and kv head: `group` query heads. Writes out, and lse if not null.
template <typename RowAt>
inline void attend_chosen(const QueryRows& a, const ChosenKeys& chosen, const RowAt& row_at,
                          float* out, float* lse) {
  const int64_t step = padded(a.d), group = a.group;
  float* memory =
      task_scratch(static_cast<size_t>(Gathered::floats(a.d) + group * (step + 2) + 64));
  Gathered gathered(memory, a.d);
  float* sums = memory + Gathered::floats(a.d);
  const SoftmaxState s{sums + group * step, sums + group * (step + 1), sums};
  for (int64_t i = 0; i < group * step; ++i) s.out[i] = 0.0f;
  for (int64_t u = 0; u < group; ++u) {
    s.max[u] = -__builtin_inff();
    s.sum[u] = 0.0f;
  }
  for (int64_t first = 0; first < chosen.count; first += kKeys) {
    const KeyBlock block = gathered.fill(chosen, first, row_at);
    softmax_block(a, block, gathered.k_t, gathered.v, s);
  }
  for (int64_t u = 0; u < group; ++u) {
    const F16 sum = set(s.sum[u]);
    for_lanes(0, a.d, [&](int64_t i, int64_t n) {
      store_n(out + u * a.d + i, load(s.out + u * step + i) / sum, n);
    });
    if (lse != nullptr) {
      const double log_sum = natural_log(static_cast<double>(s.sum[u]));
      lse[u] = static_cast<float>(static_cast<double>(s.max[u]) + log_sum);
    }
  }
}

/// One key of a sequence that is served, as a block.
DS_INLINE KeyBlock paged_key(const KvView& kv, const int32_t* pages, int64_t head,
                             int64_t position) {
  const int64_t element = kv.dtype == KvDtype::kF32 ? 4 : 2;
  const int64_t row = (pages[position / kKeys] * kv.n_kv_heads + head) * kKeys + position % kKeys;
  const int64_t at = row * kv.head_dim * element;
  return {kv.dtype,
          static_cast<const char*>(kv.k) + at,
          static_cast<const char*>(kv.v) + at,
          kv.head_dim,
          1,
          0};
}

constexpr int64_t kChosenRows = 16;  // rows of a task

inline void attention_selected(const OpContext& context, const AttentionArgs& a,
                               const KeySelection& selection) {
  const KvView& kv = a.kv;
  const int64_t d = kv.head_dim, group = a.n_heads / kv.n_kv_heads, width = a.n_heads * d;
  const auto tasks_of = [&](const SequenceRows& s) {
    return ceil_div(s.n_rows, kChosenRows) * kv.n_kv_heads;
  };
  for_sequence_tasks(context, a, tasks_of, [&](const SequenceRows& s, int64_t i) {
    const int64_t head = i % kv.n_kv_heads, first = i / kv.n_kv_heads * kChosenRows;
    const auto row_at = [&](int64_t position) { return paged_key(kv, s.pages, head, position); };
    for (int64_t r = first; r < smaller(first + kChosenRows, s.n_rows); ++r) {
      const int64_t row = s.row0 + r, at = row * width + head * group * d;
      const QueryRows q{a.q + at, width, d, group, 1, 0, a.scale};
      attend_chosen(q, chosen_keys(selection, row, kv.n_kv_heads, head), row_at, a.out + at,
                    nullptr);
    }
  });
}

/// Where a key of a training sequence is; positions count the prefix first.
struct TrainKeys {
  const TrainHead& h;
  KeyBlock operator()(int64_t position) const {
    const int64_t d = h.a.head_dim;
    const bool before = position < h.s.prefix;
    const int64_t at = before ? position * h.kv_width + h.head * d : h.key(position - h.s.prefix);
    return {KvDtype::kF32,
            (before ? h.s.prefix_k : h.a.k) + at,
            (before ? h.s.prefix_v : h.a.v) + at,
            h.kv_width,
            1,
            0};
  }
};

inline void attention_selected_train(const OpContext& context, const TrainAttentionArgs& a,
                                     const KeySelection& selection) {
  for_train_blocks(context, a, [&](const TrainHead& h, int64_t row_block) {
    const int64_t first = row_block * kTrainRows;
    for (int64_t r = first; r < smaller(first + kTrainRows, h.s.n_rows); ++r) {
      const QueryRows q{a.q + h.query(r), h.width, a.head_dim, h.group, 1, 0, a.scale};
      attend_chosen(q, chosen_keys(selection, h.s.row0 + r, a.n_kv_heads, h.head), TrainKeys{h},
                    a.out + h.query(r), a.lse == nullptr ? nullptr : a.lse + h.stat(r));
    }
  });
}

/// out[lanes] += x * from[lanes].
DS_INLINE void add_scaled(int64_t d, float x, const float* from, float* out) {
  for_lanes(0, d, [&](int64_t i, int64_t n) {
    store_n(out + i, fma(load_n(from + i, n), set(x), load_n(out + i, n)), n);
  });
}

/// Gradients of one sequence and kv head: its dk and dv rows belong to this task alone.
inline void selected_gradient_task(const TrainHead& h, const KeySelection& selection) {
  const TrainAttentionArgs& a = h.a;
  const int64_t d = a.head_dim;
  float* memory = task_scratch(static_cast<size_t>(Gathered::floats(d) + 2 * kKeys + 64));
  Gathered gathered(memory, d);
  float* p = memory + Gathered::floats(d);
  float* ds = p + kKeys;
  for (int64_t r = 0; r < h.s.n_rows; ++r) {
    for_lanes(0, d, [&](int64_t i, int64_t n) {
      store_n(a.dk + h.key(r) + i, zero(), n);
      store_n(a.dv + h.key(r) + i, zero(), n);
    });
  }
  for (int64_t r = 0; r < h.s.n_rows; ++r) {
    const ChosenKeys chosen = chosen_keys(selection, h.s.row0 + r, a.n_kv_heads, h.head);
    for (int64_t i = 0; i < h.group * d; ++i) a.dq[h.query(r) + i] = 0.0f;
    for (int64_t first = 0; first < chosen.count; first += kKeys) {
      const KeyBlock block = gathered.fill(chosen, first, TrainKeys{h});
      transpose_block(block, block.v, d, gathered.v_t);
      for (int64_t u = 0; u < h.group; ++u) {
        const int64_t at = h.query(r) + u * d;
        score_gradient(gathered.k_t, gathered.v_t, d, a.q + at, a.dout + at, a.scale,
                       a.lse[h.stat(r) + u], output_dot(a.dout + at, a.out + at, d), block.count, p,
                       ds);
        for (int64_t j = 0; j < block.count; ++j) {
          add_scaled(d, ds[j], gathered.k + j * gathered.step, a.dq + at);
          const int64_t own = chosen.positions[first + j] - h.s.prefix;
          if (own < 0) continue;  // the prefix is frozen
          add_scaled(d, ds[j], a.q + at, a.dk + h.key(own));
          add_scaled(d, p[j], a.dout + at, a.dv + h.key(own));
        }
      }
    }
  }
}

inline void attention_selected_train_backward(const OpContext& context, const TrainAttentionArgs& a,
                                              const KeySelection& selection) {
  parallel_for(context, a.n_sequences * a.n_kv_heads, [&](int64_t i) {
    selected_gradient_task(TrainHead(a, a.sequences[i / a.n_kv_heads], i % a.n_kv_heads),
                           selection);
  });
}

}  // namespace ds::DS_ISA
