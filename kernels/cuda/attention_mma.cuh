// SPDX-License-Identifier: Apache-2.0
// The forward pass on tensor cores (mma_tiles.cuh), for prompts over pages and for training over
// packed rows: FlashAttention-2 (Dao 2023, algorithm 1). Warps keep units, a query row of one head
// each; tiles of 64 keys pass by in ascending order. Scores stay in registers, where the factors of
// values are made of them. What a mask hides is zero as a factor, and keys that are not there are
// zeros in the tile too: nothing of them is seen, NaN neither.
#pragma once

#include "kernels/cuda/mma_tiles.cuh"
#include "kernels/cuda/rows_out.cuh"

namespace ds::cuda {

/// Sixteens of units of a warp, kM: two read each key once for both, as far as registers go.
template <int kD>
constexpr int kSixteens = kD <= 64 ? 2 : 1;
template <int kM>
constexpr int kBlockUnits = kGroupWarps * 16 * kM;

struct Attend {
  const float* q;
  float scale;  ///< above 0
  AttendedRows out;
  float* lse;
};

/// What a warp's lanes hold of its units: C of the sums, and of each row the maximum and the lane's
/// part of the sum of factors.
template <int kM, int kColumns>
struct Attended {
  float out[kM][kColumns][4], max[kM][2], sum[kM][2];
};

/// Scores that a unit does not see become -inf. seen[m][half]: how many keys the lane's rows see.
template <int kM, int kN>
__device__ inline void hide_unseen(int first_key, const int (&seen)[kM][2],
                                   float (&score)[kM][kN][4]) {
  const int mine = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (mine + n * 8 + e % 2 >= seen[m][e / 2]) score[m][n][e] = -INFINITY;
      }
    }
  }
}

/// The same for keys that are not chosen: of the lane's rows [m][half] a bit for each key.
template <int kM, int kN>
__device__ inline void hide_unchosen(const uint32_t (&chosen)[kM][2][kN / 4],
                                     float (&score)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = chosen[m][half][n / 4] >> (n % 4 * 8 + threadIdx.x % 4 * 2);
        if ((bits & 1u) == 0) score[m][n][2 * half] = -INFINITY;
        if ((bits & 2u) == 0) score[m][n][2 * half + 1] = -INFINITY;
      }
    }
  }
}

/// Scores become exp(score - max), and what was summed before is scaled to the new maximum. Powers
/// are of 2: `scale` has log2(e) in it.
template <int kM, int kN, int kColumns>
__device__ inline void softmax_step(float scale, float (&score)[kM][kN][4],
                                    Attended<kM, kColumns>& state) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.max[m][half];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        top = fmaxf(top, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
      }
      top = quad_max(top);
      const float shift = top == -INFINITY ? 0.0f : top * scale;  // -inf: no key seen so far
      const float keep = exp2_of(fmaf(state.max[m][half], scale, -shift));
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          score[m][n][e] = exp2_of(fmaf(score[m][n][e], scale, -shift));
          sum += score[m][n][e];
        }
      }
      state.max[m][half] = top;
      state.sum[m][half] = fmaf(state.sum[m][half], keep, sum);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        state.out[m][c][2 * half] *= keep;
        state.out[m][c][2 * half + 1] *= keep;
      }
    }
  }
}

/// Group 0's state becomes that of all keys; true there.
template <int kM, int kColumns>
__device__ inline bool join_groups(float scale, float* memory, Attended<kM, kColumns>& state) {
  constexpr int kValues = sizeof(state) / sizeof(float);
  Attended<kM, kColumns> other;
  if (!hand_over<kValues>(reinterpret_cast<const float*>(&state), memory,
                          reinterpret_cast<float(&)[kValues]>(other))) {
    return false;
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = fmaxf(state.max[m][half], other.max[m][half]);  // all units see key 0
      const float mine = exp2_of((state.max[m][half] - top) * scale);
      const float theirs = exp2_of((other.max[m][half] - top) * scale);
      state.max[m][half] = top;
      state.sum[m][half] = state.sum[m][half] * mine + other.sum[m][half] * theirs;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          state.out[m][c][e] = state.out[m][c][e] * mine + other.out[m][c][e] * theirs;
        }
      }
    }
  }
  return true;
}

/// `mine`: the warp's first unit.
template <int kM, int kColumns>
__device__ inline void store_attended(const Attend& a, const QueryUnits& units, int mine,
                                      const Attended<kM, kColumns>& state) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(state.sum[m][half]), share = 1.0f / sum;
      const int unit = mine + m * 16 + half * 8 + lane / 4;
      if (unit >= units.count) continue;
      const int64_t index = units.index(unit);
      const int64_t to = index * units.d + lane % 4 * 2;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c * 8 >= units.d) continue;
        a.out.set_two(to + c * 8, make_float2(state.out[m][c][2 * half] * share,
                                              state.out[m][c][2 * half + 1] * share));
      }
      if (a.lse != nullptr && lane % 4 == 0) {
        a.lse[index] = fmaf(state.max[m][half], a.scale, logf(sum));
      }
    }
  }
}

/// The group's tiles of keys, from memory of its own: [2][keys, values], the one in use and the
/// next.
template <int kD, int kGroups, typename Source, int kM, int kColumns, typename T>
__device__ inline void attend_keys(const Source& source, const Attend& a, const QueryUnits& units,
                                   int first, T* memory, Attended<kM, kColumns>& state) {
  const int group = threadIdx.x / kGroupThreads, lane = threadIdx.x % 32;
  const int mine = first + threadIdx.x / 32 % kGroupWarps * kM * 16;
  const int n_keys = units.seen(first + kBlockUnits<kM> - 1);
  const int n_tiles = (n_keys + kPassingRows - 1) / kPassingRows;
  const auto copy_keys = [&](int tile, T* to) {
    const PassingRows rows = source.rows(tile, n_keys);
    copy_tile<kD>(source.k, rows, units.d, to);
    copy_tile<kD>(source.v, rows, units.d, to + kTileElements<kD>);
  };
  if (group < n_tiles) copy_keys(group, memory);
  uint32_t queries[kM][kD / 16][4];
  int seen[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const float* row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = mine + m * 16 + half * 8 + lane / 4;
      row[half] = a.q + units.index(unit) * units.d;
      seen[m][half] = units.seen(unit);
    }
    load_operand<T>(row, units.d, queries[m]);
  }
  const int seen_by_first = units.seen(mine), seen_by_last = units.seen(mine + kM * 16 - 1);
  int buffer = 0;
  for (int tile = group; tile < n_tiles; tile += kGroups, buffer ^= 1) {
    wait_for_copies();
    barrier(1 + group, kGroupThreads);  // all copies are there, and the other tile is done with
    if (tile + kGroups < n_tiles) {
      copy_keys(tile + kGroups, memory + (buffer ^ 1) * 2 * kTileElements<kD>);
    }
    const int first_key = tile * kPassingRows;
    if (first_key >= seen_by_last) continue;
    const T* keys = memory + buffer * 2 * kTileElements<kD>;
    float score[kM][kPassingRows / 8][4];
    multiply_rows(queries, keys, score);
    if (first_key + kPassingRows > seen_by_first) hide_unseen(first_key, seen, score);
    softmax_step(a.scale * kLog2E, score, state);
    add_weighted_rows(score, keys + kTileElements<kD>, state.out);
  }
}

/// Grid: kv heads, sequences, tiles of kBlockUnits<kM> units, the last first: they see most keys,
/// and what is long should begin early. Source says where a sequence's units and keys are:
///   Element   of operands
///   Keys keys(sequence, kv_head), with
///     QueryUnits units
///     const Element *k, *v
///     PassingRows rows(tile, n_keys)   keys [64 tile, n_keys) of k and v, 64 at most
template <typename Source, int kD, int kM, int kGroups>
__global__ void __launch_bounds__(kGroups* kGroupThreads, kBlocksOfSm<kGroups>)
    attend_units(const __grid_constant__ Source source, const __grid_constant__ Attend a) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  const auto keys = source.keys(blockIdx.y, blockIdx.x);
  const QueryUnits& units = keys.units;
  const int first = static_cast<int>(gridDim.z - 1 - blockIdx.z) * kBlockUnits<kM>;
  if (first >= units.count) return;
  Attended<kM, kD / 8> state{};
#pragma unroll
  for (int m = 0; m < kM; ++m) state.max[m][0] = state.max[m][1] = -INFINITY;
  auto* memory = reinterpret_cast<typename Source::Element*>(shared);
  const int group = threadIdx.x / kGroupThreads;
  attend_keys<kD, kGroups>(keys, a, units, first, memory + group * 4 * kTileElements<kD>, state);
  if constexpr (kGroups == 2) {
    if (!join_groups(a.scale * kLog2E, reinterpret_cast<float*>(shared), state)) return;
  }
  store_attended(a, units, first + threadIdx.x / 32 % kGroupWarps * kM * 16, state);
}

/// f<head size as computed>() for heads of d.
template <typename F>
void for_padded_head(int64_t d, const F& f) {
  d <= 64 ? f.template operator()<64>() : f.template operator()<128>();
}

/// f<groups>(): one where so many blocks are enough for all SMs, twice over.
template <typename F>
void for_groups(int64_t blocks, const F& f) {
  blocks >= 4 * kSms ? f.template operator()<1>() : f.template operator()<2>();
}

template <int kD, int kM, int kGroups, typename Source>
void launch_attend(const StreamState& s, const Source& source, dim3 grid, const Attend& a) {
  constexpr int64_t kBytes = kGroups * 4 * kTileElements<kD> * 2;
  const auto kernel = attend_units<Source, kD, kM, kGroups>;
  if (!allow_shared(kernel, kBytes)) return;
  launch_next("attention", kernel, grid, kGroups * kGroupThreads, kBytes, s.stream(), source, a);
}

/// max_units: at least those of any sequence and kv head.
template <typename Source>
void attend_on_tensor_cores(const StreamState& s, const Source& source, int64_t n_kv_heads,
                            int64_t sequences, int64_t max_units, int64_t d, const Attend& a) {
  const auto grid_of = [&](int64_t units) {
    return dim3(static_cast<unsigned>(n_kv_heads), static_cast<unsigned>(sequences),
                static_cast<unsigned>(ceil_div(max_units, units)));
  };
  const auto blocks_of = [](dim3 grid) { return int64_t{grid.x} * grid.y * grid.z; };
  for_padded_head(d, [&]<int kD>() {
    constexpr int kM = kSixteens<kD>;
    const dim3 small = grid_of(kBlockUnits<1>), grid = grid_of(kBlockUnits<kM>);
    // An SM for each small block: they are done sooner.
    if (blocks_of(small) <= kSms) return launch_attend<kD, 1, 2>(s, source, small, a);
    for_groups(blocks_of(grid),
               [&]<int kGroups>() { launch_attend<kD, kM, kGroups>(s, source, grid, a); });
  });
}

/// Whether these kernels take such heads: whole 16-byte steps, scores that grow with the product.
inline bool suits_tensor_cores(int64_t d, float scale) {
  return d > 0 && d <= 128 && d % 8 == 0 && scale > 0.0f;
}

}  // namespace ds::cuda
