// SPDX-License-Identifier: Apache-2.0
// Local window and selected global tokens. A row at position t reads, for each kv head,
//   the last `window` keys, t - window + 1 .. t, and
//   of the keys before those the first `sinks` (Xiao et al. 2023, attention sinks) and then, up to
//   `globals` in all, the ones with the smallest norm |k|^2: a small key norm goes with a high
//   attention score (Devoto et al. 2024). Of equal norms the earlier key wins.
// Causal: what is chosen for t depends on keys up to t - window alone, and rotation keeps norms, so
// a choice is the same in whatever calls a sequence arrives. Norms are kept beside the KV pages: a
// decoded token reads window + globals keys. Gradients flow through the keys that were read; the
// choice itself is piecewise constant.
#include <algorithm>

#include "modules/attention/kernel_args.h"

namespace ds::modules {

/// The chosen positions before the window of one (sequence, kv head), as the window moves on.
class Chosen {
 public:
  Chosen(std::int32_t* room, float* norms, std::int64_t globals, std::int64_t sinks)
      : positions_(room), norms_(norms), globals_(globals), sinks_(sinks) {}

  /// The next position leaves the window; `norm` is its key's. Call in order from position 0.
  void leave(std::int64_t position, float norm) {
    const float rank = position < sinks_ ? -1.0f : norm;
    if (count_ == globals_) {
      if (count_ == 0 || !(rank < norms_[worst_])) return;
      std::copy(positions_ + worst_ + 1, positions_ + count_, positions_ + worst_);
      std::copy(norms_ + worst_ + 1, norms_ + count_, norms_ + worst_);
      --count_;
    }
    positions_[count_] = static_cast<std::int32_t>(position);  // ascending, as they leave in order
    norms_[count_++] = rank;
    if (count_ < globals_) return;
    worst_ = 0;
    for (std::int64_t i = 1; i < count_; ++i) {
      if (norms_[i] >= norms_[worst_]) worst_ = i;  // of equals the latest goes
    }
  }
  std::int64_t count() const { return count_; }
  const std::int32_t* positions() const { return positions_; }

 private:
  std::int32_t* positions_;
  float* norms_;
  std::int64_t globals_, sinks_, count_ = 0, worst_ = 0;
};

struct WindowGlobal {
  static constexpr std::string_view name = "window-global";
  static constexpr std::string_view summary = "a local window and selected global tokens";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  static constexpr std::string_view config_schema = R"({
    "type": "object", "additionalProperties": false, "properties": {
      "window": {"type": "integer", "minimum": 1, "maximum": 1048576, "default": 32},
      "globals": {"type": "integer", "minimum": 0, "maximum": 4096, "default": 32},
      "sinks": {"type": "integer", "minimum": 0, "maximum": 4096, "default": 4}}})";

  explicit WindowGlobal(sdk::context context)
      : ops(cpu_ops(best_cpu_isa())),
        window(context.get("window", 32)),
        globals(context.get("globals", 32)),
        sinks(std::min(context.get("sinks", 4), globals)) {}

  ds_plan plan(const ds_attn_args& a) const {
    const std::int64_t rows = sdk::dim(a.q, "q", 3, 0);
    const std::int64_t kv_heads = a.kv != nullptr
                                      ? sdk::dim(sdk::widened(a.kv).k_pages, "k_pages", 4, 1)
                                      : shape_of(a).n_kv_heads;
    ds_plan out{};
    out.size = sizeof out;
    out.workspace_bytes =
        static_cast<std::uint64_t>(Layout(*this, a, rows, kv_heads, nullptr).bytes);
    out.page_extra_bytes = static_cast<std::uint64_t>(kv_heads * kKvPageTokens) * sizeof(float);
    if (a.train != nullptr)
      out.saved_bytes = static_cast<std::uint64_t>(rows * sdk::dim(a.q, "q", 3, 1)) * sizeof(float);
    return out;
  }

  void prefill(const ds_call& call, const ds_attn_args& a) const { run(call, a, false); }

  void backward(const ds_call& call, const ds_attn_args& a) const {
    if (a.train == nullptr || a.saved == nullptr)
      throw sdk::error(DS_E_ARG, "backward: train or saved is missing");
    run(call, a, true);
  }

  void explain(const ds_call& call, const ds_attn_args& a, const ds_tensor& read) const {
    const AttentionShape s = shape_of(a);
    const std::int64_t keys = sdk::dim(&read, "read", 3, 2), group = s.n_heads / s.n_kv_heads;
    const auto out = sdk::flat<std::uint8_t>(&read, "read", {s.rows, s.n_heads, keys});
    const Layout at(*this, a, s.rows, s.n_kv_heads, checked_workspace(call, a, s));
    if (a.kv != nullptr) serving_args(a, s);  // checks lengths
    choose(call, a, s, at);
    std::fill(out.begin(), out.end(), std::uint8_t{0});
    for (std::int64_t i = 0; i < s.rows * s.n_heads; ++i) {
      const std::int64_t list = i / s.n_heads * s.n_kv_heads + i % s.n_heads / group;
      for (std::int32_t n = 0; n < at.counts[list]; ++n) {
        const std::int32_t position = at.keys[list * at.stride + n];
        if (position < keys) out[static_cast<std::size_t>(i * keys + position)] = 1;
      }
    }
  }

 private:
  /// The workspace of a call: sequences in training, then lists of keys, then what choosing needs.
  struct Layout {
    char* sequences = nullptr;
    std::int32_t *keys = nullptr, *counts = nullptr, *chosen = nullptr;
    float* norms = nullptr;
    std::int64_t stride = 0, bytes = 0;

    Layout(const WindowGlobal& w, const ds_attn_args& a, std::int64_t rows, std::int64_t kv_heads,
           void* memory) {
      stride = std::min<std::int64_t>(w.window + w.globals, a.max_keys);
      const auto take = [&](std::int64_t n) {
        char* const at = static_cast<char*>(memory) + bytes;
        bytes += (n + 63) / 64 * 64;
        return memory != nullptr ? at : nullptr;
      };
      const std::int64_t lists = rows * kv_heads, units = a.batch * kv_heads;
      sequences = take(a.batch * static_cast<std::int64_t>(sizeof(TrainSequence)));
      keys = reinterpret_cast<std::int32_t*>(take(lists * stride * 4));
      counts = reinterpret_cast<std::int32_t*>(take(lists * 4));
      chosen = reinterpret_cast<std::int32_t*>(take(units * w.globals * 4));
      norms = reinterpret_cast<float*>(take(units * w.globals * 4));
    }
  };

  void* checked_workspace(const ds_call& call, const ds_attn_args& a,
                          const AttentionShape& s) const {
    const std::int64_t bytes = Layout(*this, a, s.rows, s.n_kv_heads, nullptr).bytes;
    return in_workspace<char>(call, bytes).data();
  }

  void run(const ds_call& call, const ds_attn_args& a, bool back) const {
    if (a.softcap != 0) throw sdk::error(DS_E_UNSUPPORTED, "softcap");
    const AttentionShape s = shape_of(a);
    const Layout at(*this, a, s.rows, s.n_kv_heads, checked_workspace(call, a, s));
    const KeySelection selection{at.keys, at.counts, at.stride};
    const OpContext context{call.parallel, nullptr};
    if (a.train == nullptr) {
      const AttentionArgs args = serving_args(a, s);  // checks lengths, which choosing trusts
      choose(call, a, s, at);
      ops.attention_selected(context, args, selection);
      return;
    }
    TrainAttentionArgs args = training_args(a, s, in_workspace<TrainSequence>(call, s.batch));
    choose(call, a, s, at);
    if (back) {
      add_gradients(a, s, args);
      ops.attention_selected_train_backward(context, args, selection);
    } else {
      ops.attention_selected_train(context, args, selection);
    }
  }

  /// The lists of all rows, by (sequence, kv head).
  void choose(const ds_call& call, const ds_attn_args& a, const AttentionShape& s,
              const Layout& at) const {
    const auto rows = integers(a.rows, "rows", s.batch + 1);
    sdk::parallel_for(call, s.batch * s.n_kv_heads, [&](std::int64_t unit) {
      const auto b = static_cast<std::size_t>(unit / s.n_kv_heads);
      const std::int64_t head = unit % s.n_kv_heads, n = rows[b + 1] - rows[b];
      const std::int64_t first = first_position(a, b, n);
      const Norms norms(a, s, b, head);
      for (std::int64_t p = first; p < first + n; ++p) norms.keep(p);
      Chosen chosen(at.chosen + unit * globals, at.norms + unit * globals, globals, sinks);
      std::int64_t left = 0;  // positions that have left the window
      for (std::int64_t r = 0; r < n; ++r) {
        const std::int64_t position = first + r;
        for (; left <= position - window; ++left) chosen.leave(left, norms.of(left));
        const std::int64_t list = (rows[b] + r) * s.n_kv_heads + head;
        std::int32_t* keys = at.keys + list * at.stride;
        std::int32_t* end = list_globals(a, b, position, chosen, keys);
        for (std::int64_t p = std::max<std::int64_t>(0, position - window + 1); p <= position; ++p)
          *end++ = static_cast<std::int32_t>(p);
        at.counts[list] = static_cast<std::int32_t>(end - keys);
      }
    });
  }

  /// The caller's own choice if there is one, else ours: ascending positions before the window.
  std::int32_t* list_globals(const ds_attn_args& a, std::size_t b, std::int64_t position,
                             const Chosen& chosen, std::int32_t* out) const {
    if (a.global_idx == nullptr) return std::copy_n(chosen.positions(), chosen.count(), out);
    const std::int64_t n = sdk::dim(a.global_idx, "global_idx", 2, 1);
    const auto given = sdk::flat<const std::int32_t>(a.global_idx, "global_idx", {a.batch, n});
    std::int32_t* const begin = out;
    for (const std::int32_t p :
         given.subspan(b * static_cast<std::size_t>(n), static_cast<std::size_t>(n))) {
      if (p >= 0 && p <= position - window && out - begin < globals &&
          std::find(begin, out, p) == out)
        *out++ = p;
    }
    std::sort(begin, out);
    return out;
  }

  /// |k|^2 of the keys of one (sequence, kv head): kept beside the pages when serving, computed
  /// from the rows when training.
  class Norms {
   public:
    Norms(const ds_attn_args& a, const AttentionShape& s, std::size_t b, std::int64_t head)
        : head_(head), heads_(s.n_kv_heads), d_(s.head_dim), serving_(a.kv != nullptr) {
      if (serving_) {
        const ds_kv_view kv = sdk::widened(a.kv);
        kv_ = kernel_kv(kv, s, DS_DEV_CPU);
        const std::int64_t pages = sdk::dim(kv.block_table, "block_table", 2, 1);
        table_ = sdk::flat<const std::int32_t>(kv.block_table, "block_table", {s.batch, pages})
                     .subspan(b * static_cast<std::size_t>(pages), static_cast<std::size_t>(pages));
        if (kv.page_extra == nullptr) throw sdk::error(DS_E_ARG, "page_extra: missing");
        extra_stride_ = sdk::dim(kv.page_extra, "page_extra", 2, 1);  // a host may round it up
        const std::int64_t needed = heads_ * kKvPageTokens * std::int64_t{sizeof(float)};
        if (extra_stride_ < needed || extra_stride_ % std::int64_t{sizeof(float)} != 0)
          throw sdk::error(DS_E_SHAPE, "page_extra: " + std::to_string(extra_stride_) +
                                           " bytes a page, planned " + std::to_string(needed));
        extra_ = reinterpret_cast<char*>(
            sdk::flat<std::uint8_t>(kv.page_extra, "page_extra",
                                    {sdk::dim(kv.k_pages, "k_pages", 4, 0), extra_stride_})
                .data());
      } else {
        const ds_train_view train = sdk::widened(a.train);
        prefix_ = first_position(a, b, 0);
        if (prefix_ > 0) prefix_k_ = sdk::flat<const float>(train.prefix_k[b], "prefix_k").data();
        const auto rows = integers(a.rows, "rows", s.batch + 1);
        k_ = sdk::flat<const float>(train.k, "k").data() + rows[b] * heads_ * d_;
      }
    }

    void keep(std::int64_t position) const {
      if (serving_) *place(position) = measure(position);
    }
    float of(std::int64_t position) const {
      return serving_ ? *place(position) : measure(position);
    }

   private:
    float* place(std::int64_t position) const {
      const std::int64_t page = table_[static_cast<std::size_t>(position / kKvPageTokens)];
      return reinterpret_cast<float*>(extra_ + page * extra_stride_) + head_ * kKvPageTokens +
             position % kKvPageTokens;
    }
    float measure(std::int64_t position) const {
      float sum = 0;
      if (!serving_) {
        const float* row = position < prefix_ ? prefix_k_ + (position * heads_ + head_) * d_
                                              : k_ + ((position - prefix_) * heads_ + head_) * d_;
        for (std::int64_t i = 0; i < d_; ++i) sum += row[i] * row[i];
        return sum;
      }
      const std::int64_t page = table_[static_cast<std::size_t>(position / kKvPageTokens)];
      const std::int64_t at =
          ((page * heads_ + head_) * kKvPageTokens + position % kKvPageTokens) * d_;
      for (std::int64_t i = 0; i < d_; ++i) {
        const float x = kv_.dtype == KvDtype::kF32
                            ? static_cast<const float*>(kv_.k)[at + i]
                            : float(static_cast<const sdk::bf16*>(kv_.k)[at + i]);
        sum += x * x;
      }
      return sum;
    }

    std::int64_t head_, heads_, d_;
    bool serving_;
    KvView kv_;
    std::span<const std::int32_t> table_;
    char* extra_ = nullptr;
    std::int64_t extra_stride_ = 0, prefix_ = 0;
    const float *prefix_k_ = nullptr, *k_ = nullptr;
  };

  const Ops& ops;
  std::int64_t window, globals, sinks;
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.attention-window-global", "1.0.0", "Apache-2.0",
          ds::modules::WindowGlobal)
