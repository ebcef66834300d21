// SPDX-License-Identifier: Apache-2.0
// What the products of training multiply. With FP16 weights the forward pass multiplies FP16, and
// the backward pass BF16, whose range gradients need: so losses are not scaled. An input that FP16
// cannot hold saturates and is counted (PreparedRows::saturated); the products that read it fall
// back to BF16, the others stay.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace ds {

/// The seven linear layers of a block, in the order used by every per-target array.
enum Target : int { kQ, kK, kV, kO, kGate, kUp, kDown, kTargets };

/// Inputs of linear layers: four of a layer, and the head's.
class OperandFormats {
 public:
  OperandFormats(WeightFormat format, int64_t n_layers)
      : format_(format), fallen_(static_cast<size_t>(n_layers * kInputs + 1)) {}

  WeightFormat format() const { return format_; }
  /// Of W and x in y = W x. `layer` -1 is the head.
  WeightFormat forward(int64_t layer, Target target) const {
    return fallen_[input(layer, target)] ? WeightFormat::kBF16 : format_;
  }
  /// Of W and dy in dx = W^T dy, and of dy and x in dW = dy x^T.
  WeightFormat backward() const { return backward_format(format_); }

  size_t n_inputs() const { return fallen_.size(); }
  /// Which input the layer reads: 0 .. n_inputs() - 1.
  size_t input(int64_t layer, Target target) const {
    static constexpr size_t kOf[kTargets] = {0, 0, 0, 1, 2, 2, 3};
    return layer < 0 ? fallen_.size() - 1 : static_cast<size_t>(layer) * kInputs + kOf[target];
  }
  void fall_back(size_t input) { fallen_[input] = true; }
  bool fell(size_t input) const { return fallen_[input]; }
  friend bool operator==(const OperandFormats&, const OperandFormats&) = default;

 private:
  static constexpr int64_t kInputs = 4;
  WeightFormat format_;
  std::vector<bool> fallen_;
};

}  // namespace ds
