// SPDX-License-Identifier: Apache-2.0
// Every weight of a model in training: FP32 masters, their gradients, and the packed copy that the
// passes run over.
#pragma once

#include <memory>

#include "engine/train_graph.h"

namespace ds {

class FullWeights {
 public:
  /// `masters` holds every tensor of the model, by HF name.
  FullWeights(const ModelConfig& config, NamedTensors masters);

  const ModelConfig& config() const { return config_; }
  const NamedTensors& masters() const { return masters_; }
  NamedTensors& masters() { return masters_; }
  FullGradients& gradient() { return gradient_; }  ///< filled by TrainGraph::backward()
  size_t size() const { return size_; }            ///< parameters
  void zero_gradient();

  /// Makes a new packed copy from the masters; call after each change of them. The copy before
  /// stays whole for whoever holds it.
  void pack(const Compute& compute, WeightFormat format);
  const std::shared_ptr<const BaseWeights>& packed() const { return packed_; }
  void release();  ///< frees gradients and packed copy; the masters stay

 private:
  ModelConfig config_;
  NamedTensors masters_;
  FullGradients gradient_;
  size_t size_ = 0;
  std::shared_ptr<const BaseWeights> packed_;
};

}  // namespace ds
