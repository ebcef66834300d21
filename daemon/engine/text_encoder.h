// SPDX-License-Identifier: Apache-2.0
// Text by a loaded encoder plugin: token ids to the rows that the first layer reads.
#pragma once

#include <array>
#include <memory>
#include <span>

#include "ds/status.h"
#include "engine/plugin_generation.h"

namespace ds {

class BaseWeights;

class TextEncoder : public PluginGeneration {
 public:
  /// Refused when it does not read text, or reads a tensor other than the model's embedding.
  static Result<std::shared_ptr<const TextEncoder>> make(
      std::shared_ptr<const PluginInstance> plugin, uint64_t generation);

  bool trains() const { return table_.backward != nullptr; }

 private:
  friend class TextEncoding;
  TextEncoder(std::shared_ptr<const PluginInstance> plugin, uint64_t generation);

  ds_encoder table_;
};

/// The encoder's calls of one pass, forward and backward. Keeps its memory.
class TextEncoding {
 public:
  /// `out` FP32 [ids, d_model], like the ids in the memory of `ops`. The ids may be of several
  /// sequences: a row depends on its own id alone. `train`: backward() may follow; what `out` and
  /// `ids` point at stays until then.
  Status forward(const TextEncoder& encoder, const Ops& ops, const OpContext& context,
                 const BaseWeights& base, std::span<const int32_t> ids, float* out,
                 bool train = false);
  /// Adds the gradient of the embedding for `dout`, FP32 [ids, d_model], to `embedding`, FP32
  /// [vocab, d_model]. An encoder without backward adds nothing.
  Status backward(const TextEncoder& encoder, const float* dout, float* embedding);

  const void* workspace() const { return call_.workspace(); }
  const void* saved() const { return saved_.data(); }

 private:
  Result<ds_plan> plan(const TextEncoder& encoder, int64_t rows, int64_t width) const;
  Status run(const TextEncoder& encoder,
             ds_code (*function)(ds_instance*, const ds_call*, const ds_encode_args*, ds_status*));

  TensorView ids_, out_, table_, dout_, dtable_;
  std::array<const ds_tensor*, 1> tensors_{}, dtensors_{};
  Buffer saved_;
  PassCall call_;
  ds_media media_{};
  ds_encode_args args_{};
};

}  // namespace ds
