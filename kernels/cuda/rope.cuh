// SPDX-License-Identifier: Apache-2.0
// Pairs of a head (by halves) that turn by their position, and their place in the KV pages.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/ops.h"

namespace ds::cuda {

/// (a, b) -> (a cos - b sin, b cos + a sin).
__device__ inline void rotate(float cos, float sin, float* a, float* b) {
  const float x = *a, y = *b;
  *a = fmaf(x, cos, -(y * sin));
  *b = fmaf(y, cos, x * sin);
}

template <typename T>
__device__ inline void store_pair(void* base, int64_t at, int64_t half, float a, float b) {
  T* to = static_cast<T*>(base) + at;
  to[0] = from_float<T>(a);
  to[half] = from_float<T>(b);
}

/// First element of a head in a slot of [page][kv_head][32][head_dim].
__device__ inline int64_t page_offset(const KvView& kv, int64_t slot, int64_t head) {
  const int64_t page = slot / kKvPageTokens;
  return ((page * kv.n_kv_heads + head) * kKvPageTokens + slot % kKvPageTokens) * kv.head_dim;
}

/// Which of q (w = 0), k and v (1, 2) a head is of, and as which of its heads.
template <typename I>
struct HeadOf {
  int w;
  I head;
};
/// `number` counts a row's heads: those of q, then of k, then of v.
template <typename I>
__device__ inline HeadOf<I> head_of(const RopeAppendArgs& rope, I number) {
  const I n_heads = static_cast<I>(rope.n_heads), n_kv = static_cast<I>(rope.kv.n_kv_heads);
  HeadOf<I> of{0, number};
  if (of.head >= n_heads) {
    of.head -= n_heads;
    of.w = of.head < n_kv ? 1 : 2;
    of.head %= n_kv;
  }
  return of;
}

/// What the rows from `row` on need.
inline RopeAppendArgs from_row(RopeAppendArgs rope, int64_t row) {
  rope.positions += row;
  rope.slots += row;
  return rope;
}

/// Where a pair of a head of q (w = 0), k or v (1, 2) goes in one row, looked up ahead of its use.
struct PairPlace {
  float cos = 1.0f, sin = 0.0f;  ///< of the row's position; v does not turn
  int64_t at = 0;                ///< of k and v, in their pages

  __device__ void find(const RopeAppendArgs& rope, int w, int64_t head, int64_t pair, int64_t row) {
    if (w < 2) {
      const int64_t angle = rope.positions[row] * (rope.kv.head_dim / 2) + pair;
      cos = rope.cos[angle];
      sin = rope.sin[angle];
    }
    if (w > 0) at = page_offset(rope.kv, rope.slots[row], head) + pair;
  }
  /// `q` is where the pair's first half goes if it is of q.
  __device__ void put(const RopeAppendArgs& rope, int w, float* q, float x, float y) const {
    const int64_t half = rope.kv.head_dim / 2;
    if (w < 2) rotate(cos, sin, &x, &y);
    if (w == 0) {
      q[0] = x;
      q[half] = y;
      return;
    }
    void* pages = w == 1 ? rope.kv.k : rope.kv.v;
    if (rope.kv.dtype == KvDtype::kF32) {
      store_pair<float>(pages, at, half, x, y);
    } else if (rope.kv.dtype == KvDtype::kF16) {
      store_pair<Half>(pages, at, half, x, y);
    } else {
      store_pair<Bf16>(pages, at, half, x, y);
    }
  }
};

}  // namespace ds::cuda
