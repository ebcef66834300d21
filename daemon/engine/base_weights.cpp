// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

#include "engine/calibration.h"
#include "engine/model.h"
#include "storage/seams.h"

namespace ds {

std::string_view target_path(Target target) {
  static constexpr std::string_view kPaths[kTargets] = {
      "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
      "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  return kPaths[target];
}

namespace {
constexpr const char *kEmbeddingName = "model.embed_tokens.weight", *kHeadName = "lm_head.weight";
}  // namespace

std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

std::string weight_name(int64_t layer, Target target) {
  return layer_prefix(layer) + std::string(target_path(target)) + ".weight";
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

}  // namespace

namespace {

/// How `source`, in the backend's memory, is to be packed into `out`: where that has been before,
/// or was laid out to be, else into memory of its own.
Result<PackItem> room_for(const Compute& compute, WeightFormat format, int64_t n, int64_t k,
                          const float* source, bool transposed, Linear& out) {
  const Ops& ops = *compute.ops;
  if (out.view.data == nullptr) {
    DS_ASSIGN(out.storage, Buffer::make(ops, static_cast<size_t>(ops.packed_bytes(format, n, k))));
    out.view.data = out.storage.data();
  }
  out.view = {format, n, k, out.view.data};
  return PackItem{format, transposed, n, k, source, const_cast<void*>(out.view.data)};
}

/// `source` is the host's.
Status pack_into(const Compute& compute, WeightFormat format, int64_t n, int64_t k,
                 const float* source, bool transposed, Linear& out) {
  DS_ASSIGN(const auto from, InBackend::make(*compute.ops, compute.context, source,
                                             static_cast<size_t>(n * k) * sizeof(float)));
  DS_ASSIGN(const PackItem item,
            room_for(compute, format, n, k, from.as<float>(), transposed, out));
  compute.ops->pack(compute.context, format, n, k, item.source, transposed, item.packed);
  return {};
}

/// Those of one input: their weights lie one behind the other, so that a product is one.
std::span<const Target> side_by_side(Target target) {
  static constexpr Target kAll[kTargets] = {kQ, kK, kV, kO, kGate, kUp, kDown};
  if (target <= kV) return {kAll + kQ, 3};
  if (target == kGate || target == kUp) return {kAll + kGate, 2};
  return {kAll + target, 1};
}

/// Gives some weights of a layer, which have no memory yet, places one behind the other.
Status lay_out(const Compute& compute, const ModelConfig& c, WeightFormat format,
               LayerWeights& layer, std::span<const Target> targets, Buffer& memory) {
  const Ops& ops = *compute.ops;
  const auto bytes = [&](Target t) {
    const auto [n, k] = target_shape(c, t);
    return static_cast<size_t>(ops.packed_bytes(format, n, k));
  };
  constexpr size_t kAlign = 64;
  size_t total = 0;
  for (const Target t : targets) total += bytes(t);
  for (const Target t : targets) {
    if (bytes(t) % kAlign != 0 || layer.linear[t].view.data != nullptr) return {};
  }
  DS_ASSIGN(memory, Buffer::make(ops, total));
  size_t at = 0;
  for (const Target t : targets) {
    layer.linear[t].view.data = memory.data() + at;
    at += bytes(t);
  }
  return {};
}

}  // namespace

Result<Linear> pack_linear(const Compute& compute, WeightFormat format, int64_t n, int64_t k,
                           const float* source, bool transposed) {
  Linear out;
  DS_TRY(pack_into(compute, format, n, k, source, transposed, out));
  return out;
}

uint64_t WeightForm::key() const {
  const auto own = static_cast<uint64_t>(format);
  if (quantizer == nullptr) return own;
  const uint64_t quantized = Rng::mix(own, quantizer->key());
  return calibrated_with == nullptr ? quantized : Rng::mix(quantized, calibrated_with->key());
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::load(const ModelFile& file,
                                                             const Compute& compute,
                                                             const WeightForm& form) {
  return build(file.config(), file.sha256(), compute, form, HostCopy::kKept,
               [&](const std::string& name, int64_t elements,
                   std::vector<float>& scratch) -> Result<std::span<const float>> {
                 scratch.resize(static_cast<size_t>(elements));
                 DS_TRY(file.read_f32(name, scratch));
                 return std::span<const float>(scratch);
               });
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::from_tensors(
    const ModelConfig& config, const NamedTensors& tensors, const std::string& sha256,
    const Compute& compute, const WeightForm& form, HostCopy copy) {
  return build(config, sha256, compute, form, copy,
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

/// Reads tensors one after the other into a store, over what was in it before, and into one for
/// the CPU beside it.
class BaseWeights::Builder {
 public:
  enum class Where { kHost, kBackend };  ///< what `read` gives
  /// `host` is null where no copy is wanted: always with kBackend.
  Builder(const Compute& compute, const WeightForm& form, const ReadTensor& read, Where where,
          Store& store, Store* host)
      : compute_(compute),
        on_cpu_{&host_ops(compute), {compute.context.parallel}},
        form_(form),
        read_(read),
        where_(where),
        stores_{&store, host} {}

  Status all(const ModelConfig& c) {
    for (Store* store : stores_) {
      if (store != nullptr) store->layers.resize(static_cast<size_t>(c.n_layers));
    }
    DS_TRY(packed(kEmbeddingName, c.vocab, c.d_model, [](Store& s) { return &s.embedding; }));
    const Place<Linear> head = [](Store& s) { return &s.head; };
    if (!c.tied_head) {
      DS_TRY(matrix(kHeadName, c.vocab, c.d_model, head));
    } else if (form_.quantizer != nullptr) {
      DS_TRY(matrix(kEmbeddingName, c.vocab, c.d_model, head));
    }
    DS_TRY(vector("model.norm.weight", c.d_model, [](Store& s) { return &s.final_norm; }));
    for (int64_t i = 0; i < c.n_layers; ++i) DS_TRY(layer(c, i));
    return rope(c);
  }
  /// Those that somebody has asked for.
  Status second_packs(const ModelConfig& c, const Parameters& parameters) {
    const auto again = [&](std::vector<std::unique_ptr<Linear>>& packs, bool transposed) -> Status {
      for (size_t i = 0; i < packs.size(); ++i) {
        if (packs[i] == nullptr) continue;
        const bool is_head = i + 1 == packs.size();
        const std::string head = c.tied_head ? kEmbeddingName : kHeadName;
        const float* source = parameters(is_head ? head
                                                 : weight_name(static_cast<int64_t>(i) / kTargets,
                                                               static_cast<Target>(i % kTargets)));
        const WeightView& view = packs[i]->view;
        DS_ASSIGN(to_pack_.emplace_back(),
                  room_for(compute_, view.format, view.n, view.k, source, transposed, *packs[i]));
      }
      return {};
    };
    DS_TRY(again(stores_[0]->transposed, true));
    return again(stores_[0]->in_bf16, false);
  }
  std::vector<PackItem>& to_pack() { return to_pack_; }

 private:
  /// Where in a store something goes.
  template <typename T>
  using Place = std::function<T*(Store&)>;

  Status layer(const ModelConfig& c, int64_t index) {
    const auto at = static_cast<size_t>(index);
    const std::string prefix = layer_prefix(index);
    DS_TRY(vector(prefix + "input_layernorm.weight", c.d_model,
                  [at](Store& s) { return &s.layers[at].attention_norm; }));
    DS_TRY(vector(prefix + "post_attention_layernorm.weight", c.d_model,
                  [at](Store& s) { return &s.layers[at].mlp_norm; }));
    if (form_.quantizer == nullptr) DS_TRY(lay_out_layer(c, at));
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      const auto [n, k] = target_shape(c, target);
      const std::string name = prefix + std::string(target_path(target));
      DS_TRY(matrix(name + ".weight", n, k, [at, t](Store& s) { return &s.layers[at].linear[t]; }));
      if (target <= kO ? c.attention_bias : c.mlp_bias)
        DS_TRY(
            vector(name + ".bias", n, [at, t](Store& s) { return &s.layers[at].linear[t].bias; }));
    }
    return {};
  }

  Status lay_out_layer(const ModelConfig& c, size_t at) {
    for (Store* store : stores_) {
      if (store == nullptr) continue;
      LayerWeights& layer = store->layers[at];
      DS_TRY(lay_out(compute_of(store), c, format_of(store), layer, side_by_side(kQ), layer.qkv));
      DS_TRY(lay_out(compute_of(store), c, format_of(store), layer, side_by_side(kGate),
                     layer.gate_up));
    }
    return {};
  }

  /// The same for all weights of a model: made once.
  Status rope(const ModelConfig& c) {
    if (!stores_[0]->rope_cos.empty()) return {};
    const std::vector<double> inv = inverse_frequencies(c);
    std::vector<float> cos, sin;
    for (size_t p = 0; p < static_cast<size_t>(c.context); ++p) {
      for (const double f : inv) {
        cos.push_back(static_cast<float>(std::cos(static_cast<double>(p) * f)));
        sin.push_back(static_cast<float>(std::sin(static_cast<double>(p) * f)));
      }
    }
    DS_TRY(keep(cos, [](Store& s) { return &s.rope_cos; }));
    return keep(sin, [](Store& s) { return &s.rope_sin; });
  }

  const Compute& compute_of(const Store* store) const {
    return store == stores_[0] ? compute_ : on_cpu_;
  }

  WeightFormat format_of(const Store* store) const {
    return store == stores_[0] ? form_.format : host_form(form_).format;
  }

  Status pack(int64_t n, int64_t k, const float* source, const Place<Linear>& place) {
    for (Store* store : stores_) {
      if (store == nullptr) continue;
      DS_TRY(pack_into(compute_of(store), format_of(store), n, k, source, false, *place(*store)));
    }
    return {};
  }

  Status keep(std::span<const float> source, const Place<BackendFloats>& place) {
    for (Store* store : stores_) {
      if (store == nullptr) continue;
      DS_ASSIGN(*place(*store), BackendFloats::make(compute_of(store), source));
    }
    return {};
  }

  Status packed(const std::string& name, int64_t n, int64_t k, const Place<Linear>& place) {
    DS_ASSIGN(const std::span<const float> source, read_(name, n * k, scratch_));
    if (where_ == Where::kHost) return pack(n, k, source.data(), place);
    Linear& out = *place(*stores_[0]);
    DS_ASSIGN(to_pack_.emplace_back(),
              room_for(compute_, form_.format, n, k, source.data(), false, out));
    return {};
  }

  Status matrix(const std::string& name, int64_t n, int64_t k, const Place<Linear>& place) {
    if (form_.quantizer == nullptr) return packed(name, n, k, place);
    const Quantizer& quantizer = *form_.quantizer;
    DS_ASSIGN(const std::span<const float> source, read_(name, n * k, scratch_));
    DS_ASSIGN(auto quant, quantizer.quantize(compute_.context, name, n, k, source.data()));
    for (Store* store : stores_) {
      if (store == nullptr) continue;
      const Compute& compute = compute_of(store);
      Linear& out = *place(*store);
      const bool on_gpu = !compute.ops->host_memory;
      if (!quantizer.multiplies(quant->format, on_gpu)) {
        std::vector<float> rounded(static_cast<size_t>(n * k));
        DS_TRY(quantizer.dequantize(compute_.context, *quant, rounded.data()));
        DS_TRY(pack_into(compute, format_of(store), n, k, rounded.data(), false, out));
        continue;
      }
      out.view = {form_.format, n, k, nullptr};
      if (on_gpu) {
        DS_ASSIGN(out.quant, copy_to(*compute.ops, compute.context, *quant));
      } else {  // the last of the stores
        out.quant = std::move(quant);
      }
    }
    return {};
  }

  Status vector(const std::string& name, int64_t n, const Place<BackendFloats>& place) {
    DS_ASSIGN(const std::span<const float> source, read_(name, n, scratch_));
    if (where_ == Where::kHost) return keep(source, place);
    return place(*stores_[0])->copy_from(compute_, source);
  }

  const Compute& compute_;
  const Compute on_cpu_;
  const WeightForm& form_;
  const ReadTensor& read_;
  const Where where_;
  std::array<Store*, 2> stores_;
  std::vector<float> scratch_;
  std::vector<PackItem> to_pack_;  ///< from the backend, all at once
};

std::shared_ptr<BaseWeights::Store> BaseWeights::empty_store(const ModelConfig& config) {
  auto store = std::make_shared<Store>();
  for (auto* packs : {&store->transposed, &store->in_bf16})
    packs->resize(static_cast<size_t>(config.n_layers * kTargets + 1));
  return store;
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::build(const ModelConfig& c,
                                                              const std::string& sha256,
                                                              const Compute& compute,
                                                              const WeightForm& form, HostCopy copy,
                                                              const ReadTensor& read) {
  if (c.qk_norm) return unsupported("model: Q/K norm is not built yet");
  auto base = std::make_shared<BaseWeights>();
  base->config_ = c;
  base->sha256_ = sha256;
  base->form_ = form;
  base->store_ = empty_store(c);
  if (form.calibrated_with != nullptr) {
    DS_ASSIGN(const auto plain, build(c, sha256, compute, form.format, HostCopy::kNone, read));
    DS_TRY(calibrate(*form.quantizer, *plain, compute, form.calibrated_with));
  }
  std::shared_ptr<BaseWeights> host;
  if (copy == HostCopy::kKept && !compute.ops->host_memory) {
    host = std::make_shared<BaseWeights>(*base);
    host->form_ = host_form(form);
    host->serial_ = next_serial();
    host->store_ = empty_store(c);
  }
  Store* const beside = host != nullptr ? host->store_.get() : nullptr;
  DS_TRY(Builder(compute, form, read, Builder::Where::kHost, *base->store_, beside).all(c));
  DS_TRY(finish(compute));
  base->host_ = std::move(host);
  return std::shared_ptr<const BaseWeights>(std::move(base));
}

Result<std::shared_ptr<BaseWeights>> BaseWeights::from_parameters(const ModelConfig& config,
                                                                  const Parameters& parameters,
                                                                  const Compute& compute,
                                                                  WeightFormat format) {
  auto base = std::make_shared<BaseWeights>();
  base->config_ = config;
  base->form_ = format;
  base->store_ = empty_store(config);
  DS_TRY(base->repack(compute, parameters));
  return base;
}

Status BaseWeights::repack(const Compute& compute, const Parameters& parameters) {
  const ReadTensor read = [&](const std::string& name, int64_t elements, std::vector<float>&) {
    return Result<std::span<const float>>({parameters(name), static_cast<size_t>(elements)});
  };
  Builder builder(compute, form_, read, Builder::Where::kBackend, *store_, nullptr);
  DS_TRY(builder.all(config_));
  std::vector<PackItem>& items = builder.to_pack();
  DS_TRY(builder.second_packs(config_, parameters));
  const size_t bytes = items.size() * sizeof(PackItem);
  const PackItem* list = items.data();
  if (!compute.ops->host_memory) {
    DS_TRY(store_->pack_list.grow(*compute.ops, bytes));
    compute.ops->upload(compute.context, store_->pack_list.data(), list,
                        static_cast<int64_t>(bytes));
    list = store_->pack_list.as<PackItem>();
  }
  compute.ops->pack_all(compute.context, std::ssize(items), list);
  return {};
}

std::shared_ptr<const BaseWeights> BaseWeights::with(std::shared_ptr<const Quantizer> next) const {
  const auto keeps = [&](const Linear& linear) {
    if (linear.quant == nullptr) return false;  // kept dequantized
    const Result<bool> accepted = next->accepts(*linear.quant);
    return accepted.ok() && *accepted;
  };
  if (form_.quantizer == nullptr || next == nullptr || !keeps(store_->head)) return nullptr;
  for (const LayerWeights& layer : store_->layers) {
    if (!std::all_of(layer.linear.begin(), layer.linear.end(), keeps)) return nullptr;
  }
  auto out = std::make_shared<BaseWeights>();
  out->config_ = config_;
  out->sha256_ = sha256_;
  if (host_ != nullptr && (out->host_ = host_->with(next)) == nullptr) return nullptr;
  out->form_ = {form_.format, std::move(next), form_.calibrated_with};
  out->store_ = store_;
  return out;
}

/// On a CPU FP16 would be FP32 in memory, twice as much to read for each token.
WeightForm BaseWeights::host_form(const WeightForm& form) {
  WeightForm out = form;
  out.format = backward_format(form.format);
  return out;
}

bool BaseWeights::reads_lora_table() const {
  return !by_quantizer() || (layer(0).linear[0].quant->format.fused & DS_LINEAR_TABLE) != 0;
}

bool BaseWeights::fuses_phases(const Ops& ops, int64_t rows) const {
  if (!by_quantizer()) return ops.fuses_phases;
  constexpr uint32_t kBoth = DS_LINEAR_NORM | DS_LINEAR_ROPE;
  return ops.fuses_phases && rows <= DS_LINEAR_FEW_ROWS &&
         (layer(0).linear[0].quant->format.fused & kBoth) == kBoth;
}

Result<WeightView> BaseWeights::transposed(const Compute& compute, int64_t layer,
                                           Target target) const {
  const auto turned = [](const WeightView& w) {
    return WeightView{w.format, w.k, w.n, w.data, !w.transposed};
  };
  const Linear& source = layer < 0 ? head() : this->layer(layer).linear[target];
  const WeightFormat format = backward_format(form_.format);
  if (!compute.ops->reads_transposed || source.quant != nullptr)
    return second_pack(compute, layer, target, true, format);
  if (format == form_.format) return turned(source.view);
  DS_ASSIGN(const WeightView rounded, in_bf16(compute, layer, target));
  return turned(rounded);
}

Result<WeightView> BaseWeights::in_bf16(const Compute& compute, int64_t layer,
                                        Target target) const {
  return second_pack(compute, layer, target, false, WeightFormat::kBF16);
}

Result<WeightView> BaseWeights::second_pack(const Compute& compute, int64_t layer, Target target,
                                            bool transposed, WeightFormat format) const {
  auto& packs = transposed ? store_->transposed : store_->in_bf16;
  const auto pack_of = [&](Target t) -> std::unique_ptr<Linear>& {
    return packs[layer < 0 ? packs.size() - 1 : static_cast<size_t>(layer * kTargets + t)];
  };
  std::lock_guard lock(store_->second_mutex);
  if (pack_of(target) != nullptr) return pack_of(target)->view;
  const bool alone = transposed || layer < 0;
  const auto targets = alone ? std::span<const Target>(&target, 1) : side_by_side(target);
  LayerWeights made;  // of these alone
  Buffer memory;
  if (!alone) DS_TRY(lay_out(compute, config_, format, made, targets, memory));
  for (const Target t : targets) {
    const Linear& source = layer < 0 ? head() : this->layer(layer).linear[t];
    DS_TRY(pack_again(compute, source, transposed, format, made.linear[t]));
  }
  if (memory.bytes() > 0) made.linear[targets[0]].storage = std::move(memory);
  for (const Target t : targets) pack_of(t) = std::make_unique<Linear>(std::move(made.linear[t]));
  return pack_of(target)->view;
}

/// `source` in another format or turned, where `to` has its place, or else in memory of its own.
Status BaseWeights::pack_again(const Compute& compute, const Linear& source, bool transposed,
                               WeightFormat format, Linear& to) const {
  const Ops& ops = *compute.ops;
  const int64_t n = source.view.n, k = source.view.k;
  DS_ASSIGN(const Buffer rows, Buffer::make(ops, static_cast<size_t>(n * k) * sizeof(float)));
  if (source.quant != nullptr) {
    // A format that cannot be read back is refused at load (self-test).
    DS_CHECK(form_.quantizer->dequantize(compute.context, *source.quant, rows.as<float>()).ok());
  } else {
    ops.unpack(compute.context, source.view, rows.as<float>());
  }
  DS_ASSIGN(const PackItem item, room_for(compute, format, transposed ? k : n, transposed ? n : k,
                                          rows.as<float>(), transposed, to));
  ops.pack(compute.context, format, item.n, item.k, item.source, transposed, item.packed);
  return finish(compute);  // others read it on their streams, and `rows` ends here
}

KvDtype kv_dtype(const Ops& ops, WeightFormat format) {
  if (is_f32(format)) return KvDtype::kF32;
  if (format == WeightFormat::kBF16) return KvDtype::kBF16;
  return ops.host_memory ? KvDtype::kF32 : KvDtype::kF16;
}

Result<void*> prepared_room(const Ops& ops, WeightFormat format, int64_t rows, int64_t k,
                            Buffer& to) {
  const int64_t bytes = ops.prepared_bytes(format, rows, k);
  if (bytes == 0) return nullptr;
  DS_TRY(to.grow(ops, static_cast<size_t>(bytes)));
  return static_cast<void*>(to.data());
}

Status run_linear(const Compute& compute, const BaseWeights& base,
                  std::span<const Linear* const> weights, LinearArgs& args,
                  LinearScratch& scratch) {
  args.n_weights = static_cast<int>(weights.size());
  std::array<const QuantWeight*, kMaxFusedWeights> quant{};
  for (size_t i = 0; i < weights.size(); ++i) {
    const Linear& w = *weights[i];
    args.w[i] = w.view;
    args.bias[i] = w.bias.data();
    args.y_stride[i] = w.view.n;
    quant[i] = w.quant.get();
  }
  if (quant[0] != nullptr) {
    return base.form().quantizer->linear(*compute.ops, compute.context,
                                         {quant.data(), weights.size()}, args, scratch);
  }
  const int64_t k = args.w[0].k;
  // A backend that fuses phases need not be helped with an input that no other call reads.
  if (args.x_prepared == nullptr && !compute.ops->fuses_phases) {
    DS_ASSIGN(void* const room,
              prepared_room(*compute.ops, base.format(), args.rows, k, scratch.prepared));
    if (room != nullptr)
      compute.ops->prepare(compute.context, args.rows, k, args.x, args.x_stride,
                           {room, base.format()});
    args.x_prepared = room;
  }
  compute.ops->linear(compute.context, args);
  return {};
}

}  // namespace ds
