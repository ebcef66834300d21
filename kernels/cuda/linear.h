// SPDX-License-Identifier: Apache-2.0
// The two ways of a linear call. Up to kFewRows rows: few_rows() streams the weights once, without
// tensor cores, all weights of the call and its epilogue in one launch. More: cuBLAS, and what it
// cannot fuse in one launch behind it. Either way low-rank inputs t = A x come first.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"

namespace ds::cuda {

constexpr int64_t kFewRows = 8;
constexpr int64_t kSharedForSums = 1024;  ///< bytes of a block of few_rows() beside its input rows

/// What is added to the products of a call, by value in the parameters of a kernel.
struct Additions {
  struct Low {
    const void* b = nullptr;  ///< [n, 16] in the format of the weights; null: none
    float scale = 0.0f;
  };
  const int32_t* slot_of_row = nullptr;  ///< null: no low-rank parts
  const float* t = nullptr;              ///< [weights][t_rows][16]
  int64_t t_rows = 0;
  Low low[kMaxLoraSlots][kMaxFusedWeights];
  const float* bias[kMaxFusedWeights] = {nullptr, nullptr, nullptr};
};

/// For rows [row, ..) of the call.
Additions additions_of(const LinearArgs& a, int64_t row);

/// lora.t of rows [row, row + rows); `rounded` are those rows in BF16, or null: rounds itself.
void low_rank_inputs(const StreamState&, const LinearArgs&, int64_t row, int64_t rows,
                     const void* rounded);

/// Rows [row, row + rows) of a call, at most kFewRows; their lora.t is there.
void few_rows(const StreamState&, const LinearArgs&, int64_t row, int64_t rows);

/// Bytes of a row in BF16.
inline int64_t rounded_row_bytes(int64_t k) { return padded_k(WeightFormat::kBF16, k) * 2; }

#ifdef __CUDACC__

/// Where the rows of the shared input are: rounded [rows][padded] BF16, or FP32 x.
struct InputRows {
  const void* rounded;
  const float* x;
  int64_t stride, k, padded;
  const float* norm;  ///< weight of an RMSNorm that comes first; null: none
  float eps;
  bool whole;  ///< rows and norm are aligned to 16 bytes and consist of whole chunks
};

/// Elements [c * kElements, ..) of an input row as products with weights of type T see them; zero
/// beyond k. kRounded: from `rounded`. Where there is a norm, they still want its factor
/// norm_factor(), as their squares add to `squares`.
template <typename T, bool kRounded>
__device__ inline Chunk<T> input_chunk(const InputRows& in, int64_t row, int64_t c,
                                       float& squares) {
  constexpr int kEach = Chunk<T>::kElements;
  if constexpr (kRounded) {
    const auto* from = static_cast<const Bf16*>(in.rounded) + row * in.padded;
    return unpack_chunk(reinterpret_cast<const uint4*>(from)[c], T());
  }
  const auto load = [&](const float* from) {
    Chunk<T> out;
    if (c * kEach + kEach <= in.k && is_aligned16(from)) {
#pragma unroll
      for (int i = 0; i < kEach / 4; ++i) {
        const float4 four = reinterpret_cast<const float4*>(from)[i];
        out.v[4 * i] = four.x;
        out.v[4 * i + 1] = four.y;
        out.v[4 * i + 2] = four.z;
        out.v[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) out.v[i] = c * kEach + i < in.k ? from[i] : 0.0f;
    }
    return out;
  };
  Chunk<T> out = load(in.x + row * in.stride + c * kEach);
  if (in.norm != nullptr) {
    const Chunk<T> weight = load(in.norm + c * kEach);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      squares = fmaf(out.v[i], out.v[i], squares);
      out.v[i] *= weight.v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) out.v[i] = rounded_as<T>(out.v[i]);
  return out;
}

/// What products of a normed row are multiplied by: 1 / RMS; `squares` is the row's sum.
__device__ inline float norm_factor(const InputRows& in, float squares) {
  return 1.0f / sqrtf(squares / static_cast<float>(in.k) + in.eps);
}

/// 16 bytes of a matrix that is read once: they need not stay in L1. Volatile, so that it keeps its
/// place before a wait.
__device__ inline uint4 stream_chunk(const uint4* from) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from));
  return out;
}

/// One row of B, [16].
template <typename T>
struct LowRow {
  float v[kLoraRank];
  __device__ void load(const void* b, int64_t i) {
    constexpr int kEach = Chunk<T>::kElements;
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(b) + i * kLoraRank);
#pragma unroll
    for (int c = 0; c < kLoraRank / kEach; ++c) {
      const Chunk<T> chunk = unpack_chunk(from[c], T());
#pragma unroll
      for (int e = 0; e < kEach; ++e) v[c * kEach + e] = chunk.v[e];
    }
  }
  /// value + scale * B t: 16 terms ascending.
  __device__ float add_to(float value, const float* t, float scale) const {
#pragma unroll
    for (int j = 0; j < kLoraRank; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(t + j);
      value = fmaf(v[j], four.x * scale, value);
      value = fmaf(v[j + 1], four.y * scale, value);
      value = fmaf(v[j + 2], four.z * scale, value);
      value = fmaf(v[j + 3], four.w * scale, value);
    }
    return value;
  }
};

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

#endif

}  // namespace ds::cuda
