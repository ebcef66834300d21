// SPDX-License-Identifier: Apache-2.0
// A Llama-family decoder over Ops: immutable base weights, low-rank deltas beside them, and the
// serving forward pass over a paged KV cache. (Training passes: engine/train_graph.h.)
//
// Lifetime: a published BaseWeights or LoraDelta is never written again; whoever decodes with it
// holds a shared_ptr. New weights are new objects.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "ds/status.h"
#include "engine/components.h"
#include "engine/device_state.h"
#include "engine/operand_formats.h"
#include "engine/quantizer.h"
#include "engine/step_recordings.h"
#include "engine/step_tables.h"
#include "engine/tokenizer.h"
#include "kernels/buffer.h"
#include "kernels/ops.h"
#include "storage/model_file.h"

namespace ds {

/// A backend with the pool or stream to run on, and the plugins of the passes. Copied freely;
/// pool and slot outlive all copies.
struct Compute {
  const Ops* ops = nullptr;
  OpContext context;
  const ComponentsSlot* components = nullptr;  ///< null where no pass runs: packing, task models
  DeviceState* device = nullptr;               ///< is told when finish() fails; null: nobody is
};

/// Waits for what `compute` has enqueued. kDeviceLost once its device has failed: what was computed
/// since the last call is undefined, and every later call fails. On the CPU there is nothing to
/// wait for.
Status finish(const Compute& compute);

/// The CPU's, in whose place a GPU may compute.
const Ops& host_ops(const Compute& compute);

/// HF module path inside a layer: "self_attn.q_proj", ..., "mlp.down_proj".
std::string_view target_path(Target target);
/// "model.layers.3.".
std::string layer_prefix(int64_t layer);
/// "model.layers.3.mlp.up_proj.weight".
std::string weight_name(int64_t layer, Target target);
/// {n (out), k (in)} of a target's weight.
std::pair<int64_t, int64_t> target_shape(const ModelConfig& config, Target target);

/// FP32 numbers in the memory of the model's backend.
class BackendFloats {
 public:
  BackendFloats() = default;
  static Result<BackendFloats> make(const Compute& compute,
                                    std::span<const float> from);         ///< the host's
  Status copy_from(const Compute& compute, std::span<const float> from);  ///< the backend's
  const float* data() const { return storage_.as<float>(); }
  bool empty() const { return storage_.bytes() == 0; }

 private:
  Buffer storage_;
};

/// A weight with its memory and optional bias: packed, or in the format of the base's quantizer.
struct Linear {
  WeightView view;  ///< data is null when quantized
  Buffer storage;
  std::unique_ptr<QuantWeight> quant;
  BackendFloats bias;  ///< empty or [n]
  bool present() const { return view.data != nullptr || quant != nullptr; }
};

/// What a base's weights are kept in: packed panels, of which factors, transposed weights and the
/// embedding are always, or the format of a quantizer plugin.
struct WeightForm {
  WeightForm() = default;
  WeightForm(WeightFormat f, std::shared_ptr<const Quantizer> q = nullptr,
             std::shared_ptr<const Components> with = nullptr)
      : format(f), quantizer(std::move(q)), calibrated_with(std::move(with)) {}
  WeightFormat format = WeightFormat::kBF16;
  std::shared_ptr<const Quantizer> quantizer;
  /// What computes the inputs that the quantizer sees before it quantizes; null: it sees none.
  std::shared_ptr<const Components> calibrated_with;
  uint64_t key() const;  ///< part of the key of KV pages; equal forms of one base give equal bits
};

/// `source` is the host's.
Result<Linear> pack_linear(const Compute& compute, WeightFormat format, int64_t n, int64_t k,
                           const float* source, bool transposed);

/// Whether weights in a GPU's memory have a copy of themselves for the CPU beside them.
enum class HostCopy { kKept, kNone };

struct LayerWeights {
  std::array<Linear, kTargets> linear;
  /// Memory of packs that lie side by side: q, k and v, and gate and up, so that a backend can
  /// multiply by several as by one.
  Buffer qkv, gate_up;
  BackendFloats attention_norm, mlp_norm;  ///< [d_model]
};

/// Base weights of one model in one weight format.
class BaseWeights {
 public:
  static Result<std::shared_ptr<const BaseWeights>> load(const ModelFile& file,
                                                         const Compute& compute,
                                                         const WeightForm& form);
  /// From FP32 tensors by HF name (full fine-tuning, tests). `sha256` identifies them.
  static Result<std::shared_ptr<const BaseWeights>> from_tensors(
      const ModelConfig& config, const NamedTensors& tensors, const std::string& sha256,
      const Compute& compute, const WeightForm& form, HostCopy copy = HostCopy::kKept);
  /// From FP32 tensors in the memory of the backend, by HF name: those of full fine-tuning. They
  /// are plainly packed, and no copy for the CPU stands beside them.
  using Parameters = std::function<const float*(const std::string& name)>;
  static Result<std::shared_ptr<BaseWeights>> from_parameters(const ModelConfig& config,
                                                              const Parameters& parameters,
                                                              const Compute& compute,
                                                              WeightFormat format);
  /// Takes over what they are now, in place, so that recordings read the new ones: nobody else may
  /// hold this object. After a failure it has to be done again.
  Status repack(const Compute& compute, const Parameters& parameters);
  /// The same tensors by another generation of their quantizer; null when it keeps them in another
  /// format.
  std::shared_ptr<const BaseWeights> with(std::shared_ptr<const Quantizer> next) const;

  const ModelConfig& config() const { return config_; }
  const std::string& sha256() const { return sha256_; }
  uint64_t serial() const { return serial_; }  ///< of this object, never another's
  const WeightForm& form() const { return form_; }
  WeightFormat format() const { return form_.format; }
  const LayerWeights& layer(int64_t i) const { return store_->layers[static_cast<size_t>(i)]; }
  const Linear& embedding() const { return store_->embedding; }
  /// A tied head is the embedding itself unless it is quantized: lookups stay exact.
  const Linear& head() const { return store_->head.present() ? store_->head : store_->embedding; }
  const BackendFloats& final_norm() const { return store_->final_norm; }
  /// The same weights for the CPU; null where they are for it themselves, or have no copy.
  const std::shared_ptr<const BaseWeights>& host() const { return host_; }
  /// Whether the layers' products are the quantizer's, which takes FP32 inputs.
  bool by_quantizer() const { return layer(0).linear[0].quant != nullptr; }
  /// Whether a recorded product finds its low-rank parts in LoraSlots::table when it runs.
  bool reads_lora_table() const;
  /// Ops::fuses_phases of these weights' products.
  bool fuses_phases(const Ops& ops, int64_t rows) const;
  const float* rope_cos() const { return store_->rope_cos.data(); }  ///< [context, head_dim / 2]
  const float* rope_sin() const { return store_->rope_sin.data(); }

  /// W^T for the backward pass, in its format: the weight itself where the backend can read it so,
  /// else a pack that is built at the first call and kept for life. `layer` -1 is the head. Of
  /// weights of one input that lie one behind the other, these do so, too.
  Result<WeightView> transposed(const Compute& compute, int64_t layer, Target target) const;
  /// W in BF16, for what falls back from FP16; built and kept likewise.
  Result<WeightView> in_bf16(const Compute& compute, int64_t layer, Target target) const;

 private:
  /// The tensor's elements: its own memory, or `scratch` filled with them; the host's or, from
  /// parameters, the backend's.
  using ReadTensor = std::function<Result<std::span<const float>>(
      const std::string& name, int64_t elements, std::vector<float>& scratch)>;
  static Result<std::shared_ptr<const BaseWeights>> build(const ModelConfig&,
                                                          const std::string& sha256, const Compute&,
                                                          const WeightForm&, HostCopy,
                                                          const ReadTensor&);
  struct Store {
    std::vector<LayerWeights> layers;
    Linear embedding, head;
    BackendFloats final_norm, rope_cos, rope_sin;
    Buffer pack_list;  ///< of repack()
    std::mutex second_mutex;
    /// [layers * kTargets + 1], the head's last; null: nobody has asked for it.
    std::vector<std::unique_ptr<Linear>> transposed, in_bf16;
  };
  class Builder;
  static std::shared_ptr<Store> empty_store(const ModelConfig& config);
  static WeightForm host_form(const WeightForm& form);
  Result<WeightView> second_pack(const Compute& compute, int64_t layer, Target target,
                                 bool transposed, WeightFormat format) const;
  Status pack_again(const Compute& compute, const Linear& source, bool transposed,
                    WeightFormat format, Linear& to) const;
  ModelConfig config_;
  std::string sha256_;
  uint64_t serial_ = next_serial();
  WeightForm form_;
  std::shared_ptr<Store> store_;  ///< read only, but for the second packs
  std::shared_ptr<const BaseWeights> host_;
};

/// The dtype of the pages that such weights are served with.
KvDtype kv_dtype(const Ops& ops, WeightFormat format);

/// Room for rows as prepare() gives them in `to`; null where linear layers take FP32.
Result<void*> prepared_room(const Ops& ops, WeightFormat format, int64_t rows, int64_t k,
                            Buffer& to);

/// args on the given weights, whose places in it this fills: by Ops, or by the base's quantizer.
/// Fails only as a plugin does. A shared input that was prepared for Ops may be in args.x_prepared.
Status run_linear(const Compute& compute, const BaseWeights& base,
                  std::span<const Linear* const> weights, LinearArgs& args, LinearScratch& scratch);

/// Low-rank factors of one version, packed for serving. FP32 A [rank, k] and B [n, rank] in HF
/// layout come from training or from delta.safetensors.
class LoraDelta {
 public:
  struct Factors {
    std::vector<float> a, b;  ///< [rank, k], [n, rank]; both empty = target not adapted
  };
  using LayerFactors = std::array<Factors, kTargets>;

  /// BF16-rounds (in every format: what serves is what is stored) and packs, for a GPU and for the
  /// CPU too. `scale` = alpha / rank.
  static Result<std::shared_ptr<const LoraDelta>> pack(const BaseWeights& base,
                                                       const Compute& compute, int64_t rank,
                                                       float scale,
                                                       const std::vector<LayerFactors>& factors);
  /// Points `slots.pair[slot][...]` at the factors of the `n` given targets of one layer.
  void bind(int64_t layer, std::span<const Target> targets, int slot, LoraSlots& slots) const;
  /// The same of one target, as a table of slots has it.
  LoraEntry entry(int64_t layer, Target target) const;
  int64_t rank() const { return rank_; }
  float scale() const { return scale_; }
  uint64_t serial() const { return serial_; }  ///< of this object, never another's
  /// The same for the CPU; null where this is for it.
  const std::shared_ptr<const LoraDelta>& host() const { return host_; }

 private:
  struct Pair {
    Linear a, b;
  };
  Status fill(const ModelConfig& config, WeightFormat format, const Compute& compute,
              const std::vector<LayerFactors>& factors);
  uint64_t serial_ = next_serial();
  int64_t rank_ = 0;
  float scale_ = 0;
  std::vector<std::array<Pair, kTargets>> layers_;
  std::shared_ptr<const LoraDelta> host_;
};

class Mlp;  // engine/mlp.h

/// What a sequence decodes with. Immutable.
struct Weights {
  std::string version;        ///< "v3"
  std::string fingerprint;    ///< "ds-v3-9f3c2a1b"
  std::string weight_hash;    ///< hex
  uint64_t execution_id = 0;  ///< part of the key of KV pages: version and weight format
  std::shared_ptr<const BaseWeights> base;
  std::shared_ptr<const LoraDelta> delta;  ///< null for a base
  std::shared_ptr<const Mlp> mlp;  ///< a task model's whole weights; then base and delta are null
};

/// The same version for the CPU: the copies of base and delta that a GPU's have beside them.
std::shared_ptr<const Weights> on_host(const std::shared_ptr<const Weights>& weights);

/// Key and value pages of all layers. One allocation; page ids are the caller's to hand out.
class KvPages {
 public:
  KvPages(const ModelConfig& config, const Compute& compute, KvDtype dtype, int64_t n_pages);
  /// Takes their memory; the first pass over them does it if nobody has.
  Status reserve();
  KvView layer(int64_t layer) const;
  /// Room beside each page of each layer for what an attention plugin keeps there, at least
  /// `bytes`; what is in it stays. Zero at first, and after clear_extra().
  Status reserve_extra(int64_t bytes);
  void clear_extra(std::span<const int32_t> pages);
  /// Of a layer beside page 0; the layers of a page are together, so that it is cleared in one go.
  std::byte* extra(int64_t layer) const { return extra_.data() + layer * extra_bytes_; }
  int64_t extra_stride() const { return n_layers_ * extra_bytes_; }  ///< bytes from page to page
  int64_t n_pages() const { return n_pages_; }
  KvDtype dtype() const { return dtype_; }
  size_t bytes() const { return storage_.bytes(); }
  static size_t page_bytes(const ModelConfig& config, KvDtype dtype);  ///< K and V, all layers

 private:
  Result<Buffer> zeros(int64_t bytes) const;

  Compute compute_;
  KvDtype dtype_;
  int64_t n_layers_ = 0, n_pages_ = 0, n_kv_heads_ = 0, head_dim_ = 0, layer_bytes_ = 0;
  int64_t extra_bytes_ = 0;
  Buffer storage_, extra_;
};

/// Sees the input x [rows, k] of a layer's weight before it is multiplied; what it returns ends the
/// step unless it is OK.
using LinearWatch =
    std::function<Status(int64_t layer, Target, int64_t rows, int64_t k, const float* x)>;

/// One step over a mixed batch: rows of several sequences, prefill chunks and single tokens alike.
/// All sequences share `base`; each row's slot picks its delta.
struct StepBatch {
  std::span<const TokenId> ids;              ///< [rows]
  std::span<const SequenceSpan> sequences;   ///< rows and pages
  std::span<const int32_t> slot_of_row;      ///< [rows] into deltas, -1 = base
  std::span<const LoraDelta* const> deltas;  ///< at most kMaxLoraSlots
  std::span<const int32_t> logit_rows;       ///< rows whose logits are wanted
  std::span<const Draw> draws;  ///< of the last of logit_rows: a token each is wanted, no logits
  const Components* components = nullptr;  ///< null: what the slot of Compute has now
  const LinearWatch* watch = nullptr;      ///< null: nobody
};

/// The forward pass with its planned workspace. Not thread-safe; one per thread that runs it.
class Forward {
 public:
  /// `max_rows` bounds rows per step.
  Forward(const ModelConfig& config, const Compute& compute, int64_t max_rows);
  /// Takes the workspace's memory; the first run() does it if nobody has.
  Status reserve();
  /// Gives back what can be made again: for whoever is short of memory.
  void forget_recordings() { recordings_.clear(); }

  /// Appends K/V of all rows to their pages and computes logits of the wanted rows.
  /// logits: FP32 [logit_rows.size(), vocab] of the host, null to skip the head. Those of rows with
  /// a draw are undefined.
  /// hidden: FP32 [rows, d_model] of the host, after the final norm, or null.
  /// tokens: [draws.size()] of the host, as Ops::sample gives them.
  /// Fails as a plugin or a GPU does; then the pages' new rows and the outputs are undefined. After
  /// kResource the same rows may be run again, or fewer of them.
  Status run(const BaseWeights& base, const StepBatch& batch, KvPages& pages, float* logits,
             float* hidden, TokenId* tokens = nullptr);
  int64_t max_rows() const { return max_rows_; }

 private:
  /// Where results go: to the host, or what will be copied there. Each may be null.
  struct Outputs {
    float *logits = nullptr, *hidden = nullptr;
    TokenId* tokens = nullptr;
  };
  /// Everything from the ids to what `to` has in the backend's memory.
  Status enqueue(const BaseWeights& base, const StepBatch& batch, const Components& with,
                 KvPages& pages, const Outputs& to);
  StepRecordings::Key key(const BaseWeights& base, const StepBatch& batch, const Components& with,
                          const KvPages& pages, const Outputs& to) const;
  Status set_lora_table(std::span<const LoraDelta* const> deltas);
  Status block(const BaseWeights& base, int64_t layer, const StepBatch& batch,
               const KvPages& pages);
  /// Rows that linear layers read: FP32, as Ops::prepare() gives them, or FP32 that are normed
  /// first.
  struct Input {
    const float* x = nullptr;
    const void* prepared = nullptr;
    const BackendFloats* norm = nullptr;
  };
  /// What a linear layer does beyond its epilogue, see LinearArgs.
  struct Fused {
    const RopeAppendArgs* rope = nullptr;
    void* y_prepared = nullptr;
  };
  Status linear(std::initializer_list<Target> targets, const BaseWeights& base, int64_t layer,
                const StepBatch& batch, const Input& input, std::initializer_list<float*> y,
                Epilogue epilogue, const float* residual, const Fused& fused);
  /// RMSNorm of x_, at the latest when the layer reads it.
  Input norm(const BaseWeights& base, const StepBatch& batch, const BackendFloats& weight);
  Result<Outputs> place_outputs(const StepBatch& batch, const Outputs& to);
  void fetch_outputs(const StepBatch& batch, const Outputs& from, const Outputs& to) const;
  Status head(const BaseWeights& base, const StepBatch& batch, const Outputs& to);
  Status show(const StepBatch& batch, int64_t layer, Target target, int64_t k, const float* x);
  ModelConfig config_;
  Compute compute_;
  int64_t max_rows_;
  StepTables tables_;
  TextEncoding encoding_;
  ServingAttention attention_;
  LinearScratch scratch_;
  Buffer x_, normed_, q_, k_, v_, attended_, activated_, lora_t_, rows_, attended_prepared_,
      activated_prepared_;
  Buffer out_, hidden_, tokens_;  ///< what goes to the host at the end, where that is a copy
  // [layer][target][slot], for steps that are recorded: whichever deltas a replay is for.
  Buffer lora_table_;
  std::vector<LoraEntry> lora_entries_;
  std::vector<uint64_t> lora_serials_;  ///< of the deltas in it
  bool lora_by_table_ = false;          ///< in this step
  StepRecordings recordings_;
  std::vector<float> shown_;  ///< for a watch
};

}  // namespace ds
