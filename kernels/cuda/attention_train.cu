// SPDX-License-Identifier: Apache-2.0
// Attention of training, forward and backward, over all keys or over chosen ones, by tiles
// (tiles.cuh). The backward recomputes p from lse in two passes (Dao et al. 2022, section 3.1): by
// query tiles for dq, by key tiles for dk and dv, so that every gradient is summed by one warp in a
// fixed order. With D = dout . out: ds = p (dout . v - D) scale. Chosen keys are masks of the same
// tiles. All in FP32; where products may round, attention_train_mma.cu has them.
#include "kernels/cuda/attention_mma.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kSequences = 32;  // of one launch: they travel in its parameters

/// Units are the rows of a sequence; tiles the 32-key blocks of its prefix, then of its own rows.
template <bool kChosen>
struct TrainTiles {
  using Element = float;
  const float *k, *v;
  int64_t n_heads, n_kv_heads, head_dim;
  KeySelection chosen;
  TrainSequence sequences[kSequences];

  __device__ Units units(int sequence, int) const {
    const int64_t group = n_heads / n_kv_heads;
    return {sequences[sequence].n_rows * group, group, n_heads * head_dim, head_dim};
  }
  __device__ int64_t q_offset(int sequence, int head) const {
    const int64_t group = n_heads / n_kv_heads;
    return (sequences[sequence].row0 * n_heads + head * group) * head_dim;
  }
  __device__ int64_t lse_offset(int sequence, int head, int64_t unit) const {
    const Units u = units(sequence, head);
    const int64_t row = u.row(unit);
    return (sequences[sequence].row0 + row) * n_heads + head * u.group + unit - row * u.group;
  }
  __device__ int64_t key_offset(int sequence, int head, int64_t row) const {
    return ((sequences[sequence].row0 + row) * n_kv_heads + head) * head_dim;
  }
  __device__ int prefix_tiles(int sequence) const {
    return static_cast<int>(ceil_div(sequences[sequence].prefix, kTileRows));
  }
  __device__ int n_tiles(int sequence, int64_t last_row) const {
    return prefix_tiles(sequence) + static_cast<int>(last_row / kTileRows) + 1;
  }
  /// Rows count from the sequence's first own one; prefix keys come before all of them.
  __device__ KeyTile tile(int sequence, int head, int i, int64_t last_row) const {
    const TrainSequence& s = sequences[sequence];
    const int64_t stride = n_kv_heads * head_dim, before = prefix_tiles(sequence);
    if (i < before) {
      const int64_t first = static_cast<int64_t>(i) * kTileRows;
      const int64_t at = first * stride + head * head_dim;
      const auto count = static_cast<int>(smaller(kTileRows, s.prefix - first));
      return {s.prefix_k + at, s.prefix_v + at, stride, count, -kTileRows, first};
    }
    const int64_t first = (i - before) * kTileRows, at = key_offset(sequence, head, first);
    const auto count = static_cast<int>(smaller(kTileRows, last_row + 1 - first));
    return {k + at, v + at, stride, count, first, s.prefix + first};
  }
  __device__ uint32_t mask(int sequence, int head, int64_t row, const KeyTile& tile) const {
    const uint32_t seen = low_bits(smaller(tile.count, row + 1 - tile.first));
    if (!kChosen || seen == 0) return seen;
    const int64_t list = (sequences[sequence].row0 + row) * n_kv_heads + head;
    return seen &
           chosen_bits(chosen.keys + list * chosen.stride, chosen.counts[list], tile.list_first);
  }
};

struct Gradients {
  const float *q, *out, *lse, *dout;
  float *dq, *dk, *dv;
  float scale;
};

/// D of one unit, in every lane.
__device__ inline float output_dot(const Gradients& g, int64_t at, int d) {
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < d; i += 32) sum = fmaf(g.dout[at + i], g.out[at + i], sum);
  return warp_sum(sum);
}

/// dq. Grid: tiles of 32 units, kv heads, sequences.
template <typename Source, int kColumns>
__global__ void __launch_bounds__(kTileThreads)
    query_gradient(const __grid_constant__ Source source, const __grid_constant__ Gradients g) {
  extern __shared__ float4 shared[];
  const int sequence = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Units units = source.units(sequence, head);
  const int64_t first = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * kTileRows;
  if (first >= units.count) return;
  const auto d = static_cast<int>(units.d), own = warp * kWarpRows * tile_stride(d);
  auto* queries = reinterpret_cast<float*>(shared);
  float *douts = queries + tile_floats(d), *keys = douts + tile_floats(d);
  float* values = keys + tile_floats(d);
  const Factors factors{values + tile_floats(d) + warp * kWarpRows * 32};
  const int64_t base = source.q_offset(sequence, head), mine = first + warp * kWarpRows;
  const int64_t last_row = units.row(smaller(first + kTileRows, units.count) - 1);
  load_units(units, g.q + base, first, queries);
  load_units(units, g.dout + base, first, douts);
  float lse[kWarpRows], dot[kWarpRows], dq[kWarpRows][kColumns] = {};
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    const int64_t unit = smaller(mine + u, units.count - 1);
    lse[u] = g.lse[source.lse_offset(sequence, head, unit)];
    dot[u] = output_dot(g, base + units.offset(unit), d);
  }
  const int n_tiles = source.n_tiles(sequence, last_row);
  for (int i = 0; i < n_tiles; ++i) {
    const KeyTile tile = source.tile(sequence, head, i, last_row);
    __syncthreads();
    load_tile<float>(tile.k, tile.stride, tile.count, d, keys);
    load_tile<float>(tile.v, tile.stride, tile.count, d, values);
    __syncthreads();
    uint32_t mask[kWarpRows];
    if (!seen_keys(source, units, sequence, head, mine, tile, mask)) continue;
    float score[kWarpRows], back[kWarpRows];
    dot_rows(queries + own, keys, d, score);
    dot_rows(douts + own, values, d, back);
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      const bool visible = (mask[u] >> lane & 1u) != 0;
      const float p = visible ? expf(score[u] * g.scale - lse[u]) : 0.0f;
      factors.set(u, visible ? p * (back[u] - dot[u]) * g.scale : 0.0f);
    }
    __syncwarp();
    add_rows(factors, mask, keys, d, dq);
    __syncwarp();
  }
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    if (mine + u >= units.count) continue;
    float* to = g.dq + base + units.offset(mine + u);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (lane + 32 * c < d) to[lane + 32 * c] = dq[u][c];
    }
  }
}

/// What the units of a passing tile bring to key_gradient(), in shared memory.
struct PassingUnits {
  float *queries, *douts, *lse, *dot;
};

template <typename Source>
__device__ inline void load_passing(const Source& source, const Gradients& g, const Units& units,
                                    int sequence, int head, int64_t first, const PassingUnits& to) {
  const int warp = threadIdx.x / 32;
  const auto d = static_cast<int>(units.d);
  const int64_t base = source.q_offset(sequence, head);
  load_units(units, g.q + base, first, to.queries);
  load_units(units, g.dout + base, first, to.douts);
  for (int u = warp * kWarpRows; u < (warp + 1) * kWarpRows; ++u) {
    const int64_t unit = smaller(first + u, units.count - 1);
    const float dot = output_dot(g, base + units.offset(unit), d);
    if (threadIdx.x % 32 != 0) continue;
    to.lse[u] = g.lse[source.lse_offset(sequence, head, unit)];
    to.dot[u] = dot;
  }
}

/// dk and dv: a tile of 32 own keys stays, 4 to a warp; units from the first that sees it pass by,
/// rows ascending. Grid: tiles of own keys, kv heads, sequences.
template <typename Source, int kColumns>
__global__ void __launch_bounds__(kTileThreads)
    key_gradient(const __grid_constant__ Source source, const __grid_constant__ Gradients g) {
  extern __shared__ float4 shared[];
  const int sequence = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Units units = source.units(sequence, head);
  const int64_t n_rows = units.count / units.group;
  if (static_cast<int64_t>(blockIdx.x) * kTileRows >= n_rows) return;
  const auto d = static_cast<int>(units.d), own = warp * kWarpRows * tile_stride(d);
  auto* keys = reinterpret_cast<float*>(shared);
  float *values = keys + tile_floats(d), *queries = values + tile_floats(d);
  float *douts = queries + tile_floats(d), *stats = douts + tile_floats(d);
  const PassingUnits passing{queries, douts, stats, stats + kTileRows};
  const Factors of_v{stats + 2 * kTileRows + warp * 2 * kWarpRows * 32};
  const Factors of_k{of_v.at + kWarpRows * 32};
  const KeyTile tile =
      source.tile(sequence, head, source.prefix_tiles(sequence) + blockIdx.x, n_rows - 1);
  load_tile<float>(tile.k, tile.stride, tile.count, d, keys);
  load_tile<float>(tile.v, tile.stride, tile.count, d, values);
  constexpr uint32_t kAll[kWarpRows] = {kAllLanes, kAllLanes, kAllLanes, kAllLanes};
  float dk[kWarpRows][kColumns] = {}, dv[kWarpRows][kColumns] = {};
  int64_t first = tile.first * units.group / kTileRows * kTileRows;
  for (; first < units.count; first += kTileRows) {
    __syncthreads();
    load_passing(source, g, units, sequence, head, first, passing);
    __syncthreads();
    const int64_t unit = first + lane;
    uint32_t mask = 0;
    if (unit < units.count) mask = source.mask(sequence, head, units.row(unit), tile);
    mask = mask >> (warp * kWarpRows) & ((1u << kWarpRows) - 1);
    if (!__any_sync(kAllLanes, mask != 0)) continue;
    float score[kWarpRows], back[kWarpRows];
    dot_rows(keys + own, queries, d, score);
    dot_rows(values + own, douts, d, back);
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      const bool visible = (mask >> u & 1u) != 0;
      const float p = visible ? expf(score[u] * g.scale - passing.lse[lane]) : 0.0f;
      of_v.set(u, p);
      of_k.set(u, visible ? p * (back[u] - passing.dot[lane]) * g.scale : 0.0f);
    }
    __syncwarp();
    add_rows(of_v, kAll, douts, d, dv);
    add_rows(of_k, kAll, queries, d, dk);
    __syncwarp();
  }
#pragma unroll
  for (int u = 0; u < kWarpRows; ++u) {
    const int key = warp * kWarpRows + u;
    if (key >= tile.count) continue;
    const int64_t to = source.key_offset(sequence, head, tile.first + key);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (lane + 32 * c >= d) continue;
      g.dk[to + lane + 32 * c] = dk[u][c];
      g.dv[to + lane + 32 * c] = dv[u][c];
    }
  }
}

template <bool kChosen, int kColumns>
void launch_backward(const StreamState& s, const TrainTiles<kChosen>& source, dim3 units, dim3 keys,
                     const Gradients& g) {
  using Source = TrainTiles<kChosen>;
  const int64_t tiles = 4 * tile_floats(source.head_dim);
  const int64_t q_bytes = (tiles + kTileRows * 32) * 4;
  const int64_t k_bytes = (tiles + 2 * kTileRows + 2 * kTileRows * 32) * 4;
  if (!allow_shared(query_gradient<Source, kColumns>, q_bytes) ||
      !allow_shared(key_gradient<Source, kColumns>, k_bytes)) {
    return;
  }
  query_gradient<Source, kColumns>
      <<<units, kTileThreads, static_cast<size_t>(q_bytes), s.stream()>>>(source, g);
  if (!launched("gradient of queries")) return;
  key_gradient<Source, kColumns>
      <<<keys, kTileThreads, static_cast<size_t>(k_bytes), s.stream()>>>(source, g);
  launched("gradient of keys");
}

/// Forward or backward of up to kSequences sequences.
template <bool kChosen>
void train_some(const StreamState& s, const TrainAttentionArgs& a, const KeySelection& chosen,
                const TrainSequence* sequences, int64_t count, bool backward) {
  TrainTiles<kChosen> source{a.k, a.v, a.n_heads, a.n_kv_heads, a.head_dim, chosen, {}};
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    source.sequences[i] = sequences[i];
    rows = larger(rows, sequences[i].n_rows);
  }
  if (rows == 0) return;
  const auto heads = static_cast<unsigned>(a.n_kv_heads), each = static_cast<unsigned>(count);
  const int64_t units = rows * (a.n_heads / a.n_kv_heads);
  const dim3 unit_grid(static_cast<unsigned>(ceil_div(units, kTileRows)), heads, each);
  if (!backward) return attend(s, source, unit_grid, a.head_dim, a.q, a.scale, a.out, a.lse);
  const dim3 key_grid(static_cast<unsigned>(ceil_div(rows, kTileRows)), heads, each);
  const Gradients g{a.q, a.out, a.lse, a.dout, a.dq, a.dk, a.dv, a.scale};
  for_head_dim(a.head_dim, [&]<int kColumns>() {
    launch_backward<kChosen, kColumns>(s, source, unit_grid, key_grid, g);
  });
}

void train(const OpContext& context, const TrainAttentionArgs& a, const KeySelection* chosen,
           bool backward) {
  const StreamState* s = enter(context);
  if (s == nullptr) return;
  if (train_on_tensor_cores(*s, a, chosen, backward)) return;
  for (int64_t i = 0; i < a.n_sequences; i += kSequences) {
    const int64_t count = smaller(kSequences, a.n_sequences - i);
    if (chosen == nullptr) {
      train_some<false>(*s, a, {}, a.sequences + i, count, backward);
    } else {
      train_some<true>(*s, a, *chosen, a.sequences + i, count, backward);
    }
  }
}

}  // namespace

void attention_train(const OpContext& context, const TrainAttentionArgs& a) {
  train(context, a, nullptr, false);
}
void attention_train_backward(const OpContext& context, const TrainAttentionArgs& a) {
  train(context, a, nullptr, true);
}
void attention_selected_train(const OpContext& context, const TrainAttentionArgs& a,
                              const KeySelection& chosen) {
  train(context, a, &chosen, false);
}
void attention_selected_train_backward(const OpContext& context, const TrainAttentionArgs& a,
                                       const KeySelection& chosen) {
  train(context, a, &chosen, true);
}

}  // namespace ds::cuda
