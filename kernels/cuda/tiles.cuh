// SPDX-License-Identifier: Apache-2.0
// Attention by tiles: 32 rows of one side (units: a query row of one head) stay in shared memory
// while tiles of 32 rows of the other side pass by. A block has 8 warps, each with 4 rows of the
// side that stays; its lanes are the 32 passing rows while scores are made, and columns of a head
// while products are summed. Everything FP32.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"

namespace ds::cuda {

constexpr int kTileRows = 32;
constexpr int kTileWarps = 8;
constexpr int kTileThreads = kTileWarps * 32;
constexpr int kWarpRows = kTileRows / kTileWarps;

/// Floats of a row in shared memory: whole 16-byte steps, an odd number of them, so that 8 lanes
/// reading 16 bytes of neighbouring rows meet all 32 banks.
__host__ __device__ constexpr int tile_stride(int64_t d) {
  return static_cast<int>((d + 3) / 4 | 1) * 4;
}
__host__ __device__ constexpr int tile_floats(int64_t d) { return kTileRows * tile_stride(d); }

/// Up to 32 keys and their values, row j at j * stride elements.
struct KeyTile {
  const void *k, *v;
  int64_t stride;
  int count;
  int64_t first;       ///< position of key 0 as rows count theirs: a row sees keys up to its own
  int64_t list_first;  ///< position of key 0 as lists of chosen keys count
};

/// rows [0, count) of `from` to FP32 in shared memory; zero in rows beyond and in columns [d, next
/// multiple of 4). All threads of the block.
template <typename T>
__device__ inline void load_tile(const void* base, int64_t stride, int count, int d, float* to) {
  constexpr int kEach = Chunk<T>::kElements;
  const auto* from = static_cast<const T*>(base);
  const int step = tile_stride(d);
  if (d % kEach == 0 && stride % kEach == 0 && is_aligned16(from)) {
    const int chunks = d / kEach;
    for (int n = threadIdx.x; n < kTileRows * chunks; n += kTileThreads) {
      const int row = n / chunks, c = n % chunks;
      Chunk<T> chunk{};
      if (row < count) {
        chunk = unpack_chunk(reinterpret_cast<const uint4*>(from + row * stride)[c], T());
      }
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        *reinterpret_cast<float4*>(to + row * step + c * kEach + i) =
            make_float4(chunk.v[i], chunk.v[i + 1], chunk.v[i + 2], chunk.v[i + 3]);
      }
    }
    return;
  }
  const int width = (d + 3) / 4 * 4;
  for (int n = threadIdx.x; n < kTileRows * width; n += kTileThreads) {
    const int row = n / width, i = n % width;
    to[row * step + i] = row < count && i < d ? to_float(from[row * stride + i]) : 0.0f;
  }
}

/// The query heads that share one kv head, over the rows of one sequence: unit = row * group +
/// head. `base` is the first row's first head.
struct Units {
  int64_t count, group, row_step, d;  ///< count < 2^31: divisions of 64 bits would cost too much
  __device__ int64_t row(int64_t unit) const {
    return static_cast<uint32_t>(unit) / static_cast<uint32_t>(group);
  }
  __device__ int64_t offset(int64_t unit) const {
    const int64_t r = row(unit);
    return r * row_step + (unit - r * group) * d;
  }
};

/// Units [first, first + 32) of q or alike to shared memory, zero beyond the last.
__device__ inline void load_units(const Units& units, const float* base, int64_t first, float* to) {
  const int d = static_cast<int>(units.d), step = tile_stride(d), fours = (d + 3) / 4;
  const bool aligned = d % 4 == 0 && is_aligned16(base);
  for (int n = threadIdx.x; n < kTileRows * fours; n += kTileThreads) {
    const int row = n / fours, i = n % fours * 4;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < units.count) {
      const float* from = base + units.offset(first + row) + i;
      if (aligned) {
        four = *reinterpret_cast<const float4*>(from);
      } else {
        four.x = from[0];  // the last four may reach beyond d
        if (i + 1 < d) four.y = from[1];
        if (i + 2 < d) four.z = from[2];
        if (i + 3 < d) four.w = from[3];
      }
    }
    *reinterpret_cast<float4*>(to + row * step + i) = four;
  }
}

/// out[u] = the warp's row u of `stay` times the lane's row of `pass`.
__device__ inline void dot_rows(const float* stay, const float* pass, int d,
                                float (&out)[kWarpRows]) {
  const int step = tile_stride(d), fours = (d + 3) / 4;
  const auto* mine = reinterpret_cast<const float4*>(pass + threadIdx.x % 32 * step);
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) out[u] = 0.0f;
#pragma unroll 4
  for (int i = 0; i < fours; ++i) {
    const float4 b = mine[i];
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      const float4 a = reinterpret_cast<const float4*>(stay + u * step)[i];
      out[u] = fmaf(a.x, b.x, out[u]);
      out[u] = fmaf(a.y, b.y, out[u]);
      out[u] = fmaf(a.z, b.z, out[u]);
      out[u] = fmaf(a.w, b.w, out[u]);
    }
  }
}

/// The warp's rows of 32 factors in shared memory.
struct Factors {
  float* at;  ///< [kWarpRows][32], of this warp
  __device__ void set(int u, float x) const { at[u * 32 + threadIdx.x % 32] = x; }
  __device__ float get(int u, int j) const { return at[u * 32 + j]; }
};

/// sum[u][c] += factor[u][j] * tile[j][lane + 32 c] over j whose bit in mask[u] is set: what a mask
/// hides is not multiplied, as it may be NaN. Columns beyond d are computed from column d - 1 and
/// never stored.
template <int kColumns>
__device__ inline void add_rows(const Factors& factors, const uint32_t (&mask)[kWarpRows],
                                const float* tile, int d, float (&sum)[kWarpRows][kColumns]) {
  const int step = tile_stride(d), lane = threadIdx.x % 32;
  int column[kColumns];
  uint32_t all = kAllLanes, any = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) column[c] = lane + 32 * c < d ? lane + 32 * c : d - 1;
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    all &= mask[u];
    any |= mask[u];
  }
  if (all == kAllLanes) {
#pragma unroll 4
    for (int j = 0; j < 32; ++j) {
      float v[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) v[c] = tile[j * step + column[c]];
#pragma unroll
      for (int u = 0; u < kWarpRows; ++u) {
        const float f = factors.get(u, j);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[u][c] = fmaf(f, v[c], sum[u][c]);
      }
    }
    return;
  }
  for (; any != 0; any &= any - 1) {
    const int j = __ffs(static_cast<int>(any)) - 1;
    float v[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) v[c] = tile[j * step + column[c]];
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      if ((mask[u] >> j & 1u) == 0) continue;
      const float f = factors.get(u, j);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[u][c] = fmaf(f, v[c], sum[u][c]);
    }
  }
}

/// The lowest n bits, n clamped to [0, 32].
__device__ inline uint32_t low_bits(int64_t n) {
  return n <= 0 ? 0u : n >= 32 ? kAllLanes : (1u << n) - 1;
}

/// Which of positions [first, first + 32) are in an ascending list.
__device__ inline uint32_t chosen_bits(const int32_t* list, int count, int64_t first) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] < first) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  uint32_t bits = 0;
  for (; low < count && list[low] < first + 32; ++low) bits |= 1u << (list[low] - first);
  return bits;
}

}  // namespace ds::cuda
