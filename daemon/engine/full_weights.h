// SPDX-License-Identifier: Apache-2.0
// Every weight of a model in training: FP32 masters, their gradients, and the packed copy that the
// passes run over.
#pragma once

#include <memory>
#include <optional>

#include "engine/parameters.h"

namespace ds {

class FullWeights {
 public:
  /// `masters` holds every tensor of the model, by HF name; error: one is missing or of another
  /// size.
  static Result<std::unique_ptr<FullWeights>> make(const Compute& compute,
                                                   const ModelConfig& config,
                                                   const NamedTensors& masters);
  Result<std::unique_ptr<FullWeights>> copy() const;  ///< of the masters

  const ModelConfig& config() const { return config_; }
  size_t size() const { return masters_.size(); }  ///< parameters
  std::span<float> masters() const { return masters_.all(); }
  Result<NamedTensors> read_masters() const;
  FullGradients& gradient() { return *gradient_; }  ///< once zero_gradient() has made it
  Status zero_gradient();

  /// Brings the packed copy up to date with the masters; call after each change of them. A copy
  /// that somebody else holds stays as it is, and another takes its place.
  Status pack(WeightFormat format);
  std::shared_ptr<const BaseWeights> packed() const { return packed_; }
  void release();  ///< frees gradients and packed copy; the masters stay

 private:
  FullWeights(const Compute& compute, const ModelConfig& config, BackendVector masters)
      : compute_(compute), config_(config), table_(config), masters_(std::move(masters)) {}

  Compute compute_;
  ModelConfig config_;
  ParameterTable table_;
  BackendVector masters_;
  std::optional<FullGradients> gradient_;
  std::shared_ptr<BaseWeights> packed_;
};

}  // namespace ds
