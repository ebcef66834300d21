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

/// How a pair of a row turns, and where its k and v go.
struct Turn {
  float cos = 1.0f, sin = 0.0f;
  int32_t slot = 0;

  __device__ static Turn of(const RopeAppendArgs& rope, int64_t row, int64_t pair) {
    const int64_t angle = rope.positions[row] * (rope.kv.head_dim / 2) + pair;
    return {rope.cos[angle], rope.sin[angle], rope.slots[row]};
  }
  /// Elements `pair` and half a head on of one head of q (which 0), k (1) or v (2): q goes to `q`,
  /// k and v to their page; q and k turn.
  __device__ void store(const RopeAppendArgs& rope, int which, int64_t head, int64_t pair, float x,
                        float y, float* q) const {
    const int64_t half = rope.kv.head_dim / 2;
    if (which < 2) rotate(cos, sin, &x, &y);
    if (which == 0) {
      q[0] = x;
      q[half] = y;
      return;
    }
    const int64_t to = page_offset(rope.kv, slot, head) + pair;
    void* pages = which == 1 ? rope.kv.k : rope.kv.v;
    if (rope.kv.dtype == KvDtype::kF32) {
      store_pair<float>(pages, to, half, x, y);
    } else {
      store_pair<Bf16>(pages, to, half, x, y);
    }
  }
};

}  // namespace ds::cuda
