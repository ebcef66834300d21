// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/ops.h"

namespace ds::cuda {

class StreamState;

/// x [rows, k] in any format, as prepare() writes it: rows padded with zeros to 16 bytes.
void round_rows(const StreamState&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                const PreparedRows& to);

/// RMSNorm of x [rows, d], rows `x_stride` apart, with weight w [d]: to y [rows, d], to rows as
/// round_rows() gives them, or to both; y or the data of those may be null.
void norm_rows(const StreamState&, int64_t rows, int64_t d, const float* x, int64_t x_stride,
               const float* w, float eps, float* y, const PreparedRows& rounded,
               float* rstd = nullptr);

}  // namespace ds::cuda
