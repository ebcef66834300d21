// SPDX-License-Identifier: Apache-2.0
// From logits to weights and tokens on the CPU: what Ops::sample does there, and the parts of it
// that samplers with more settings are made of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/ops.h"

namespace ds {

/// The largest of x [n]; NaN where one is not finite.
float largest_finite(const float* x, int64_t n);

/// weights[i] = e^((x[i] - best) * heat), best the largest; returns their sum, in double and in a
/// fixed order. weights may be null.
double softmax_weights(const float* x, int64_t n, float best, float heat, float* weights);

/// Ops::sample of one row: -1 where a logit is not finite.
int32_t sample_row(const float* logits, int64_t vocab, float heat, double chance);

/// Ops::sample.
void sample_rows(const OpContext&, const SampleArgs&);

/// First index at which the running sum of weights passes a target.
class Walk {
 public:
  explicit Walk(double target) : left_(target) {}
  /// The next one; true: it is this.
  bool passes_at(int64_t i, float weight) {
    if (weight <= 0) return false;
    last_ = i;
    left_ -= static_cast<double>(weight);
    return left_ < 0;
  }
  /// Rounding can leave a hair behind the end: then it is the last one with any weight.
  int64_t last() const { return last_; }

 private:
  double left_;
  int64_t last_ = 0;
};

}  // namespace ds
