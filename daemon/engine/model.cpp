// SPDX-License-Identifier: Apache-2.0
#include "engine/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "engine/bf16.h"

namespace ds {

Status finish(const Compute& compute) {
  const char* failed = compute.ops->finish(compute.context);
  if (failed == nullptr) return {};
  Status lost(Code::kDeviceLost, std::string(compute.ops->name) + ": " + failed);
  if (compute.device != nullptr) compute.device->lose(lost.message());
  return lost;
}

const Ops& host_ops(const Compute& compute) {
  return compute.ops->host_memory ? *compute.ops : cpu_ops(best_cpu_isa());
}

Result<BackendFloats> BackendFloats::make(const Compute& compute, std::span<const float> from) {
  BackendFloats out;
  DS_ASSIGN(out.storage_, Buffer::make(*compute.ops, from.size_bytes()));
  compute.ops->upload(compute.context, out.storage_.data(), from.data(),
                      static_cast<int64_t>(from.size_bytes()));
  return out;
}

Status BackendFloats::copy_from(const Compute& compute, std::span<const float> from) {
  DS_TRY(storage_.grow(*compute.ops, from.size_bytes()));
  compute.ops->copy(compute.context, storage_.data(), from.data(),
                    static_cast<int64_t>(from.size_bytes()));
  return {};
}

Result<std::shared_ptr<const LoraDelta>> LoraDelta::pack(const BaseWeights& base,
                                                         const Compute& compute, int64_t rank,
                                                         float scale,
                                                         const std::vector<LayerFactors>& factors) {
  DS_CHECK(rank > 0 && rank <= kLoraRank);
  const auto empty = [&] {
    auto delta = std::make_shared<LoraDelta>();
    delta->rank_ = rank;
    delta->scale_ = scale;
    delta->layers_.resize(factors.size());
    return delta;
  };
  const auto delta = empty();
  DS_TRY(delta->fill(base, compute, factors));
  DS_TRY(finish(compute));
  if (!compute.ops->host_memory) {
    const auto host = empty();
    DS_TRY(host->fill(base, {&host_ops(compute), {compute.context.parallel}}, factors));
    delta->host_ = host;
  }
  return std::shared_ptr<const LoraDelta>(delta);
}

Status LoraDelta::fill(const BaseWeights& base, const Compute& compute,
                       const std::vector<LayerFactors>& factors) {
  const int64_t rank = rank_;
  std::vector<float> padded;
  for (size_t layer = 0; layer < factors.size(); ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const Factors& f = factors[layer][t];
      if (f.a.empty()) continue;
      const auto [n, k] = target_shape(base.config(), static_cast<Target>(t));
      DS_CHECK(static_cast<int64_t>(f.a.size()) == rank * k &&
               static_cast<int64_t>(f.b.size()) == n * rank);
      padded.assign(static_cast<size_t>(kLoraRank * k), 0.0f);
      std::transform(f.a.begin(), f.a.end(), padded.begin(), round_to_bf16);
      DS_ASSIGN(layers_[layer][t].a,
                pack_linear(compute, base.format(), kLoraRank, k, padded.data(), false));
      padded.assign(static_cast<size_t>(n * kLoraRank), 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t r = 0; r < rank; ++r) {
          padded[static_cast<size_t>(i * kLoraRank + r)] =
              round_to_bf16(f.b[static_cast<size_t>(i * rank + r)]);
        }
      }
      DS_ASSIGN(layers_[layer][t].b,
                pack_linear(compute, base.format(), n, kLoraRank, padded.data(), false));
    }
  }
  return {};
}

std::shared_ptr<const Weights> on_host(const std::shared_ptr<const Weights>& weights) {
  const bool base_there = weights->base != nullptr && weights->base->host() != nullptr;
  const bool delta_there = weights->delta != nullptr && weights->delta->host() != nullptr;
  if (!base_there && !delta_there) return weights;
  auto out = std::make_shared<Weights>(*weights);
  if (base_there) out->base = weights->base->host();
  if (delta_there) out->delta = weights->delta->host();
  return out;
}

void LoraDelta::bind(int64_t layer, std::span<const Target> targets, int slot,
                     LoraSlots& slots) const {
  for (size_t i = 0; i < targets.size(); ++i) {
    const Pair& pair = layers_[static_cast<size_t>(layer)][targets[i]];
    slots.pair[slot][i] = {pair.a.view, pair.b.view, scale_};
  }
}

KvPages::KvPages(const ModelConfig& c, const Compute& compute, KvDtype dtype, int64_t n_pages)
    : compute_(compute),
      dtype_(dtype),
      n_layers_(c.n_layers),
      n_pages_(n_pages),
      n_kv_heads_(c.n_kv_heads),
      head_dim_(c.head_dim) {
  layer_bytes_ = static_cast<int64_t>(page_bytes(c, dtype)) / c.n_layers * n_pages;
}

Status KvPages::reserve() {
  if (storage_.bytes() > 0) return {};
  // Masked keys are read, times zero: never NaN.
  DS_ASSIGN(storage_, zeros(layer_bytes_ * n_layers_));
  return {};
}

Result<Buffer> KvPages::zeros(int64_t bytes) const {
  DS_ASSIGN(Buffer out, Buffer::make(*compute_.ops, static_cast<size_t>(bytes)));
  compute_.ops->zero(compute_.context, out.data(), bytes);
  return out;
}

size_t KvPages::page_bytes(const ModelConfig& c, KvDtype dtype) {
  const int64_t element = dtype == KvDtype::kF32 ? 4 : 2;
  return static_cast<size_t>(2 * c.n_layers * c.n_kv_heads * kKvPageTokens * c.head_dim * element);
}

KvView KvPages::layer(int64_t layer) const {
  std::byte* base = storage_.data() + layer * layer_bytes_;
  return {dtype_, n_kv_heads_, head_dim_, base, base + layer_bytes_ / 2};
}

Status KvPages::reserve_extra(int64_t bytes) {
  if (bytes <= extra_bytes_) return {};
  DS_ASSIGN(Buffer wider, zeros(n_layers_ * n_pages_ * bytes));
  for (int64_t i = 0; i < n_layers_ * n_pages_ && extra_bytes_ > 0; ++i) {
    compute_.ops->copy(compute_.context, wider.data() + i * bytes, extra_.data() + i * extra_bytes_,
                       extra_bytes_);
  }
  extra_ = std::move(wider);
  extra_bytes_ = bytes;
  return {};
}

void KvPages::clear_extra(std::span<const int32_t> pages) {
  if (extra_bytes_ == 0) return;
  for (int64_t layer = 0; layer < n_layers_; ++layer) {
    for (const int32_t page : pages)
      compute_.ops->zero(compute_.context, extra(layer) + page * extra_bytes_, extra_bytes_);
  }
}

Forward::Forward(const ModelConfig& c, const Compute& compute, int64_t max_rows)
    : config_(c),
      compute_(compute),
      max_rows_(max_rows),
      recordings_(*compute.ops, compute.context) {}

Status Forward::reserve() {
  const ModelConfig& c = config_;
  const int64_t q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  const std::pair<Buffer*, int64_t> widths[] = {{&x_, c.d_model},
                                                {&normed_, c.d_model},
                                                {&q_, q},
                                                {&k_, kv},
                                                {&v_, kv},
                                                {&attended_, q},
                                                {&activated_, c.d_ff},
                                                {&rows_, c.d_model},
                                                {&lora_t_, kMaxFusedWeights * kLoraRank}};
  for (const auto& [buffer, width] : widths)
    DS_TRY(buffer->grow(*compute_.ops, static_cast<size_t>(max_rows_ * width) * sizeof(float)));
  return {};
}

Status Forward::linear(std::initializer_list<Target> targets, const BaseWeights& base,
                       int64_t layer, const StepBatch& batch, const Input& input,
                       std::initializer_list<float*> y, Epilogue epilogue, const float* residual,
                       const Fused& fused) {
  std::array<const Linear*, kMaxFusedWeights> weights{};
  for (size_t i = 0; i < targets.size(); ++i)
    weights[i] = &base.layer(layer).linear[targets.begin()[i]];
  LinearArgs args;
  args.rows = static_cast<int64_t>(batch.ids.size());
  args.x = input.x;
  args.x_stride = weights[0]->view.k;
  args.x_prepared = input.prepared;
  if (input.norm != nullptr) {
    args.norm = input.norm->data();
    args.norm_eps = config_.norm_eps;
  }
  args.rope = fused.rope;
  args.y_prepared = fused.y_prepared;
  std::copy(y.begin(), y.end(), args.y);
  if (batch.watch != nullptr) {
    for (const Target target : targets) DS_TRY(show(batch, layer, target, args.x_stride, input.x));
  }
  LoraSlots slots;
  if (!batch.deltas.empty()) {
    slots.slot_of_row = tables_.lora_slots();
    slots.n_slots = static_cast<int>(batch.deltas.size());
    slots.t = lora_t_.as<float>();
    for (int s = 0; s < slots.n_slots; ++s) {
      batch.deltas[static_cast<size_t>(s)]->bind(layer, {targets.begin(), targets.size()}, s,
                                                 slots);
    }
    args.lora = &slots;
  }
  args.epilogue = epilogue;
  args.residual = residual;
  return run_linear(compute_, base, {weights.data(), targets.size()}, args, scratch_);
}

Status Forward::show(const StepBatch& batch, int64_t layer, Target target, int64_t k,
                     const float* x) {
  const int64_t rows = tables_.rows();
  if (!compute_.ops->host_memory) {
    shown_.resize(static_cast<size_t>(rows * k));
    compute_.ops->download(compute_.context, shown_.data(), x, rows * k * 4);
    DS_TRY(finish(compute_));
    x = shown_.data();
  }
  return (*batch.watch)(layer, target, rows, k, x);
}

Status Forward::block(const BaseWeights& base, int64_t layer, const StepBatch& batch,
                      const KvPages& pages) {
  const ModelConfig& c = config_;
  const int64_t rows = static_cast<int64_t>(batch.ids.size());
  const LayerWeights& w = base.layer(layer);
  const Ops& ops = *compute_.ops;
  float* x = x_.as<float>();

  const RopeAppendArgs rope{rows,
                            c.n_heads,
                            q_.as<float>(),
                            k_.as<float>(),
                            v_.as<float>(),
                            base.rope_cos(),
                            base.rope_sin(),
                            tables_.positions(),
                            tables_.slots(),
                            pages.layer(layer)};
  DS_ASSIGN(const Input normed, norm(base, batch, w.attention_norm));
  Fused fused;
  if (normed.norm != nullptr) fused.rope = &rope;
  DS_TRY(linear({kQ, kK, kV}, base, layer, batch, normed,
                {q_.as<float>(), k_.as<float>(), v_.as<float>()}, Epilogue::kNone, nullptr, fused));
  if (fused.rope == nullptr) ops.rope_append(compute_.context, rope);
  DS_TRY(attention_.layer(static_cast<uint32_t>(layer), q_.as<float>(), attended_.as<float>(),
                          pages.layer(layer), pages.extra(layer), pages.extra_bytes()));
  DS_TRY(
      linear({kO}, base, layer, batch, {attended_.as<float>()}, {x}, Epilogue::kResidual, x, {}));

  DS_ASSIGN(const Input to_mlp, norm(base, batch, w.mlp_norm));
  fused = {};
  if (to_mlp.prepared != nullptr) {
    DS_ASSIGN(fused.y_prepared, prepared_there(base, rows, c.d_ff, activated_prepared_));
  }
  float* activated = fused.y_prepared == nullptr ? activated_.as<float>() : nullptr;
  DS_TRY(linear({kGate, kUp}, base, layer, batch, to_mlp, {activated}, Epilogue::kSwiglu, nullptr,
                fused));
  return linear({kDown}, base, layer, batch, {activated, fused.y_prepared}, {x},
                Epilogue::kResidual, x, {});
}

/// Room for rows as prepare() gives them; null where linear() takes FP32.
Result<void*> Forward::prepared_there(const BaseWeights& base, int64_t rows, int64_t k,
                                      Buffer& to) {
  const Ops& ops = *compute_.ops;
  const int64_t bytes = base.by_quantizer() ? 0 : ops.prepared_bytes(base.format(), rows, k);
  if (bytes == 0) return nullptr;
  DS_TRY(to.grow(ops, static_cast<size_t>(bytes)));
  return static_cast<void*>(to.data());
}

Result<Forward::Input> Forward::norm(const BaseWeights& base, const StepBatch& batch,
                                     const BackendFloats& weight) {
  const Ops& ops = *compute_.ops;
  const int64_t rows = tables_.rows(), d = config_.d_model;
  if (batch.watch == nullptr && rows <= base.fused_rows(ops))
    return Input{x_.as<float>(), nullptr, &weight};
  // The CPU's ops would make both, a watch sees FP32.
  const bool fp32 = ops.host_memory || batch.watch != nullptr;
  void* prepared = nullptr;
  if (!fp32) {
    DS_ASSIGN(prepared, prepared_there(base, rows, d, scratch_.prepared));
  }
  float* normed = prepared == nullptr ? normed_.as<float>() : nullptr;
  ops.rmsnorm(compute_.context, rows, d, x_.as<float>(), weight.data(), config_.norm_eps, normed,
              nullptr, prepared);
  return Input{normed, prepared};
}

Status Forward::head(const BaseWeights& base, int64_t wanted, float* logits) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  ops.gather_rows(compute_.context, wanted, c.d_model, tables_.logit_rows(), x_.as<float>(),
                  rows_.as<float>());
  LinearArgs args;
  args.rows = wanted;
  args.x = rows_.as<float>();
  args.x_stride = c.d_model;
  if (wanted <= base.fused_rows(ops)) {
    args.norm = base.final_norm().data();
    args.norm_eps = c.norm_eps;
  } else {
    ops.rmsnorm(compute_.context, wanted, c.d_model, rows_.as<float>(), base.final_norm().data(),
                c.norm_eps, normed_.as<float>(), nullptr, nullptr);
    args.x = normed_.as<float>();
  }
  args.y[0] = logits;
  const Linear* head = &base.head();
  return run_linear(compute_, base, {&head, 1}, args, scratch_);
}

Status Forward::enqueue(const BaseWeights& base, const StepBatch& batch, const Components& with,
                        KvPages& pages, float* logits, float* hidden) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  float* x = x_.as<float>();
  DS_TRY(encoding_.forward(*with.encoder, ops, compute_.context, base,
                           {tables_.ids(), batch.ids.size()}, x));
  DS_TRY(attention_.begin(*with.attention, ops, compute_.context, c.n_heads,
                          1.0f / std::sqrt(static_cast<float>(c.head_dim)), tables_, pages.layer(0),
                          pages.n_pages()));
  DS_TRY(pages.reserve_extra(attention_.page_extra_bytes()));
  for (int64_t layer = 0; layer < c.n_layers; ++layer) DS_TRY(block(base, layer, batch, pages));
  if (hidden != nullptr) {
    ops.rmsnorm(compute_.context, tables_.rows(), c.d_model, x, base.final_norm().data(),
                c.norm_eps, hidden, nullptr, nullptr);
  }
  if (logits == nullptr) return {};
  return head(base, std::ssize(batch.logit_rows), logits);
}

StepRecordings::Key Forward::key(const BaseWeights& base, const StepBatch& batch,
                                 const Components& with, const KvPages& pages,
                                 const float* logits) const {
  StepRecordings::Key key;
  for (const int64_t size : {tables_.rows(), tables_.batch(), tables_.table_width(),
                             static_cast<int64_t>(batch.logit_rows.size())})
    key.push_back(static_cast<uint64_t>(size));
  key.push_back(with.key());
  for (const void* address :
       {tables_.address(), static_cast<const void*>(logits),
        static_cast<const void*>(scratch_.prepared.data()),
        static_cast<const void*>(scratch_.workspace.data()),
        static_cast<const void*>(activated_prepared_.data()), attention_.workspace(),
        static_cast<const void*>(pages.layer(0).k), static_cast<const void*>(pages.extra(0))})
    key.push_back(reinterpret_cast<uint64_t>(address));
  key.push_back(base.serial());
  for (const LoraDelta* delta : batch.deltas) key.push_back(delta->serial());
  return key;
}

int64_t Forward::logits_bytes(const StepBatch& batch) const {
  return std::ssize(batch.logit_rows) * config_.vocab * 4;
}

/// Where the backend writes what goes to the host: there, or in its own memory. Null stays null.
Status Forward::place_outputs(const StepBatch& batch, float*& logits, float*& hidden) {
  const Ops& ops = *compute_.ops;
  if (ops.host_memory) return {};
  if (logits != nullptr) {
    DS_TRY(out_.grow(ops, static_cast<size_t>(logits_bytes(batch))));
    logits = out_.as<float>();
  }
  if (hidden != nullptr) {
    DS_TRY(hidden_.grow(ops, static_cast<size_t>(max_rows_ * config_.d_model) * sizeof(float)));
    hidden = hidden_.as<float>();
  }
  return {};
}

Status Forward::run(const BaseWeights& base, const StepBatch& batch, KvPages& pages, float* logits,
                    float* hidden) {
  const Ops& ops = *compute_.ops;
  const int64_t rows = static_cast<int64_t>(batch.ids.size());
  DS_CHECK(rows > 0 && rows <= max_rows_);
  DS_CHECK(batch.deltas.size() <= kMaxLoraSlots);
  // Decode steps come again and again in the same sizes.
  const bool again = !ops.host_memory && batch.watch == nullptr && hidden == nullptr &&
                     batch.sequences.size() == batch.ids.size();
  DS_TRY(reserve());
  DS_TRY(pages.reserve());
  DS_TRY(tables_.set(ops, compute_.context, batch.ids, batch.sequences, batch.slot_of_row,
                     batch.logit_rows, again));
  const std::shared_ptr<const Components> held =
      batch.components == nullptr ? compute_.components->current() : nullptr;
  const Components& with = held != nullptr ? *held : *batch.components;
  if (batch.logit_rows.empty()) logits = nullptr;
  float *logits_there = logits, *hidden_there = hidden;
  DS_TRY(place_outputs(batch, logits_there, hidden_there));
  const auto enqueue_it = [&] {
    return enqueue(base, batch, with, pages, logits_there, hidden_there);
  };
  if (again) {
    DS_TRY(recordings_.run(key(base, batch, with, pages, logits_there), enqueue_it));
  } else {
    DS_TRY(enqueue_it());
  }
  if (!ops.host_memory && logits != nullptr)
    ops.download(compute_.context, logits, logits_there, logits_bytes(batch));
  if (!ops.host_memory && hidden != nullptr)
    ops.download(compute_.context, hidden, hidden_there, rows * config_.d_model * 4);
  return finish(compute_);
}

}  // namespace ds
