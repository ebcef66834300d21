// SPDX-License-Identifier: Apache-2.0
// What the products of a training pass multiply, and what falls back.
#include "engine/train_graph.h"

namespace ds {

void TrainGraph::forget_fallen() {
  formats_ = OperandFormats(formats_.format(), 0);
  saturated_ = {};
}

const OperandFormats& TrainGraph::formats(const BaseWeights& base) {
  if (formats_.n_inputs() == 1 || formats_.format() != base.format()) {
    formats_ = OperandFormats(base.format(), config_.n_layers);
    saturated_ = {};
  }
  return formats_;
}

TrainGraph::Operand TrainGraph::forward_operand(int64_t layer, Target reader) {
  const WeightFormat format = formats_.forward(layer, reader);
  const bool counts = format == WeightFormat::kF16 && saturated_.bytes() > 0;
  return {format, counts ? saturated_.as<int32_t>() + formats_.input(layer, reader) : nullptr};
}

/// Zeros, where anything is counted: the CPU's FP16 is FP32.
Status TrainGraph::reserve_saturation() {
  const Ops& ops = *compute_.ops;
  if (formats_.format() != WeightFormat::kF16 || ops.host_memory || saturated_.bytes() > 0)
    return {};
  DS_TRY(saturated_.grow(ops, formats_.n_inputs() * sizeof(int32_t)));
  ops.zero(compute_.context, saturated_.data(), static_cast<int64_t>(saturated_.bytes()));
  counted_.assign(formats_.n_inputs(), 0);
  settled_ = counted_;
  return {};
}

void TrainGraph::fetch_saturation() {
  if (saturated_.bytes() == 0) return;
  compute_.ops->download(compute_.context, counted_.data(), saturated_.data(),
                         static_cast<int64_t>(saturated_.bytes()));
}

int64_t TrainGraph::settle_saturation() {
  int64_t total = 0;
  if (saturated_.bytes() == 0) return total;
  for (size_t i = 0; i < counted_.size(); ++i) {
    if (counted_[i] == settled_[i]) continue;
    total += counted_[i] - settled_[i];
    formats_.fall_back(i);
  }
  settled_ = counted_;
  return total;
}

}  // namespace ds
