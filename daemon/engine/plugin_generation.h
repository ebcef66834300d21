// SPDX-License-Identifier: Apache-2.0
// What the engine's use of each kind of plugin begins with.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "ds/status.h"
#include "kernels/buffer.h"
#include "kernels/ops.h"
#include "plugin/abi.h"
#include "plugin/library.h"
#include "plugin/tensor_view.h"
#include "storage/hash.h"

namespace ds {

/// One generation of a component. Immutable; whoever computes with it holds it.
class PluginGeneration {
 public:
  std::string_view name() const { return plugin_->name(); }
  uint64_t generation() const { return generation_; }
  const PluginInstance& plugin() const { return *plugin_; }
  /// Part of the key of KV pages: what the component computes depends on its file, name and config.
  /// Equal keys give equal bits.
  uint64_t key() const { return key_; }

 protected:
  PluginGeneration(std::shared_ptr<const PluginInstance> plugin, uint64_t generation)
      : plugin_(std::move(plugin)),
        generation_(generation),
        key_(first_word(sha256(plugin_->library().sha256() + " " + std::string(plugin_->name()) +
                               " " + canonical_json(plugin_->config())))) {}

  /// `result` of one of its functions, as ours: "generation 2 of attention: dense: ...".
  Status judge(ds_code result, const ds_status& st) const {
    if (result == DS_OK) return {};
    return plugin_status(name(), result, st)
        .in("generation " + std::to_string(generation_) + " of " +
            std::string(kind_name(plugin_->component().kind)));
  }
  /// Whether a plan asks for memory that there can be.
  Status check_room(const ds_plan& plan) const {
    constexpr uint64_t kLimit = uint64_t{1} << 40;
    if (plan.workspace_bytes <= kLimit && plan.saved_bytes <= kLimit) return {};
    return {Code::kPlugin, std::string(name()) + ": plans " + std::to_string(plan.workspace_bytes) +
                               " bytes of workspace, " + std::to_string(plan.saved_bytes) +
                               " to keep"};
  }

  std::shared_ptr<const PluginInstance> plugin_;

 private:
  uint64_t generation_, key_;
};

/// A call on the context's pool with `bytes` of workspace.
inline ds_call call_with(const OpContext& context, Buffer& workspace, uint64_t bytes) {
  ds_call call = host_call(context.parallel);
  call.workspace = workspace.at_least(static_cast<size_t>(bytes));
  call.workspace_bytes = bytes;
  return call;
}

/// A matrix in packed panels as the ABI has it.
inline void show_packed(const WeightView& w, TensorView& view) {
  const bool f32 = w.format == WeightFormat::kF32;
  const int64_t panels = (w.n + 15) / 16;
  const int64_t bytes = f32 ? panels * w.k * 64 : panels * ((w.k + 1) / 2) * 64;
  view.set(w.data, f32 ? kAbiF32 : kAbiBf16, {w.n, w.k});
  view.set_packing(f32 ? DS_PACK_PANEL_F32 : DS_PACK_PANEL_BF16, static_cast<uint64_t>(bytes));
}

}  // namespace ds
