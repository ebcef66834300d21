// SPDX-License-Identifier: Apache-2.0
// Local window and selected global tokens. A row at position t reads, for each kv head,
//   the last `window` keys, t - window + 1 .. t, and
//   of the keys before those the first `sinks` (Xiao et al. 2023, attention sinks) and then, up to
//   `globals` in all, the ones with the smallest norm |k|^2: a small key norm goes with a high
//   attention score (Devoto et al. 2024). Of equal norms the earlier key wins.
// Causal: what is chosen for t depends on keys up to t - window alone, and rotation keeps norms, so
// a choice is the same in whatever calls a sequence arrives. Norms and choices are kept beside the
// KV pages: a decoded token looks at window + globals keys, however many there are. Gradients flow
// through the keys that were read; the choice itself is piecewise constant.
#include "modules/attention/kernel_args.h"
#include "modules/device_ops.h"

namespace ds::modules {

struct WindowGlobal {
  static constexpr std::string_view name = "window-global";
  static constexpr std::string_view summary = "a local window and selected global tokens";
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  static constexpr std::uint32_t flags = DS_ATTENTION_OUT_16;
  static constexpr std::string_view config_schema = R"({
    "type": "object", "additionalProperties": false, "properties": {
      "window": {"type": "integer", "minimum": 1, "maximum": 1048576, "default": 32},
      "globals": {"type": "integer", "minimum": 0, "maximum": 4096, "default": 32},
      "sinks": {"type": "integer", "minimum": 0, "maximum": 4096, "default": 4}}})";

  explicit WindowGlobal(sdk::context context) {
    choice_.window = context.get("window", 32);
    choice_.globals = context.get("globals", 32);
    choice_.sinks = context.get("sinks", 4);
  }

  ds_plan plan(const ds_attn_args& a) const {
    const std::int64_t rows = sdk::dim(a.q, "q", 3, 0);
    const std::int64_t kv_heads = a.kv != nullptr
                                      ? sdk::dim(sdk::widened(a.kv).k_pages, "k_pages", 4, 1)
                                      : shape_of(a).n_kv_heads;
    ds_plan out{};
    out.size = sizeof out;
    out.workspace_bytes =
        static_cast<std::uint64_t>(Layout(choice_, a, rows, kv_heads, nullptr).bytes);
    out.page_extra_bytes = static_cast<std::uint64_t>(choice_.kept_bytes(kv_heads));
    if (a.train != nullptr)
      out.saved_bytes = static_cast<std::uint64_t>(rows * sdk::dim(a.q, "q", 3, 1)) * sizeof(float);
    return out;
  }

  void prefill(const ds_call& call, const ds_attn_args& a) const {
    if (a.softcap != 0) throw sdk::error(DS_E_UNSUPPORTED, "softcap");
    if (a.train != nullptr) return train(call, a, false);
    const AttentionShape s = shape_of(a);
    const AttentionArgs args = serving_args(a, s);
    const KeyChoice choice = choose(call, a, s, args);
    ops_.of(call).attention_selected(op_context(call), args, choice.selection());
  }

  void backward(const ds_call& call, const ds_attn_args& a) const {
    if (a.softcap != 0) throw sdk::error(DS_E_UNSUPPORTED, "softcap");
    if (a.train == nullptr || a.saved == nullptr)
      throw sdk::error(DS_E_ARG, "backward: train or saved is missing");
    train(call, a, true);
  }

  void explain(const ds_call& call, const ds_attn_args& a, const ds_tensor& read) const {
    const AttentionShape s = shape_of(a);
    const std::int64_t keys = sdk::dim(&read, "read", 3, 2), group = s.n_heads / s.n_kv_heads;
    const auto out = sdk::flat<std::uint8_t>(&read, "read", {s.rows, s.n_heads, keys});
    KeyChoice choice;
    if (a.train == nullptr) {
      choice = choose(call, a, s, serving_args(a, s));
    } else {
      with_training_args(call, a, s, false, [&](const TrainAttentionArgs& args) {
        choice = choose(call, a, s, args);
      });
    }
    std::fill(out.begin(), out.end(), std::uint8_t{0});
    for (std::int64_t i = 0; i < s.rows * s.n_heads; ++i) {
      const std::int64_t list = i / s.n_heads * s.n_kv_heads + i % s.n_heads / group;
      for (std::int32_t n = 0; n < choice.counts[list]; ++n) {
        const std::int32_t position = choice.keys[list * choice.stride + n];
        if (position < keys) out[static_cast<std::size_t>(i * keys + position)] = 1;
      }
    }
  }

 private:
  /// The workspace of a call: on the CPU first the sequences in training, then lists of keys, then
  /// in training room for norms.
  struct Layout {
    std::int32_t *keys = nullptr, *counts = nullptr;
    void* norms = nullptr;
    std::int64_t stride = 0, bytes = 0;

    Layout(const KeyChoice& c, const ds_attn_args& a, std::int64_t rows, std::int64_t kv_heads,
           void* memory) {
      stride = std::min<std::int64_t>(c.window + c.globals, a.max_keys);
      const auto take = [&](std::int64_t n) {
        char* const at = static_cast<char*>(memory) + bytes;
        bytes += (n + 63) / 64 * 64;
        return memory != nullptr ? at : nullptr;
      };
      if (a.train != nullptr) {
        take(a.batch * static_cast<std::int64_t>(sizeof(TrainSequence)));
        norms = take(a.batch * norms_bytes(a, kv_heads));
      }
      keys = reinterpret_cast<std::int32_t*>(take(rows * kv_heads * stride * 4));
      counts = reinterpret_cast<std::int32_t*>(take(rows * kv_heads * 4));
    }
    static std::int64_t norms_bytes(const ds_attn_args& a, std::int64_t kv_heads) {
      return std::int64_t{a.max_keys} * kv_heads * 4;
    }
  };

  /// With the lists in the call's workspace, of which `kept` is still missing.
  KeyChoice with_lists(const ds_call& call, const ds_attn_args& a, const AttentionShape& s) const {
    const std::int64_t bytes = Layout(choice_, a, s.rows, s.n_kv_heads, nullptr).bytes;
    const Layout at(choice_, a, s.rows, s.n_kv_heads, in_workspace<char>(call, bytes).data());
    KeyChoice out = choice_;
    out.keys = at.keys, out.counts = at.counts, out.stride = at.stride;
    if (a.train != nullptr)
      out.kept = at.norms, out.kept_stride = Layout::norms_bytes(a, s.n_kv_heads);
    if (a.global_idx == nullptr) return out;
    out.n_given = sdk::dim(a.global_idx, "global_idx", 2, 1);
    out.given = sdk::flat<const std::int32_t>(a.global_idx, "global_idx", {s.batch, out.n_given},
                                              device_type(a))
                    .data();
    return out;
  }

  KeyChoice choose(const ds_call& call, const ds_attn_args& a, const AttentionShape& s,
                   const AttentionArgs& args) const {
    KeyChoice choice = with_lists(call, a, s);
    const BesidePages beside =
        beside_pages(sdk::widened(a.kv), choice.kept_bytes(s.n_kv_heads), device_type(a));
    choice.kept = beside.data, choice.kept_stride = beside.stride;
    ops_.of(call).choose_keys(op_context(call), args, choice);
    return choice;
  }

  KeyChoice choose(const ds_call& call, const ds_attn_args& a, const AttentionShape& s,
                   const TrainAttentionArgs& args) const {
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const std::int64_t keys = args.sequences[b].prefix + args.sequences[b].n_rows;
      if (keys > a.max_keys)
        throw sdk::error(DS_E_SHAPE, "max_keys: " + std::to_string(a.max_keys) + ", sequence " +
                                         std::to_string(b) + " has " + std::to_string(keys));
    }
    const KeyChoice choice = with_lists(call, a, s);
    ops_.of(call).choose_train_keys(op_context(call), args, choice);
    return choice;
  }

  void train(const ds_call& call, const ds_attn_args& a, bool back) const {
    const AttentionShape s = shape_of(a);
    const Ops& ops = ops_.of(call);
    with_training_args(call, a, s, back, [&](const TrainAttentionArgs& args) {
      const KeySelection selection = choose(call, a, s, args).selection();
      (back ? ops.attention_selected_train_backward : ops.attention_selected_train)(
          op_context(call), args, selection);
    });
  }

  DeviceOps ops_;
  KeyChoice choice_;  ///< window, globals and sinks
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.attention-window-global", "1.0.0", "Apache-2.0",
          ds::modules::WindowGlobal)
