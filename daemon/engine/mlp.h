// SPDX-License-Identifier: Apache-2.0
// A small classifier for task models: linear layers with ReLU between, softmax at the end. FP32, on
// the same Ops as the transformer.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/model.h"
#include "storage/version_store.h"

namespace ds {

class Mlp {
 public:
  /// `sizes`: inputs, hidden widths, classes; at least two. Uniform +-1/sqrt(inputs of the layer).
  Mlp(std::vector<int64_t> sizes, uint64_t seed);

  const std::vector<int64_t>& sizes() const { return sizes_; }
  std::span<float> parameters() { return parameters_; }
  std::span<const float> parameters() const { return parameters_; }

  /// Scores before the softmax, FP32 [rows, classes].
  std::vector<float> forward(const Compute& compute, int64_t rows, const float* x) const;

  /// Sum over the rows of `weight` times cross-entropy; writes each row's log-probability, and the
  /// sum's gradient to `gradient` (same layout as parameters()) unless that is empty.
  double loss(const Compute& compute, int64_t rows, const float* x, const int32_t* labels,
              std::span<const float> weight, std::span<float> logprob,
              std::span<float> gradient) const;

  std::vector<StoredTensor> tensors()
      const;  ///< "layers.N.weight" [out, in], "layers.N.bias" [out]; F32
  Status set_tensors(const std::vector<StoredTensor>& tensors);

 private:
  struct Layer {
    int64_t in, out, weight, bias;
  };  // offsets into parameters_
  std::vector<std::vector<float>> activations(const Compute& compute, int64_t rows,
                                              const float* x) const;
  std::vector<int64_t> sizes_;
  std::vector<Layer> layers_;
  std::vector<float> parameters_;
};

}  // namespace ds
