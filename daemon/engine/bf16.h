// SPDX-License-Identifier: Apache-2.0
// The one rounding from FP32 to BF16 on the host: what a file holds is what serves.
#pragma once

#include <bit>
#include <cstdint>

namespace ds {

/// Upper half of the FP32 bits, to nearest, ties to even; NaN becomes a quiet NaN.
inline uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float round_to_bf16(float x) {
  return std::bit_cast<float>(static_cast<uint32_t>(to_bf16(x)) << 16);
}

}  // namespace ds
