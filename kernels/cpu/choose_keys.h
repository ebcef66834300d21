// SPDX-License-Identifier: Apache-2.0
// KeyChoice: one pass over the keys of a sequence and kv head, which leave the window in order. Of
// a sequence that is served the chosen among all keys up to a page's end are kept beside that page,
// so the pass begins at the last of these that the call needs.
#pragma once

#include "kernels/cpu/attention_selected.h"

namespace ds::DS_ISA {

/// Norms of one sequence's keys for one kv head; beside pages 32 of them, then the chosen
/// positions.
struct KeptKeys {
  char* at;              ///< of the kv head beside page 0, or of the sequence in training
  const int32_t* pages;  ///< null in training: all norms in a row
  int64_t stride;

  float& norm(int64_t position) const {
    if (pages == nullptr) return reinterpret_cast<float*>(at)[position];
    return reinterpret_cast<float*>(at + pages[position / kKeys] * stride)[position % kKeys];
  }
  int32_t* chosen(int64_t page) const {
    return reinterpret_cast<int32_t*>(at + pages[page] * stride) + kKeys;
  }
};

/// The chosen of the keys that have left the window.
struct Chosen {
  int32_t* positions;  ///< ascending
  float* ranks;
  int64_t limit, sinks, count, worst;

  /// The next position leaves; call in order.
  void leave(int64_t position, float norm) {
    const float rank = position < sinks ? -1.0f : norm;
    if (count == limit) {
      if (count == 0 || !(rank < ranks[worst])) return;
      --count;
      for (int64_t i = worst; i < count; ++i) {
        positions[i] = positions[i + 1];
        ranks[i] = ranks[i + 1];
      }
    }
    positions[count] = static_cast<int32_t>(position);
    ranks[count++] = rank;
    if (count < limit) return;
    worst = 0;
    for (int64_t i = 1; i < count; ++i) {
      if (ranks[i] >= ranks[worst]) worst = i;  // of equals the latest goes
    }
  }
};

/// One sequence and kv head: its rows are those of the call from row0 on.
struct ChoiceUnit {
  const KeyChoice& c;
  KeptKeys kept;
  int64_t sequence, row0, n_rows, position0, head, n_kv_heads;

  /// The caller's own choice for a row that `left` keys are before the window of.
  int64_t list_given(int64_t left, int32_t* out) const {
    const int32_t* given = c.given + sequence * c.n_given;
    int64_t count = 0;
    for (int64_t i = 0; i < c.n_given && count < c.globals; ++i) {
      if (given[i] < 0 || given[i] >= left) continue;
      int64_t at = count;
      while (at > 0 && out[at - 1] > given[i]) --at;
      if (at > 0 && out[at - 1] == given[i]) continue;
      for (int64_t j = count++; j > at; --j) out[j] = out[j - 1];
      out[at] = given[i];
    }
    return count;
  }

  void list_row(int64_t r, const Chosen& chosen) const {
    const int64_t list = (row0 + r) * n_kv_heads + head, position = position0 + r;
    const int64_t left = larger(0, position - c.window + 1);
    int32_t* keys = c.keys + list * c.stride;
    int64_t n = chosen.count;
    if (c.given != nullptr) {
      n = list_given(left, keys);
    } else {
      for (int64_t i = 0; i < n; ++i) keys[i] = chosen.positions[i];
    }
    for (int64_t p = left; p <= position; ++p) keys[n++] = static_cast<int32_t>(p);
    c.counts[list] = static_cast<int32_t>(n);
  }
};

inline void choose_unit(const ChoiceUnit& u) {
  const KeyChoice& c = u.c;
  float* memory = task_scratch(static_cast<size_t>(2 * c.globals + 1));
  Chosen chosen{reinterpret_cast<int32_t*>(memory), memory + c.globals, c.globals, c.sinks, 0, 0};
  const int64_t end = u.position0 + u.n_rows;
  const bool paged = u.kept.pages != nullptr;
  int64_t left = paged ? larger(0, u.position0 - c.window + 1) / kKeys * kKeys : 0;
  for (int64_t i = 0; i < smaller(left, c.globals); ++i) {
    const int32_t position = u.kept.chosen(left / kKeys - 1)[i];
    chosen.leave(position, u.kept.norm(position));
  }
  const int64_t last_page = paged && end / kKeys * kKeys > u.position0 ? end / kKeys * kKeys : 0;
  const int64_t stop = larger(larger(0, end - c.window), last_page);
  for (int64_t r = 0;; ++left) {
    for (; r < u.n_rows && u.position0 + r - c.window < left; ++r) u.list_row(r, chosen);
    if (paged && left > u.position0 && left % kKeys == 0) {
      int32_t* to = u.kept.chosen(left / kKeys - 1);
      for (int64_t i = 0; i < chosen.count; ++i) to[i] = chosen.positions[i];
    }
    if (left == stop) return;
    chosen.leave(left, u.kept.norm(left));
  }
}

inline float squared_norm(const KeyBlock& key, int64_t d) {
  return sum_lanes(d, [&](int64_t i, int64_t n, F16 s) {
    const F16 x = load_head(key, key.k, 0, i, n);
    return fma(x, x, s);
  });
}

inline void choose_keys(const OpContext& context, const AttentionArgs& a, const KeyChoice& c) {
  const int64_t heads = a.kv.n_kv_heads;
  parallel_for(context, a.batch * heads, [&](int64_t i) {
    const SequenceRows s = sequence_rows(a, i / heads);
    const int64_t head = i % heads;
    const KeptKeys kept{static_cast<char*>(c.kept) + head * (kKeys + c.globals) * 4, s.pages,
                        c.kept_stride};
    for (int64_t p = s.position0; p < s.position0 + s.n_rows; ++p) {
      kept.norm(p) = squared_norm(paged_key(a.kv, s.pages, head, p), a.kv.head_dim);
    }
    choose_unit({c, kept, i / heads, s.row0, s.n_rows, s.position0, head, heads});
  });
}

inline void choose_train_keys(const OpContext& context, const TrainAttentionArgs& a,
                              const KeyChoice& c) {
  parallel_for(context, a.n_sequences * a.n_kv_heads, [&](int64_t i) {
    const TrainSequence& s = a.sequences[i / a.n_kv_heads];
    const int64_t head = i % a.n_kv_heads, keys = s.prefix + s.n_rows;
    const KeptKeys kept{
        static_cast<char*>(c.kept) + i / a.n_kv_heads * c.kept_stride + head * keys * 4, nullptr,
        0};
    const TrainHead h(a, s, head);
    for (int64_t p = 0; p < keys; ++p) kept.norm(p) = squared_norm(TrainKeys{h}(p), a.head_dim);
    choose_unit({c, kept, i / a.n_kv_heads, s.row0, s.n_rows, s.prefix, head, a.n_kv_heads});
  });
}

}  // namespace ds::DS_ISA
