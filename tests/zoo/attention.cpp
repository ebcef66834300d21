// SPDX-License-Identifier: Apache-2.0
// Attentions that break one rule each.
#include <cmath>

#include "tests/zoo/zoo.h"

namespace {

enum fault {
  sound,
  past_workspace,
  past_tensor,
  crash_on_null,
  wrong_code,
  takes_wrong_shape,
  takes_short_buffer,
  takes_missing_tensor,
  silent_failure,
  reads_past_struct,
  writes_past_output,
  acausal,
  lying_explain,
  wrong_scale,
  overflows,
  batch_dependent,
  chunk_dependent,
  wrong_gradient
};
constexpr std::string_view names[] = {
    "sound",           "past_workspace",    "past_tensor",        "crash_on_null",
    "wrong_code",      "takes_wrong_shape", "takes_short_buffer", "takes_missing_tensor",
    "silent_failure",  "reads_past_struct", "writes_past_output", "acausal",
    "lying_explain",   "wrong_scale",       "overflows",          "batch_dependent",
    "chunk_dependent", "wrong_gradient"};

template <fault F>
struct attention {
  static constexpr std::string_view name = names[F];
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  using view_type = ds::sdk::attention_view;
  explicit attention(ds::sdk::context) {}

  ds_plan plan(const ds_attn_args& a) const {
    const view_type view(a);
    ds_plan p{};
    p.workspace_bytes = static_cast<std::uint64_t>(view.rows * view.heads) * sizeof(float);
    return p;
  }

  void prefill(const ds_call& call, const ds_attn_args& a) const {
    if constexpr (F == crash_on_null) touch(a.out->flags);
    if constexpr (F == wrong_code) {
      try {
        run(call, a);
      } catch (const ds::sdk::error& e) {
        throw ds::sdk::error(e.code == DS_E_DTYPE ? DS_E_INTERNAL : e.code, e.text);
      }
    } else {
      run(call, a);
    }
  }

  void backward(const ds_call& call, const ds_attn_args& a) const {
    if (a.train == nullptr) throw ds::sdk::error(DS_E_ARG, "train: missing");
    const view_type view(a);
    const std::int64_t d = view.head_dim;
    const auto dout = ds::sdk::flat<const float>(a.dout, "dout", {view.rows, view.heads, d});
    const auto dq = ds::sdk::flat<float>(a.dq, "dq", {view.rows, view.heads, d});
    const auto dk = ds::sdk::flat<float>(a.dk, "dk", {view.rows, view.kv_heads, d});
    const auto dv = ds::sdk::flat<float>(a.dv, "dv", {view.rows, view.kv_heads, d});
    for (const auto& all : {dq, dk, dv}) std::fill(all.begin(), all.end(), 0.0f);
    scratch memory(view);
    for (std::int64_t row = 0; row < view.rows; ++row) {
      ds::sdk::check_cancelled(call);
      zoo::check_deadline(call);
      const std::int64_t b = view.sequence_of(row), first = view.position(b, view.row_begin(b));
      for (std::int64_t h = 0; h < view.heads; ++h) {
        const auto [p, dp, k, v] = memory.of(view, row, h);
        shares(a, view, row, h, p, k);
        const float* up = &dout[(row * view.heads + h) * d];
        float mean = 0;
        for (std::size_t key = 0; key < p.size(); ++key) {
          view.value(b, h, static_cast<std::int64_t>(key), v.data());
          for (std::int64_t i = 0; i < d; ++i) dp[key] += up[i] * v[i];
          mean += p[key] * dp[key];
        }
        for (std::size_t key = 0; key < p.size(); ++key) {
          const auto at = static_cast<std::int64_t>(key);
          view.key(b, h, at, k.data());
          const float s = p[key] * (dp[key] - mean) * scale_of(a);
          const std::int64_t own = view.row_begin(b) + at - first;
          const std::int64_t to = (own * view.kv_heads + h / (view.heads / view.kv_heads)) * d;
          for (std::int64_t i = 0; i < d; ++i) {
            dq[(row * view.heads + h) * d + i] += s * k[i];
            if (at < first) continue;  // of the frozen prefix
            dk[to + i] += s * view.query(row, h)[i] * (F == wrong_gradient ? 0.5f : 1.0f);
            dv[to + i] += p[key] * up[i];
          }
        }
      }
    }
  }

  void explain(const ds_call&, const ds_attn_args& a, const ds_tensor& read) const {
    const view_type view(a);
    const std::int64_t keys = ds::sdk::dim(&read, "read", 3, 2);
    const auto out = ds::sdk::flat<std::uint8_t>(read, "read", {view.rows, view.heads, keys});
    std::fill(out.begin(), out.end(), std::uint8_t{0});
    for (std::int64_t row = 0; row < view.rows; ++row) {
      const std::int64_t end = std::min(keys, keys_of(view, row));
      const std::int64_t begin = F == lying_explain ? std::max<std::int64_t>(0, end - 8) : 0;
      for (std::int64_t h = 0; h < view.heads; ++h)
        for (std::int64_t key = begin; key < end; ++key)
          out[(row * view.heads + h) * keys + key] = 1;
    }
  }

 private:
  static void touch(std::uint32_t flags) {
    volatile std::uint32_t seen = flags;
    (void)seen;
  }
  static float scale_of(const ds_attn_args& a) { return F == wrong_scale ? 0.25f : a.scale; }
  static std::int64_t keys_of(const view_type& view, std::int64_t row) {
    const std::int64_t b = view.sequence_of(row);
    return view.position(b, F == acausal ? view.row_end(b) - 1 : row) + 1;
  }

  /// What a head needs for each of its rows, in one block: the kit refuses every allocation of a
  /// call once, so that one for each row would make minutes of it.
  class scratch {
   public:
    struct slice {
      std::span<float> p, dp;  ///< [keys of the row], zeros
      std::span<float> k, v;   ///< [head_dim]
    };
    explicit scratch(const view_type& view) {
      for (std::int64_t row = 0; row < view.rows; ++row)
        keys_ = std::max(keys_, keys_of(view, row));
      all_.resize(static_cast<std::size_t>(view.rows * view.heads * floats(view)));
    }
    slice of(const view_type& view, std::int64_t row, std::int64_t h) {
      float* at = &all_[static_cast<std::size_t>((row * view.heads + h) * floats(view))];
      const auto n = static_cast<std::size_t>(keys_of(view, row));
      const auto d = static_cast<std::size_t>(view.head_dim);
      float* rest = at + 2 * keys_;
      return {{at, n}, {at + keys_, n}, {rest, d}, {rest + d, d}};
    }

   private:
    std::int64_t floats(const view_type& view) const { return 2 * (keys_ + view.head_dim); }
    std::int64_t keys_ = 0;
    std::vector<float> all_;
  };

  /// Softmax over the keys of a row, into p; k is room for a key.
  static void shares(const ds_attn_args& a, const view_type& view, std::int64_t row, std::int64_t h,
                     std::span<float> p, std::span<float> k) {
    const std::int64_t b = view.sequence_of(row);
    float top = -INFINITY, sum = 0;
    for (std::size_t key = 0; key < p.size(); ++key) {
      view.key(b, h, static_cast<std::int64_t>(key), k.data());
      for (std::int64_t i = 0; i < view.head_dim; ++i) p[key] += view.query(row, h)[i] * k[i];
      p[key] *= scale_of(a);
      top = std::max(top, p[key]);
    }
    for (float& x : p) sum += x = std::exp(x - (F == overflows ? 0 : top));
    for (float& x : p) x /= sum;
  }

  std::span<float> output(const ds_attn_args& a, const view_type& view) const {
    const auto unchecked = [&] {
      const auto n = static_cast<std::size_t>(view.rows * view.heads * view.head_dim);
      return std::span(static_cast<float*>(a.out->data), n);
    };
    if constexpr (F == takes_wrong_shape) {
      if (a.out == nullptr) throw ds::sdk::error(DS_E_ARG, "out: missing");
      if (a.out->dtype.code != DS_FLOAT) throw ds::sdk::error(DS_E_DTYPE, "out: not f32");
      return unchecked();
    }
    if constexpr (F == takes_short_buffer) {
      if (a.out == nullptr) throw ds::sdk::error(DS_E_ARG, "out: missing");
      if (a.out->dtype.code != DS_FLOAT) throw ds::sdk::error(DS_E_DTYPE, "out: not f32");
      if (a.out->shape[2] != view.head_dim) throw ds::sdk::error(DS_E_SHAPE, "out");
      return unchecked();
    }
    return ds::sdk::flat<float>(a.out, "out", {view.rows, view.heads, view.head_dim});
  }

  void run(const ds_call& call, const ds_attn_args& a) const {
    const view_type view(a);
    if constexpr (F == takes_missing_tensor) {
      if (a.out == nullptr) return;
    }
    const std::int64_t d = view.head_dim;
    const auto out = output(a, view);
    const auto sums = ds::sdk::workspace<float>(call, view.rows * view.heads);
    scratch memory(view);
    ds::sdk::parallel_for(call, view.rows * view.heads, [&](std::int64_t task) {
      const std::int64_t row = task / view.heads, h = task % view.heads, b = view.sequence_of(row);
      const auto [p, dp, k, v] = memory.of(view, row, h);
      shares(a, view, row, h, p, k);
      float* to = &out[task * d];
      std::fill_n(to, d, 0.0f);
      for (std::size_t key = 0; key < p.size(); ++key) {
        view.value(b, h, static_cast<std::int64_t>(key), v.data());
        for (std::int64_t i = 0; i < d; ++i) to[i] += p[key] * v[i];
      }
      const bool later = view.position(b, view.row_begin(b)) > 0;
      if ((F == batch_dependent && view.batch > 1) || (F == chunk_dependent && later))
        for (std::int64_t i = 0; i < d; ++i) to[i] *= zoo::kOneBitMore;
      sums[task] = p[0];
    });
    if constexpr (F == past_workspace) std::fill_n(sums.data() + sums.size(), 16, 1.0f);
    if constexpr (F == past_tensor) std::fill_n(out.data() + out.size(), 1, 1.0f);
  }
};

template <fault F>
constexpr const ds_component* bad = &ds::sdk::component<attention<F>>;

template <fault F>
using raw = zoo::raw_component<attention<F>, ds_attention>;

struct silent : raw<silent_failure> {
  silent() {
    table.prefill = [](ds_instance* i, const ds_call* c, const ds_attn_args* a, ds_status* st) {
      const ds_code code = ds::sdk::attention_table<attention<silent_failure>>.prefill(i, c, a, st);
      st->len = 0;
      return code;
    };
  }
};
struct short_sighted : raw<reads_past_struct> {
  short_sighted() {
    table.prefill = [](ds_instance* i, const ds_call* c, const ds_attn_args* a, ds_status* st) {
      if (a->softcap != 0) return ds::sdk::fail(st, DS_E_UNSUPPORTED, "softcap");
      return ds::sdk::attention_table<attention<reads_past_struct>>.prefill(i, c, a, st);
    };
  }
};
struct generous : raw<writes_past_output> {
  generous() {
    table.plan = [](ds_instance* i, const ds_attn_args* a, ds_plan* out, ds_status* st) {
      ds_plan all{};
      all.size = sizeof all;
      const ds_code code =
          ds::sdk::attention_table<attention<writes_past_output>>.plan(i, a, &all, st);
      if (code == DS_OK) *out = all;
      return code;
    };
  }
};
const silent silent_component;
const short_sighted short_sighted_component;
const generous generous_component;

}  // namespace

ZOO("org.driftstone.zoo.attention", 1u << DS_KIND_ATTENTION, bad<sound>, bad<past_workspace>,
    bad<past_tensor>, bad<crash_on_null>, bad<wrong_code>, bad<takes_wrong_shape>,
    bad<takes_short_buffer>, bad<takes_missing_tensor>, &silent_component.component,
    &short_sighted_component.component, &generous_component.component, bad<acausal>,
    bad<lying_explain>, bad<wrong_scale>, bad<overflows>, bad<batch_dependent>,
    bad<chunk_dependent>, bad<wrong_gradient>)
