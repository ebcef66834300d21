// SPDX-License-Identifier: Apache-2.0
// Linear layers of many rows through cuBLAS, and the choice between them and few_rows().
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;  // columns of a block
constexpr int kTileRows = 4;   // rows that one thread finishes

/// Products of rows in memory, to be finished: in place, or into rounded rows.
struct Finish {
  int64_t rows = 0, n = 0;
  float* y = nullptr;  ///< products of weight `weight`; of the gate with swiglu
  int64_t y_stride = 0;
  const float* up = nullptr;  ///< products of weight 1 with swiglu, [rows, n]
  void* prepared = nullptr;   ///< [rows, padded n] in the format of the weights; null: in place
  const float* residual = nullptr;
  int weight = 0;
  Additions add;
};

/// y = product + low-rank part + bias, then residual or swiglu. A thread takes one column of
/// kTileRows rows, whose products it asks for at once, and loads its row of B again only where the
/// slot changes.
template <typename T, bool kPaired>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Finish a) {
  constexpr int kParts = kPaired ? 2 : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t padded = padded_k(WeightFormat::kBF16, a.n);
  auto* const prepared = static_cast<T*>(a.prepared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows;
  if (i >= a.n) {
    if (prepared == nullptr || i >= padded) return;
    for (int64_t row = first; row < a.rows && row < first + kTileRows; ++row) {
      prepared[row * padded + i] = from_float<T>(0.0f);
    }
    return;
  }
  float product[kTileRows][kParts], residual[kTileRows] = {};
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = first + r;
    if (row >= a.rows) break;
    product[r][0] = a.y[row * a.y_stride + i];
    if constexpr (kPaired) product[r][1] = a.up[row * a.n + i];
    if (a.residual != nullptr) residual[r] = a.residual[row * a.y_stride + i];
  }
  LowRow<T> b[kParts];
  float bias[kParts];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const float* from = a.add.bias[a.weight + p];
    bias[p] = from == nullptr ? 0.0f : from[i];
  }
  int32_t loaded = -1;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = first + r;
    if (row >= a.rows) return;
    const int32_t slot = a.add.slot_of_row == nullptr ? -1 : a.add.slot_of_row[row];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int w = a.weight + p;
      if (slot >= 0 && a.add.low[slot][w].b != nullptr) {
        if (slot != loaded) b[p].load(a.add.low[slot][w].b, i);
        const float* t = a.add.t + (w * a.add.t_rows + row) * kLoraRank;
        product[r][p] = b[p].add_to(product[r][p], t, a.add.low[slot][w].scale);
      }
      product[r][p] += bias[p];
    }
    loaded = slot;
    float out = product[r][0];
    if constexpr (kPaired) out = silu_times(out, product[r][1]);
    if (prepared != nullptr) {
      prepared[row * padded + i] = from_float<T>(out);
    } else {
      a.y[row * a.y_stride + i] = residual[r] + out;
    }
  }
}

void launch_finish(const StreamState& s, const Finish& a, WeightFormat format) {
  if (a.rows == 0 || a.n == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kTileRows)),
                  static_cast<unsigned>(ceil_div(padded_k(WeightFormat::kBF16, a.n), kThreads)));
  with_element(format, [&]<typename T>(T) {
    const auto kernel = a.up != nullptr ? finish_rows<T, true> : finish_rows<T, false>;
    kernel<<<grid, kThreads, 0, s.stream()>>>(a);
  });
  launched("end of a linear layer");
}

/// FP32 is FP32: without TF32, unless that is asked for.
Product product_of(WeightFormat format) {
  Product p;
  switch (format) {
    case WeightFormat::kBF16:
      p.type = CUDA_R_16BF;
      break;
    case WeightFormat::kF16:
      p.type = CUDA_R_16F;
      break;
    case WeightFormat::kTF32:
      p.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
      break;
    default:
      p.compute = CUBLAS_COMPUTE_32F_PEDANTIC;
  }
  return p;
}

/// y [rows, n] = x W^T + beta y; x is rounded rows for weights of 16 bits, else FP32 rows.
bool multiply(const StreamState& s, const WeightView& w, int64_t rows, const void* x,
              int64_t x_stride, float beta, float* y, int64_t y_stride) {
  if (w.n == 0) return true;
  Product p = product_of(w.format);
  p.m = rows;
  p.n = w.n;
  // The padding of rows of 16 bits is zero on both sides: multiplied too, it keeps k a multiple of
  // 8. The pack of W^T has no such rows.
  p.k = is_f32(w.format) || w.transposed ? w.k : padded_k(w.format, w.k);
  p.a = {x, x_stride, false};
  p.b = {w.data, padded_k(w.format, w.transposed ? w.n : w.k), !w.transposed};
  p.beta = beta;
  p.c = y;
  p.c_stride = y_stride;
  return s.multiply(p, "product of a linear layer");
}

/// Where the products of a pair of weights wait to be finished.
struct PairRoom {
  float *gate = nullptr, *up = nullptr;  ///< gate null: in y
};

/// Rows [row, row + rows) of a call, x as multiply() wants it.
bool multiply_all(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows,
                  const void* x, int64_t x_stride, const PairRoom& room) {
  const bool paired = a.epilogue == Epilogue::kSwiglu;
  for (int w = 0; w < (paired ? 1 : a.n_weights); ++w) {
    const int64_t stride = room.gate != nullptr ? a.w[0].n : a.y_stride[w];
    float* y = room.gate != nullptr ? room.gate : a.y[w] + row * stride;
    const float* residual =
        a.epilogue == Epilogue::kResidual ? a.residual + row * a.y_stride[w] : nullptr;
    const bool in_place = residual == y;
    if (!multiply(s, a.w[w], rows, x, x_stride, in_place ? 1.0f : 0.0f, y, stride)) return false;
    if (paired && !multiply(s, a.w[1], rows, x, x_stride, 0.0f, room.up, a.w[1].n)) return false;
    if (!paired && a.lora == nullptr && a.bias[w] == nullptr && (residual == nullptr || in_place)) {
      continue;
    }
    Finish f;
    f.rows = rows;
    f.n = a.w[w].n;
    f.y = y;
    f.y_stride = stride;
    f.up = paired ? room.up : nullptr;
    if (a.y_prepared != nullptr) {
      f.prepared = static_cast<char*>(a.y_prepared) + row * rounded_row_bytes(f.n);
    }
    f.residual = in_place ? nullptr : residual;
    f.weight = w;
    f.add = additions_of(a, row);
    launch_finish(s, f, a.w[w].format);
  }
  return true;
}

/// t = A x of rows [row, row + rows) where all rows that have a low-rank part have the same: what
/// rows without one get is not read.
bool multiply_low_rank(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows,
                       const void* x, int64_t x_stride) {
  for (int w = 0; w < a.n_weights; ++w) {
    const WeightView& low = a.lora->pair[0][w].a;
    float* t = a.lora->t + (w * a.rows + row) * kLoraRank;
    if (low.data != nullptr && !multiply(s, low, rows, x, x_stride, 0.0f, t, kLoraRank)) {
      return false;
    }
  }
  return true;
}

/// In pieces whose rounded rows and second products fit the scratch.
void many_rows(const StreamState& s, const LinearArgs& a) {
  const WeightFormat format = a.w[0].format;
  const bool rounds = !is_f32(format);
  const int64_t k = a.w[0].k;
  const int64_t round_bytes = rounds && a.x_prepared == nullptr ? rounded_row_bytes(k) : 0;
  int64_t up_bytes = a.epilogue == Epilogue::kSwiglu ? a.w[1].n * 4 : 0;
  if (a.y_prepared != nullptr) up_bytes *= 2;
  const int64_t row_bytes = larger(round_bytes + up_bytes, 1);
  const int64_t each = smaller(a.rows, larger(1, (kScratchBytes - 256) / row_bytes));
  for (int64_t row = 0; row < a.rows; row += each) {
    const int64_t rows = smaller(each, a.rows - row);
    const void* rounded = nullptr;
    if (rounds && a.x_prepared != nullptr) {
      rounded = static_cast<const char*>(a.x_prepared) + row * rounded_row_bytes(k);
    } else if (rounds) {
      round_rows(s, rows, k, a.x + row * a.x_stride, a.x_stride, {s.scratch<char>(), format});
      rounded = s.scratch<char>();
    }
    const void* x = rounds ? rounded : a.x + row * a.x_stride;
    const int64_t stride = rounds ? padded_k(format, k) : a.x_stride;
    if (a.lora != nullptr && a.lora->n_slots > 1) {
      low_rank_inputs(s, a, row, rows, rounded);
    } else if (a.lora != nullptr && !multiply_low_rank(s, a, row, rows, x, stride)) {
      return;
    }
    PairRoom room;
    room.up = reinterpret_cast<float*>(s.scratch<char>() + ceil_div(each * round_bytes, 256) * 256);
    if (a.y_prepared != nullptr) room.gate = room.up + rows * a.w[1].n;
    if (!multiply_all(s, a, row, rows, x, stride, room)) return;
  }
}

}  // namespace

namespace {

/// Rows of a call of few_rows(): as many as its shared memory takes, 0 if not even one.
int64_t rows_at_once(WeightFormat format, int64_t k) {
  int64_t rows = kFewRows;
  while (rows > 0 && rows * padded_k(format, k) * 4 > kMaxSharedBytes - kSharedForSums) rows /= 2;
  return rows;
}

}  // namespace

void linear(const OpContext& context, const LinearArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0 || a.n_weights == 0) return;
  const int64_t each = rows_at_once(a.w[0].format, a.w[0].k);
  const bool many = a.rows > kFewRows || a.w[0].transposed || each == 0;
  if (many && a.w[0].k > 0) return many_rows(*s, a);
  if (a.lora != nullptr) low_rank_inputs(*s, a, 0, a.rows, a.x_prepared);
  for (int64_t row = 0; row < a.rows; row += each) {
    few_rows(*s, a, row, smaller(each, a.rows - row));
  }
}

namespace {

constexpr int kOuterColumns = 32;  // of x, to a block: one a lane
constexpr int kOuterWarps = 8;     // each takes every 8th row of the block's
constexpr int kOuterRows = 64;     // of a block: 8 of a warp, all under way at once

/// part [row blocks][n, k] = dy^T x over each block's rows, for n up to 16: factors of low rank,
/// biases. A thread sums all n of one column over its warp's rows, then the warps' sums are added
/// in order. Grid: columns, rows.
__global__ void __launch_bounds__(kOuterWarps * 32)
    outer_few(const __grid_constant__ OuterArgs a, int64_t x_padded, float* part) {
  __shared__ float of_warp[kOuterWarps][kOuterColumns + 1];
  __shared__ float dy[kOuterRows][kLoraRank];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kOuterColumns + lane;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kOuterRows;
  const auto rows = static_cast<int>(smaller(kOuterRows, a.rows - first));
#pragma unroll
  for (int u = 0; u < kOuterRows * kLoraRank / (kOuterWarps * 32); ++u) {
    const int at = threadIdx.x + u * kOuterWarps * 32, r = at / kLoraRank, i = at % kLoraRank;
    dy[r][i] = r < rows && i < a.n ? a.dy[(first + r) * a.dy_stride + i] : 0.0f;
  }
  __syncthreads();
  const auto* rounded = static_cast<const Bf16*>(a.x_prepared);
  float sum[kLoraRank] = {};
  if (column < a.k) {
    float x_of[kOuterRows / kOuterWarps];
#pragma unroll
    for (int u = 0; u < kOuterRows / kOuterWarps; ++u) {
      const int r = warp + u * kOuterWarps;
      const int64_t row = first + (r < rows ? r : 0);  // beyond the last dy is zero
      x_of[u] = rounded == nullptr ? a.x[row * a.x_stride + column]
                                   : to_float(rounded[row * x_padded + column]);
    }
#pragma unroll
    for (int u = 0; u < kOuterRows / kOuterWarps; ++u) {
      const int r = warp + u * kOuterWarps;
      const float x = x_of[u];
#pragma unroll
      for (int i = 0; i < kLoraRank; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&dy[r][i]);
        sum[i] = fmaf(four.x, x, sum[i]);
        sum[i + 1] = fmaf(four.y, x, sum[i + 1]);
        sum[i + 2] = fmaf(four.z, x, sum[i + 2]);
        sum[i + 3] = fmaf(four.w, x, sum[i + 3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kLoraRank; ++i) {
    if (i >= a.n) break;
    of_warp[warp][lane] = sum[i];
    __syncthreads();
    if (warp == i % kOuterWarps && column < a.k) {
      float total = 0.0f;
      for (int w = 0; w < kOuterWarps; ++w) total += of_warp[w][lane];
      part[(blockIdx.y * a.n + i) * a.k + column] = total;
    }
    __syncthreads();
  }
}

/// out += scale * the parts, in order.
__global__ void __launch_bounds__(kThreads)
    outer_add(int64_t count, int64_t parts, const float* __restrict__ part, float scale,
              float* out) {
  for (int64_t i = loop_begin(); i < count; i += loop_step()) {
    float total = 0.0f;
#pragma unroll 8
    for (int64_t p = 0; p < parts; ++p) total += part[p * count + i];
    out[i] = fmaf(scale, total, out[i]);
  }
}

/// In pieces of rows whose parts fit the scratch.
void few_outer(const StreamState& s, OuterArgs a) {
  const int64_t count = a.n * a.k, rows = a.rows;
  const int64_t most = larger(1, kScratchBytes / (count * 4)) * kOuterRows;
  for (int64_t row = 0; row < rows; row += most) {
    a.rows = smaller(most, rows - row);
    const int64_t parts = ceil_div(a.rows, kOuterRows), padded = padded_k(WeightFormat::kBF16, a.k);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.k, kOuterColumns)),
                    static_cast<unsigned>(parts));
    outer_few<<<grid, kOuterWarps * 32, 0, s.stream()>>>(a, padded, s.scratch<float>());
    if (!launched("gradient of factors")) return;
    outer_add<<<loop_blocks(count, kThreads), kThreads, 0, s.stream()>>>(
        count, parts, s.scratch<float>(), a.scale, a.out);
    if (!launched("gradient of factors")) return;
    a.dy += most * a.dy_stride;
    if (a.x_prepared != nullptr) {
      a.x_prepared = static_cast<const Bf16*>(a.x_prepared) + most * padded;
    } else {
      a.x += most * a.x_stride;
    }
  }
}

}  // namespace

/// out [n, k] += scale * dy^T x.
void outer_accumulate(const OpContext& context, const OuterArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0 || a.n == 0 || a.k == 0) return;
  if (a.n <= kLoraRank) return few_outer(*s, a);
  const bool rounded = a.dy_prepared != nullptr && a.x_prepared != nullptr;
  Product p = product_of(rounded  ? WeightFormat::kBF16
                         : a.tf32 ? WeightFormat::kTF32
                                  : WeightFormat::kF32);
  p.m = a.n;
  p.n = a.k;
  p.k = a.rows;
  p.a = {rounded ? a.dy_prepared : a.dy, rounded ? padded_k(WeightFormat::kBF16, a.n) : a.dy_stride,
         true};
  p.b = {rounded ? a.x_prepared : a.x, rounded ? padded_k(WeightFormat::kBF16, a.k) : a.x_stride,
         false};
  p.alpha = a.scale;
  p.beta = 1.0f;
  p.c = a.out;
  p.c_stride = a.k;
  s->multiply(p, "gradient of a weight");
}

}  // namespace ds::cuda
