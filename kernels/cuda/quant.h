// SPDX-License-Identifier: Apache-2.0
// Linear layers on codes of 8 and 4 bits (layouts: kernels/quant.h). Up to kGemvRows rows:
// few_quant_rows() rounds the input itself and streams the codes once, all weights of the call, the
// phases around it and its epilogue in one launch. More: many_quant_rows() on tensor cores, whose
// input prepare() has rounded. Both add groups up in FP32.
#pragma once

#include "kernels/cuda/linear.h"
#include "kernels/quant.h"

namespace ds::cuda {

/// The codes of a call, by value in the parameters of a kernel.
struct QuantWeights {
  int64_t k = 0, groups = 0;
  int64_t panel_bytes = 0, scale_panel_bytes = 0;  ///< of 16 rows
  const char* codes[kMaxFusedWeights] = {nullptr, nullptr, nullptr};
  const char* scales[kMaxFusedWeights] = {nullptr, nullptr, nullptr};
  int64_t n[kMaxFusedWeights] = {0, 0, 0};
};
QuantWeights quant_weights(const QuantLinearArgs& q);

/// The format of the call's low-rank parts.
WeightFormat low_rank_format(const LinearArgs& a);

/// QuantOps::linear.
void quant_linear(const OpContext&, const QuantLinearArgs&);
extern const QuantOps kQuantTable;

/// Rows [row, row + rows) of a call, at most kGemvRows; their lora.t is there.
void few_quant_rows(const StreamState&, const QuantLinearArgs&, int64_t row, int64_t rows);
/// As many rows as few_quant_rows() takes of k columns at once; 0: none.
int64_t few_quant_rows_at_once(int64_t k);

/// All rows of a call, from x_prepared; their lora.t is there.
void many_quant_rows(const StreamState&, const QuantLinearArgs&);

#ifdef __CUDACC__

/// An integer of less than 2^22 in size added to these bits is a float beyond kCodeSum: products of
/// codes become floats by a subtraction, which is exact and quicker than a conversion.
constexpr int kCodeSumBits = 0x4b400000;
constexpr float kCodeSum = 12582912.0f;
__device__ inline float float_of_sum(int sum) { return __int_as_float(sum) - kCodeSum; }

/// Codes of 8 bits as signed numbers.
__device__ inline uint32_t signed_codes(uint32_t word) { return word ^ 0x80808080u; }

/// Eight neighbours of a group in 8 bits, the first in the lowest byte, and what all of its
/// QuantInput say.
struct CodedEight {
  uint2 codes;
  float scale, sum;
};
/// The group's other values are those of the other lanes of the same four (4 i .. 4 i + 3).
__device__ inline CodedEight code_eight(const float (&v)[8]) {
  const unsigned four = 0xfu << (threadIdx.x % 32 & ~3u);
  uint32_t bits = 0;  // of sizes, which are ordered as integers; infinity and NaN come last
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, __float_as_uint(fabsf(v[i])));
  bits = max(bits, __shfl_xor_sync(four, bits, 1));
  bits = max(bits, __shfl_xor_sync(four, bits, 2));
  const float largest = __uint_as_float(bits);
  const bool finite = bits < 0x7f800000u, counts = finite && largest > kQuantZero;
  const float inverse = counts ? 127.0f / largest : 0.0f;
  uint32_t q[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    q[i] = static_cast<uint32_t>(__float2int_rn(fminf(fmaxf(v[i] * inverse, -127.0f), 127.0f)));
  }
  const auto word = [&](int i) {
    return (q[i] & 0xffu) | (q[i + 1] & 0xffu) << 8 | (q[i + 2] & 0xffu) << 16 | q[i + 3] << 24;
  };
  CodedEight out;
  out.codes = make_uint2(word(0), word(4));
  constexpr int kOnes = 0x01010101;
  int sum = __dp4a(static_cast<int>(out.codes.x), kOnes, 0);
  sum = __dp4a(static_cast<int>(out.codes.y), kOnes, sum);
  sum += __shfl_xor_sync(four, sum, 1);
  sum += __shfl_xor_sync(four, sum, 2);
  out.scale = finite ? (counts ? largest / 127.0f : 0.0f) : __int_as_float(0x7fffffff);
  out.sum = out.scale * static_cast<float>(sum);
  return out;
}

/// Columns 8 i .. 8 i + 7 of a row of x [k]; zero beyond k.
__device__ inline void load_eight(const float* x, int64_t i, int64_t k, bool whole, float (&v)[8]) {
  if (whole) {
    const float4 a = reinterpret_cast<const float4*>(x)[2 * i];
    const float4 b = reinterpret_cast<const float4*>(x)[2 * i + 1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = 8 * i + j < k ? x[8 * i + j] : 0.0f;
}

__device__ inline float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ inline float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

#endif

}  // namespace ds::cuda
