// SPDX-License-Identifier: Apache-2.0
// What cases of ops without state are made of.
#pragma once

#include "tests/kernels/cases.h"

namespace ds::test {

using Run = std::function<void(const Ops&, const OpContext&, const Floats& in, Floats* out)>;

/// A case whose op reads `in` and starts from `start` in *out each time.
Case simple(std::string name, double tolerance, std::function<Floats()> in, Floats start, Run run,
            std::function<Vec(const Floats& in)> expect);

std::function<Floats()> normal(int64_t n, uint32_t seed, float scale = 1.0f);
Vec slice(const Floats& x, int64_t begin, int64_t end);
Vec joined(Vec a, const Vec& b);
std::string sized(const std::string& name, int64_t a, int64_t b);  ///< "name 3x4"

/// Of ops that leave their result for linear layers.
void add_prepared_cases(std::vector<Case>* all);
/// Of rows that lie side by side in 16 bits.
void add_side_by_side_cases(std::vector<Case>* all);
void add_sample_cases(std::vector<Case>* all);

}  // namespace ds::test
