// SPDX-License-Identifier: Apache-2.0
// Paged attention of one row per sequence over pages of BF16 or FP16, over all keys or chosen ones,
// in one launch. A block has the query heads of one kv head. Teams of 8 or 16 lanes, as many as a
// key has 16 bytes, take keys in turn and keep a softmax of their own, which are joined at the end:
// teams of a warp, warps of a block, and where few sequences have long contexts, the up to 8 blocks
// of a cluster (the split of flash-decoding, Dao et al. 2023, without its second launch). The split
// follows from the call's bounds and lengths are read on the device, so a captured graph serves all
// lengths up to its max_keys.
#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/rows_out.cuh"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;  // of a block, or all it can have where SMs would be idle
constexpr int kMostThreads = 512;
constexpr int kKeys = 4;             // of a team at once
constexpr int kMaxHeads = 4;         // of a block
constexpr int kMaxBlocks = 8;        // of a cluster, what every GPU with clusters can
constexpr int64_t kBlockKeys = 256;  // of a block, before a second one helps

struct Decode {
  AttentionArgs a;
  KeySelection chosen;
  int parts;  ///< blocks that share a kv head, kHeads query heads each
};

template <int kHeads>
struct Softmax {
  float max[kHeads], sum[kHeads], out[kHeads][8];  ///< powers of 2
};

struct Keys {
  uint4 k[kKeys], v[kKeys];
};

/// exp2(max - top), 0 where no key was seen.
__device__ inline float weight_of(float max, float top) {
  return top == -INFINITY ? 0.0f : exp2_of(max - top);
}

/// Scores of a team's keys, every kTeams-th from `first` on, and what they add. All lanes of the
/// warp call.
template <typename T, int kLanes, int kHeads>
__device__ inline void attend_keys(const Keys& keys, int first, int count,
                                   const float (&q)[kHeads][8], Softmax<kHeads>& state) {
  constexpr int kTeams = 32 / kLanes;
  float p[kHeads][kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const Chunk<T> key = unpack_chunk(keys.k[u], T());
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) dot = fmaf(q[h][i], key.v[i], dot);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        dot += __shfl_xor_sync(kAllLanes, dot, step);
      }
      p[h][u] = first + u * kTeams < count ? dot : -INFINITY;
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float top = state.max[h];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) top = fmaxf(top, p[h][u]);
    const float keep = weight_of(state.max[h], top);
    state.max[h] = top;
    state.sum[h] *= keep;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      p[h][u] = weight_of(p[h][u], top);
      state.sum[h] += p[h][u];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) state.out[h][i] *= keep;
  }
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const Chunk<T> value = unpack_chunk(keys.v[u], T());
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) state.out[h][i] = fmaf(p[h][u], value.v[i], state.out[h][i]);
    }
  }
}

/// Every team's state becomes that of the whole warp.
template <int kLanes, int kHeads>
__device__ inline void join_teams(Softmax<kHeads>& state) {
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float top = fmaxf(state.max[h], __shfl_xor_sync(kAllLanes, state.max[h], step));
      const float mine = weight_of(state.max[h], top);
      state.max[h] = top;
      state.sum[h] *= mine;
      state.sum[h] += __shfl_xor_sync(kAllLanes, state.sum[h], step);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        state.out[h][i] *= mine;
        state.out[h][i] += __shfl_xor_sync(kAllLanes, state.out[h][i], step);
      }
    }
  }
}

/// A warp's state to its [kHeads][d + 4]: sums, maximum, sum of factors. The lanes of one team.
template <int kHeads>
__device__ inline void keep_state(float* to, int d, int column, const Softmax<kHeads>& state) {
#pragma unroll
  for (int h = 0; h < kHeads; ++h, to += d + 4) {
    const float(&out)[8] = state.out[h];
    auto* fours = reinterpret_cast<float4*>(to + column);
    fours[0] = make_float4(out[0], out[1], out[2], out[3]);
    fours[1] = make_float4(out[4], out[5], out[6], out[7]);
    if (column != 0) continue;
    to[d] = state.max[h];
    to[d + 1] = state.sum[h];
  }
}

/// One column of a head out of n parts; load(i, at) is part i's float: d sums, maximum, sum.
struct Joined {
  float out = 0.0f, max = -INFINITY, sum = 0.0f;

  template <typename Load>
  __device__ Joined(int n, int d, int column, const Load& load) {
#pragma unroll 4
    for (int i = 0; i < n; ++i) max = fmaxf(max, load(i, d));
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      const float weight = weight_of(load(i, d), max);
      sum = fmaf(load(i, d + 1), weight, sum);
      out = fmaf(load(i, column), weight, out);
    }
  }
};

/// Warps' states in shared memory [warps][kHeads][d + 4], then, of a cluster, the block's
/// [kHeads][d + 4], to the output.
template <int kHeads>
__device__ inline void join_warps(float* memory, int heads, int d, const AttendedRows& out,
                                  int64_t at_row) {
  const int step = d + 4, threads = static_cast<int>(blockDim.x), warps = threads / 32;
  float* of_block = memory + warps * kHeads * step;
  __syncthreads();
  for (int at = threadIdx.x; at < heads * d; at += threads) {
    const int h = at / d, column = at % d;
    const Joined all(warps, d, column,
                     [&](int i, int c) { return memory[(i * kHeads + h) * step + c]; });
    if (gridDim.x == 1) {
      out.set(at_row + at, all.out / all.sum);
      continue;
    }
    of_block[h * step + column] = all.out;
    if (column != 0) continue;
    of_block[h * step + d] = all.max;
    of_block[h * step + d + 1] = all.sum;
  }
  if (gridDim.x == 1) return;
  cluster_barrier();
  for (int at = threadIdx.x; blockIdx.x == 0 && at < heads * d; at += threads) {
    const int h = at / d, column = at % d;
    const Joined all(static_cast<int>(gridDim.x), d, column,
                     [&](int i, int c) { return load_of_block(of_block + h * step + c, i); });
    out.set(at_row + at, all.out / all.sum);
  }
  cluster_barrier();  // the others' memory is there as long as it is read
}

/// Keys `first` + team and every kTeams-th behind it, and their values; zero from `count` on and in
/// columns that are not there. row_of(key): where it is among all pages' rows.
template <int kLanes, typename RowOf>
__device__ inline Keys load_keys(const KvView& kv, int first, int count, const RowOf& row_of) {
  constexpr int kTeams = 32 / kLanes;
  const int lane = threadIdx.x % 32, team = lane / kLanes, column = lane % kLanes * 8;
  const int64_t d = kv.head_dim;
  Keys keys;
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    const int key = first + team + u * kTeams;
    keys.k[u] = keys.v[u] = make_uint4(0, 0, 0, 0);
    if (key >= count || column >= d) continue;
    const int64_t at = row_of(key) * d + column;
    keys.k[u] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(kv.k) + at);
    keys.v[u] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(kv.v) + at);
  }
  return keys;
}

/// Grid: blocks of a cluster, kv heads times parts, sequences. What does not depend on another load
/// is asked for first: the way to a key is three loads long.
template <typename T, int kLanes, int kHeads, bool kChosen>
__global__ void __launch_bounds__(kMostThreads, 1)
    attend_one_row(const __grid_constant__ Decode r) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  constexpr int kStep = 32 / kLanes * kKeys;  // a warp's keys, all in one page
  static_assert(kKvPageTokens % kStep == 0);
  const AttentionArgs& a = r.a;
  const int sequence = blockIdx.z, kv_head = blockIdx.y / r.parts, part = blockIdx.y % r.parts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = lane / kLanes, column = lane % kLanes * 8;
  const int step = static_cast<int>(gridDim.x) * warps * kStep;
  int first = (static_cast<int>(blockIdx.x) * warps + warp) * kStep;
  const auto page_of = [&](int key) {
    const int64_t i = key / kKvPageTokens;
    return i < a.table_width ? a.table[sequence * a.table_width + i] : 0;
  };
  int32_t page = kChosen ? 0 : page_of(first);
  const int length = a.lengths[sequence];
  const int64_t row = a.starts[sequence];
  if (a.starts[sequence + 1] == row) return;
  const int64_t list = row * a.kv.n_kv_heads + kv_head;
  const int count = kChosen ? r.chosen.counts[list] : length;
  const auto row_of = [&](int key) {
    if constexpr (kChosen) {
      key = r.chosen.keys[list * r.chosen.stride + key];
      page = page_of(key);
    }
    return (page * a.kv.n_kv_heads + kv_head) * kKvPageTokens + key % kKvPageTokens;
  };
  const auto d = static_cast<int>(a.kv.head_dim);
  const auto group = static_cast<int>(a.n_heads / a.kv.n_kv_heads);
  const int heads = min(kHeads, group - part * kHeads);
  const int64_t at_row = (row * a.n_heads + kv_head * group + part * kHeads) * d;
  float q[kHeads][8] = {};
  Softmax<kHeads> state{};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    state.max[h] = -INFINITY;
    if (h >= heads || column >= d) continue;
    const auto* fours = reinterpret_cast<const float4*>(a.q + at_row + h * d + column);
    const float4 low = fours[0], high = fours[1];
    const float scale = a.scale * kLog2E;
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) q[h][i] = all[i] * scale;
  }
  for (; first < count; first += step) {
    const Keys keys = load_keys<kLanes>(a.kv, first, count, row_of);
    if constexpr (!kChosen) page = page_of(first + step);
    attend_keys<T, kLanes>(keys, first + team, count, q, state);
  }
  join_teams<kLanes>(state);
  auto* memory = reinterpret_cast<float*>(shared);
  if (team == 0 && column < d) {
    keep_state(memory + warp * kHeads * (d + 4), d, column, state);
  }
  join_warps<kHeads>(memory, heads, d, AttendedRows(a), at_row);
}

template <typename T, int kLanes, int kHeads>
void launch(const StreamState& s, const AttentionArgs& a, const KeySelection* chosen) {
  const int64_t group = a.n_heads / a.kv.n_kv_heads, parts = ceil_div(group, kHeads);
  const int64_t blocks = a.kv.n_kv_heads * parts * a.batch;
  const int64_t keys = chosen == nullptr ? a.max_keys : smaller(a.max_keys, chosen->stride);
  int64_t split = 1;
  while (split < kMaxBlocks && 2 * split * blocks <= 2 * kSms && split * kBlockKeys < keys) {
    split *= 2;
  }
  const int64_t with_keys = ceil_div(keys, 32 / kLanes * kKeys) * 32;
  const auto threads =
      static_cast<int>(smaller(with_keys, split * blocks <= kSms ? kMostThreads : kThreads));
  const auto bytes = static_cast<size_t>((threads / 32 + 1) * kHeads * (a.kv.head_dim + 4)) * 4;
  const dim3 grid(static_cast<unsigned>(split), static_cast<unsigned>(a.kv.n_kv_heads * parts),
                  static_cast<unsigned>(a.batch));
  launch("attention of rows", Launching{.cluster = static_cast<unsigned>(split)},
         chosen == nullptr ? attend_one_row<T, kLanes, kHeads, false>
                           : attend_one_row<T, kLanes, kHeads, true>,
         grid, threads, bytes, s.stream(),
         Decode{a, chosen == nullptr ? KeySelection{} : *chosen, static_cast<int>(parts)});
}

template <typename T, int kLanes>
void launch_for_group(const StreamState& s, const AttentionArgs& a, const KeySelection* chosen) {
  switch (smaller(a.n_heads / a.kv.n_kv_heads, kMaxHeads)) {
    case 1:
      return launch<T, kLanes, 1>(s, a, chosen);
    case 2:
      return launch<T, kLanes, 2>(s, a, chosen);
    case 3:
      return launch<T, kLanes, 3>(s, a, chosen);
    default:
      return launch<T, kLanes, kMaxHeads>(s, a, chosen);
  }
}

template <typename T>
void launch_for_size(const StreamState& s, const AttentionArgs& a, const KeySelection* chosen) {
  if (a.kv.head_dim <= 64) return launch_for_group<T, 8>(s, a, chosen);
  launch_for_group<T, 16>(s, a, chosen);
}

}  // namespace

bool attend_one_row_each(const StreamState& s, const AttentionArgs& a, const KeySelection* chosen) {
  const int64_t d = a.kv.head_dim;
  if (a.kv.dtype == KvDtype::kF32 || a.max_rows != 1 || d > 128 || d % 8 != 0) return false;
  if (!is_aligned16(a.q) || !is_aligned16(a.kv.k) || !is_aligned16(a.kv.v)) return false;
  if (a.kv.dtype == KvDtype::kF16) {
    launch_for_size<Half>(s, a, chosen);
  } else {
    launch_for_size<Bf16>(s, a, chosen);
  }
  return true;
}

}  // namespace ds::cuda
