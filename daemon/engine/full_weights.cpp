// SPDX-License-Identifier: Apache-2.0
#include "engine/full_weights.h"

namespace ds {

Result<std::unique_ptr<FullWeights>> FullWeights::make(const Compute& compute,
                                                       const ModelConfig& config,
                                                       const NamedTensors& masters) {
  DS_ASSIGN(const std::vector<float> all, ParameterTable(config).join(masters));
  DS_ASSIGN(BackendVector there, BackendVector::make(compute, all.size()));
  there.set(all);
  return std::unique_ptr<FullWeights>(new FullWeights(compute, config, std::move(there)));
}

Result<std::unique_ptr<FullWeights>> FullWeights::copy() const {
  DS_ASSIGN(BackendVector masters, masters_.copy());
  return std::unique_ptr<FullWeights>(new FullWeights(compute_, config_, std::move(masters)));
}

Result<NamedTensors> FullWeights::read_masters() const {
  DS_ASSIGN(const std::vector<float> all, masters_.read());
  return table_.split(all);
}

Status FullWeights::zero_gradient() {
  if (gradient_) {
    gradient_->zero();
  } else {
    DS_ASSIGN(gradient_, FullGradients::make(compute_, config_));
  }
  return {};
}

Status FullWeights::pack(WeightFormat format) {
  const BaseWeights::Parameters at = [this](const std::string& name) {
    return masters_.data() + table_.begin(name);
  };
  const bool ours = packed_ != nullptr && packed_.use_count() == 1 && packed_->format() == format;
  if (ours) return packed_->repack(compute_, at);
  packed_.reset();  // its memory is free for the new one
  DS_ASSIGN(packed_, BaseWeights::from_parameters(config_, at, compute_, format));
  return {};
}

void FullWeights::release() {
  packed_.reset();
  gradient_.reset();
}

}  // namespace ds
