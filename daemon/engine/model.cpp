// SPDX-License-Identifier: Apache-2.0
#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "engine/bf16.h"

namespace ds {

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  constexpr size_t kAlign = 64;
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign;
  auto* p = static_cast<std::byte*>(std::aligned_alloc(kAlign, rounded));
  DS_CHECK(p != nullptr);  // host out of memory: die, restart from the checkpoint
  data_.reset(p);
}

void Buffer::Free::operator()(std::byte* p) const { std::free(p); }

std::string_view target_path(Target target) {
  static constexpr std::string_view kPaths[kTargets] = {
      "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
      "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  return kPaths[target];
}

std::pair<int64_t, int64_t> target_shape(const ModelConfig& c, Target target) {
  const int64_t q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  switch (target) {
    case kQ:
      return {q, c.d_model};
    case kK:
    case kV:
      return {kv, c.d_model};
    case kO:
      return {c.d_model, q};
    case kGate:
    case kUp:
      return {c.d_ff, c.d_model};
    case kDown:
      return {c.d_model, c.d_ff};
    default:
      break;
  }
  DS_CHECK(!"target");
}

namespace {

/// Inverse frequencies of RoPE with the config's scaling; llama3 as in transformers'
/// modeling_rope_utils (wavelengths between the two bounds are interpolated).
std::vector<double> inverse_frequencies(const ModelConfig& c) {
  std::vector<double> inv(static_cast<size_t>(c.head_dim / 2));
  constexpr double kTwoPi = 6.283185307179586;
  for (size_t i = 0; i < inv.size(); ++i) {
    double f =
        std::pow(c.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(c.head_dim));
    if (c.rope_scaling == RopeScaling::kLinear) {
      f /= c.rope_factor;
    } else if (c.rope_scaling == RopeScaling::kLlama3) {
      const double original = static_cast<double>(c.rope_original_context);
      const double wavelength = kTwoPi / f;
      if (wavelength > original / c.rope_low_freq_factor) {
        f /= c.rope_factor;
      } else if (wavelength >= original / c.rope_high_freq_factor) {
        const double smooth = (original / wavelength - c.rope_low_freq_factor) /
                              (c.rope_high_freq_factor - c.rope_low_freq_factor);
        f = (1.0 - smooth) * f / c.rope_factor + smooth * f;
      }
    }
    inv[i] = f;
  }
  return inv;
}

Linear pack_linear(const Compute& compute, WeightFormat format, int64_t n, int64_t k,
                   const float* source, bool transposed) {
  Linear out;
  out.storage = Buffer(static_cast<size_t>(compute.ops->packed_bytes(format, n, k)));
  compute.ops->pack(compute.context, format, n, k, source, transposed, out.storage.data());
  out.view = {format, n, k, out.storage.data()};
  return out;
}

std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

}  // namespace

Result<std::shared_ptr<const BaseWeights>> BaseWeights::load(const ModelFile& file,
                                                             const Compute& compute,
                                                             WeightFormat format) {
  return build(file.config(), file.sha256(), compute, format,
               [&](const std::string& name, int64_t elements,
                   std::vector<float>& scratch) -> Result<std::span<const float>> {
                 scratch.resize(static_cast<size_t>(elements));
                 DS_TRY(file.read_f32(name, scratch));
                 return std::span<const float>(scratch);
               });
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::from_tensors(const ModelConfig& config,
                                                                     const NamedTensors& tensors,
                                                                     const std::string& sha256,
                                                                     const Compute& compute,
                                                                     WeightFormat format) {
  return build(config, sha256, compute, format,
               [&](const std::string& name, int64_t elements,
                   std::vector<float>&) -> Result<std::span<const float>> {
                 const auto it = tensors.find(name);
                 if (it == tensors.end()) return not_found(name + ": tensor missing");
                 if (static_cast<int64_t>(it->second.size()) != elements) {
                   return invalid(name + ": " + std::to_string(it->second.size()) +
                                  " elements, the model wants " + std::to_string(elements));
                 }
                 return std::span<const float>(it->second);
               });
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::build(const ModelConfig& c,
                                                              const std::string& sha256,
                                                              const Compute& compute,
                                                              WeightFormat format,
                                                              const ReadTensor& read) {
  if (c.qk_norm) return unsupported("model: Q/K norm is not built yet");
  auto base = std::make_shared<BaseWeights>();
  base->config_ = c;
  base->sha256_ = sha256;
  base->format_ = format;
  std::vector<float> scratch;
  const auto matrix = [&](const std::string& name, int64_t n, int64_t k, Linear& out) -> Status {
    DS_ASSIGN(const std::span<const float> source, read(name, n * k, scratch));
    out = pack_linear(compute, format, n, k, source.data(), false);
    return {};
  };
  const auto vector = [&](const std::string& name, int64_t n, std::vector<float>& out) -> Status {
    DS_ASSIGN(const std::span<const float> source, read(name, n, scratch));
    out.assign(source.begin(), source.end());
    return {};
  };
  DS_TRY(matrix("model.embed_tokens.weight", c.vocab, c.d_model, base->embedding_));
  if (!c.tied_head) DS_TRY(matrix("lm_head.weight", c.vocab, c.d_model, base->head_));
  DS_TRY(vector("model.norm.weight", c.d_model, base->final_norm_));
  base->layers_.resize(static_cast<size_t>(c.n_layers));
  for (int64_t i = 0; i < c.n_layers; ++i) {
    LayerWeights& layer = base->layers_[static_cast<size_t>(i)];
    const std::string prefix = layer_prefix(i);
    DS_TRY(vector(prefix + "input_layernorm.weight", c.d_model, layer.attention_norm));
    DS_TRY(vector(prefix + "post_attention_layernorm.weight", c.d_model, layer.mlp_norm));
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      const auto [n, k] = target_shape(c, target);
      const std::string name = prefix + std::string(target_path(target));
      DS_TRY(matrix(name + ".weight", n, k, layer.linear[t]));
      if (target <= kO ? c.attention_bias : c.mlp_bias) {
        DS_TRY(vector(name + ".bias", n, layer.linear[t].bias));
      }
    }
  }
  const std::vector<double> inv = inverse_frequencies(c);
  base->rope_cos_.resize(static_cast<size_t>(c.context) * inv.size());
  base->rope_sin_.resize(base->rope_cos_.size());
  for (size_t p = 0, i = 0; p < static_cast<size_t>(c.context); ++p) {
    for (const double f : inv) {
      base->rope_cos_[i] = static_cast<float>(std::cos(static_cast<double>(p) * f));
      base->rope_sin_[i++] = static_cast<float>(std::sin(static_cast<double>(p) * f));
    }
  }
  base->transposed_.resize(static_cast<size_t>(c.n_layers * kTargets + 1));
  return std::shared_ptr<const BaseWeights>(std::move(base));
}

const Linear& BaseWeights::transposed(const Compute& compute, int64_t layer, Target target) const {
  const size_t index =
      layer < 0 ? transposed_.size() - 1 : static_cast<size_t>(layer * kTargets + target);
  std::lock_guard lock(transposed_mutex_);
  if (!transposed_[index]) {
    const Linear& source = layer < 0 ? head() : layers_[static_cast<size_t>(layer)].linear[target];
    const auto [format, n, k, data] = source.view;
    Buffer rows(static_cast<size_t>(n * k) * sizeof(float));
    compute.ops->unpack(compute.context, source.view, rows.as<float>());
    transposed_[index] =
        std::make_unique<Linear>(pack_linear(compute, format, k, n, rows.as<float>(), true));
  }
  return *transposed_[index];
}

std::shared_ptr<const LoraDelta> LoraDelta::pack(const BaseWeights& base, const Compute& compute,
                                                 int64_t rank, float scale,
                                                 const std::vector<LayerFactors>& factors) {
  DS_CHECK(rank > 0 && rank <= kLoraRank);
  auto delta = std::make_shared<LoraDelta>();
  delta->rank_ = rank;
  delta->scale_ = scale;
  delta->layers_.resize(factors.size());
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
      delta->layers_[layer][t].a =
          pack_linear(compute, base.format(), kLoraRank, k, padded.data(), false);
      padded.assign(static_cast<size_t>(n * kLoraRank), 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t r = 0; r < rank; ++r) {
          padded[static_cast<size_t>(i * kLoraRank + r)] =
              round_to_bf16(f.b[static_cast<size_t>(i * rank + r)]);
        }
      }
      delta->layers_[layer][t].b =
          pack_linear(compute, base.format(), n, kLoraRank, padded.data(), false);
    }
  }
  return delta;
}

void LoraDelta::bind(int64_t layer, std::span<const Target> targets, int slot,
                     LoraSlots& slots) const {
  for (size_t i = 0; i < targets.size(); ++i) {
    const Pair& pair = layers_[static_cast<size_t>(layer)][targets[i]];
    slots.pair[slot][i] = {pair.a.view, pair.b.view, scale_};
  }
}

KvPages::KvPages(const ModelConfig& c, KvDtype dtype, int64_t n_pages)
    : dtype_(dtype), n_pages_(n_pages), n_kv_heads_(c.n_kv_heads), head_dim_(c.head_dim) {
  layer_bytes_ = static_cast<int64_t>(page_bytes(c, dtype)) / c.n_layers * n_pages;
  storage_ = Buffer(static_cast<size_t>(layer_bytes_ * c.n_layers));
  std::memset(storage_.data(), 0, storage_.bytes());  // masked keys are read, times zero: never NaN
}

size_t KvPages::page_bytes(const ModelConfig& c, KvDtype dtype) {
  const int64_t element = dtype == KvDtype::kF32 ? 4 : 2;
  return static_cast<size_t>(2 * c.n_layers * c.n_kv_heads * kKvPageTokens * c.head_dim * element);
}

KvView KvPages::layer(int64_t layer) const {
  std::byte* base = storage_.data() + layer * layer_bytes_;
  return {dtype_, n_kv_heads_, head_dim_, base, base + layer_bytes_ / 2};
}

Forward::Forward(const ModelConfig& c, const Compute& compute, int64_t max_rows)
    : config_(c), compute_(compute), max_rows_(max_rows) {
  const int64_t q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  const auto floats = [&](int64_t width) {
    return Buffer(static_cast<size_t>(max_rows * width) * sizeof(float));
  };
  x_ = floats(c.d_model);
  normed_ = floats(c.d_model);
  q_ = floats(q);
  k_ = floats(kv);
  v_ = floats(kv);
  attended_ = floats(q);
  activated_ = floats(c.d_ff);
  rows_ = floats(c.d_model);
  lora_t_ = floats(kMaxFusedWeights * kLoraRank);
  int64_t prepared = 0;
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16}) {
    for (const int64_t width : {c.d_model, q, c.d_ff}) {
      prepared = std::max(prepared, compute.ops->prepared_bytes(format, max_rows, width));
    }
  }
  prepared_ = Buffer(static_cast<size_t>(prepared));
}

void Forward::linear(std::initializer_list<Target> targets, const BaseWeights& base, int64_t layer,
                     const StepBatch& batch, const float* x, std::initializer_list<float*> y,
                     Epilogue epilogue, const float* residual) {
  LinearArgs args;
  args.rows = static_cast<int64_t>(batch.ids.size());
  args.x = x;
  args.n_weights = static_cast<int>(targets.size());
  for (int i = 0; i < args.n_weights; ++i) {
    const Linear& w = base.layer(layer).linear[targets.begin()[i]];
    args.w[i] = w.view;
    args.bias[i] = w.bias.empty() ? nullptr : w.bias.data();
    if (i < static_cast<int>(y.size())) {
      args.y[i] = y.begin()[i];
      args.y_stride[i] = w.view.n;
    }
  }
  const int64_t k = args.w[0].k;
  args.x_stride = k;
  if (compute_.ops->prepared_bytes(base.format(), args.rows, k) > 0) {
    compute_.ops->prepare(compute_.context, base.format(), args.rows, k, x, k, prepared_.data());
    args.x_prepared = prepared_.data();
  }
  LoraSlots slots;
  if (!batch.deltas.empty()) {
    slots.slot_of_row = batch.slot_of_row.data();
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
  compute_.ops->linear(compute_.context, args);
}

Status Forward::block(const BaseWeights& base, int64_t layer, const StepBatch& batch,
                      const KvPages& pages) {
  const ModelConfig& c = config_;
  const int64_t rows = static_cast<int64_t>(batch.ids.size());
  const LayerWeights& w = base.layer(layer);
  const Ops& ops = *compute_.ops;
  float* x = x_.as<float>();
  float* normed = normed_.as<float>();

  ops.rmsnorm(compute_.context, rows, c.d_model, x, w.attention_norm.data(), c.norm_eps, normed,
              nullptr);
  linear({kQ, kK, kV}, base, layer, batch, normed, {q_.as<float>(), k_.as<float>(), v_.as<float>()},
         Epilogue::kNone, nullptr);
  RopeAppendArgs rope{rows,
                      c.n_heads,
                      q_.as<float>(),
                      k_.as<float>(),
                      v_.as<float>(),
                      base.rope_cos(),
                      base.rope_sin(),
                      batch.sequences.data(),
                      static_cast<int64_t>(batch.sequences.size()),
                      pages.layer(layer)};
  ops.rope_append(compute_.context, rope);
  DS_TRY(attention_.layer(static_cast<uint32_t>(layer), q_.as<float>(), attended_.as<float>(),
                          pages.layer(layer)));
  linear({kO}, base, layer, batch, attended_.as<float>(), {x}, Epilogue::kResidual, x);

  ops.rmsnorm(compute_.context, rows, c.d_model, x, w.mlp_norm.data(), c.norm_eps, normed, nullptr);
  linear({kGate, kUp}, base, layer, batch, normed, {activated_.as<float>()}, Epilogue::kSwiglu,
         nullptr);
  linear({kDown}, base, layer, batch, activated_.as<float>(), {x}, Epilogue::kResidual, x);
  return {};
}

Status Forward::run(const BaseWeights& base, const StepBatch& batch, const KvPages& pages,
                    float* logits, float* hidden) {
  const ModelConfig& c = config_;
  const Ops& ops = *compute_.ops;
  const int64_t rows = static_cast<int64_t>(batch.ids.size());
  DS_CHECK(rows > 0 && rows <= max_rows_);
  DS_CHECK(batch.deltas.size() <= kMaxLoraSlots);
  float* x = x_.as<float>();
  ops.embed(compute_.context, base.embedding().view, rows, batch.ids.data(), x);
  const std::shared_ptr<const Attention> held =
      batch.attention == nullptr ? compute_.attention->current() : nullptr;
  DS_TRY(attention_.begin(held != nullptr ? *held : *batch.attention, compute_.context, c.n_heads,
                          1.0f / std::sqrt(static_cast<float>(c.head_dim)), batch.sequences, rows,
                          pages.layer(0), pages.n_pages()));
  for (int64_t layer = 0; layer < c.n_layers; ++layer) DS_TRY(block(base, layer, batch, pages));
  if (hidden != nullptr) {
    ops.rmsnorm(compute_.context, rows, c.d_model, x, base.final_norm().data(), c.norm_eps, hidden,
                nullptr);
  }
  const int64_t wanted = static_cast<int64_t>(batch.logit_rows.size());
  if (logits == nullptr || wanted == 0) return {};
  float* picked = rows_.as<float>();
  for (int64_t i = 0; i < wanted; ++i) {
    std::memcpy(picked + i * c.d_model, x + batch.logit_rows[static_cast<size_t>(i)] * c.d_model,
                static_cast<size_t>(c.d_model) * sizeof(float));
  }
  float* normed = normed_.as<float>();
  ops.rmsnorm(compute_.context, wanted, c.d_model, picked, base.final_norm().data(), c.norm_eps,
              normed, nullptr);
  LinearArgs args;
  args.rows = wanted;
  args.x = normed;
  args.x_stride = c.d_model;
  args.n_weights = 1;
  args.w[0] = base.head().view;
  args.y[0] = logits;
  args.y_stride[0] = c.vocab;
  if (ops.prepared_bytes(base.format(), wanted, c.d_model) > 0) {
    ops.prepare(compute_.context, base.format(), wanted, c.d_model, normed, c.d_model,
                prepared_.data());
    args.x_prepared = prepared_.data();
  }
  ops.linear(compute_.context, args);
  return {};
}

}  // namespace ds
