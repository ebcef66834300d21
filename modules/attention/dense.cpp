// SPDX-License-Identifier: Apache-2.0
// Dense causal attention: every row uses every key up to its own position.
#include "modules/attention/kernel_args.h"
#include "modules/device_ops.h"

namespace ds::modules {

struct Dense {
  static constexpr std::string_view name = "dense";
  static constexpr std::string_view summary = "every key up to the row's own position";
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  static constexpr std::uint32_t flags = DS_ATTENTION_OUT_16;

  explicit Dense(sdk::context) {}

  ds_plan plan(const ds_attn_args& a) const {
    ds_plan out{};
    out.size = sizeof out;
    if (a.train != nullptr) {
      const AttentionShape s = shape_of(a);
      out.workspace_bytes = a.batch * sizeof(TrainSequence);
      out.saved_bytes = static_cast<std::uint64_t>(s.rows * s.n_heads) * sizeof(float);
    }
    return out;
  }

  void prefill(const ds_call& call, const ds_attn_args& a) const {
    refuse_extras(a);
    if (a.train != nullptr) return train(call, a, false);
    ops_.of(call).attention(op_context(call), serving_args(a, shape_of(a)));
  }

  void backward(const ds_call& call, const ds_attn_args& a) const {
    refuse_extras(a);
    if (a.train == nullptr) throw sdk::error(DS_E_ARG, "backward: train is missing");
    if (a.saved == nullptr) throw sdk::error(DS_E_ARG, "backward: saved is missing");
    train(call, a, true);
  }

  void explain(const ds_call&, const ds_attn_args& a, const ds_tensor& read) const {
    const AttentionShape s = shape_of(a);
    const std::int64_t keys = sdk::dim(&read, "read", 3, 2);
    const auto out = sdk::flat<std::uint8_t>(&read, "read", {s.rows, s.n_heads, keys});
    const auto rows = integers(a.rows, "rows", s.batch + 1);
    std::fill(out.begin(), out.end(), std::uint8_t{0});
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const auto at = static_cast<std::size_t>(b);
      const std::int64_t before = first_position(a, at, rows[at + 1] - rows[at]);
      for (std::int64_t r = rows[at]; r < rows[at + 1]; ++r) {
        const std::int64_t seen = std::min(keys, before + r - rows[at] + 1);
        for (std::int64_t h = 0; h < s.n_heads; ++h)
          std::fill_n(out.begin() + (r * s.n_heads + h) * keys, seen, std::uint8_t{1});
      }
    }
  }

 private:
  static void refuse_extras(const ds_attn_args& a) {
    if (a.softcap != 0) throw sdk::error(DS_E_UNSUPPORTED, "softcap");
  }

  void train(const ds_call& call, const ds_attn_args& a, bool back) const {
    const Ops& ops = ops_.of(call);
    with_training_args(call, a, shape_of(a), back, [&](const TrainAttentionArgs& args) {
      (back ? ops.attention_train_backward : ops.attention_train)(op_context(call), args);
    });
  }

  DeviceOps ops_;
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.attention-dense", "1.0.0", "Apache-2.0", ds::modules::Dense)
