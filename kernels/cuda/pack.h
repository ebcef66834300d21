// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ds::cuda {

class StreamState;

/// x [rows, k] rounded to BF16, as prepare() writes it: rows padded with zeros to 16 bytes.
void round_rows(const StreamState&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                void* rounded);

/// RMSNorm of x [rows, d], rows `x_stride` apart, with weight w [d]: to y [rows, d], to rows as
/// round_rows() gives them, or to both; either may be null.
void norm_rows(const StreamState&, int64_t rows, int64_t d, const float* x, int64_t x_stride,
               const float* w, float eps, float* y, void* rounded, float* rstd = nullptr);

}  // namespace ds::cuda
