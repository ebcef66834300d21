// SPDX-License-Identifier: Apache-2.0
// Cases of what training does to parameters: gradients of weights, factors, the optimizer, vectors.
#pragma once

#include "tests/kernels/cases.h"

namespace ds::test {

/// `rounded`: with operands for BF16 products, where the backend has any.
Case outer_case(int64_t rows, int64_t n, int64_t k, bool rounded = false);
Case outers_case();
Case pack_all_case();
Case factors_case(WeightFormat format, int64_t rank);
Case adamw_case(int64_t n);
Case vectors_case(int64_t n);

}  // namespace ds::test
