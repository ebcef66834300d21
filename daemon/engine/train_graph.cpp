// SPDX-License-Identifier: Apache-2.0
#include "engine/train_graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ds {

int64_t TrainBatch::add(std::span<const TokenId> sequence, int64_t first_target,
                        const PrefixKv* prefix) {
  const auto row0 = static_cast<int64_t>(ids.size());
  const auto n = static_cast<int64_t>(sequence.size());
  DS_CHECK(first_target >= 1 && first_target <= n);
  ids.insert(ids.end(), sequence.begin(), sequence.end());
  sequences.push_back({row0, n, prefix});
  for (int64_t i = first_target; i < n; ++i)
    loss_rows.push_back(static_cast<int32_t>(row0 + i - 1));
  return row0;
}

/// About 8 numbers of rows at a time, some 210 recordings each of 10 kernels or 40 kB.
constexpr size_t kMostRecordings = 2048;

TrainGraph::TrainGraph(const ModelConfig& config, const Compute& compute)
    : config_(config),
      compute_(compute),
      recordings_(*compute.ops, compute.context, kMostRecordings),
      layers_(static_cast<size_t>(config.n_layers)) {}

/// Batches differ a little from step to step: a quarter more than asked for, else just that.
Status TrainGraph::reserve(int64_t rows, int64_t loss_rows) {
  if (rows > max_rows_ && !reserve_rows(rows + rows / 4).ok()) DS_TRY(reserve_rows(rows));
  if (loss_rows > max_loss_rows_ && !reserve_loss_rows(loss_rows + loss_rows / 4).ok())
    DS_TRY(reserve_loss_rows(loss_rows));
  return {};
}

Status TrainGraph::reserve_rows(int64_t r) {
  const ModelConfig& c = config_;
  const int64_t q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  max_rows_ = 0;  // until all of it is there
  const auto grow = [&](std::initializer_list<Buffer*> buffers, int64_t width) -> Status {
    for (Buffer* b : buffers)
      DS_TRY(b->grow(*compute_.ops, static_cast<size_t>(r * width) * sizeof(float)));
    return {};
  };
  for (LayerState& s : layers_) {
    DS_TRY(grow({&s.x, &s.mid}, c.d_model));
    DS_TRY(grow({&s.q, &s.attended}, q));
    DS_TRY(grow({&s.k, &s.v}, kv));
    DS_TRY(grow({&s.gate, &s.up}, c.d_ff));
    DS_TRY(grow({&s.t}, kTargets * kLoraRank));
  }
  DS_TRY(grow({&x_, &normed_, &dx_, &dnormed_}, c.d_model));
  DS_TRY(grow({&activated_, &dwide_, &dwide2_}, c.d_ff));
  DS_TRY(grow({&dq_, &dattended_}, q));
  DS_TRY(grow({&dk_, &dv_}, kv));
  DS_TRY(grow({&rstd_, &ones_}, 1));
  DS_TRY(grow({&dt_}, kTargets * kLoraRank));
  const std::vector<float> ones(static_cast<size_t>(r), 1.0f);
  compute_.ops->upload(compute_.context, ones_.data(), ones.data(), r * 4);
  max_rows_ = r;
  return {};
}

Status TrainGraph::reserve_loss_rows(int64_t r) {
  const auto bytes = [r](int64_t width) { return static_cast<size_t>(r * width) * sizeof(float); };
  max_loss_rows_ = 0;
  DS_TRY(picked_.grow(*compute_.ops, bytes(config_.d_model)));
  DS_TRY(head_in_.grow(*compute_.ops, bytes(config_.d_model)));
  DS_TRY(head_rstd_.grow(*compute_.ops, bytes(1)));
  DS_TRY(logits_.grow(*compute_.ops, bytes(config_.vocab)));
  max_loss_rows_ = r;
  return {};
}

void TrainGraph::release() {
  for (LayerState& s : layers_) s = {};
  for (Buffer* b : {&x_, &normed_, &activated_, &rstd_, &dx_, &dnormed_, &dwide_, &dwide2_, &dq_,
                    &dk_, &dv_, &dattended_, &dt_, &ones_})
    *b = Buffer();
  for (Buffer* b :
       {&picked_, &head_in_, &head_rstd_, &logits_, &prepared_, &prepared_dy_, &prepared_dup_,
        &prepared_dv_, &prepared_dx_, &prepared_head_, &prepared_dlogits_})
    *b = Buffer();
  recordings_.clear();
  saturated_ = {};
  tables_ = {};
  loss_tables_ = {};
  dlogits_prepared_ = nullptr;
  max_rows_ = max_loss_rows_ = 0;
}

/// x as linear() wants it, in `to`; null where it needs nothing.
void* TrainGraph::prepare(const Operand& as, int64_t rows, int64_t k, const float* x, Buffer& to) {
  const Result<void*> room = prepared_room(*compute_.ops, as.format, rows, k, to);
  note(room.status());
  if (!status_.ok() || *room == nullptr) return nullptr;
  compute_.ops->prepare(compute_.context, rows, k, x, k, {*room, as.format, as.saturated});
  return *room;
}

/// Where an op leaves rows that only linear layers read, ready for them; null: it leaves FP32. The
/// CPU's ops would make both.
PreparedRows TrainGraph::room_for_prepared(const Operand& as, int64_t rows, int64_t k, Buffer& to) {
  if (compute_.ops->host_memory) return {};
  const Result<void*> room = prepared_room(*compute_.ops, as.format, rows, k, to);
  note(room.status());
  return {room.ok() ? *room : nullptr, as.format, as.saturated};
}

/// The same for what layers of the base read: a quantizer takes FP32, which the backward pass has
/// to prepare for itself.
PreparedRows TrainGraph::room_for_input(const Call& call, const Operand& as, int64_t k) {
  return call.base.by_quantizer() ? PreparedRows() : room_for_prepared(as, call.rows, k, prepared_);
}

/// RMSNorm of d_model columns as the input of linear layers.
TrainGraph::Input TrainGraph::norm(const Call& call, const Operand& as, const float* x,
                                   const BackendFloats& weight, float* rstd) {
  const PreparedRows prepared = room_for_input(call, as, config_.d_model);
  float* normed = prepared.data == nullptr ? normed_.as<float>() : nullptr;
  compute_.ops->rmsnorm(compute_.context, call.rows, config_.d_model, x, weight.data(),
                        config_.norm_eps, normed, rstd, prepared);
  return {normed, prepared.data};
}

/// Whether gate and up stay what their product leaves in FP16, side by side in LayerState::gate:
/// half the memory, which is what bounds whoever reads them. What reads their product in BF16, as
/// FP16 could not hold it, gets them in FP32.
bool TrainGraph::keeps_halves(const Call& call, int64_t layer) const {
  const auto& linear = call.base.layer(layer).linear;
  return compute_.ops->rows_side_by_side && call.adapters == nullptr && !call.base.by_quantizer() &&
         formats_.forward(layer, kGate) == WeightFormat::kF16 &&
         formats_.forward(layer, kDown) == WeightFormat::kF16 && linear[kGate].bias.empty() &&
         linear[kUp].bias.empty() && config_.d_ff % 8 == 0;
}

SwigluArgs TrainGraph::gate_and_up(const Call& call, int64_t layer) const {
  const LayerState& s = layers_[static_cast<size_t>(layer)];
  SwigluArgs args{.rows = call.rows, .d = config_.d_ff};
  if (keeps_halves(call, layer)) {
    args.gate_up_f16 = s.gate.data();
  } else {
    args.gate = s.gate.as<float>();
    args.up = s.up.as<float>();
  }
  return args;
}

TrainGraph::Input TrainGraph::activate(const Call& call, int64_t layer) {
  SwigluArgs args = gate_and_up(call, layer);
  args.y_prepared = room_for_input(call, forward_operand(layer, kDown), config_.d_ff);
  if (args.y_prepared.data == nullptr) args.y = activated_.as<float>();
  compute_.ops->swiglu(compute_.context, args);
  return {args.y, args.y_prepared.data};
}

float* TrainGraph::t_of(int64_t layer, Target target) {
  return layers_[static_cast<size_t>(layer)].t.as<float>() + target * rows_ * kLoraRank;
}

/// On a GPU attention rounds as the linear layers do, with kTF32 not at all.
Status TrainGraph::begin_attention(const TrainBatch& batch) {
  const ModelConfig& c = config_;
  std::vector<TrainingAttention::Sequence> sequences;
  for (const TrainBatch::Sequence& s : batch.sequences)
    sequences.push_back({s.n_rows, s.prefix != nullptr ? s.prefix->tokens : 0});
  if (padding_ > 0) sequences.push_back({padding_, 0});
  DS_TRY(attention_.begin(components_->attention, *compute_.ops, compute_.context, c.n_heads,
                          c.n_kv_heads, c.head_dim,
                          1.0f / std::sqrt(static_cast<float>(c.head_dim)), sequences, rows_,
                          compute_.ops->host_memory ? WeightFormat::kF32 : formats_.format()));
  for (LayerState& s : layers_) DS_TRY(s.saved.grow(*compute_.ops, attention_.saved_bytes()));
  return {};
}

TrainingAttention::Pointers TrainGraph::attention_pointers(const TrainBatch& batch, int64_t layer) {
  prefix_k_.clear(), prefix_v_.clear();
  for (const TrainBatch::Sequence& s : batch.sequences) {
    const bool has = s.prefix != nullptr;
    const auto at = static_cast<size_t>(layer);
    prefix_k_.push_back(has ? s.prefix->k[at].as<float>() : nullptr);
    prefix_v_.push_back(has ? s.prefix->v[at].as<float>() : nullptr);
  }
  if (padding_ > 0) prefix_k_.push_back(nullptr), prefix_v_.push_back(nullptr);
  const LayerState& s = layers_[static_cast<size_t>(layer)];
  TrainingAttention::Pointers at;
  at.q = s.q.as<float>();
  at.k = s.k.as<float>();
  at.v = s.v.as<float>();
  at.out = s.attended.as<float>();
  at.saved = s.saved.data();
  return at;
}

RopeArgs TrainGraph::rotation(const Call& call, float* q, float* k) const {
  const ModelConfig& c = config_;
  RopeArgs args{call.rows, c.n_heads, c.n_kv_heads, c.head_dim, positions_};
  args.cos = call.base.rope_cos();
  args.sin = call.base.rope_sin();
  args.q = q;
  args.k = k;
  return args;
}

void TrainGraph::query_key_value(const Call& call, int64_t layer) {
  LayerState& s = layers_[static_cast<size_t>(layer)];
  linear(call, layer, kQ,
         norm(call, forward_operand(layer, kQ), s.x.as<float>(),
              call.base.layer(layer).attention_norm, nullptr),
         {s.q.as<float>(), s.k.as<float>(), s.v.as<float>()}, nullptr);
  compute_.ops->rope(compute_.context, rotation(call, s.q.as<float>(), s.k.as<float>()));
}

void TrainGraph::output_gate_up(const Call& call, int64_t layer) {
  LayerState& s = layers_[static_cast<size_t>(layer)];
  linear(call, layer, kO, {s.attended.as<float>()}, {s.mid.as<float>()}, s.x.as<float>());
  linear(call, layer, kGate,
         norm(call, forward_operand(layer, kGate), s.mid.as<float>(),
              call.base.layer(layer).mlp_norm, nullptr),
         {s.gate.as<float>(), s.up.as<float>()}, nullptr,
         keeps_halves(call, layer) ? s.gate.data() : nullptr);
}

void TrainGraph::down(const Call& call, int64_t layer) {
  LayerState& s = layers_[static_cast<size_t>(layer)];
  float* next = layer + 1 < config_.n_layers ? layers_[static_cast<size_t>(layer) + 1].x.as<float>()
                                             : x_.as<float>();
  linear(call, layer, kDown, activate(call, layer), {next}, s.mid.as<float>());
}

void TrainGraph::forward_layer(const Call& call, int64_t layer) {
  run_piece(Piece::kQkv, layer, [&] { query_key_value(call, layer); });
  if (status_.ok()) {
    const auto at = attention_pointers(call.batch, layer);
    status_ = attention_.forward(static_cast<uint32_t>(layer), at, prefix_k_, prefix_v_);
  }
  run_piece(Piece::kOutputGateUp, layer, [&] { output_gate_up(call, layer); });
  run_piece(Piece::kDown, layer, [&] { down(call, layer); });
}

void TrainGraph::head_forward(const Call& call) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  const auto wanted = static_cast<int64_t>(call.batch.loss_rows.size());
  dlogits_prepared_ = nullptr;
  if (wanted == 0) return;
  float* picked = picked_.as<float>();
  ops.gather_rows(compute_.context, wanted, c.d_model, loss_rows_, x_.as<float>(), picked);
  ops.rmsnorm(compute_.context, wanted, c.d_model, picked, call.base.final_norm().data(),
              c.norm_eps, head_in_.as<float>(), head_rstd_.as<float>(), {});
  dlogits_prepared_ =
      room_for_prepared(backward_operand(), wanted, c.vocab, prepared_dlogits_).data;
  LinearArgs args;
  args.rows = wanted;
  args.x = head_in_.as<float>();
  args.x_stride = c.d_model;
  args.y[0] = logits_.as<float>();
  const Linear& head = call.base.head();
  if (head.quant == nullptr)
    args.x_prepared = prepare(forward_operand(-1, kQ), wanted, c.d_model, args.x, prepared_head_);
  const Linear* const weights[] = {&head};
  if (status_.ok()) note(linear_in_format(call, weights, -1, kQ, args));
}

Status TrainGraph::set_tables(const TrainBatch& batch) {
  std::vector<TokenId> ids = batch.ids;
  std::vector<int32_t> positions(batch.ids.size());
  for (const TrainBatch::Sequence& s : batch.sequences) {
    const int64_t start = s.prefix != nullptr ? s.prefix->tokens : 0;
    DS_CHECK(start + s.n_rows <= config_.context);
    for (int64_t i = 0; i < s.n_rows; ++i) {
      positions[static_cast<size_t>(s.row0 + i)] = static_cast<int32_t>(start + i);
    }
  }
  for (int64_t i = 0; i < padding_; ++i) {  // a sequence of its own, of ordinary tokens
    ids.push_back(batch.ids[static_cast<size_t>(i) % batch.ids.size()]);
    positions.push_back(static_cast<int32_t>(i));
  }
  tables_.clear();
  const size_t all_ids = tables_.append(ids), at = tables_.append(positions),
               slot_0 = tables_.append(std::vector<int32_t>(positions.size(), 0)),
               loss_rows = tables_.append(batch.loss_rows);
  DS_TRY(tables_.bring(*compute_.ops, compute_.context));
  ids_ = tables_.at(all_ids);
  positions_ = tables_.at(at);
  slot_0_ = tables_.at(slot_0);
  loss_rows_ = tables_.at(loss_rows);
  return {};
}

float* TrainGraph::forward(const BaseWeights& base, const Adapters* adapters,
                           const TrainBatch& batch) {
  DS_CHECK(!batch.ids.empty());
  padding_ = padding_of(std::ssize(batch.ids));
  rows_ = std::ssize(batch.ids) + padding_;
  const auto begin = [&]() -> Status {
    DS_TRY(reserve(rows_, static_cast<int64_t>(batch.loss_rows.size())));
    DS_TRY(set_tables(batch));
    components_ = compute_.components->current();
    (void)formats(base);
    DS_TRY(reserve_saturation());
    return begin_attention(batch);
  };
  if (const Status begun = begin(); !begun.ok()) {
    note(begun);
    release();
    return nullptr;
  }
  const Call call{base, batch, adapters, nullptr, nullptr, rows_};
  set_key(base, adapters, nullptr);
  note(encoding_.forward(*components_->encoder, *compute_.ops, compute_.context, base,
                         {ids_, static_cast<size_t>(rows_)}, layers_[0].x.as<float>(), true));
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) forward_layer(call, layer);
  head_forward(call);
  return logits_.as<float>();
}

const float* TrainGraph::host_logits(int64_t rows) {
  if (compute_.ops->host_memory && status_.ok()) return logits_.as<float>();
  fetched_.assign(static_cast<size_t>(rows * config_.vocab), 0.0f);
  if (!status_.ok()) return fetched_.data();  // undefined, but there
  compute_.ops->download(compute_.context, fetched_.data(), logits_.data(),
                         rows * config_.vocab * 4);
  note(finish(compute_));
  return fetched_.data();
}

Result<PrefixKv> TrainGraph::prefix(const BaseWeights& base, std::span<const TokenId> ids) {
  TrainBatch batch;
  batch.add(ids, static_cast<int64_t>(ids.size()), nullptr);
  forward(base, nullptr, batch);
  DS_TRY(take_status());
  PrefixKv out;
  out.tokens = static_cast<int64_t>(ids.size());
  const Ops& ops = *compute_.ops;
  const int64_t bytes = out.tokens * config_.n_kv_heads * config_.head_dim * 4;
  const auto add_copy = [&](const Buffer& from, std::vector<Buffer>& to) -> Status {
    DS_ASSIGN(to.emplace_back(), Buffer::make(ops, static_cast<size_t>(bytes)));
    ops.copy(compute_.context, to.back().data(), from.data(), bytes);
    return {};
  };
  for (const LayerState& s : layers_) {
    DS_TRY(add_copy(s.k, out.k));
    DS_TRY(add_copy(s.v, out.v));
  }
  DS_TRY(finish(compute_));
  return out;
}

/// Null when the norm is not trained.
float* TrainGraph::norm_gradient(const Call& call, const std::string& name) {
  return call.full == nullptr ? nullptr : call.full->of(name);
}

/// Whether a gradient of so many columns, a product that is but read once, may be in BF16.
bool TrainGraph::gives_bf16(const Call& call, int64_t columns) const {
  return compute_.ops->rows_side_by_side && call.full != nullptr && call.gradients == nullptr &&
         formats_.backward() == WeightFormat::kBF16 && columns > kLoraRank && columns % 8 == 0;
}

/// W^T of targets that follow each other in memory, as one matrix [k, sum of n]; without data where
/// they do not, or where something is added to the product of one.
WeightView TrainGraph::turned_together(const Call& call, int64_t layer, Target first, int count) {
  WeightView all;
  for (int i = 0; i < count; ++i) {
    const auto target = static_cast<Target>(first + i);
    const int64_t n = target_shape(config_, target).first;
    if (!gives_bf16(call, n) || !call.base.layer(layer).linear[target].bias.empty()) return {};
    const WeightView one = transposed(call, layer, target);
    if (!one.transposed || one.data == nullptr) return {};
    const auto* end = static_cast<const std::byte*>(all.data);
    if (i > 0 && end + compute_.ops->packed_bytes(all.format, all.k, all.n) != one.data) return {};
    all = i == 0 ? one : WeightView{all.format, all.n, all.k + one.k, all.data, true};
  }
  return all;
}

/// Where the gradients of what targets of one input make go: ready for linear layers where these
/// read nothing else, side by side if they can, else FP32, which outer_accumulate() wants of few
/// columns.
TrainGraph::Gradients TrainGraph::room_for_gradients(const Call& call, int64_t layer, Target first,
                                                     std::initializer_list<Buffer*> fp32) {
  Buffer* const rooms[kMaxFusedWeights] = {&prepared_dy_, &prepared_dup_, &prepared_dv_};
  Gradients out;
  out.count = static_cast<int>(fp32.size());
  out.together = turned_together(call, layer, first, out.count);
  std::byte* at = nullptr;
  if (out.together.data != nullptr)
    at = static_cast<std::byte*>(
        room_for_prepared(backward_operand(), call.rows, out.together.k, prepared_dy_).data);
  for (int i = 0; i < out.count; ++i) {
    const int64_t n = target_shape(config_, static_cast<Target>(first + i)).first;
    Input& one = out.of[i];
    if (at != nullptr) {
      one.prepared = at;
      one.stride = out.together.k;
      at += n * 2;
    } else if (n > kLoraRank) {
      one.prepared = room_for_prepared(backward_operand(), call.rows, n, *rooms[i]).data;
    }
    if (one.prepared == nullptr) one.x = fp32.begin()[i]->as<float>();
  }
  return out;
}

/// dx beside its FP32, as rmsnorm_backward() leaves it; null on a CPU.
void* TrainGraph::prepared_dx(const Call& call) {
  return room_for_prepared(backward_operand(), call.rows, config_.d_model, prepared_dx_).data;
}

void TrainGraph::backward_down(const Call& call, int64_t layer) {
  const ModelConfig& c = config_;
  // Of the top layer dx is the head's, which leaves no prepared rows.
  Gradients dy{{{dx_.as<float>()}}, 1, {}};
  dy.of[0].prepared = layer + 1 < c.n_layers ? prepared_dx(call)
                                             : prepare(backward_operand(), call.rows, c.d_model,
                                                       dy.of[0].x, prepared_dx_);
  SwigluArgs args = gate_and_up(call, layer);
  void* const dy_bf16 = gives_bf16(call, c.d_ff) ? dwide_.data() : nullptr;
  input_gradient(call, layer, kDown, dy, dwide_.as<float>(), dy_bf16);
  args.dy_bf16 = dy_bf16;
  if (dy_bf16 == nullptr) args.dy = dwide_.as<float>();
  // The layer's input is computed again beside its gradient, from what that reads anyway.
  if (call.full != nullptr || (call.gradients != nullptr && call.gradients->adapts(kDown))) {
    args.y_prepared = room_for_input(call, backward_operand(), c.d_ff);
    if (args.y_prepared.data == nullptr) args.y = activated_.as<float>();
  }
  const Gradients to = gate_up_gradients(call, layer);
  args.dgate = to.of[0].x, args.dup = to.of[1].x;
  args.dgate_prepared = to.of[0].rows(), args.dup_prepared = to.of[1].rows();
  if (!status_.ok()) return;
  compute_.ops->swiglu_backward(compute_.context, args);
  weight_gradients(call, layer, kDown, dy, {args.y, args.y_prepared.data});
}

void TrainGraph::backward_gate_up(const Call& call, int64_t layer) {
  LayerState& s = layers_[static_cast<size_t>(layer)];
  const LayerWeights& w = call.base.layer(layer);
  const Input normed =
      norm(call, backward_operand(), s.mid.as<float>(), w.mlp_norm, rstd_.as<float>());
  Gradients dy = gate_up_gradients(call, layer);
  linear_backward(call, layer, kGate, dy, normed, dnormed_.as<float>());
  if (!status_.ok()) return;
  float* dnorm = norm_gradient(call, layer_prefix(layer) + "post_attention_layernorm.weight");
  compute_.ops->rmsnorm_backward(compute_.context, call.rows, config_.d_model, dnormed_.as<float>(),
                                 s.mid.as<float>(), w.mlp_norm.data(), rstd_.as<float>(),
                                 dx_.as<float>(), prepared_dx(call), dnorm);
}

void TrainGraph::backward_output(const Call& call, int64_t layer) {
  Gradients dy{{{dx_.as<float>(), prepared_dx(call)}}, 1, {}};
  linear_backward(call, layer, kO, dy, {layers_[static_cast<size_t>(layer)].attended.as<float>()},
                  dattended_.as<float>());
}

void TrainGraph::backward_attention(const Call& call, int64_t layer) {
  auto at = attention_pointers(call.batch, layer);
  at.dout = dattended_.as<float>();
  at.dq = dq_.as<float>();
  at.dk = dk_.as<float>();
  at.dv = dv_.as<float>();
  if (status_.ok())
    status_ = attention_.backward(static_cast<uint32_t>(layer), at, prefix_k_, prefix_v_);
}

void TrainGraph::backward_query_key_value(const Call& call, int64_t layer) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  const OpContext& ctx = compute_.context;
  LayerState& s = layers_[static_cast<size_t>(layer)];
  const LayerWeights& w = call.base.layer(layer);
  float *dx = dx_.as<float>(), *dnormed = dnormed_.as<float>();
  Gradients dy = room_for_gradients(call, layer, kQ, {&dq_, &dk_, &dv_});
  if (!status_.ok()) return;
  RopeArgs back = rotation(call, dq_.as<float>(), dk_.as<float>());
  back.inverse = true;
  back.v = dv_.as<float>();
  back.q_prepared = dy.of[0].rows();
  back.k_prepared = dy.of[1].rows();
  back.v_prepared = dy.of[2].rows();
  ops.rope(ctx, back);
  const Input normed =
      norm(call, backward_operand(), s.x.as<float>(), w.attention_norm, rstd_.as<float>());
  linear_backward(call, layer, kQ, dy, normed, dnormed);
  float* dnorm = norm_gradient(call, layer_prefix(layer) + "input_layernorm.weight");
  ops.rmsnorm_backward(ctx, call.rows, c.d_model, dnormed, s.x.as<float>(), w.attention_norm.data(),
                       rstd_.as<float>(), dx, prepared_dx(call), dnorm);
}

void TrainGraph::head_backward(const Call& call) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  const auto wanted = static_cast<int64_t>(call.batch.loss_rows.size());
  float *dx = dx_.as<float>(), *dhead = dnormed_.as<float>();
  ops.zero(compute_.context, dx, call.rows * c.d_model * 4);
  if (wanted == 0) return;
  Input dlogits{logits_.as<float>(), dlogits_prepared_};
  if (dlogits.prepared == nullptr)
    dlogits.prepared = prepare(backward_operand(), wanted, c.vocab, dlogits.x, prepared_dlogits_);
  LinearArgs args;
  args.rows = wanted;
  args.x = dlogits.x;
  args.x_stride = c.vocab;
  args.w[0] = transposed(call, -1, kQ);
  if (!status_.ok()) return;
  args.x_prepared = dlogits.prepared;
  args.n_weights = 1;
  args.y[0] = dhead;
  args.y_stride[0] = c.d_model;
  ops.linear(compute_.context, args);
  float* dnorm = norm_gradient(call, "model.norm.weight");
  if (call.full != nullptr) {
    Input head_in{head_in_.as<float>()};
    if (!ops.host_memory)
      head_in.prepared = prepare(backward_operand(), wanted, c.d_model, head_in.x, prepared_);
    Call picked = call;
    picked.rows = wanted;
    const OuterArgs args =
        outer(picked, dlogits, c.vocab, c.vocab, head_in, c.d_model, 1.0f,
              call.full->of(c.tied_head ? "model.embed_tokens.weight" : "lm_head.weight"));
    ops.outer_accumulate(compute_.context, 1, &args);
  }
  // The head read picked rows: differentiate there, then scatter (loss rows are distinct).
  float* dpicked = head_in_.as<float>();
  ops.zero(compute_.context, dpicked, wanted * c.d_model * 4);
  ops.rmsnorm_backward(compute_.context, wanted, c.d_model, dhead, picked_.as<float>(),
                       call.base.final_norm().data(), head_rstd_.as<float>(), dpicked, nullptr,
                       dnorm);
  ops.scatter_rows(compute_.context, wanted, c.d_model, loss_rows_, dpicked, dx);
}

void TrainGraph::backward(const BaseWeights& base, Adapters* adapters, FullGradients* full,
                          const TrainBatch& batch) {
  const Call call{base, batch, adapters, adapters, full, rows_};
  set_key(base, adapters, full);
  constexpr uint32_t kAttentionTargets = 1u << kQ | 1u << kK | 1u << kV | 1u << kO;
  DS_CHECK(adapters == nullptr || adapters->gradient().size() == adapters->size());
  head_backward(call);
  for (int64_t layer = config_.n_layers - 1; layer >= 0; --layer) {
    // Below the lowest trained part nothing needs a gradient.
    const bool last = layer == 0 && full == nullptr &&
                      (adapters == nullptr || (adapters->targets() & kAttentionTargets) == 0);
    run_piece(Piece::kBackDown, layer, [&] { backward_down(call, layer); });
    run_piece(Piece::kBackGateUp, layer, [&] { backward_gate_up(call, layer); });
    // Without a backward of its own the attention passes no gradient on: what is below learns
    // through the residual alone.
    if (last || !attention_.attention().trains()) continue;
    run_piece(Piece::kBackOutput, layer, [&] { backward_output(call, layer); });
    backward_attention(call, layer);
    run_piece(Piece::kBackQkv, layer, [&] { backward_query_key_value(call, layer); });
  }
  if (full != nullptr) {
    for (int64_t row = 0; row < std::ssize(batch.ids); ++row) {
      if (batch.ids[static_cast<size_t>(row)] != config_.padding_id) continue;
      compute_.ops->zero(compute_.context, dx_.as<float>() + row * config_.d_model,
                         config_.d_model * 4);
    }
    note(encoding_.backward(*components_->encoder, dx_.as<float>(),
                            call.full->of("model.embed_tokens.weight")));
  }
}

}  // namespace ds
