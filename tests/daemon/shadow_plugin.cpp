// SPDX-License-Identifier: Apache-2.0
// A small attention and a small tool whose next version computes the same, or does not:
// DS_SHADOW_FACTOR.
#include "ds/plugin.hpp"

#ifndef DS_SHADOW_FACTOR
#define DS_SHADOW_FACTOR 1.0f
#endif
#ifndef DS_SHADOW_VERSION
#define DS_SHADOW_VERSION "1.0.0"
#endif

namespace {

/// The mean of the values up to each row's own position.
struct MeanOfValues {
  static constexpr std::string_view name = "mean";
  explicit MeanOfValues(ds::sdk::context) {}
  ds_plan plan(const ds_attn_args&) const { return {}; }
  void prefill(const ds_call&, const ds_attn_args& a) const {
    const ds::sdk::attention_view view(a);
    const auto out = ds::sdk::flat<float>(a.out, "out", {view.rows, view.heads, view.head_dim});
    std::vector<float> value(static_cast<std::size_t>(view.head_dim));
    for (std::int64_t task = 0; task < view.rows * view.heads; ++task) {
      const std::int64_t row = task / view.heads, b = view.sequence_of(row);
      const std::int64_t keys = view.position(b, row) + 1;
      float* const to = &out[static_cast<std::size_t>(task * view.head_dim)];
      std::fill_n(to, view.head_dim, 0.0f);
      for (std::int64_t key = 0; key < keys; ++key) {
        view.value(b, task % view.heads, key, value.data());
        for (std::int64_t i = 0; i < view.head_dim; ++i)
          to[i] += DS_SHADOW_FACTOR * value[static_cast<std::size_t>(i)] / static_cast<float>(keys);
      }
    }
  }
};

struct Notes {
  static constexpr std::string_view name = "notes";
  explicit Notes(ds::sdk::context) {}
  template <class Emit>
  void analyse(const ds_call&, std::string_view, std::string_view, std::string_view text,
               Emit&& emit) const {
    const float factor = DS_SHADOW_FACTOR;
    const std::string message = std::to_string(text.size()) + " bytes";
    ds_finding f{};
    f.severity = DS_SEVERITY_NOTE;
    f.line = 1;
    f.rule = ds::sdk::str(factor == 1 ? "size" : "weight");
    f.message = ds::sdk::str(message);
    f.confidence = 1;
    emit(f);
  }
};

}  // namespace

DS_PLUGIN("org.driftstone.shadow", DS_SHADOW_VERSION, "Apache-2.0", MeanOfValues, Notes)
