// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/ops.h"

namespace ds::cuda {

class StreamState;

/// x [rows, k] in any format, as prepare() writes it: rows padded with zeros to 16 bytes.
void round_rows(const StreamState&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                const PreparedRows& to);

}  // namespace ds::cuda
