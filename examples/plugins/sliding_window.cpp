// SPDX-License-Identifier: Apache-2.0
// Attention: each row uses the last `window` keys, and the positions of global_idx if the host
// names some. Reads per row do not grow with the text.
#include <array>
#include <cmath>
#include <limits>

#include "ds/plugin.hpp"

struct sliding_window {
  static constexpr std::string_view name = "sliding-window";
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "window": {"type": "integer", "minimum": 1, "default": 256, "description": "keys per row"}}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  static constexpr std::int64_t max_head_dim = 256;

  explicit sliding_window(ds::sdk::context c) : window(c.get("window", 256)) {}

  ds_plan plan(const ds_attn_args&) const { return {}; }  // no workspace, nothing saved

  // One task is one row of one head, so its bits cannot depend on the rest of the call.
  void prefill(const ds_call& call, const ds_attn_args& a) const {
    const ds::sdk::attention_view view(a);
    const auto out = ds::sdk::flat<float>(a.out, "out", {view.rows, view.heads, view.head_dim});
    std::span<float> lse;
    if (a.lse != nullptr) lse = ds::sdk::flat<float>(a.lse, "lse", {view.rows, view.heads});
    if (view.head_dim > max_head_dim) throw ds::sdk::error(DS_E_UNSUPPORTED, "heads above 256");
    ds::sdk::parallel_for(call, view.rows * view.heads, [&](std::int64_t task) {
      softmax_sum sum(a, view, task, &out[task * view.head_dim]);
      each_key(a, view, task / view.heads, [&](std::int64_t key) { sum.add(key); });
      const float total = sum.finish();
      if (!lse.empty()) lse[task] = total;
    });
  }

  void explain(const ds_call&, const ds_attn_args& a, const ds_tensor& read) const {
    const ds::sdk::attention_view view(a);
    const std::int64_t keys = ds::sdk::dim(&read, "read", 3, 2);
    const auto out = ds::sdk::flat<std::uint8_t>(read, "read", {view.rows, view.heads, keys});
    std::fill(out.begin(), out.end(), std::uint8_t{0});
    for (std::int64_t task = 0; task < view.rows * view.heads; ++task)
      each_key(a, view, task / view.heads, [&](std::int64_t key) {
        if (key < keys) out[task * keys + key] = 1;
      });
  }

 private:
  // Softmax over keys that come one by one: rescaled whenever the maximum rises.
  struct softmax_sum {
    const ds_attn_args& args;
    const ds::sdk::attention_view& view;
    std::int64_t row, head, sequence;
    float* out;  // [head_dim]
    float top = -std::numeric_limits<float>::infinity(), weight = 0;

    softmax_sum(const ds_attn_args& a, const ds::sdk::attention_view& v, std::int64_t task,
                float* to)
        : args(a), view(v), row(task / v.heads), head(task % v.heads), out(to) {
      sequence = view.sequence_of(row);
      std::fill_n(out, view.head_dim, 0.0f);
    }
    void add(std::int64_t position) {
      std::array<float, max_head_dim> v;
      view.key(sequence, head, position, v.data());
      const auto q = view.query(row, head);
      float score = 0;
      for (std::int64_t i = 0; i < view.head_dim; ++i) score += q[i] * v[i];
      score *= args.scale;
      if (args.softcap != 0) score = args.softcap * std::tanh(score / args.softcap);
      const float shrink = score > top ? std::exp(top - score) : 1;
      top = std::max(top, score);
      const float share = std::exp(score - top);
      weight = weight * shrink + share;
      view.value(sequence, head, position, v.data());
      for (std::int64_t i = 0; i < view.head_dim; ++i) out[i] = out[i] * shrink + share * v[i];
    }
    float finish() {
      for (std::int64_t i = 0; i < view.head_dim; ++i) out[i] /= weight;
      return top + std::log(weight);
    }
  };

  // The keys of a row, each once, its own position last.
  template <class F>
  void each_key(const ds_attn_args& a, const ds::sdk::attention_view& view, std::int64_t row,
                F&& f) const {
    const std::int64_t b = view.sequence_of(row), own = view.position(b, row);
    const std::int64_t first = std::max<std::int64_t>(0, own - window + 1);
    if (a.global_idx != nullptr) {
      const std::int64_t n = ds::sdk::dim(a.global_idx, "global_idx", 2, 1);
      const auto all = ds::sdk::flat<const std::int32_t>(a.global_idx, "global_idx", {a.batch, n});
      for (const std::int32_t key : all.subspan(b * n, n))
        if (key >= 0 && key < first) f(key);
    }
    for (std::int64_t key = first; key <= own; ++key) f(key);
  }

  std::int64_t window;
};

DS_PLUGIN("org.driftstone.example.sliding-window", "1.0.0", "Apache-2.0", sliding_window)
