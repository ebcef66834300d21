// SPDX-License-Identifier: Apache-2.0
// Linear layers of few rows: memory-bound, so every weight is read once in 16-byte loads and meets
// all rows. Order of an output: a lane's chunks ascending, then the lanes of its group as a tree;
// which lanes depends on k and the outputs alone, so a row's bits do not see how many rows there
// are.
#include "kernels/cuda/linear.h"
#include "kernels/cuda/rope.cuh"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;
// 16-byte loads of a weight row that a lane has under way: all of them for k up to 1,536, so that
// no weight is waited for after the input.
constexpr int kAhead = 6;

/// What a group of lanes computes.
enum class Outputs {
  kOne,     ///< one output of one weight
  kSwiglu,  ///< output i of both weights
  kRope,    ///< outputs i and i + half of one head of q, k or v
};

struct GemvArgs {
  InputRows in;
  int rows = 0, n_weights = 0, lanes = 32;  ///< lanes of a group
  int64_t outputs = 0;                      ///< groups
  const void* w[kMaxFusedWeights];
  int64_t n[kMaxFusedWeights];
  float* y[kMaxFusedWeights];
  int64_t y_stride[kMaxFusedWeights];
  const float* residual = nullptr;
  Additions add;
  RopeAppendArgs rope;
};

/// What a group is about: rows i0 and, if it has two, i1 of weights w0 and w1.
struct Group {
  int w0 = 0, w1 = 0;
  int64_t i0 = 0, i1 = 0;
  int64_t head = 0, pair = 0;  ///< kRope: of the weight's heads, and i of the pair

  template <Outputs kOutputs>
  __device__ static Group of(const GemvArgs& a, int64_t output) {
    Group g;
    g.i0 = g.i1 = output;
    if constexpr (kOutputs == Outputs::kSwiglu) {
      g.w1 = 1;
    } else if constexpr (kOutputs == Outputs::kOne) {
      while (g.i0 >= a.n[g.w0]) g.i0 -= a.n[g.w0++];
    } else {
      const int64_t half = a.rope.kv.head_dim / 2;
      const auto of = head_of(a.rope, output / half);
      g.w0 = g.w1 = of.w;
      g.head = of.head;
      g.pair = output % half;
      g.i0 = g.head * 2 * half + g.pair;
      g.i1 = g.i0 + half;
    }
    return g;
  }
};

/// The input rows in shared memory, as products with weights of type T see them: each is read from
/// memory once for a block. A norm's factor is left for the sums.
template <typename T, int kRows>
struct StagedRows {
  float* x;  ///< [kRows][padded]
  float factor[kRows];

  __device__ static int row_of(const GemvArgs& a, int r) { return r < a.rows ? r : a.rows - 1; }
  /// Every block has all rows: the first counts.
  __device__ static bool counts(const GemvArgs& a, int r) {
    return blockIdx.x == 0 && r < a.rows && a.in.saturated != nullptr;
  }

  /// Columns 4 i .. 4 i + 3 of all rows: without a branch, so that all loads are under way at once.
  __device__ void stage_four(const GemvArgs& a, int i, float (&part)[kRows]) {
    float4 v[kRows], weight = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if (a.in.norm != nullptr) {
      weight = before_norm<T>(reinterpret_cast<const float4*>(a.in.norm)[i]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      v[r] = reinterpret_cast<const float4*>(a.in.x + row_of(a, r) * a.in.stride)[i];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      part[r] = fmaf(v[r].x, v[r].x, fmaf(v[r].y, v[r].y, part[r]));
      part[r] = fmaf(v[r].z, v[r].z, fmaf(v[r].w, v[r].w, part[r]));
      const bool mine = counts(a, r);
      const auto value = [&](float x, float w) {
        return as_operand<T>(x * w, mine, a.in.saturated);
      };
      reinterpret_cast<float4*>(x + r * a.in.padded)[i] =
          make_float4(value(v[r].x, weight.x), value(v[r].y, weight.y), value(v[r].z, weight.z),
                      value(v[r].w, weight.w));
    }
  }
  __device__ void stage_chunk(const GemvArgs& a, int c, float (&part)[kRows]) {
    constexpr int kEach = Chunk<T>::kElements;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto chunk = input_chunk<T, false>(a.in, row_of(a, r), c, part[r], counts(a, r));
      auto* to = reinterpret_cast<float4*>(x + r * a.in.padded + c * kEach);
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        to[i / 4] = make_float4(chunk.v[i], chunk.v[i + 1], chunk.v[i + 2], chunk.v[i + 3]);
      }
    }
  }

  /// All threads of the block; rows beyond a.rows repeat the last one.
  __device__ StagedRows(const GemvArgs& a, float* shared) : x(shared) {
    __shared__ float squares[kRows][kThreads / 32];
    constexpr int kEach = Chunk<T>::kElements;
    const auto chunks = static_cast<int>(a.in.padded / kEach);
    float part[kRows] = {};
    if (a.in.whole) {
      for (int i = threadIdx.x; i < a.in.k / 4; i += kThreads) stage_four(a, i, part);
    } else {
      for (int c = threadIdx.x; c < chunks; c += kThreads) stage_chunk(a, c, part);
    }
    const bool normed = a.in.norm != nullptr;
    if (normed) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = warp_sum(part[r]);
        if (threadIdx.x % 32 == 0) squares[r][threadIdx.x / 32] = sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      factor[r] = 1.0f;
      if (!normed) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) sum += squares[r][w];
      factor[r] = norm_factor<T>(sum, static_cast<float>(a.in.k), a.in.eps);
    }
  }
};

/// This lane's part of the products of a group's weight rows with kRows input rows. No kernel that
/// launch_next() starts writes weights, so the first of them are asked for before the input is
/// waited for.
template <typename T, int kRows, bool kTwo>
struct LaneSums {
  static constexpr int kEach = Chunk<T>::kElements;
  float sum0[kRows] = {}, sum1[kRows] = {};
  uint4 raw0[kAhead], raw1[kAhead];

  __device__ void load(const GemvArgs& a, const uint4* row0, const uint4* row1, int c0) {
    const auto chunks = static_cast<int>(a.in.padded / kEach);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int c = c0 + u * a.lanes;
      if (c >= chunks) continue;
      raw0[u] = stream_chunk(row0 + c);
      if (kTwo) raw1[u] = stream_chunk(row1 + c);
    }
  }

  /// After load() of the lane's first chunks.
  __device__ void multiply(const GemvArgs& a, const uint4* row0, const uint4* row1, int lane,
                           const float* x) {
    const auto chunks = static_cast<int>(a.in.padded / kEach);
    for (int c0 = lane; c0 < chunks; c0 += kAhead * a.lanes) {
      if (c0 != lane) load(a, row0, row1, c0);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int c = c0 + u * a.lanes;
        if (c >= chunks) continue;
        const Chunk<T> w0 = unpack_chunk(raw0[u], T());
        const Chunk<T> w1 = kTwo ? unpack_chunk(raw1[u], T()) : Chunk<T>{};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const auto* from = reinterpret_cast<const float4*>(x + r * a.in.padded + c * kEach);
#pragma unroll
          for (int i = 0; i < kEach; i += 4) {
            const float4 four = from[i / 4];
            add(w0.v + i, four, sum0[r]);
            if (kTwo) add(w1.v + i, four, sum1[r]);
          }
        }
      }
    }
  }
  __device__ static void add(const float* w, const float4& x, float& sum) {
    sum = fmaf(w[0], x.x, sum);
    sum = fmaf(w[1], x.y, sum);
    sum = fmaf(w[2], x.z, sum);
    sum = fmaf(w[3], x.w, sum);
  }

  /// Adds the lanes' parts; every lane has them.
  __device__ void add_lanes(int lanes, const float (&factor)[kRows]) {
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum0[r] += __shfl_xor_sync(kAllLanes, sum0[r], step);
        if (kTwo) sum1[r] += __shfl_xor_sync(kAllLanes, sum1[r], step);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum0[r] *= factor[r];
      if (kTwo) sum1[r] *= factor[r];
    }
  }
};

template <int kRows>
__device__ inline float element_of(const float (&sum)[kRows], int row) {
  float out = sum[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) out = row == r ? sum[r] : out;
  return out;
}

/// A group of 8, 16 or 32 lanes computes the same outputs of all rows; lane r of it finishes row r.
/// Rows beyond a.rows, up to kRows, repeat the last one and are not written, as are groups beyond
/// the last.
template <typename T, int kRows, Outputs kOutputs>
__global__ void __launch_bounds__(kThreads) gemv(const __grid_constant__ GemvArgs a) {
  extern __shared__ float4 room[];
  auto* shared = reinterpret_cast<float*>(room);
  constexpr bool kTwo = kOutputs != Outputs::kOne;
  const int lane = threadIdx.x % a.lanes;
  const int64_t output = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / a.lanes;
  const bool inside = output < a.outputs;
  const auto g = Group::of<kOutputs>(a, inside ? output : 0);
  const int64_t row_bytes = a.in.padded * static_cast<int64_t>(sizeof(T));
  const int64_t to = lane * a.y_stride[g.w0] + g.i0;
  const bool writes = inside && lane < a.rows;
  const auto* row0 =
      reinterpret_cast<const uint4*>(static_cast<const char*>(a.w[g.w0]) + g.i0 * row_bytes);
  const auto* row1 =
      reinterpret_cast<const uint4*>(static_cast<const char*>(a.w[g.w1]) + g.i1 * row_bytes);
  LaneSums<T, kRows, kTwo> sums;
  sums.load(a, row0, row1, lane);
  begin_after_previous();
  const float residual = writes && a.residual != nullptr ? a.residual[to] : 0.0f;
  PairPlace place;
  if constexpr (kOutputs == Outputs::kRope) {
    if (writes) place.find(a.rope, g.w0, g.head, g.pair, lane);
  }
  const StagedRows<T, kRows> in(a, shared);
  sums.multiply(a, row0, row1, lane, in.x);
  sums.add_lanes(a.lanes, in.factor);
  if (!writes) return;
  float value = with_additions<T>(a.add, g.w0, g.i0, lane, element_of(sums.sum0, lane));
  float other = 0.0f;
  if (kTwo) other = with_additions<T>(a.add, g.w1, g.i1, lane, element_of(sums.sum1, lane));
  if constexpr (kOutputs == Outputs::kRope) {
    return place.put(a.rope, g.w0, a.y[0] + to, value, other);
  }
  if constexpr (kOutputs == Outputs::kSwiglu) value = silu_times(value, other);
  a.y[g.w0][to] = residual + value;
}

/// Lanes of a group: enough groups to fill 132 SMs when there are few outputs, few idle lanes in
/// the last chunks of a row when it is short.
int lanes_for(int64_t chunks, int64_t outputs) {
  if (chunks <= 16) return 8;
  if (chunks >= 128) return outputs >= 8192 ? 16 : 32;
  return outputs >= 4096 ? 8 : 16;
}

template <typename T, int kRows>
void launch_gemv(const StreamState& s, const GemvArgs& a, Outputs outputs) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.outputs * a.lanes, kThreads));
  auto* kernel = gemv<T, kRows, Outputs::kOne>;
  if (outputs == Outputs::kSwiglu) kernel = gemv<T, kRows, Outputs::kSwiglu>;
  if (outputs == Outputs::kRope) kernel = gemv<T, kRows, Outputs::kRope>;
  const auto shared = static_cast<size_t>(kRows * a.in.padded) * sizeof(float);
  if (!allow_shared(kernel, static_cast<int64_t>(shared) + kSharedForSums)) return;
  launch("linear of few rows", Launching{.early = !s.take_weights_changed()}, kernel, dim3(blocks),
         kThreads, shared, s.stream(), a);
}

template <typename T>
void launch_gemv(const StreamState& s, const GemvArgs& a, Outputs outputs) {
  if (a.rows == 1) return launch_gemv<T, 1>(s, a, outputs);
  if (a.rows == 2) return launch_gemv<T, 2>(s, a, outputs);
  if (a.rows <= 4) return launch_gemv<T, 4>(s, a, outputs);
  launch_gemv<T, 8>(s, a, outputs);
}

}  // namespace

InputRows input_rows(const LinearArgs& a, int64_t row, const void* rounded) {
  const int64_t k = a.w[0].k, padded = padded_k(a.w[0].format, k);
  const bool whole =
      padded == k && a.x_stride % 4 == 0 && is_aligned16(a.x) && is_aligned16(a.norm);
  const float* norm = rounded == nullptr ? a.norm : nullptr;  // rounded rows are normed already
  return {rounded,    a.x + row * a.x_stride, a.x_stride, k, padded, norm, a.norm_eps, whole,
          a.saturated};
}

void few_rows(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows) {
  Outputs outputs = Outputs::kOne;
  if (a.epilogue == Epilogue::kSwiglu) outputs = Outputs::kSwiglu;
  if (a.rope != nullptr) outputs = Outputs::kRope;
  const WeightFormat format = a.w[0].format;
  GemvArgs g{};
  g.in = input_rows(a, row, nullptr);
  g.rows = static_cast<int>(rows);
  g.n_weights = a.n_weights;
  int64_t total = 0;
  for (int w = 0; w < a.n_weights; ++w) {
    g.w[w] = a.w[w].data;
    g.n[w] = a.w[w].n;
    g.y_stride[w] = a.y_stride[w];
    g.y[w] = a.y[w] == nullptr ? nullptr : a.y[w] + row * a.y_stride[w];
    total += a.w[w].n;
  }
  g.outputs = outputs == Outputs::kOne ? total : total / 2;
  if (a.epilogue == Epilogue::kResidual) g.residual = a.residual + row * a.y_stride[0];
  if (a.rope != nullptr) g.rope = from_row(*a.rope, row);
  g.add = additions_of(a, row);
  if (g.outputs == 0) return;
  g.lanes = lanes_for(g.in.padded * element_bytes(format) / 16, g.outputs);
  with_element(format, [&]<typename T>(T) { launch_gemv<T>(s, g, outputs); });
}

}  // namespace ds::cuda
