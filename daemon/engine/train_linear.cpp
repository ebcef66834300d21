// SPDX-License-Identifier: Apache-2.0
// Linear layers of a training pass, forward and backward.
#include "engine/train_graph.h"

namespace ds {

/// As run_linear, in BF16 where FP16 could not hold the input.
Status TrainGraph::linear_in_format(const Call& call, std::span<const Linear* const> weights,
                                    int64_t layer, Target first, LinearArgs& args) {
  if (args.x_prepared == nullptr) args.saturated = forward_operand(layer, first).saturated;
  if (weights[0]->quant != nullptr || formats_.forward(layer, first) == weights[0]->view.format)
    return run_linear(compute_, call.base, weights, args, scratch_);
  args.n_weights = static_cast<int>(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto target = static_cast<Target>(first + static_cast<int>(i));
    DS_ASSIGN(args.w[i], call.base.in_bf16(compute_, layer, target));
    args.bias[i] = weights[i]->bias.data();
    args.y_stride[i] = weights[i]->view.n;
  }
  compute_.ops->linear(compute_.context, args);
  return {};
}

/// Targets of one input, which follow each other from `first` on: their A x are kept side by side.
void TrainGraph::linear(const Call& call, int64_t layer, Target first, Input input,
                        std::initializer_list<float*> y, const float* residual) {
  const int64_t k = target_shape(config_, first).second;
  const LayerWeights& of = call.base.layer(layer);
  if (input.prepared == nullptr && of.linear[first].quant == nullptr)
    input.prepared = prepare(forward_operand(layer, first), call.rows, k, input.x, prepared_);
  if (!status_.ok()) return;
  LinearArgs args;
  args.rows = call.rows;
  args.x = input.x;
  args.x_stride = k;
  args.x_prepared = input.prepared;
  LoraSlots slots;
  slots.slot_of_row = slot_0_;
  slots.n_slots = 1;
  slots.t = t_of(layer, first);
  const Linear* weights[kMaxFusedWeights];
  for (size_t i = 0; i < y.size(); ++i) {
    const auto target = static_cast<Target>(first + static_cast<int>(i));
    weights[i] = &of.linear[target];
    args.y[i] = y.begin()[i];
    if (call.adapters == nullptr || !call.adapters->adapts(target)) continue;
    slots.pair[0][i] = call.adapters->forward_pair(layer, target);
    args.lora = &slots;
  }
  args.epilogue = residual != nullptr ? Epilogue::kResidual : Epilogue::kNone;
  args.residual = residual;
  note(linear_in_format(call, {weights, y.size()}, layer, first, args));
}

/// Without data, and noted, when there is no memory for it.
WeightView TrainGraph::transposed(const Call& call, int64_t layer, Target target) {
  const Result<WeightView> turned = call.base.transposed(compute_, layer, target);
  note(turned.status());
  return turned.ok() ? *turned : WeightView();
}

// y = W x + scale * B (A x):  dx = W^T dy + scale * A^T (B^T dy),  dB = scale * dy (A x)^T,
// dA = scale * (B^T dy) x^T,  dW = dy x^T.
void TrainGraph::linear_backward(const Call& call, int64_t layer, Target first,
                                 std::initializer_list<Input> dy, Input x, float* dx) {
  const Ops& ops = *compute_.ops;
  Buffer* const rooms[kMaxFusedWeights] = {&prepared_dy_, &prepared_dup_, &prepared_dv_};
  const int64_t k = target_shape(config_, first).second;
  // The CPU sums in FP32 and reads nothing prepared.
  if (call.full != nullptr && x.prepared == nullptr && !ops.host_memory)
    x.prepared = prepare(backward_operand(), call.rows, k, x.x, prepared_);
  std::vector<OuterArgs> outers;
  for (size_t i = 0; i < dy.size(); ++i) {
    const auto target = static_cast<Target>(first + static_cast<int>(i));
    const int64_t n = target_shape(config_, target).first;
    Input of = dy.begin()[i];
    if (of.prepared == nullptr)
      of.prepared = prepare(backward_operand(), call.rows, n, of.x, *rooms[i]);
    const WeightView turned = transposed(call, layer, target);
    if (!status_.ok()) return;
    add_input_gradient(call, layer, target, turned, of, dx, i > 0);
    add_outers(call, layer, target, of, x, outers);
  }
  ops.outer_accumulate(compute_.context, std::ssize(outers), outers.data());
}

/// dx of one target, beside what is there.
void TrainGraph::add_input_gradient(const Call& call, int64_t layer, Target target,
                                    const WeightView& turned, Input dy, float* dx,
                                    bool accumulate) {
  const auto [n, k] = target_shape(config_, target);
  LoraSlots slots;
  LinearArgs args;
  args.rows = call.rows;
  args.x = dy.x;
  args.x_stride = n;
  args.w[0] = turned;
  args.x_prepared = dy.prepared;
  args.n_weights = 1;
  args.y[0] = dx;
  args.y_stride[0] = k;
  if (call.gradients != nullptr && call.gradients->adapts(target)) {
    slots.slot_of_row = slot_0_;
    slots.n_slots = 1;
    slots.pair[0][0] = call.gradients->backward_pair(layer, target);
    slots.t = dt_of(target);
    args.lora = &slots;
  }
  args.epilogue = accumulate ? Epilogue::kResidual : Epilogue::kNone;
  args.residual = accumulate ? dx : nullptr;
  compute_.ops->linear(compute_.context, args);
}

/// What the target's parameters get.
void TrainGraph::add_outers(const Call& call, int64_t layer, Target target, Input dy, Input x,
                            std::vector<OuterArgs>& to) {
  const auto [n, k] = target_shape(config_, target);
  if (call.gradients != nullptr && call.gradients->adapts(target)) {
    const int64_t rank = call.gradients->rank();
    const float scale = call.gradients->scale();
    to.push_back(outer(call, {dt_of(target)}, rank, kLoraRank, x, k, scale,
                       call.gradients->a_gradient(layer, target)));
    to.push_back(outer(call, {t_of(layer, target)}, rank, kLoraRank, dy, n, scale,
                       call.gradients->bt_gradient(layer, target)));
  }
  if (call.full == nullptr) return;
  to.push_back(outer(call, dy, n, n, x, k, 1.0f, call.full->of(weight_name(layer, target))));
  if (call.base.layer(layer).linear[target].bias.empty()) return;
  to.push_back(
      outer(call, {ones_.as<float>()}, 1, 1, dy, n, 1.0f,
            call.full->of(layer_prefix(layer) + std::string(target_path(target)) + ".bias")));
}

/// out [n, k] += scale * dy^T x, rows of dy `dy_stride` apart.
OuterArgs TrainGraph::outer(const Call& call, Input dy, int64_t n, int64_t dy_stride, Input x,
                            int64_t k, float scale, float* out) const {
  OuterArgs args;
  args.rows = call.rows;
  args.n = n;
  args.dy = dy.x;
  args.dy_stride = dy_stride;
  args.dy_prepared = dy.prepared;
  args.k = args.x_stride = k;
  args.x = x.x;
  args.x_prepared = x.prepared;
  args.scale = scale;
  args.out = out;
  args.tf32 = formats_.format() == WeightFormat::kTF32;
  return args;
}

}  // namespace ds
