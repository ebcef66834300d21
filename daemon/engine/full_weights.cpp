// SPDX-License-Identifier: Apache-2.0
#include "engine/full_weights.h"

#include <algorithm>

namespace ds {

FullWeights::FullWeights(const ModelConfig& config, NamedTensors masters)
    : config_(config), masters_(std::move(masters)) {
  for (const auto& [name, tensor] : masters_) size_ += tensor.size();
}

void FullWeights::zero_gradient() {
  for (auto& [name, tensor] : gradient_) std::fill(tensor.begin(), tensor.end(), 0.0f);
}

void FullWeights::pack(const Compute& compute, WeightFormat format) {
  packed_.reset();  // its memory is free for the new one
  auto packed = BaseWeights::from_tensors(config_, masters_, "", compute, format);
  DS_CHECK(packed.ok());  // the masters are complete
  packed_ = std::move(packed).value();
}

void FullWeights::release() {
  packed_.reset();
  gradient_.clear();
}

}  // namespace ds
