// SPDX-License-Identifier: Apache-2.0
#include "storage/dequantize.h"

#include <bit>
#include <cstring>

namespace ds {
namespace {

uint16_t load_u16(const std::byte* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

void dequantize_q8_0(const std::byte* block, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, block += 34, out += kQuantBlock) {
    const float d = f16_to_f32(load_u16(block));
    for (int i = 0; i < kQuantBlock; ++i) {
      out[i] = d * static_cast<float>(static_cast<int8_t>(block[2 + i]));
    }
  }
}

/// Both 4-bit formats: w = d * (q + shift) + m, where one of shift and m is zero.
void dequantize_q4(const std::byte* block, int64_t blocks, bool has_minimum, float* out) {
  const int header = has_minimum ? 4 : 2;
  const int shift = has_minimum ? 0 : -8;
  for (int64_t b = 0; b < blocks; ++b, block += header + 16, out += kQuantBlock) {
    const float d = f16_to_f32(load_u16(block));
    const float m = has_minimum ? f16_to_f32(load_u16(block + 2)) : 0.0f;
    for (int i = 0; i < 16; ++i) {
      const int q = static_cast<int>(block[header + i]);
      out[i] = d * static_cast<float>((q & 15) + shift) + m;
      out[i + 16] = d * static_cast<float>((q >> 4) + shift) + m;
    }
  }
}

}  // namespace

int64_t block_weights(FileDtype dtype) {
  switch (dtype) {
    case FileDtype::kF32:
    case FileDtype::kF16:
    case FileDtype::kBF16:
      return 1;
    case FileDtype::kQ8_0:
    case FileDtype::kQ4_0:
    case FileDtype::kQ4_1:
      return kQuantBlock;
  }
  return 1;
}

int64_t block_bytes(FileDtype dtype) {
  switch (dtype) {
    case FileDtype::kF32:
      return 4;
    case FileDtype::kF16:
    case FileDtype::kBF16:
      return 2;
    case FileDtype::kQ8_0:
      return 34;
    case FileDtype::kQ4_0:
      return 18;
    case FileDtype::kQ4_1:
      return 20;
  }
  return 1;
}

std::string_view dtype_name(FileDtype dtype) {
  switch (dtype) {
    case FileDtype::kF32:
      return "F32";
    case FileDtype::kF16:
      return "F16";
    case FileDtype::kBF16:
      return "BF16";
    case FileDtype::kQ8_0:
      return "Q8_0";
    case FileDtype::kQ4_0:
      return "Q4_0";
    case FileDtype::kQ4_1:
      return "Q4_1";
  }
  return "?";
}

float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero or subnormal: mantissa * 2^-24, exact in FP32
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  // Exponent bias 15 -> 127; infinity and NaN go to the top exponent.
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  return std::bit_cast<float>(sign | ((magnitude << 13) + rebias));
}

void dequantize(FileDtype dtype, const std::byte* source, int64_t count, float* out) {
  switch (dtype) {
    case FileDtype::kF32:
      std::memcpy(out, source, static_cast<size_t>(count) * 4);
      return;
    case FileDtype::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(load_u16(source + 2 * i));
      return;
    case FileDtype::kBF16:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = std::bit_cast<float>(static_cast<uint32_t>(load_u16(source + 2 * i)) << 16);
      }
      return;
    case FileDtype::kQ8_0:
      dequantize_q8_0(source, count / kQuantBlock, out);
      return;
    case FileDtype::kQ4_0:
      dequantize_q4(source, count / kQuantBlock, false, out);
      return;
    case FileDtype::kQ4_1:
      dequantize_q4(source, count / kQuantBlock, true, out);
      return;
  }
}

}  // namespace ds
