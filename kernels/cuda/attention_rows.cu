// SPDX-License-Identifier: Apache-2.0
// Paged attention row by row, for what attention_decode.cu and attention_prompt.cu do not take. A
// block takes one row and kv head and a run of its keys, a tile at a time: keys and values to
// shared memory in FP32, scores with a thread per (head, key), a softmax with a warp per head, sums
// with a thread per (head, column). Where a row has several runs, a second launch adds them up
// (flash-decoding). Runs begin at fixed positions, so the bits depend on the row's own keys alone;
// lengths are read on the device, and blocks beyond them end at once, so a captured graph serves
// all lengths up to its max_keys.
#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/tiles.cuh"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kJoinThreads = 64;
constexpr int64_t kRunKeys = 64;  // keys of a run, at the least

struct RowsArgs {
  AttentionArgs a;
  KeySelection chosen;
  int tile = 64;  ///< keys of a tile, a power of two
  int64_t run_keys = kRunKeys;
  int n_runs = 1;
  float* partial = nullptr;  ///< [batch][max_rows][n_heads][n_runs][head_dim + 2], or null: one run
};

/// One row of the batch as kernels find it.
struct RowOf {
  int64_t row, count;  ///< of the call, -1: there is none; keys for the kv head

  __device__ RowOf(const RowsArgs& r, int sequence, int64_t i, int64_t head) {
    const int32_t begin = r.a.starts[sequence], rows = r.a.starts[sequence + 1] - begin;
    row = i < rows ? begin + i : -1;
    count = 0;
    if (row < 0) return;
    count = r.chosen.keys == nullptr ? r.a.lengths[sequence] - rows + i + 1
                                     : r.chosen.counts[row * r.a.kv.n_kv_heads + head];
  }
};

/// Shared memory of a block: queries and sums [group][d], keys and values [tile][stride], factors
/// [group][tile], and per head {max, sum, keep}.
struct RowMemory {
  float *q, *out, *k, *v, *p, *max, *sum, *keep;

  __host__ __device__ static int64_t floats(int64_t group, int64_t d, int64_t tile) {
    return 2 * group * tile_stride(d) + 2 * tile * tile_stride(d) + group * (tile + 3);
  }
  __device__ RowMemory(float* memory, int group, int d, int tile) {
    const int step = tile_stride(d);
    q = memory;
    out = q + group * step;
    k = out + group * step;
    v = k + tile * step;
    p = v + tile * step;
    max = p + group * tile;
    sum = max + group;
    keep = sum + group;
  }
};

/// Keys [first, first + n) of the row and their values to shared memory.
template <typename T>
__device__ inline void load_keys(const RowsArgs& r, int sequence, const RowOf& row, int64_t head,
                                 int64_t first, int n, const RowMemory& m) {
  constexpr int kEach = Chunk<T>::kElements;
  const KvView& kv = r.a.kv;
  const auto d = static_cast<int>(kv.head_dim), step = tile_stride(d);
  const int32_t* pages = r.a.table + sequence * r.a.table_width;
  const int32_t* list = r.chosen.keys == nullptr
                            ? nullptr
                            : r.chosen.keys + (row.row * kv.n_kv_heads + head) * r.chosen.stride;
  const auto offset_of = [&](int64_t key) {
    const int64_t position = list == nullptr ? key : list[key];
    const int64_t page = pages[position / kKvPageTokens];
    return ((page * kv.n_kv_heads + head) * kKvPageTokens + position % kKvPageTokens) * d;
  };
  const auto *k = static_cast<const T*>(kv.k), *v = static_cast<const T*>(kv.v);
  if (d % kEach == 0 && is_aligned16(k) && is_aligned16(v)) {
    const int chunks = d / kEach;
    for (int at = threadIdx.x; at < n * chunks; at += kThreads) {
      const int j = at / chunks, c = at % chunks;
      const int64_t from = offset_of(first + j) + c * kEach;
      const Chunk<T> key = unpack_chunk(*reinterpret_cast<const uint4*>(k + from), T());
      const Chunk<T> value = unpack_chunk(*reinterpret_cast<const uint4*>(v + from), T());
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        const int to = j * step + c * kEach + i;
        *reinterpret_cast<float4*>(m.k + to) =
            make_float4(key.v[i], key.v[i + 1], key.v[i + 2], key.v[i + 3]);
        *reinterpret_cast<float4*>(m.v + to) =
            make_float4(value.v[i], value.v[i + 1], value.v[i + 2], value.v[i + 3]);
      }
    }
    return;
  }
  const int width = (d + 3) / 4 * 4;
  for (int at = threadIdx.x; at < n * width; at += kThreads) {
    const int j = at / width, i = at % width;
    const int64_t from = offset_of(first + j) + i;
    m.k[j * step + i] = i < d ? to_float(k[from]) : 0.0f;
    m.v[j * step + i] = i < d ? to_float(v[from]) : 0.0f;
  }
}

/// p = scale * q . k for all heads of the group and n keys.
__device__ inline void score_keys(const RowMemory& m, int group, int d, int tile, int n,
                                  float scale) {
  const int step = tile_stride(d), fours = (d + 3) / 4;
  for (int at = threadIdx.x; at < group * tile; at += kThreads) {
    const int head = at / tile, j = at % tile;
    if (j >= n) continue;
    const auto* a = reinterpret_cast<const float4*>(m.q + head * step);
    const auto* b = reinterpret_cast<const float4*>(m.k + j * step);
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < fours; ++i) {
      sum = fmaf(a[i].x, b[i].x, sum);
      sum = fmaf(a[i].y, b[i].y, sum);
      sum = fmaf(a[i].z, b[i].z, sum);
      sum = fmaf(a[i].w, b[i].w, sum);
    }
    m.p[at] = sum * scale;
  }
}

/// p = exp(p - max) with the maximum so far; a warp per head.
__device__ inline void softmax_keys(const RowMemory& m, int group, int tile, int n) {
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < group; head += kThreads / 32) {
    float* p = m.p + head * tile;
    float top = -INFINITY;
    for (int j = lane; j < n; j += 32) top = fmaxf(top, p[j]);
    const float before = m.max[head];
    top = fmaxf(before, warp_max(top));
    float sum = 0.0f;
    for (int j = lane; j < n; j += 32) {
      p[j] = expf(p[j] - top);
      sum += p[j];
    }
    sum = warp_sum(sum);
    __syncwarp();  // all lanes have read max[head]
    if (lane != 0) continue;
    const float keep = expf(before - top);
    m.max[head] = top;
    m.sum[head] = fmaf(m.sum[head], keep, sum);
    m.keep[head] = keep;
  }
}

/// out = out * keep + sum over n keys of p * v; each (head, column) belongs to one thread.
__device__ inline void sum_values(const RowMemory& m, int group, int d, int tile, int n) {
  const int step = tile_stride(d);
  for (int at = threadIdx.x; at < group * d; at += kThreads) {
    const int head = at / d, i = at % d;
    const float* p = m.p + head * tile;
    float sum = m.out[head * step + i] * m.keep[head];
#pragma unroll 8
    for (int j = 0; j < n; ++j) sum = fmaf(p[j], m.v[j * step + i], sum);
    m.out[head * step + i] = sum;
  }
}

/// Grid: max_rows * n_runs, kv heads, sequences.
template <typename T>
__global__ void __launch_bounds__(kThreads) attend_runs(const __grid_constant__ RowsArgs r) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  const int64_t i = blockIdx.x / r.n_runs, run = blockIdx.x % r.n_runs, head = blockIdx.y;
  const int sequence = blockIdx.z;
  const RowOf row(r, sequence, i, head);
  const int64_t begin = run * r.run_keys, end = smaller(row.count, begin + r.run_keys);
  if (row.row < 0 || begin >= end) return;
  const auto d = static_cast<int>(r.a.kv.head_dim), step = tile_stride(d);
  const auto group = static_cast<int>(r.a.n_heads / r.a.kv.n_kv_heads);
  const RowMemory m(reinterpret_cast<float*>(shared), group, d, r.tile);
  const int64_t at_row = (row.row * r.a.n_heads + head * group) * d;
  for (int at = threadIdx.x; at < group * step; at += kThreads) {
    const int h = at / step, c = at % step;
    m.q[at] = c < d ? r.a.q[at_row + h * d + c] : 0.0f;
    m.out[at] = 0.0f;
  }
  for (int h = threadIdx.x; h < group; h += kThreads) {
    m.max[h] = -INFINITY;
    m.sum[h] = 0.0f;
  }
  for (int64_t first = begin; first < end; first += r.tile) {
    const auto n = static_cast<int>(smaller(r.tile, end - first));
    load_keys<T>(r, sequence, row, head, first, n, m);
    __syncthreads();
    score_keys(m, group, d, r.tile, n, r.a.scale);
    __syncthreads();
    softmax_keys(m, group, r.tile, n);
    __syncthreads();
    sum_values(m, group, d, r.tile, n);
    __syncthreads();
  }
  const int64_t unit = (sequence * r.a.max_rows + i) * r.a.n_heads + head * group;
  for (int at = threadIdx.x; at < group * d; at += kThreads) {
    const int h = at / d, c = at % d;
    const float sum = m.out[h * step + c];
    if (r.partial == nullptr) {
      r.a.out[at_row + at] = sum / m.sum[h];
      continue;
    }
    float* to = r.partial + ((unit + h) * r.n_runs + run) * (d + 2);
    to[c] = sum;
    if (c == 0) {
      to[d] = m.max[h];
      to[d + 1] = m.sum[h];
    }
  }
}

/// Adds the runs of one head of one row. Grid: max_rows, heads, sequences.
__global__ void __launch_bounds__(kJoinThreads) join_runs(const __grid_constant__ RowsArgs r) {
  begin_after_previous();
  extern __shared__ float weight[];  // [n_runs]
  const int64_t i = blockIdx.x, head = blockIdx.y, d = r.a.kv.head_dim;
  const int sequence = blockIdx.z;
  const RowOf row(r, sequence, i, head / (r.a.n_heads / r.a.kv.n_kv_heads));
  if (row.row < 0 || row.count <= 0) return;
  const auto runs = static_cast<int>(ceil_div(row.count, r.run_keys));
  const int64_t unit = (sequence * r.a.max_rows + i) * r.a.n_heads + head;
  const float* part = r.partial + unit * r.n_runs * (d + 2);
  float top = -INFINITY;
  for (int n = threadIdx.x; n < runs; n += kJoinThreads) top = fmaxf(top, part[n * (d + 2) + d]);
  top = block_max(top);
  float sum = 0.0f;
  for (int n = threadIdx.x; n < runs; n += kJoinThreads) {
    weight[n] = expf(part[n * (d + 2) + d] - top);
    sum = fmaf(part[n * (d + 2) + d + 1], weight[n], sum);
  }
  sum = block_sum(sum);  // also the barrier behind `weight`
  float* to = r.a.out + (row.row * r.a.n_heads + head) * d;
  for (int64_t c = threadIdx.x; c < d; c += kJoinThreads) {
    float out = 0.0f;
#pragma unroll 8
    for (int n = 0; n < runs; ++n) out = fmaf(part[n * (d + 2) + c], weight[n], out);
    to[c] = out / sum;
  }
}

}  // namespace

void attend_rows(const StreamState& s, const AttentionArgs& a, const KeySelection* chosen) {
  RowsArgs r;
  r.a = a;
  if (chosen != nullptr) r.chosen = *chosen;
  const int64_t d = a.kv.head_dim, group = a.n_heads / a.kv.n_kv_heads;
  const int64_t keys = chosen == nullptr ? a.max_keys : smaller(a.max_keys, chosen->stride);
  if (RowMemory::floats(group, d, r.tile) * 4 > kMaxSharedBytes) r.tile = 16;
  const int64_t unit_bytes = a.batch * a.max_rows * a.n_heads * (d + 2) * 4;
  while (ceil_div(keys, r.run_keys) * unit_bytes > kScratchBytes && r.run_keys < keys) {
    r.run_keys *= 2;
  }
  if (a.max_rows > 1) r.run_keys = larger(keys, 1);  // rows enough without runs
  r.n_runs = static_cast<int>(larger(1, ceil_div(keys, r.run_keys)));
  r.partial = r.n_runs > 1 ? s.scratch<float>() : nullptr;
  const auto bytes = static_cast<size_t>(RowMemory::floats(group, d, r.tile)) * sizeof(float);
  const dim3 grid(static_cast<unsigned>(a.max_rows * r.n_runs),
                  static_cast<unsigned>(a.kv.n_kv_heads), static_cast<unsigned>(a.batch));
  auto attend = attend_runs<Bf16>;
  if (a.kv.dtype == KvDtype::kF32) attend = attend_runs<float>;
  if (a.kv.dtype == KvDtype::kF16) attend = attend_runs<Half>;
  if (!allow_shared(attend, static_cast<int64_t>(bytes))) return;
  if (!launch_next("attention of rows", attend, grid, kThreads, bytes, s.stream(), r)) return;
  if (r.n_runs == 1) return;
  const dim3 heads(static_cast<unsigned>(a.max_rows), static_cast<unsigned>(a.n_heads),
                   static_cast<unsigned>(a.batch));
  // Whole fours: compiled, the loop over them reads four at a time.
  const auto weights = static_cast<size_t>(ceil_div(r.n_runs, 4) * 4) * sizeof(float);
  if (!allow_shared(join_runs, static_cast<int64_t>(weights))) return;
  launch_next("attention of rows", join_runs, heads, kJoinThreads, weights, s.stream(), r);
}

}  // namespace ds::cuda
