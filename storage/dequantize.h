// SPDX-License-Identifier: Apache-2.0
// Element formats of model files and their exact values in FP32. Block layouts as ggml defines them
// (ggml-common.h): 32 weights per block, scale d (and minimum m) in FP16 in front.
//   Q8_0: d, 32 x int8           w = d * q
//   Q4_0: d, 16 bytes            w = d * (q - 8)    low nibbles are weights 0..15, high 16..31
//   Q4_1: d, m, 16 bytes         w = d * q + m
#pragma once

#include <cstddef>
#include <cstdint>

#include "storage/model_file.h"

namespace ds {

constexpr int64_t kQuantBlock = 32;  ///< weights that share a scale

/// Weights per indivisible unit of the format: 1, or kQuantBlock for Q*.
int64_t block_weights(FileDtype dtype);
/// Bytes of that unit.
int64_t block_bytes(FileDtype dtype);

float f16_to_f32(uint16_t bits);

/// `count` weights (a multiple of block_weights) from packed `source`, which may be unaligned.
void dequantize(FileDtype dtype, const std::byte* source, int64_t count, float* out);

}  // namespace ds
