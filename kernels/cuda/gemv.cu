// SPDX-License-Identifier: Apache-2.0
// Linear layers of few rows: memory-bound, so every weight is read once in 16-byte loads and meets
// all rows. Order of an output: a lane's chunks ascending, then the lanes of its group as a tree;
// which lanes depends on k and the outputs alone, so a row's bits do not see how many rows there
// are.
#include "kernels/cuda/linear.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 4;  // 16-byte loads of a weight row that a lane has under way

struct GemvArgs {
  InputRows in;
  int rows = 0, n_weights = 0, lanes = 32;  ///< lanes of a group: each group has one output
  int64_t outputs = 0;                      ///< of all weights, or pairs with swiglu
  const void* w[kMaxFusedWeights];
  int64_t n[kMaxFusedWeights];
  float* y[kMaxFusedWeights];
  int64_t y_stride[kMaxFusedWeights];
  const float* residual = nullptr;
  Additions add;
};

template <int kRows, typename T>
__device__ inline void multiply_add(const Chunk<T>& w, const Chunk<T> (&x)[kRows],
                                    float (&sum)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int e = 0; e < Chunk<T>::kElements; ++e) sum[r] = fmaf(w.v[e], x[r].v[e], sum[r]);
  }
}

/// This lane's part of the products of one weight row (two if kPaired) with kRows input rows. No
/// kernel that launch_next() starts writes weights, so the first of them are asked for before the
/// input is waited for.
template <typename T, bool kRounded, int kRows, bool kPaired>
__device__ inline void lane_sums(const GemvArgs& a, const void* w0, const void* w1, int lane,
                                 float (&sum0)[kRows], float (&sum1)[kRows]) {
  const auto* row0 = static_cast<const uint4*>(w0);
  const auto* row1 = static_cast<const uint4*>(w1);
  const auto chunks = static_cast<int>(a.in.padded / Chunk<T>::kElements);
  uint4 raw0[kAhead], raw1[kAhead];
  const auto load = [&](int c0) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int c = c0 + u * a.lanes;
      if (c >= chunks) continue;
      raw0[u] = stream_chunk(row0 + c);
      if (kPaired) raw1[u] = stream_chunk(row1 + c);
    }
  };
  load(lane);
  begin_after_previous();
  for (int c0 = lane; c0 < chunks; c0 += kAhead * a.lanes) {
    if (c0 != lane) load(c0);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int c = c0 + u * a.lanes;
      if (c >= chunks) continue;
      Chunk<T> x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r] = input_chunk<T, kRounded>(a.in, r < a.rows ? r : a.rows - 1, c);
      }
      multiply_add(unpack_chunk(raw0[u], T()), x, sum0);
      if (kPaired) multiply_add(unpack_chunk(raw1[u], T()), x, sum1);
    }
  }
}

/// Low-rank part and bias of output i of weight w in one row.
template <typename T>
__device__ inline float with_additions(const Additions& add, int w, int64_t i, int row,
                                       float value) {
  if (add.slot_of_row != nullptr) {
    const int32_t slot = add.slot_of_row[row];
    if (slot >= 0 && add.low[slot][w].b != nullptr) {
      LowRow<T> b;
      b.load(add.low[slot][w].b, i);
      value = b.add_to(value, add.t + (w * add.t_rows + row) * kLoraRank, add.low[slot][w].scale);
    }
  }
  return add.bias[w] == nullptr ? value : value + add.bias[w][i];
}

template <int kRows>
__device__ inline float element_of(const float (&sum)[kRows], int row) {
  float out = sum[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) out = row == r ? sum[r] : out;
  return out;
}

/// A group of 8, 16 or 32 lanes computes one output of all rows; lane r of it finishes row r. Rows
/// beyond a.rows, up to kRows, repeat the last one and are not written.
template <typename T, bool kRounded, int kRows, bool kPaired>
__global__ void __launch_bounds__(kThreads) gemv(const __grid_constant__ GemvArgs a) {
  const int lane = threadIdx.x % a.lanes;
  const int64_t output = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / a.lanes;
  const bool inside = output < a.outputs;
  int64_t i = inside ? output : 0;
  int w = 0;
  if (!kPaired) {
    while (i >= a.n[w]) i -= a.n[w++];
  }
  const int64_t at = i * a.in.padded * static_cast<int64_t>(sizeof(T));
  float sum0[kRows] = {}, sum1[kRows] = {};
  if (inside) {
    lane_sums<T, kRounded, kRows, kPaired>(
        a, static_cast<const char*>(a.w[w]) + at,
        kPaired ? static_cast<const char*>(a.w[1]) + at : nullptr, lane, sum0, sum1);
  } else {
    begin_after_previous();
  }
  for (int step = a.lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum0[r] += __shfl_xor_sync(kAllLanes, sum0[r], step);
      if (kPaired) sum1[r] += __shfl_xor_sync(kAllLanes, sum1[r], step);
    }
  }
  if (!inside || lane >= a.rows) return;
  float value = with_additions<T>(a.add, w, i, lane, element_of(sum0, lane));
  if (kPaired) {
    value = silu_times(value, with_additions<T>(a.add, 1, i, lane, element_of(sum1, lane)));
  }
  const int64_t to = lane * a.y_stride[w] + i;
  a.y[w][to] = a.residual == nullptr ? value : a.residual[to] + value;
}

/// Lanes of a group: enough groups to fill 132 SMs when there are few outputs, few idle lanes in
/// the last chunks of a row when it is short.
int lanes_for(int64_t chunks, int64_t outputs) {
  if (chunks <= 16) return 8;
  if (chunks >= 128) return outputs >= 8192 ? 16 : 32;
  return outputs >= 4096 ? 8 : 16;
}

template <typename T, bool kRounded, int kRows>
void launch_gemv(const StreamState& s, const GemvArgs& a, bool paired) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.outputs * a.lanes, kThreads));
  launch_next("linear of few rows",
              paired ? gemv<T, kRounded, kRows, true> : gemv<T, kRounded, kRows, false>,
              dim3(blocks), kThreads, 0, s.stream(), a);
}

template <typename T, bool kRounded>
void launch_gemv(const StreamState& s, const GemvArgs& a, bool paired) {
  if (a.rows == 1) return launch_gemv<T, kRounded, 1>(s, a, paired);
  if (a.rows == 2) return launch_gemv<T, kRounded, 2>(s, a, paired);
  if (a.rows <= 4) return launch_gemv<T, kRounded, 4>(s, a, paired);
  launch_gemv<T, kRounded, 8>(s, a, paired);
}

/// t [weights][t_rows][16] = A x. A block takes kRows rows of one weight, its warp j the rank j;
/// rows of one slot share the loads of A.
struct LowInputs {
  InputRows in;
  int64_t rows = 0, t_rows = 0;
  const int32_t* slot_of_row = nullptr;
  const void* a[kMaxLoraSlots][kMaxFusedWeights];
  float* t = nullptr;
};

template <typename T, bool kRounded, int kRows>
__global__ void __launch_bounds__(kLoraRank * 32)
    low_rank_rows(const __grid_constant__ LowInputs a) {
  begin_after_previous();
  const int lane = threadIdx.x % 32, rank = threadIdx.x / 32, w = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto chunks = static_cast<int>(a.in.padded / Chunk<T>::kElements);
  for (int64_t row = first; row < a.rows && row < first + kRows;) {
    const int32_t slot = a.slot_of_row[row];
    int count = 1;
    while (row + count < a.rows && row + count < first + kRows &&
           a.slot_of_row[row + count] == slot) {
      ++count;
    }
    float sum[kRows] = {};
    if (slot >= 0 && a.a[slot][w] != nullptr) {
      const auto* matrix = static_cast<const T*>(a.a[slot][w]) + rank * a.in.padded;
#pragma unroll 2
      for (int c = lane; c < chunks; c += 32) {
        const Chunk<T> weights = unpack_chunk(reinterpret_cast<const uint4*>(matrix)[c], T());
        for (int r = 0; r < kRows; ++r) {
          if (r >= count) break;
          const Chunk<T> x = input_chunk<T, kRounded>(a.in, row + r, c);
#pragma unroll
          for (int e = 0; e < Chunk<T>::kElements; ++e) sum[r] = fmaf(weights.v[e], x.v[e], sum[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float total = warp_sum(sum[r]);
      if (r < count && lane == 0) a.t[(w * a.t_rows + row + r) * kLoraRank + rank] = total;
    }
    row += count;
  }
}

template <typename T, bool kRounded>
void launch_low_rank(const StreamState& s, const LowInputs& a, int n_weights) {
  constexpr int kMany = 4;
  if (a.rows <= kFewRows) {
    const dim3 grid(static_cast<unsigned>(a.rows), static_cast<unsigned>(n_weights));
    launch_next("low-rank inputs", low_rank_rows<T, kRounded, 1>, grid, kLoraRank * 32, 0,
                s.stream(), a);
  } else {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kMany)),
                    static_cast<unsigned>(n_weights));
    launch_next("low-rank inputs", low_rank_rows<T, kRounded, kMany>, grid, kLoraRank * 32, 0,
                s.stream(), a);
  }
}

InputRows input_rows(const LinearArgs& a, int64_t row, const void* rounded) {
  const int64_t k = a.w[0].k;
  return {rounded, a.x + row * a.x_stride, a.x_stride, k, padded_k(a.w[0].format, k)};
}

}  // namespace

Additions additions_of(const LinearArgs& a, int64_t row) {
  Additions out;
  for (int w = 0; w < a.n_weights; ++w) out.bias[w] = a.bias[w];
  if (a.lora == nullptr) return out;
  out.slot_of_row = a.lora->slot_of_row + row;
  out.t = a.lora->t + row * kLoraRank;
  out.t_rows = a.rows;
  for (int slot = 0; slot < a.lora->n_slots; ++slot) {
    for (int w = 0; w < a.n_weights; ++w) {
      const LoraPair& pair = a.lora->pair[slot][w];
      out.low[slot][w] = {pair.b.data, pair.scale};
    }
  }
  return out;
}

void low_rank_inputs(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows,
                     const void* rounded) {
  LowInputs low{};
  low.in = input_rows(a, row, rounded);
  low.rows = rows;
  low.t_rows = a.rows;
  low.slot_of_row = a.lora->slot_of_row + row;
  low.t = a.lora->t + row * kLoraRank;
  for (int slot = 0; slot < a.lora->n_slots; ++slot) {
    for (int w = 0; w < a.n_weights; ++w) low.a[slot][w] = a.lora->pair[slot][w].a.data;
  }
  if (a.w[0].format == WeightFormat::kF32) {
    launch_low_rank<float, false>(s, low, a.n_weights);
  } else if (rounded != nullptr) {
    launch_low_rank<Bf16, true>(s, low, a.n_weights);
  } else {
    launch_low_rank<Bf16, false>(s, low, a.n_weights);
  }
}

void few_rows(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows) {
  const bool paired = a.epilogue == Epilogue::kSwiglu;
  const WeightFormat format = a.w[0].format;
  const void* rounded = nullptr;
  if (format == WeightFormat::kBF16 && a.x_prepared != nullptr) {
    rounded = static_cast<const char*>(a.x_prepared) + row * rounded_row_bytes(a.w[0].k);
  }
  GemvArgs g{};
  g.in = input_rows(a, row, rounded);
  g.rows = static_cast<int>(rows);
  g.n_weights = a.n_weights;
  for (int w = 0; w < a.n_weights; ++w) {
    g.w[w] = a.w[w].data;
    g.n[w] = a.w[w].n;
    g.y_stride[w] = a.y_stride[w];
    g.y[w] = a.y[w] == nullptr ? nullptr : a.y[w] + row * a.y_stride[w];
    g.outputs += !paired || w == 0 ? a.w[w].n : 0;
  }
  if (a.epilogue == Epilogue::kResidual) g.residual = a.residual + row * a.y_stride[0];
  g.add = additions_of(a, row);
  if (g.outputs == 0) return;
  g.lanes = lanes_for(g.in.padded * element_bytes(format) / 16, g.outputs);
  if (format == WeightFormat::kF32) {
    launch_gemv<float, false>(s, g, paired);
  } else if (rounded != nullptr) {
    launch_gemv<Bf16, true>(s, g, paired);
  } else {
    launch_gemv<Bf16, false>(s, g, paired);
  }
}

}  // namespace ds::cuda
