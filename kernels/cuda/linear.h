// SPDX-License-Identifier: Apache-2.0
// The ways of a linear call. Up to 32 rows (kSomeRows with rotation behind them) of weights of 16
// bits: some_rows() reads the weights once, on tensor cores, all weights of the call and its
// epilogue in one launch. Up to kGemvRows that it does not take (FP32, the head): few_rows() does
// the same without tensor cores. More: by tiles where swiglu or rotation follows, else cuBLAS, and
// what it cannot fuse in one launch behind it. Low-rank inputs t = A x come first, but for the
// fewest rows of some_rows(), whose blocks make them.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"

namespace ds::cuda {

constexpr int64_t kFewRows = 16;          ///< rows that need not be rounded ahead of the call
constexpr int64_t kSomeRows = 64;         ///< of one launch on tensor cores, at most
constexpr int64_t kGemvRows = 8;          ///< of one launch without tensor cores
constexpr int64_t kManyOutputs = 8192;    ///< from which on cuBLAS is better at fewer rows
constexpr int64_t kSharedForSums = 1024;  ///< bytes of a block of few_rows() beside its input rows

/// The low-rank pairs of a call: in a table, or by value in the parameters of a kernel.
struct LowPairs {
  const LoraEntry* table = nullptr;  ///< null: by value
  LoraEntry value[kMaxFusedWeights][kMaxLoraSlots];

  __device__ const LoraEntry& at(int w, int32_t slot) const {
    return table == nullptr ? value[w][slot] : table[w * kMaxLoraSlots + slot];
  }
};
LowPairs low_pairs(const LinearArgs& a);
/// Whether all rows that have a low-rank part have that of slot 0, by value.
inline bool has_one_pair(const LoraSlots& slots) {
  return slots.n_slots <= 1 && slots.table == nullptr;
}

/// What is added to the products of a call.
struct Additions {
  const int32_t* slot_of_row = nullptr;  ///< null: no low-rank parts
  const float* t = nullptr;              ///< [weights][t_rows][16]
  int64_t t_rows = 0;
  LowPairs low;
  const float* bias[kMaxFusedWeights] = {nullptr, nullptr, nullptr};
};

/// For rows [row, ..) of the call.
Additions additions_of(const LinearArgs& a, int64_t row);

/// lora.t of rows [row, row + rows); `rounded` are those rows as prepare() gives them, or null:
/// rounds itself.
void low_rank_inputs(const StreamState&, const LinearArgs&, int64_t row, int64_t rows,
                     const void* rounded);

/// Rows [row, row + rows) of a call, at most kGemvRows; their lora.t is there.
void few_rows(const StreamState&, const LinearArgs&, int64_t row, int64_t rows);

/// All of a call. False, and nothing enqueued, if it is not for this kernel.
bool some_rows(const StreamState&, const LinearArgs&);

// By tiles, with what follows in the same launch; x are rows of the weights' 16 bits, `x_stride`
// elements from one to the next. False, and nothing enqueued, where something is not by steps that
// these kernels take.
/// y [rows, n] = silu(gate) * up in that format, of products of x; what FP16 cannot hold saturates.
bool swiglu_by_tiles(const StreamState&, const WeightView& gate, const WeightView& up, int64_t rows,
                     const void* x, int64_t x_stride, const Additions& add, void* y);
/// `heads` are the weights of q, k and v, as one; their products go where rope_append() puts them.
bool rope_by_tiles(const StreamState&, const WeightView& heads, int64_t rows, const void* x,
                   int64_t x_stride, const Additions& add, float* q, int64_t q_stride,
                   const RopeAppendArgs& rope);

/// FP32 is FP32: without TF32, unless that is asked for.
inline Product product_of(WeightFormat format) {
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

/// Bytes of a row of 16-bit elements.
inline int64_t rounded_row_bytes(int64_t k) { return padded_k(WeightFormat::kBF16, k) * 2; }

#ifdef __CUDACC__

/// Where the rows of the shared input are: [rows][padded] rounded as the weights, or FP32 x.
struct InputRows {
  const void* rounded;
  const float* x;
  int64_t stride, k, padded;
  const float* norm;  ///< weight of an RMSNorm that comes first; null: none
  float eps;
  bool whole;  ///< rows and norm are aligned to 16 bytes and consist of whole chunks
  int32_t* saturated;
};
/// Rows that a norm has yet to divide by their size are kept this much smaller, where elements end
/// at 65504: they lose nothing, as their least bits are far below what counts beside their RMS.
template <typename T>
constexpr float kBeforeNorm = std::is_same_v<T, Half> ? 1.0f / 64 : 1.0f;
template <typename T>
__device__ inline float4 before_norm(const float4& w) {
  constexpr float kScale = kBeforeNorm<T>;
  return make_float4(w.x * kScale, w.y * kScale, w.z * kScale, w.w * kScale);
}
/// A value of a row as products see it; `counts`: this thread is the one that counts what
/// saturates.
template <typename T>
__device__ inline float as_operand(float x, bool counts, int32_t* saturated) {
  if (std::is_same_v<T, Half> && counts && saturates(x)) atomicAdd(saturated, 1);
  return rounded_as<T>(x);
}
/// From row `row` of the call on; `rounded` are those rows as prepare() gives them, normed already,
/// or null.
InputRows input_rows(const LinearArgs& a, int64_t row, const void* rounded);

/// Elements [c * kElements, ..) of an input row as products with weights of type T see them; zero
/// beyond k. kRounded: from `rounded`. Where there is a norm, they still want its factor
/// norm_factor(), as their squares add to `squares`.
template <typename T, bool kRounded>
__device__ inline Chunk<T> input_chunk(const InputRows& in, int64_t row, int64_t c, float& squares,
                                       bool counts = false) {
  constexpr int kEach = Chunk<T>::kElements;
  if constexpr (kRounded) {
    const auto* from = static_cast<const T*>(in.rounded) + row * in.padded;
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
      out.v[i] *= weight.v[i] * kBeforeNorm<T>;
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) out.v[i] = as_operand<T>(out.v[i], counts, in.saturated);
  return out;
}

/// What products of a normed row are multiplied by: 1 / RMS, and what kBeforeNorm took; `squares`
/// is the row's sum.
template <typename T>
__device__ inline float norm_factor(float squares, float k, float eps) {
  return 1.0f / (kBeforeNorm<T> * sqrtf(squares / k + eps));
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
    const LoraEntry low = slot < 0 ? LoraEntry{} : add.low.at(w, slot);
    if (low.b != nullptr) {
      LowRow<T> b;
      b.load(low.b, i);
      value = b.add_to(value, add.t + (w * add.t_rows + row) * kLoraRank, low.scale);
    }
  }
  return add.bias[w] == nullptr ? value : value + add.bias[w][i];
}

#endif

}  // namespace ds::cuda
