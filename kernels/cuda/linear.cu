// SPDX-License-Identifier: Apache-2.0
// Linear layers of many rows through cuBLAS, and the choice between them and few_rows(). Row-major
// y [rows, n] = x W^T is what cuBLAS, column-major, calls y [n, rows] = W x with W transposed.
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;  // columns of a block
constexpr int kTileRows = 8;   // rows that one thread finishes

/// Products of rows in memory, to be finished in place.
struct Finish {
  int64_t rows = 0, n = 0;
  float* y = nullptr;  ///< products of weight `weight`; of the gate with swiglu
  int64_t y_stride = 0;
  const float* up = nullptr;  ///< products of weight 1 with swiglu, [rows, n]
  const float* residual = nullptr;
  int weight = 0;
  Additions add;
};

/// y = product + low-rank part + bias, then residual or swiglu. A thread takes one column of
/// kTileRows rows, and loads its row of B again only where the slot changes.
template <typename T, bool kPaired>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Finish a) {
  constexpr int kParts = kPaired ? 2 : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= a.n) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows;
  LowRow<T> b[kParts];
  float bias[kParts];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const float* from = a.add.bias[a.weight + p];
    bias[p] = from == nullptr ? 0.0f : from[i];
  }
  int32_t loaded = -1;
  for (int64_t row = first; row < a.rows && row < first + kTileRows; ++row) {
    const int64_t at = row * a.y_stride + i;
    float value[kParts];
    value[0] = a.y[at];
    if constexpr (kPaired) value[1] = a.up[row * a.n + i];
    const int32_t slot = a.add.slot_of_row == nullptr ? -1 : a.add.slot_of_row[row];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int w = a.weight + p;
      if (slot >= 0 && a.add.low[slot][w].b != nullptr) {
        if (slot != loaded) b[p].load(a.add.low[slot][w].b, i);
        const float* t = a.add.t + (w * a.add.t_rows + row) * kLoraRank;
        value[p] = b[p].add_to(value[p], t, a.add.low[slot][w].scale);
      }
      value[p] += bias[p];
    }
    loaded = slot;
    float out = value[0];
    if constexpr (kPaired) out = silu_times(value[0], value[1]);
    a.y[at] = a.residual == nullptr ? out : a.residual[at] + out;
  }
}

void launch_finish(const StreamState& s, const Finish& a, WeightFormat format) {
  if (a.rows == 0 || a.n == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kTileRows)),
                  static_cast<unsigned>(ceil_div(a.n, kThreads)));
  const bool f32 = format == WeightFormat::kF32;
  if (a.up != nullptr) {
    if (f32) {
      finish_rows<float, true><<<grid, kThreads, 0, s.stream()>>>(a);
    } else {
      finish_rows<Bf16, true><<<grid, kThreads, 0, s.stream()>>>(a);
    }
  } else if (f32) {
    finish_rows<float, false><<<grid, kThreads, 0, s.stream()>>>(a);
  } else {
    finish_rows<Bf16, false><<<grid, kThreads, 0, s.stream()>>>(a);
  }
  launched("end of a linear layer");
}

/// y [rows, n] = x W^T + beta y; x is rounded rows for BF16 weights, FP32 rows for FP32 weights.
bool multiply(const StreamState& s, const WeightView& w, int64_t rows, const void* x,
              int64_t x_stride, float beta, float* y, int64_t y_stride) {
  if (w.n == 0) return true;
  const bool f32 = w.format == WeightFormat::kF32;
  const cudaDataType_t type = f32 ? CUDA_R_32F : CUDA_R_16BF;
  const float alpha = 1.0f;
  // The padding of BF16 rows is zero on both sides: multiplied too, it keeps k a multiple of 8.
  const int64_t k = f32 ? w.k : padded_k(w.format, w.k);
  return check(
      cublasGemmEx(s.blas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(w.n),
                   static_cast<int>(rows), static_cast<int>(k), &alpha, w.data, type,
                   static_cast<int>(padded_k(w.format, w.k)), x, type,
                   static_cast<int>(larger(x_stride, k)), &beta, y, CUDA_R_32F,
                   static_cast<int>(larger(y_stride, w.n)),
                   f32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
      "product of a linear layer");
}

/// Rows [row, row + rows) of a call, x as multiply() wants it; `up`: room for the second product.
bool multiply_all(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows,
                  const void* x, int64_t x_stride, float* up) {
  const bool paired = a.epilogue == Epilogue::kSwiglu;
  for (int w = 0; w < (paired ? 1 : a.n_weights); ++w) {
    float* y = a.y[w] + row * a.y_stride[w];
    const float* residual =
        a.epilogue == Epilogue::kResidual ? a.residual + row * a.y_stride[w] : nullptr;
    const bool in_place = residual == y;
    if (!multiply(s, a.w[w], rows, x, x_stride, in_place ? 1.0f : 0.0f, y, a.y_stride[w])) {
      return false;
    }
    if (paired && !multiply(s, a.w[1], rows, x, x_stride, 0.0f, up, a.w[1].n)) return false;
    if (!paired && a.lora == nullptr && a.bias[w] == nullptr && (residual == nullptr || in_place)) {
      continue;
    }
    Finish f;
    f.rows = rows;
    f.n = a.w[w].n;
    f.y = y;
    f.y_stride = a.y_stride[w];
    f.up = paired ? up : nullptr;
    f.residual = in_place ? nullptr : residual;
    f.weight = w;
    f.add = additions_of(a, row);
    launch_finish(s, f, a.w[w].format);
  }
  return true;
}

/// In pieces whose rounded rows and second products fit the scratch.
void many_rows(const StreamState& s, const LinearArgs& a) {
  const bool bf16 = a.w[0].format == WeightFormat::kBF16;
  const int64_t k = a.w[0].k;
  const int64_t round_bytes = bf16 && a.x_prepared == nullptr ? rounded_row_bytes(k) : 0;
  const int64_t up_bytes = a.epilogue == Epilogue::kSwiglu ? a.w[1].n * 4 : 0;
  const int64_t row_bytes = larger(round_bytes + up_bytes, 1);
  const int64_t each = smaller(a.rows, larger(1, (kScratchBytes - 256) / row_bytes));
  for (int64_t row = 0; row < a.rows; row += each) {
    const int64_t rows = smaller(each, a.rows - row);
    const void* rounded = nullptr;
    if (bf16 && a.x_prepared != nullptr) {
      rounded = static_cast<const char*>(a.x_prepared) + row * rounded_row_bytes(k);
    } else if (bf16) {
      round_rows(s, rows, k, a.x + row * a.x_stride, a.x_stride, s.scratch<char>());
      rounded = s.scratch<char>();
    }
    if (a.lora != nullptr) low_rank_inputs(s, a, row, rows, rounded);
    auto* up =
        reinterpret_cast<float*>(s.scratch<char>() + ceil_div(each * round_bytes, 256) * 256);
    const void* x = bf16 ? rounded : a.x + row * a.x_stride;
    const int64_t stride = bf16 ? padded_k(WeightFormat::kBF16, k) : a.x_stride;
    if (!multiply_all(s, a, row, rows, x, stride, up)) return;
  }
}

}  // namespace

void linear(const OpContext& context, const LinearArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0 || a.n_weights == 0) return;
  if (a.rows > kFewRows && a.w[0].k > 0) return many_rows(*s, a);
  if (a.lora != nullptr) low_rank_inputs(*s, a, 0, a.rows, a.x_prepared);
  for (int64_t row = 0; row < a.rows; row += kFewRows) {
    few_rows(*s, a, row, smaller(kFewRows, a.rows - row));
  }
}

/// out^T [k, n] += scale * x^T dy in cuBLAS's columns. FP32 without TF32: gradients of weights are
/// sums over few rows, and the tests hold them to 1e-5.
void outer_accumulate(const OpContext& context, int64_t rows, int64_t n, int64_t k, const float* dy,
                      int64_t dy_stride, const float* x, int64_t x_stride, float scale,
                      float* out) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows == 0 || n == 0 || k == 0) return;
  const float one = 1.0f;
  check(cublasGemmEx(s->blas(), CUBLAS_OP_N, CUBLAS_OP_T, static_cast<int>(k), static_cast<int>(n),
                     static_cast<int>(rows), &scale, x, CUDA_R_32F,
                     static_cast<int>(larger(x_stride, k)), dy, CUDA_R_32F,
                     static_cast<int>(larger(dy_stride, n)), &one, out, CUDA_R_32F,
                     static_cast<int>(k), CUBLAS_COMPUTE_32F_PEDANTIC, CUBLAS_GEMM_DEFAULT),
        "gradient of a weight");
}

}  // namespace ds::cuda
