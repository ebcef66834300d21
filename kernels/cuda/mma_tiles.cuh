// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores by tiles: each warp keeps rows of one side in registers, as operand A,
// while tiles of 64 rows of the other side pass through shared memory, copied a tile ahead
// (FlashAttention-2, Dao 2023, sections 3.1 and 3.3). A group is 4 warps that share the passing
// tiles; a block has one group, or two that take every second tile and add up at the end, where
// there are few blocks for the GPU. Operands are BF16 or FP16, sums FP32.
#pragma once

#include <type_traits>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/state.h"

namespace ds::cuda {

constexpr int kGroupWarps = 4;
constexpr int kGroupThreads = kGroupWarps * 32;
constexpr int kPassingRows = 64;

/// Elements of a row in shared memory: an odd number of 16-byte steps, so that the 8 rows that
/// ldmatrix reads at once meet all 32 banks.
template <int kD>
constexpr int kRowStep = kD + 8;
template <int kD>
constexpr int kTileElements = kPassingRows* kRowStep<kD>;

/// Blocks of one group fit twice on an SM, of two once.
template <int kGroups>
constexpr int kBlocksOfSm = kGroups == 1 ? 2 : 1;

/// Where the two halves of a passing tile begin, 32 rows each, in elements from a base that is
/// given with it, and how many rows there are.
struct PassingRows {
  int64_t half[2];
  int64_t stride;
  int count;
};

/// Begins to copy a tile; zeros in rows and columns that are not there. All threads of a group.
template <int kD, typename T>
__device__ inline void copy_tile(const T* base, const PassingRows& rows, int d, T* tile) {
  constexpr int kChunks = kD / 8,
                kRound = kGroupThreads / kChunks;  // rows that the group copies at once
  const int thread = threadIdx.x % kGroupThreads;
  const int row = thread / kChunks, column = thread % kChunks * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* from = base + rows.half[half] + row * rows.stride + column;
#pragma unroll
    for (int i = 0; i < kPassingRows / 2; i += kRound) {
      const int to = half * (kPassingRows / 2) + i + row;
      copy_16(tile + to * kRowStep<kD> + column, from + i * rows.stride,
              to < rows.count && column < d);
    }
  }
}

/// product[m][n] = the warp's rows 16 m.. times rows 8 n.. of a tile. `stay` is A by 16 columns.
template <int kM, int kSteps, int kN, typename T>
__device__ inline void multiply_rows(const uint32_t (&stay)[kM][kSteps][4], const T* tile,
                                     float (&product)[kM][kN][4]) {
  constexpr int kStep = kRowStep<16 * kSteps>;
  const int lane = threadIdx.x % 32;
  const T* at = tile + (lane / 16 * 8 + lane % 8) * kStep + lane / 8 % 2 * 8;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) product[m][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_matrices(at + n * 8 * kStep + s * 16, b);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(stay[m][s], b[0], b[1], product[m][n]);
        multiply_add<T>(stay[m][s], b[2], b[3], product[m][n + 1]);
      }
    }
  }
}

/// sum[m][c] += factors of the warp's rows 16 m.. times rows 0..8 kN of a tile, columns 8 c.. The
/// factors are as multiply_rows leaves them: two neighbours of C are an A.
template <int kM, int kN, int kColumns, typename T>
__device__ inline void add_weighted_rows(const float (&factor)[kM][kN][4], const T* tile,
                                         float (&sum)[kM][kColumns][4]) {
  constexpr int kStep = kRowStep<8 * kColumns>;
  const int lane = threadIdx.x % 32;
  const T* at = tile + (lane / 8 % 2 * 8 + lane % 8) * kStep + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&two)[4] = factor[m][n + i / 2];
        a[m][i] = pack_pair<T>(two[i % 2 * 2], two[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      uint32_t b[4];
      load_transposed(at + n * 8 * kStep + c * 8, b);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(a[m], b[0], b[1], sum[m][c]);
        multiply_add<T>(a[m], b[2], b[3], sum[m][c + 1]);
      }
    }
  }
}

/// Two neighbours of a row, zero beyond its d columns. Without branches, so that many loads are
/// under way at once.
template <typename Pair, typename T>
__device__ inline Pair pair_at(const T* row, int column, int d) {
  const Pair pair = *reinterpret_cast<const Pair*>(row + (column < d ? column : 0));
  return column < d ? pair : Pair{};
}
template <typename T>
__device__ inline uint32_t as_pair(float2 x) {
  return pack_pair<T>(x.x, x.y);
}
template <typename T>
__device__ inline uint32_t as_pair(uint32_t x) {
  return x;
}

/// A of 16 rows of T from global memory, which has From, T or FP32: `row` are the lane's two, g and
/// g + 8 of them.
template <typename T, int kSteps, typename From>
__device__ inline void load_operand(const From* const (&row)[2], int d, uint32_t (&to)[kSteps][4]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = s * 16 + i / 2 * 8 + threadIdx.x % 4 * 2;
      using Pair = std::conditional_t<sizeof(From) == 4, float2, uint32_t>;
      to[s][i] = as_pair<T>(pair_at<Pair>(row[i % 2], column, d));
    }
  }
}

/// Over the four lanes that share rows of A and C.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

/// The query heads that share one kv head, over the rows of one sequence: unit = row * group +
/// head of the group. Units beyond the last are computed as that one, and not stored.
struct QueryUnits {
  int64_t row0, n_heads;  ///< first row in the call
  int count, group, head0, before, d;

  __device__ int row(int unit) const {
    const auto there = static_cast<uint32_t>(unit < count ? unit : count - 1);
    return static_cast<int>(there / static_cast<uint32_t>(group));
  }
  /// Of [rows][n_heads]: times d it is where the unit's q begins.
  __device__ int64_t index(int unit) const {
    const int r = row(unit);
    return (row0 + r) * n_heads + head0 + (unit < count ? unit : count - 1) - r * group;
  }
  /// How many keys it sees.
  __device__ int seen(int unit) const { return before + row(unit) + 1; }
};

/// Those of a sequence that is served, for one kv head.
__device__ inline QueryUnits paged_units(const AttentionArgs& a, int64_t sequence, int64_t head) {
  const int32_t row0 = a.starts[sequence], rows = a.starts[sequence + 1] - row0;
  const auto group = static_cast<int>(a.n_heads / a.kv.n_kv_heads);
  return {row0,
          a.n_heads,
          rows * group,
          group,
          static_cast<int>(head) * group,
          a.lengths[sequence] - rows,
          static_cast<int>(a.kv.head_dim)};
}

/// Hands group 1's values to group 0, thread by thread; true in group 0. All threads of the block,
/// done with shared memory.
template <int kValues>
__device__ inline bool hand_over(const float* mine, float* memory, float (&other)[kValues]) {
  float* at = memory + threadIdx.x % kGroupThreads;
  __syncthreads();
  if (threadIdx.x >= kGroupThreads) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) at[i * kGroupThreads] = mine[i];
  }
  __syncthreads();
  if (threadIdx.x >= kGroupThreads) return false;
#pragma unroll
  for (int i = 0; i < kValues; ++i) other[i] = at[i * kGroupThreads];
  return true;
}

}  // namespace ds::cuda
