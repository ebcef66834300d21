// SPDX-License-Identifier: Apache-2.0
// Weights in the format of a loaded quantizer plugin, and linear layers over them.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ds/status.h"
#include "engine/plugin_generation.h"
#include "kernels/buffer.h"
#include "kernels/ops.h"

namespace ds {

/// A number that no other call of this process gets.
uint64_t next_serial();

/// One matrix [n, k] as a quantizer keeps it, in memory of the host or of a GPU.
struct QuantWeight {
  QuantWeight() = default;
  QuantWeight(const QuantWeight&) = delete;
  ds_qformat format{};
  bool on_gpu = false;
  Buffer packed, scales, zeros;
  ds_qweight view{};  ///< of the above
  size_t bytes() const { return packed.bytes() + scales.bytes() + zeros.bytes(); }
};

/// A copy in the memory of a GPU.
Result<std::unique_ptr<QuantWeight>> copy_to(const Ops& ops, const OpContext& context,
                                             const QuantWeight& weight);

/// Memory of the linear calls; grows to what they need and stays.
struct LinearScratch {
  /// What a quantizer said a call needs: asked once for each shape.
  struct Plan {
    uint64_t quantizer;  ///< Quantizer::serial()
    int64_t rows, k;
    uint32_t layout;
    uint64_t workspace_bytes, prepared_bytes;
  };
  Buffer prepared, workspace, up, lora;
  std::vector<Plan> plans;
};

class Quantizer : public PluginGeneration {
 public:
  Quantizer(std::shared_ptr<const PluginInstance> plugin, uint64_t generation);

  uint64_t serial() const { return serial_; }  ///< of this object, never another's
  /// Whether it multiplies weights in this format; else they are served as dequantize() gives them.
  /// On a GPU it has to be able to, and to fuse whatever a layer needs.
  bool multiplies(const ds_qformat& format, bool on_gpu) const;

  /// Whether it wants to see the inputs of weights before it quantizes them.
  bool calibrates() const { return table_.observe != nullptr; }
  /// `x` FP32 [rows, k], inputs of the weight `name`.
  Status observe(const OpContext& context, const std::string& name, int64_t rows, int64_t k,
                 const float* x) const;
  /// `w` FP32 [n, k]; `name` is the weight's HF path.
  Result<std::unique_ptr<QuantWeight>> quantize(const OpContext& context, const std::string& name,
                                                int64_t n, int64_t k, const float* w) const;
  /// `w` is where the weight is: in memory of the host or of the context's GPU.
  Status dequantize(const OpContext& context, const QuantWeight& weight, float* w) const;
  /// Whether the weight is this one's as it is.
  Result<bool> accepts(const QuantWeight& weight) const;

  /// As Ops.linear on args.w, whose places `weights` take. What the format does not fuse is done
  /// here with `ops`.
  Status linear(const Ops& ops, const OpContext& context,
                std::span<const QuantWeight* const> weights, const LinearArgs& args,
                LinearScratch& scratch) const;

 private:
  Result<ds_qformat> format(int64_t n, int64_t k) const;
  Result<LinearScratch::Plan> plan(const ds_qformat& format, int64_t rows, int64_t k,
                                   LinearScratch& scratch) const;
  Status run(const Ops& ops, const OpContext& context, std::span<const QuantWeight* const> weights,
             const LinearArgs& args, uint32_t fused, LinearScratch& scratch) const;

  void record(const Ops& ops, const OpContext& context, const QuantWeight& weight,
              const LinearArgs& args) const;

  ds_quantizer table_;
  uint64_t serial_;
};

}  // namespace ds
