// SPDX-License-Identifier: Apache-2.0
// What the engine's use of each kind of plugin begins with.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "ds/status.h"
#include "kernels/buffer.h"
#include "kernels/cuda/backend.h"
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

/// Where the memory of a pass is.
inline ds_device device_of(const OpContext& context) {
  if (context.stream == nullptr) return {DS_DEV_CPU, 0};
  return {DS_DEV_CUDA, context.device};
}

/// A call where `context` computes; `stream` is room for what it points to.
inline ds_call device_call(const OpContext& context, ds_stream& stream) {
  ds_call call = host_call(context.parallel);
  if (context.stream == nullptr) return call;
  stream = {sizeof stream, 0, device_of(context), native_stream(context)};
  call.stream = &stream;
  return call;
}

/// The ds_call of a pass's plugin calls: its pool or stream, and workspace in the backend's memory.
class PassCall {
 public:
  Status begin(const Ops& ops, const OpContext& context, uint64_t workspace_bytes) {
    context_ = context;
    workspace_bytes_ = workspace_bytes;
    return workspace_.grow(ops, static_cast<size_t>(workspace_bytes));
  }
  const void* workspace() const { return workspace_.data(); }
  /// Valid until the next begin(), while this object stays where it is.
  ds_call get() {
    ds_call call = device_call(context_, stream_);
    call.workspace = workspace_.data();
    call.workspace_bytes = workspace_bytes_;
    return call;
  }

 private:
  OpContext context_;
  ds_stream stream_{};
  Buffer workspace_;
  uint64_t workspace_bytes_ = 0;
};

/// The elements of pages as the ABI has them.
inline ds_dtype kv_element(KvDtype dtype) {
  static constexpr ds_dtype kElements[] = {kAbiF32, kAbiBf16, kAbiF16};  // in the order of KvDtype
  return kElements[static_cast<size_t>(dtype)];
}

/// The elements of what linear layers multiply on a GPU, as the ABI has them.
inline ds_dtype element_of(WeightFormat format) {
  if (is_f32(format)) return kAbiF32;
  return format == WeightFormat::kF16 ? kAbiF16 : kAbiBf16;
}

/// A packed matrix as the ABI has it: panels on the CPU; on a GPU rows, which may be padded.
inline void show_packed(const Ops& ops, const OpContext& context, const WeightView& w,
                        TensorView& view) {
  const bool on_host = context.stream == nullptr;  // where all but BF16 is FP32
  const bool f32 = is_f32(w.format) || (on_host && w.format == WeightFormat::kF16);
  const int64_t bytes = ops.packed_bytes(w.format, w.n, w.k);
  view.set(w.data, f32 ? kAbiF32 : element_of(w.format), {w.n, w.k}, device_of(context));
  if (on_host) {
    view.set_packing(f32 ? DS_PACK_PANEL_F32 : DS_PACK_PANEL_BF16, static_cast<uint64_t>(bytes));
  } else {
    view.set_row_stride(bytes / w.n / (f32 ? 4 : 2), static_cast<uint64_t>(bytes));
  }
}

}  // namespace ds
