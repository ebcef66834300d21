// SPDX-License-Identifier: Apache-2.0
// FP32 weights to codes, as kernels/cpu/quant_weights.h does it: the same products and sums, each
// rounded, so the same codes.
#pragma once

#include "kernels/cuda/state.h"
#include "kernels/quant.h"

namespace ds::cuda {

/// Without `feedback`.
void quantize(const OpContext&, QuantFormat, int64_t n, int64_t k, const float* w,
              const float* feedback, void* packed, void* scales);
void fake_quantize(const OpContext&, QuantFormat, int64_t n, int64_t k, const float* w, float* wq);
void fake_quantize_backward(const OpContext&, QuantFormat, int64_t n, int64_t k, const float* w,
                            const float* dwq, float* dw);

#ifdef __CUDACC__

/// w = low + scale * u with 0 <= u <= 15, or w = scale * u with |u| <= 127 (low unused).
struct QuantGrid {
  float scale = 0.0f, low = 0.0f;
};

__device__ inline QuantGrid load_grid(const QuantView& q, int64_t panel, int64_t g, int64_t row) {
  const bool four = q.format.bits == 4;
  if (q.format.group == 0) {
    const auto* at = static_cast<const float*>(q.scales) + panel * (four ? 32 : 16) + row;
    return {at[0], four ? at[16] : 0.0f};
  }
  const int64_t at = (panel * ceil_div(q.k, kQuantGroup) + g) * 16 + row;
  if (four) {
    const uint32_t both = static_cast<const uint32_t*>(q.scales)[at];
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
  }
  return {__uint_as_float(uint32_t{static_cast<const uint16_t*>(q.scales)[at]} << 16), 0.0f};
}

#endif

}  // namespace ds::cuda
