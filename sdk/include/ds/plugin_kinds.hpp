// SPDX-License-Identifier: Apache-2.0
// Part of ds/plugin.hpp: the seven kinds as concepts, and the tables made from classes that meet
// them. Arguments arrive widened (fields that an older host does not know are zero); nested structs
// are widened by whoever reads them: sdk::widened(args.kv).
#pragma once

#ifndef DS_PLUGIN_H
#error "include ds/plugin.hpp"
#endif

namespace ds::sdk {

/// What a ds_instance* points to.
template <class T>
struct holder {
  explicit holder(context c) : made_with(c), value(c) {}
  context made_with;
  T value;
};
template <class T>
T& self(ds_instance* i) {
  return reinterpret_cast<holder<T>*>(i)->value;
}

template <class T>
concept component_class = std::constructible_from<T, context> && requires {
  { T::name } -> std::convertible_to<std::string_view>;
};

/// static modalities (bits 1 << DS_MOD_x), plan, encode; opt. backward, static tensor_names (ds_str
/// array).
template <class T>
concept encoder = component_class<T> && requires(T t, const ds_call& c, const ds_encode_args& a) {
  { T::modalities } -> std::convertible_to<std::uint32_t>;
  { t.plan(a) } -> std::same_as<ds_plan>;
  t.encode(c, a);
};

/// plan, prefill; opt. decode, backward, explain(call, args, read), static flags (DS_ATTENTION_x).
template <class T>
concept attention = component_class<T> && requires(T t, const ds_call& c, const ds_attn_args& a) {
  { t.plan(a) } -> std::same_as<ds_plan>;
  t.prefill(c, a);
};

/// format, quantize, dequantize; opt. observe, plan, prepare, linear, fake_quant,
/// fake_quant_backward.
template <class T>
concept quantizer = component_class<T> &&
    requires(T t, const ds_call& c, std::string_view s, const ds_tensor& w, const ds_qweight& q) {
  { t.format(std::int64_t{}, std::int64_t{}) } -> std::same_as<ds_qformat>;
  t.quantize(c, s, w, q);
  t.dequantize(c, q, w);
};

/// draws(call, samples, emit); opt. round_begin, coefficients, combine, stepped, round_end, forget.
template <class T>
concept learner = component_class<T> &&
    requires(T t, const ds_call& c, std::span<const ds_sample> s) {
  t.draws(c, s, [](const ds_draw&) {});
};

/// pick(call, samples, budget) -> keys; opt. score, outcome.
template <class T>
concept curriculum = component_class<T> &&
    requires(T t, const ds_call& c, std::span<const ds_sample> s) {
  { t.pick(c, s, std::uint64_t{}) } -> std::convertible_to<std::vector<std::uint64_t>>;
};

/// What fetch() gives.
struct document {
  std::string text, meta_json;
};
/// put, erase, commit, search -> hits, fetch -> document.
template <class T>
concept retriever = component_class<T> &&
    requires(T t, const ds_call& c, std::string_view s, const ds_tensor* e) {
  t.put(std::uint64_t{}, s, e, s);
  t.erase(std::span<const std::uint64_t>{});
  { t.commit() } -> std::convertible_to<std::uint64_t>;
  { t.search(c, s, e, s, std::uint64_t{}) } -> std::convertible_to<std::vector<ds_hit>>;
  { t.fetch(std::uint64_t{}) } -> std::same_as<document>;
};

/// analyse(call, language, path, text, emit) or invoke(call, json) -> json, or both.
template <class T>
concept analyser = requires(T t, const ds_call& c, std::string_view s) {
  t.analyse(c, s, s, s, [](const ds_finding&) {});
};
template <class T>
concept invocable_tool = requires(T t, const ds_call& c, std::string_view s) {
  { t.invoke(c, s) } -> std::convertible_to<std::string>;
};
template <class T>
concept tool = component_class<T> &&(analyser<T> || invocable_tool<T>);

template <class T>
constexpr std::uint32_t kind_of() {
  if constexpr (encoder<T>)
    return DS_KIND_ENCODER;
  else if constexpr (attention<T>)
    return DS_KIND_ATTENTION;
  else if constexpr (quantizer<T>)
    return DS_KIND_QUANTIZER;
  else if constexpr (learner<T>)
    return DS_KIND_LEARNER;
  else if constexpr (curriculum<T>)
    return DS_KIND_CURRICULUM;
  else if constexpr (retriever<T>)
    return DS_KIND_RETRIEVER;
  else if constexpr (tool<T>)
    return DS_KIND_TOOL;
  else
    return 0;
}

template <class T>
inline constexpr ds_encoder encoder_table = [] {
  ds_encoder v{};
  v.size = sizeof v;
  v.modalities = T::modalities;
  if constexpr (requires { T::tensor_names; }) {
    v.tensor_names = T::tensor_names.data();
    v.tensor_count = static_cast<std::uint32_t>(T::tensor_names.size());
  }
  v.plan = [](ds_instance* i, const ds_encode_args* a, ds_plan* out, ds_status* st) {
    return guard(st, [&] { hand_out(self<T>(i).plan(widened(a)), out); });
  };
  v.encode = [](ds_instance* i, const ds_call* c, const ds_encode_args* a, ds_status* st) {
    return guard(st, [&] { self<T>(i).encode(widened(c), widened(a)); });
  };
  if constexpr (requires(T t, const ds_call& c, const ds_encode_args& a) { t.backward(c, a); })
    v.backward = [](ds_instance* i, const ds_call* c, const ds_encode_args* a, ds_status* st) {
      return guard(st, [&] { self<T>(i).backward(widened(c), widened(a)); });
    };
  return v;
}();

template <class T>
inline constexpr ds_attention attention_table = [] {
  ds_attention v{};
  v.size = sizeof v;
  if constexpr (requires { T::flags; }) v.flags = T::flags;
  v.plan = [](ds_instance* i, const ds_attn_args* a, ds_plan* out, ds_status* st) {
    return guard(st, [&] { hand_out(self<T>(i).plan(widened(a)), out); });
  };
  v.prefill = [](ds_instance* i, const ds_call* c, const ds_attn_args* a, ds_status* st) {
    return guard(st, [&] { self<T>(i).prefill(widened(c), widened(a)); });
  };
  if constexpr (requires(T t, const ds_call& c, const ds_attn_args& a) { t.decode(c, a); })
    v.decode = [](ds_instance* i, const ds_call* c, const ds_attn_args* a, ds_status* st) {
      return guard(st, [&] { self<T>(i).decode(widened(c), widened(a)); });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_attn_args& a) { t.backward(c, a); })
    v.backward = [](ds_instance* i, const ds_call* c, const ds_attn_args* a, ds_status* st) {
      return guard(st, [&] { self<T>(i).backward(widened(c), widened(a)); });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_attn_args& a, const ds_tensor& r) {
                  t.explain(c, a, r);
                })
    v.explain = [](ds_instance* i, const ds_call* c, const ds_attn_args* a, const ds_tensor* read,
                   ds_status* st) {
      return guard(st, [&] {
        if (read == nullptr) throw error(DS_E_ARG, "read: missing");
        self<T>(i).explain(widened(c), widened(a), *read);
      });
    };
  return v;
}();

/// Both tensors of a call that may not be NULL.
template <class F>
void with_pair(const ds_tensor* a, const ds_tensor* b, F&& f) {
  if (a == nullptr || b == nullptr) throw error(DS_E_ARG, "a tensor is missing");
  f(*a, *b);
}

template <class T>
constexpr void add_training(ds_quantizer& v) {
  if constexpr (requires(T t, const ds_call& c, const ds_tensor& w) { t.fake_quant(c, w, w); })
    v.fake_quant = [](ds_instance* i, const ds_call* c, const ds_tensor* w, const ds_tensor* wq,
                      ds_status* st) {
      return guard(st, [&] {
        with_pair(w, wq,
                  [&](auto& from, auto& to) { self<T>(i).fake_quant(widened(c), from, to); });
      });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_tensor& w) {
                  t.fake_quant_backward(c, w, w, w);
                })
    v.fake_quant_backward = [](ds_instance* i, const ds_call* c, const ds_tensor* w,
                               const ds_tensor* dwq, const ds_tensor* dw, ds_status* st) {
      return guard(st, [&] {
        if (w == nullptr) throw error(DS_E_ARG, "w: missing");
        with_pair(dwq, dw, [&](auto& from, auto& to) {
          self<T>(i).fake_quant_backward(widened(c), *w, from, to);
        });
      });
    };
}

template <class T>
constexpr void add_linear(ds_quantizer& v) {
  if constexpr (requires(T t, const ds_qformat& f) { t.plan(f, std::int64_t{}, std::int64_t{}); })
    v.plan = [](ds_instance* i, const ds_qformat* f, std::int64_t rows, std::int64_t k,
                ds_plan* out, ds_status* st) {
      return guard(st, [&] { hand_out(self<T>(i).plan(widened(f), rows, k), out); });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_qformat& f, const float* x, void* p) {
                  t.prepare(c, f, std::int64_t{}, std::int64_t{}, x, std::int64_t{}, p);
                })
    v.prepare = [](ds_instance* i, const ds_call* c, const ds_qformat* f, std::int64_t rows,
                   std::int64_t k, const float* x, std::int64_t stride, void* prepared,
                   ds_status* st) {
      return guard(
          st, [&] { self<T>(i).prepare(widened(c), widened(f), rows, k, x, stride, prepared); });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_linear_args& a) { t.linear(c, a); })
    v.linear = [](ds_instance* i, const ds_call* c, const ds_linear_args* a, ds_status* st) {
      return guard(st, [&] { self<T>(i).linear(widened(c), widened(a)); });
    };
}

template <class T>
inline constexpr ds_quantizer quantizer_table = [] {
  ds_quantizer v{};
  v.size = sizeof v;
  v.format = [](ds_instance* i, std::int64_t n, std::int64_t k, ds_qformat* out, ds_status* st) {
    return guard(st, [&] {
      if (n <= 0 || k <= 0)
        throw error(DS_E_SHAPE, "weight " + std::to_string(n) + " x " + std::to_string(k) +
                                    ", expected positive sizes");
      hand_out(self<T>(i).format(n, k), out);
    });
  };
  if constexpr (requires(T t, const ds_call& c, std::string_view s, const ds_tensor& x) {
                  t.observe(c, s, x);
                })
    v.observe = [](ds_instance* i, const ds_call* c, ds_str name, const ds_tensor* x,
                   ds_status* st) {
      return guard(st, [&] {
        if (x == nullptr) throw error(DS_E_ARG, "x: missing");
        self<T>(i).observe(widened(c), view(name), *x);
      });
    };
  v.quantize = [](ds_instance* i, const ds_call* c, ds_str name, const ds_tensor* w,
                  const ds_qweight* out, ds_status* st) {
    return guard(st, [&] {
      if (w == nullptr || out == nullptr) throw error(DS_E_ARG, "w or out: missing");
      self<T>(i).quantize(widened(c), view(name), *w, widened(out));
    });
  };
  v.dequantize = [](ds_instance* i, const ds_call* c, const ds_qweight* q, const ds_tensor* w,
                    ds_status* st) {
    return guard(st, [&] {
      if (w == nullptr || q == nullptr) throw error(DS_E_ARG, "q or w: missing");
      self<T>(i).dequantize(widened(c), widened(q), *w);
    });
  };
  add_linear<T>(v);
  add_training<T>(v);
  return v;
}();

/// Passes on to a C callback what a method emits.
template <class Item>
auto emitter(void* ctx, ds_code (*emit)(void*, const Item*)) {
  return [ctx, emit](Item item) {
    item.size = sizeof item;
    if (const ds_code code = emit(ctx, &item)) throw error(code, "the host took no more");
  };
}

template <class T>
constexpr void add_learner_extras(ds_learner& v) {
  if constexpr (requires(T t, const ds_call& c, const ds_vectors& x) { t.combine(c, x); })
    v.combine = [](ds_instance* i, const ds_call* c, const ds_vectors* x, ds_status* st) {
      return guard(st, [&] { self<T>(i).combine(widened(c), widened(x)); });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_vectors& x, const ds_step_report& r) {
                  t.stepped(c, x, r);
                })
    v.stepped = [](ds_instance* i, const ds_call* c, const ds_vectors* x, const ds_step_report* r,
                   ds_status* st) {
      return guard(st, [&] { self<T>(i).stepped(widened(c), widened(x), widened(r)); });
    };
  if constexpr (requires(T t, const ds_call& c, const ds_vectors& x) { t.round_end(c, x); })
    v.round_end = [](ds_instance* i, const ds_call* c, const ds_vectors* x, ds_status* st) {
      return guard(st, [&] { self<T>(i).round_end(widened(c), widened(x)); });
    };
  if constexpr (requires(T t, std::span<const std::uint64_t> keys) { t.forget(keys); })
    v.forget = [](ds_instance* i, const std::uint64_t* keys, std::uint64_t n, ds_status* st) {
      return guard(st, [&] { self<T>(i).forget({keys, static_cast<std::size_t>(n)}); });
    };
}

template <class T>
inline constexpr ds_learner learner_table = [] {
  ds_learner v{};
  v.size = sizeof v;
  if constexpr (requires(T t, const ds_round& r) { t.round_begin(r); })
    v.round_begin = [](ds_instance* i, const ds_round* r, ds_status* st) {
      return guard(st, [&] { self<T>(i).round_begin(widened(r)); });
    };
  v.draws = [](ds_instance* i, const ds_call* c, const ds_sample* s, std::uint64_t n, void* ctx,
               ds_code (*emit)(void*, const ds_draw*), ds_status* st) {
    return guard(st, [&] {
      self<T>(i).draws(widened(c), std::span(s, static_cast<std::size_t>(n)),
                       emitter<ds_draw>(ctx, emit));
    });
  };
  if constexpr (requires(T t, const ds_call& c, std::span<const ds_sequence_stat> s,
                         std::span<double> o) { t.coefficients(c, s, o); })
    v.coefficients = [](ds_instance* i, const ds_call* c, const ds_sequence_stat* s,
                        std::uint64_t n, double* out, ds_status* st) {
      return guard(st, [&] {
        const auto count = static_cast<std::size_t>(n);
        self<T>(i).coefficients(widened(c), std::span(s, count), std::span(out, count));
      });
    };
  add_learner_extras<T>(v);
  return v;
}();

template <class T>
inline constexpr ds_curriculum curriculum_table = [] {
  ds_curriculum v{};
  v.size = sizeof v;
  v.pick = [](ds_instance* i, const ds_call* c, const ds_sample* s, std::uint64_t n,
              std::uint64_t budget, std::uint64_t* keys, std::uint64_t* n_keys, ds_status* st) {
    return guard(st, [&] {
      const std::vector<std::uint64_t> out =
          self<T>(i).pick(widened(c), std::span(s, static_cast<std::size_t>(n)), budget);
      if (out.size() > budget) throw error(DS_E_INTERNAL, "picked more than the budget");
      std::copy(out.begin(), out.end(), keys);
      *n_keys = out.size();
    });
  };
  if constexpr (requires(T t, const ds_call& c, std::span<const ds_sample> s, std::span<float> o) {
                  t.score(c, s, o);
                })
    v.score = [](ds_instance* i, const ds_call* c, const ds_sample* s, std::uint64_t n, float* out,
                 ds_status* st) {
      return guard(st, [&] {
        const auto count = static_cast<std::size_t>(n);
        self<T>(i).score(widened(c), std::span(s, count), std::span(out, count));
      });
    };
  if constexpr (requires(T t, std::span<const ds_sample> s) { t.outcome(s); })
    v.outcome = [](ds_instance* i, const ds_sample* s, std::uint64_t n, ds_status* st) {
      return guard(st, [&] { self<T>(i).outcome({s, static_cast<std::size_t>(n)}); });
    };
  return v;
}();

template <class T>
inline constexpr ds_retriever retriever_table = [] {
  ds_retriever v{};
  v.size = sizeof v;
  v.put = [](ds_instance* i, std::uint64_t id, ds_str text, const ds_tensor* e, ds_str meta,
             ds_status* st) {
    return guard(st, [&] { self<T>(i).put(id, view(text), e, view(meta)); });
  };
  v.erase = [](ds_instance* i, const std::uint64_t* ids, std::uint64_t n, ds_status* st) {
    return guard(st, [&] { self<T>(i).erase({ids, static_cast<std::size_t>(n)}); });
  };
  v.commit = [](ds_instance* i, std::uint64_t* version, ds_status* st) {
    return guard(st, [&] {
      const std::uint64_t now = self<T>(i).commit();
      if (version != nullptr) *version = now;
    });
  };
  v.search = [](ds_instance* i, const ds_call* c, ds_str text, const ds_tensor* e, ds_str filter,
                ds_hit* out, std::uint64_t max, std::uint64_t* n, ds_status* st) {
    return guard(st, [&] {
      const std::vector<ds_hit> hits =
          self<T>(i).search(widened(c), view(text), e, view(filter), max);
      *n = std::min<std::uint64_t>(hits.size(), max);
      std::copy_n(hits.begin(), *n, out);
    });
  };
  v.fetch = [](ds_instance* i, std::uint64_t id, const ds_sink* text, const ds_sink* meta,
               ds_status* st) {
    return guard(st, [&] {
      const document found = self<T>(i).fetch(id);
      if (text != nullptr) write(text, found.text);
      if (meta != nullptr) write(meta, found.meta_json);
    });
  };
  return v;
}();

template <class T>
inline constexpr ds_tool tool_table = [] {
  ds_tool v{};
  v.size = sizeof v;
  if constexpr (requires { T::input_schema; }) v.input_schema = str(T::input_schema);
  if constexpr (analyser<T>)
    v.analyse = [](ds_instance* i, const ds_call* c, ds_str language, ds_str path, ds_str text,
                   void* ctx, ds_code (*emit)(void*, const ds_finding*), ds_status* st) {
      return guard(st, [&] {
        self<T>(i).analyse(widened(c), view(language), view(path), view(text),
                           emitter<ds_finding>(ctx, emit));
      });
    };
  if constexpr (invocable_tool<T>)
    v.invoke = [](ds_instance* i, const ds_call* c, ds_str arguments, const ds_sink* result,
                  ds_status* st) {
      return guard(
          st, [&] { write(result, std::string(self<T>(i).invoke(widened(c), view(arguments)))); });
    };
  return v;
}();

template <class T>
constexpr const void* table_of() {
  if constexpr (encoder<T>)
    return &encoder_table<T>;
  else if constexpr (attention<T>)
    return &attention_table<T>;
  else if constexpr (quantizer<T>)
    return &quantizer_table<T>;
  else if constexpr (learner<T>)
    return &learner_table<T>;
  else if constexpr (curriculum<T>)
    return &curriculum_table<T>;
  else if constexpr (retriever<T>)
    return &retriever_table<T>;
  else if constexpr (tool<T>)
    return &tool_table<T>;
  else
    return nullptr;
}

}  // namespace ds::sdk
