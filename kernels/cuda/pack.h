// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ds::cuda {

class StreamState;

/// x [rows, k] rounded to BF16, as prepare() writes it: rows padded with zeros to 16 bytes.
void round_rows(const StreamState&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                void* rounded);

}  // namespace ds::cuda
