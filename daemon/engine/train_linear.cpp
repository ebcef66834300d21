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
                        std::initializer_list<float*> y, const float* residual, void* y_16) {
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
  args.y_16 = y_16;
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
void TrainGraph::linear_backward(const Call& call, int64_t layer, Target first, Gradients& dy,
                                 Input x, float* dx) {
  input_gradient(call, layer, first, dy, dx);
  weight_gradients(call, layer, first, dy, x);
}

/// Prepares gradients that are not. To dx, or in BF16 to dx_16, which is for one target.
void TrainGraph::input_gradient(const Call& call, int64_t layer, Target first, Gradients& dy,
                                float* dx, void* dx_16) {
  if (!status_.ok()) return;  // there was no memory for dy
  if (dy.together.data != nullptr)
    return add_input_gradient(call, layer, first, dy.together, dy.of[0], dx, dx_16, false);
  Buffer* const rooms[kMaxFusedWeights] = {&prepared_dy_, &prepared_dup_, &prepared_dv_};
  for (int i = 0; i < dy.count; ++i) {
    const auto target = static_cast<Target>(first + i);
    Input& of = dy.of[i];
    if (of.prepared == nullptr)
      of.prepared = prepare(backward_operand(), call.rows, target_shape(config_, target).first,
                            of.x, *rooms[i]);
    const WeightView turned = transposed(call, layer, target);
    if (!status_.ok()) return;
    add_input_gradient(call, layer, target, turned, of, dx, dx_16, i > 0);
  }
}

void TrainGraph::weight_gradients(const Call& call, int64_t layer, Target first,
                                  const Gradients& dy, Input x) {
  const Ops& ops = *compute_.ops;
  const int64_t k = target_shape(config_, first).second;
  // The CPU sums in FP32 and reads nothing prepared.
  if (call.full != nullptr && x.prepared == nullptr && !ops.host_memory)
    x.prepared = prepare(backward_operand(), call.rows, k, x.x, prepared_);
  if (!status_.ok()) return;
  std::vector<OuterArgs> outers;
  for (int i = 0; i < dy.count; ++i)
    add_outers(call, layer, static_cast<Target>(first + i), dy.of[i], x, outers);
  ops.outer_accumulate(compute_.context, std::ssize(outers), outers.data());
}

/// dx of one target, beside what is there.
void TrainGraph::add_input_gradient(const Call& call, int64_t layer, Target target,
                                    const WeightView& turned, Input dy, float* dx, void* dx_16,
                                    bool accumulate) {
  LoraSlots slots;
  LinearArgs args;
  args.rows = call.rows;
  args.x = dy.x;
  args.x_stride = turned.k;
  args.w[0] = turned;
  args.x_prepared = dy.prepared;
  args.n_weights = 1;
  args.y[0] = dx;
  args.y_stride[0] = turned.n;
  args.y_16 = dx_16;
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

namespace {

/// Whether both are one: of gradients side by side, to weights one behind the other.
bool continues(const OuterArgs& a, const OuterArgs& next) {
  return next.dy_prepared_stride != 0 && a.dy_prepared_stride == next.dy_prepared_stride &&
         static_cast<const std::byte*>(a.dy_prepared) + a.n * 2 == next.dy_prepared &&
         a.out + a.n * a.k == next.out;
}

}  // namespace

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
  const OuterArgs all =
      outer(call, dy, n, n, x, k, 1.0f, call.full->of(weight_name(layer, target)));
  if (!to.empty() && continues(to.back(), all)) {
    to.back().n += n;
  } else {
    to.push_back(all);
  }
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
  args.dy_prepared_stride = dy.stride;
  args.k = args.x_stride = k;
  args.x = x.x;
  args.x_prepared = x.prepared;
  args.scale = scale;
  args.out = out;
  args.tf32 = formats_.format() == WeightFormat::kTF32;
  return args;
}

}  // namespace ds
