// SPDX-License-Identifier: Apache-2.0
// The forward pass by tiles (tiles.cuh), for prompts over pages and for training over packed rows:
// an online softmax over tiles of 32 keys in ascending order (Milakov and Gimelshein 2018; Dao et
// al. 2022). A unit's arithmetic depends on its own keys alone.
#pragma once

#include "kernels/cuda/tiles.cuh"

namespace ds::cuda {

struct SoftmaxRow {
  float max, sum;  ///< `sum` is this lane's part
};

/// Scores of one tile for the warp's units: factors become exp(score - max), and what was summed
/// before is scaled to the new maximum.
template <int kColumns>
__device__ inline void softmax_tile(const float (&score)[kWarpRows], float scale,
                                    const uint32_t (&mask)[kWarpRows], const Factors& factors,
                                    SoftmaxRow (&state)[kWarpRows],
                                    float (&out)[kWarpRows][kColumns]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    if (mask[u] == 0) continue;  // before the first key the maximum is -inf
    const bool visible = (mask[u] >> lane & 1u) != 0;
    const float s = visible ? score[u] * scale : -INFINITY;
    const float top = fmaxf(state[u].max, warp_max(s));
    const float keep = expf(state[u].max - top);
    const float p = visible ? expf(s - top) : 0.0f;
    state[u].max = top;
    state[u].sum = fmaf(state[u].sum, keep, p);
    factors.set(u, p);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[u][c] *= keep;
  }
}

/// Which keys of a tile the warp's units from `mine` on see; whether any does. Units beyond the
/// last see what it sees, so that the warp need not step key by key.
template <typename Source>
__device__ inline bool seen_keys(const Source& source, const Units& units, int sequence, int head,
                                 int64_t mine, const KeyTile& tile, uint32_t (&mask)[kWarpRows]) {
  uint32_t any = 0;
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    const int64_t row = units.row(smaller(mine + u, units.count - 1));
    mask[u] = mine < units.count ? source.mask(sequence, head, row, tile) : 0u;
    any |= mask[u];
  }
  return any != 0;
}

/// Grid: tiles of 32 units (the last first: they see most keys), kv heads, sequences. Source says
/// where a sequence's units and keys are:
///   Units units(sequence, kv_head)          and the offsets of the first unit in q and out, lse
///   int64_t q_offset(sequence, kv_head), lse_offset(sequence, kv_head)
///   int n_tiles(sequence, last_row)         of keys that rows up to this one see
///   KeyTile tile(sequence, kv_head, i, last_row)
///   int64_t position(sequence, row)         as KeyTile::first counts
///   uint32_t mask(sequence, kv_head, row, tile)  keys of the tile that a row sees
template <typename Source, int kColumns>
__global__ void __launch_bounds__(kTileThreads)
    attend_tiles(const __grid_constant__ Source source, const float* __restrict__ q, float scale,
                 float* out, float* lse) {
  extern __shared__ float4 shared[];
  const int sequence = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Units units = source.units(sequence, head);
  const int64_t first = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * kTileRows;
  if (first >= units.count) return;
  const auto d = static_cast<int>(units.d);
  auto* queries = reinterpret_cast<float*>(shared);
  float *keys = queries + tile_floats(d), *values = keys + tile_floats(d);
  const Factors factors{values + tile_floats(d) + warp * kWarpRows * 32};
  load_units(units, q + source.q_offset(sequence, head), first, queries);
  const int64_t mine = first + warp * kWarpRows;  // the warp's first unit
  const int64_t last_row = units.row(smaller(first + kTileRows, units.count) - 1);
  SoftmaxRow state[kWarpRows];
  float sum[kWarpRows][kColumns] = {};
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) state[u] = {-INFINITY, 0.0f};
  const int n_tiles = source.n_tiles(sequence, last_row);
  for (int i = 0; i < n_tiles; ++i) {
    const KeyTile tile = source.tile(sequence, head, i, last_row);
    __syncthreads();
    load_tile<typename Source::Element>(tile.k, tile.stride, tile.count, d, keys);
    load_tile<typename Source::Element>(tile.v, tile.stride, tile.count, d, values);
    __syncthreads();
    uint32_t mask[kWarpRows];
    if (!seen_keys(source, units, sequence, head, mine, tile, mask)) continue;
    float score[kWarpRows];
    dot_rows(queries + warp * kWarpRows * tile_stride(d), keys, d, score);
    softmax_tile(score, scale, mask, factors, state, sum);
    __syncwarp();
    add_rows(factors, mask, values, d, sum);
    __syncwarp();
  }
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    const float total = warp_sum(state[u].sum);
    if (mine + u >= units.count) continue;
    float* to = out + source.q_offset(sequence, head) + units.offset(mine + u);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (lane + 32 * c < d) to[lane + 32 * c] = sum[u][c] / total;
    }
    if (lse != nullptr && lane == 0) {
      lse[source.lse_offset(sequence, head, mine + u)] = state[u].max + logf(total);
    }
  }
}

template <typename Source, int kColumns>
void launch_tiles(const StreamState& s, const Source& source, dim3 grid, int64_t d, const float* q,
                  float scale, float* out, float* lse) {
  const auto bytes = static_cast<size_t>(3 * tile_floats(d) + kTileRows * 32) * sizeof(float);
  if (!allow_shared(attend_tiles<Source, kColumns>, static_cast<int64_t>(bytes))) return;
  attend_tiles<Source, kColumns>
      <<<grid, kTileThreads, bytes, s.stream()>>>(source, q, scale, out, lse);
  launched("attention");
}

/// f<columns>() for heads of d: 32 columns a step.
template <typename F>
void for_head_dim(int64_t d, const F& f) {
  if (d <= 0 || d > 256) return fail("attention: head_dim " + std::to_string(d) + ", at most 256");
  if (d <= 32) return f.template operator()<1>();
  if (d <= 64) return f.template operator()<2>();
  if (d <= 128) return f.template operator()<4>();
  f.template operator()<8>();
}

template <typename Source>
void attend(const StreamState& s, const Source& source, dim3 grid, int64_t d, const float* q,
            float scale, float* out, float* lse) {
  for_head_dim(d, [&]<int kColumns>() {
    launch_tiles<Source, kColumns>(s, source, grid, d, q, scale, out, lse);
  });
}

}  // namespace ds::cuda
