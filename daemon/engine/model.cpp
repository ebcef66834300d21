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
  DS_TRY(delta->fill(base.config(), base.format(), compute, factors));
  DS_TRY(finish(compute));
  if (!compute.ops->host_memory) {
    const auto host = empty();
    const WeightFormat format = base.host() != nullptr ? base.host()->format() : base.format();
    DS_TRY(host->fill(base.config(), format, {&host_ops(compute), {compute.context.parallel}},
                      factors));
    delta->host_ = host;
  }
  return std::shared_ptr<const LoraDelta>(delta);
}

Status LoraDelta::fill(const ModelConfig& config, WeightFormat format, const Compute& compute,
                       const std::vector<LayerFactors>& factors) {
  const int64_t rank = rank_;
  std::vector<float> padded;
  for (size_t layer = 0; layer < factors.size(); ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const Factors& f = factors[layer][t];
      if (f.a.empty()) continue;
      const auto [n, k] = target_shape(config, static_cast<Target>(t));
      DS_CHECK(static_cast<int64_t>(f.a.size()) == rank * k &&
               static_cast<int64_t>(f.b.size()) == n * rank);
      padded.assign(static_cast<size_t>(kLoraRank * k), 0.0f);
      std::transform(f.a.begin(), f.a.end(), padded.begin(), round_to_bf16);
      DS_ASSIGN(layers_[layer][t].a,
                pack_linear(compute, format, kLoraRank, k, padded.data(), false));
      padded.assign(static_cast<size_t>(n * kLoraRank), 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t r = 0; r < rank; ++r) {
          padded[static_cast<size_t>(i * kLoraRank + r)] =
              round_to_bf16(f.b[static_cast<size_t>(i * rank + r)]);
        }
      }
      DS_ASSIGN(layers_[layer][t].b,
                pack_linear(compute, format, n, kLoraRank, padded.data(), false));
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

LoraEntry LoraDelta::entry(int64_t layer, Target target) const {
  const Pair& pair = layers_[static_cast<size_t>(layer)][target];
  return {pair.a.view.data, pair.b.view.data, scale_};
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
  for (const int32_t page : pages)
    compute_.ops->zero(compute_.context, extra(0) + page * extra_stride(), extra_stride());
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
    if (lora_by_table_) {
      slots.table =
          lora_table_.as<LoraEntry>() + (layer * kTargets + *targets.begin()) * kMaxLoraSlots;
      slots.table_format = base.format();
    }
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
  const Input normed = norm(base, batch, w.attention_norm);
  Fused fused;
  if (normed.norm != nullptr) fused.rope = &rope;
  DS_TRY(linear({kQ, kK, kV}, base, layer, batch, normed,
                {q_.as<float>(), k_.as<float>(), v_.as<float>()}, Epilogue::kNone, nullptr, fused));
  if (fused.rope == nullptr) ops.rope_append(compute_.context, rope);
  const int64_t heads = c.n_heads * c.head_dim;
  PreparedRows out_16{.format = base.format()};
  if (attention_.gives_16_bits() && ops.rows_side_by_side && batch.watch == nullptr &&
      !base.by_quantizer() && heads % 8 == 0) {
    DS_ASSIGN(out_16.data, prepared_room(ops, base.format(), rows, heads, attended_prepared_));
  }
  DS_TRY(attention_.layer(static_cast<uint32_t>(layer), q_.as<float>(), attended_.as<float>(),
                          out_16, pages.layer(layer), pages.extra(layer), pages.extra_stride()));
  DS_TRY(linear({kO}, base, layer, batch, {attended_.as<float>(), out_16.data}, {x},
                Epilogue::kResidual, x, {}));

  const Input to_mlp = norm(base, batch, w.mlp_norm);
  fused = {};
  if (to_mlp.norm != nullptr && !base.by_quantizer()) {
    DS_ASSIGN(fused.y_prepared,
              prepared_room(ops, base.format(), rows, c.d_ff, activated_prepared_));
  }
  float* activated = fused.y_prepared == nullptr ? activated_.as<float>() : nullptr;
  DS_TRY(linear({kGate, kUp}, base, layer, batch, to_mlp, {activated}, Epilogue::kSwiglu, nullptr,
                fused));
  return linear({kDown}, base, layer, batch, {activated, fused.y_prepared}, {x},
                Epilogue::kResidual, x, {});
}

Forward::Input Forward::norm(const BaseWeights& base, const StepBatch& batch,
                             const BackendFloats& weight) {
  const Ops& ops = *compute_.ops;
  if (batch.watch == nullptr && base.fuses_phases(ops, tables_.rows()))
    return {x_.as<float>(), nullptr, &weight};
  ops.rmsnorm(compute_.context, tables_.rows(), config_.d_model, x_.as<float>(), weight.data(),
              config_.norm_eps, normed_.as<float>(), nullptr, {});
  return {normed_.as<float>()};
}

Status Forward::head(const BaseWeights& base, const StepBatch& batch, const Outputs& to) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  const int64_t wanted = std::ssize(batch.logit_rows), drawn = std::ssize(batch.draws);
  ops.gather_rows(compute_.context, wanted, c.d_model, tables_.logit_rows(), x_.as<float>(),
                  rows_.as<float>());
  LinearArgs args;
  args.rows = wanted;
  args.x = rows_.as<float>();
  args.x_stride = c.d_model;
  if (base.fuses_phases(ops, wanted)) {
    args.norm = base.final_norm().data();
    args.norm_eps = c.norm_eps;
  } else {
    ops.rmsnorm(compute_.context, wanted, c.d_model, rows_.as<float>(), base.final_norm().data(),
                c.norm_eps, normed_.as<float>(), nullptr, {});
    args.x = normed_.as<float>();
  }
  args.y[0] = to.logits;
  const Linear* head = &base.head();
  DS_TRY(run_linear(compute_, base, {&head, 1}, args, scratch_));
  if (drawn > 0) {
    ops.sample(compute_.context, {drawn, c.vocab, c.vocab, to.logits + (wanted - drawn) * c.vocab,
                                  tables_.heat(), tables_.chance(), to.tokens});
  }
  return {};
}

Status Forward::enqueue(const BaseWeights& base, const StepBatch& batch, const Components& with,
                        KvPages& pages, const Outputs& to) {
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
  if (to.hidden != nullptr) {
    ops.rmsnorm(compute_.context, tables_.rows(), c.d_model, x, base.final_norm().data(),
                c.norm_eps, to.hidden, nullptr, {});
  }
  if (to.logits == nullptr) return {};
  return head(base, batch, to);
}

StepRecordings::Key Forward::key(const BaseWeights& base, const StepBatch& batch,
                                 const Components& with, const KvPages& pages,
                                 const Outputs& to) const {
  StepRecordings::Key key;
  // The layers' places depend on the number of pages.
  for (const int64_t size :
       {tables_.rows(), tables_.batch(), tables_.table_width(), std::ssize(batch.logit_rows),
        std::ssize(batch.draws), pages.n_pages()})
    key.push_back(static_cast<uint64_t>(size));
  key.push_back(with.key());
  for (const void* address :
       {tables_.address(), static_cast<const void*>(to.logits), static_cast<const void*>(to.tokens),
        static_cast<const void*>(scratch_.prepared.data()),
        static_cast<const void*>(scratch_.workspace.data()),
        static_cast<const void*>(attended_prepared_.data()),
        static_cast<const void*>(activated_prepared_.data()), attention_.workspace(),
        encoding_.workspace(), encoding_.saved(), static_cast<const void*>(pages.layer(0).k),
        static_cast<const void*>(pages.extra(0))})
    key.push_back(reinterpret_cast<uint64_t>(address));
  key.push_back(base.serial());
  key.push_back(batch.deltas.empty() ? 0 : 1);
  // Kernels look for pairs in a table; some quantizer plugins take them by value.
  if (!base.reads_lora_table()) {
    for (const LoraDelta* delta : batch.deltas) key.push_back(delta->serial());
  }
  return key;
}

/// Brings the pairs of `deltas` to where recorded steps look for them.
Status Forward::set_lora_table(std::span<const LoraDelta* const> deltas) {
  const auto is_there = [](const LoraDelta* delta, uint64_t serial) {
    return delta->serial() == serial;
  };
  lora_by_table_ = !deltas.empty();
  if (deltas.empty() || std::ranges::equal(deltas, lora_serials_, is_there)) return {};
  const size_t bytes =
      static_cast<size_t>(config_.n_layers * kTargets * kMaxLoraSlots) * sizeof(LoraEntry);
  DS_TRY(lora_table_.grow(*compute_.ops, bytes));  // before what follows says that it is filled
  lora_serials_.clear();
  lora_entries_.assign(static_cast<size_t>(config_.n_layers * kTargets * kMaxLoraSlots), {});
  for (const LoraDelta* delta : deltas) {
    const size_t slot = lora_serials_.size();
    for (size_t i = slot; i < lora_entries_.size(); i += kMaxLoraSlots) {
      const auto weight = static_cast<int64_t>(i) / kMaxLoraSlots;
      lora_entries_[i] = delta->entry(weight / kTargets, static_cast<Target>(weight % kTargets));
    }
    lora_serials_.push_back(delta->serial());
  }
  compute_.ops->upload(compute_.context, lora_table_.data(), lora_entries_.data(),
                       static_cast<int64_t>(bytes));
  return {};
}

/// Where the backend writes what goes to the host: there, or in its own memory. Null stays null.
Result<Forward::Outputs> Forward::place_outputs(const StepBatch& batch, const Outputs& to) {
  const Ops& ops = *compute_.ops;
  Outputs there = to;
  if (batch.logit_rows.empty()) there.logits = nullptr;
  if (ops.host_memory) return there;
  if (there.logits != nullptr) {
    DS_TRY(out_.grow(ops, batch.logit_rows.size() * static_cast<size_t>(config_.vocab) * 4));
    there.logits = out_.as<float>();
  }
  if (to.hidden != nullptr) {
    DS_TRY(hidden_.grow(ops, static_cast<size_t>(max_rows_ * config_.d_model) * sizeof(float)));
    there.hidden = hidden_.as<float>();
  }
  if (to.tokens != nullptr) {
    DS_TRY(tokens_.grow(ops, static_cast<size_t>(max_rows_) * sizeof(TokenId)));
    there.tokens = tokens_.as<TokenId>();
  }
  return there;
}

void Forward::fetch_outputs(const StepBatch& batch, const Outputs& from, const Outputs& to) const {
  const Ops& ops = *compute_.ops;
  if (ops.host_memory) return;
  const int64_t drawn = std::ssize(batch.draws), whole = std::ssize(batch.logit_rows) - drawn;
  if (from.logits != nullptr && whole > 0)
    ops.download(compute_.context, to.logits, from.logits, whole * config_.vocab * 4);
  if (from.hidden != nullptr)
    ops.download(compute_.context, to.hidden, from.hidden, tables_.rows() * config_.d_model * 4);
  if (drawn > 0)
    ops.download(compute_.context, to.tokens, from.tokens,
                 drawn * static_cast<int64_t>(sizeof(TokenId)));
}

namespace {

/// Sizes that come again and again: of decode steps, and of full chunks of one long prompt.
bool comes_again(const StepBatch& batch) {
  constexpr size_t kChunks = 64;
  return batch.sequences.size() == batch.ids.size() ||
         (batch.sequences.size() == 1 && batch.ids.size() % kChunks == 0);
}

}  // namespace

Status Forward::run(const BaseWeights& base, const StepBatch& batch, KvPages& pages, float* logits,
                    float* hidden, TokenId* tokens) {
  const Ops& ops = *compute_.ops;
  const int64_t rows = static_cast<int64_t>(batch.ids.size());
  DS_CHECK(rows > 0 && rows <= max_rows_);
  DS_CHECK(batch.deltas.size() <= kMaxLoraSlots);
  DS_CHECK(batch.draws.size() <= (tokens == nullptr ? 0 : batch.logit_rows.size()));
  const bool again =
      !ops.host_memory && batch.watch == nullptr && hidden == nullptr && comes_again(batch);
  DS_TRY(reserve());
  DS_TRY(pages.reserve());
  DS_TRY(tables_.set(ops, compute_.context, batch.ids, batch.sequences, batch.slot_of_row,
                     batch.logit_rows, again, batch.draws));
  const std::shared_ptr<const Components> held =
      batch.components == nullptr ? compute_.components->current() : nullptr;
  const Components& with = held != nullptr ? *held : *batch.components;
  const Outputs to{logits, hidden, tokens};
  DS_ASSIGN(const Outputs there, place_outputs(batch, to));
  const auto enqueue_it = [&] { return enqueue(base, batch, with, pages, there); };
  lora_by_table_ = false;
  if (again) {
    // What allocates goes before what is recorded: as the step of these sizes before it planned.
    DS_TRY(pages.reserve_extra(attention_.page_extra_bytes()));
    DS_TRY(set_lora_table(batch.deltas));
    DS_TRY(recordings_.run(key(base, batch, with, pages, there), enqueue_it));
  } else {
    DS_TRY(enqueue_it());
  }
  fetch_outputs(batch, there, to);
  return finish(compute_);
}

}  // namespace ds
