// SPDX-License-Identifier: Apache-2.0
// C++20 over ds/plugin.h: write a class, name it in DS_PLUGIN(...), done. The class lives wholly
// inside the plugin; nothing of C++ crosses the boundary. Which kind it is follows from its members
// (the concepts in ds/plugin_kinds.hpp); members beyond the required ones are found by name.
//
//   struct my_tool {
//     static constexpr std::string_view name = "my-tool";
//     explicit my_tool(ds::sdk::context) {}
//     std::string invoke(const ds_call&, std::string_view arguments) { return "{}"; }
//   };
//   DS_PLUGIN("org.acme.my-tool", "1.0.0", "Apache-2.0", my_tool)
//
// Failures are thrown: ds::sdk::error carries its ds_code, std::bad_alloc becomes DS_E_NOMEM,
// anything else DS_E_INTERNAL.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <concepts>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "ds/plugin.h"

#ifndef __cpp_exceptions
#error "ds/plugin.hpp needs exceptions; with -fno-exceptions write to the tables of ds/plugin.h"
#endif

namespace ds::sdk {

constexpr ds_str str(std::string_view s) { return {s.data(), s.size()}; }
constexpr std::string_view view(ds_str s) { return {s.ptr, static_cast<std::size_t>(s.len)}; }

struct error : std::exception {
  ds_code code;
  std::string text;
  error(ds_code c, std::string t) : code(c), text(std::move(t)) {}
  const char* what() const noexcept override { return text.c_str(); }
};

inline ds_code fail(ds_status* st, ds_code code, std::string_view text) noexcept {
  if (st == nullptr) return code;
  *st = {};
  st->code = code;
  std::size_t n = std::min(text.size(), sizeof st->text);
  while (n > 0 && n < text.size() && (text[n] & 0xc0) == 0x80) --n;  // no half of a UTF-8 character
  st->len = static_cast<std::uint32_t>(n);
  if (n > 0) std::memcpy(st->text, text.data(), n);
  return code;
}

/// The wall: every function handed to the host runs behind it.
template <class F>
ds_code guard(ds_status* st, F&& body) noexcept {
  try {
    std::forward<F>(body)();
    return DS_OK;
  } catch (const error& e) {
    return fail(st, e.code != DS_OK ? e.code : DS_E_INTERNAL, e.text);
  } catch (const std::bad_alloc&) {
    return fail(st, DS_E_NOMEM, "out of memory");
  } catch (const std::exception& e) {
    return fail(st, DS_E_INTERNAL, e.what());
  } catch (...) {
    return fail(st, DS_E_INTERNAL, "unknown exception");
  }
}

/// A struct from the other side in full: fields that its writer did not know are zero. Null = all
/// zero.
template <class T>
T widened(const T* from) {
  T out;
  if (from != nullptr && from->size >= sizeof out) {  // the usual case, a copy of constant size
    std::memcpy(&out, from, sizeof out);
  } else {
    std::memset(static_cast<void*>(&out), 0, sizeof out);
    if (from != nullptr) std::memcpy(&out, from, from->size);
  }
  out.size = sizeof out;
  return out;
}
/// Into a struct of the other side, no further than it reaches. Sets its size; the value's own is
/// not looked at.
template <class T>
void hand_out(const T& value, T* to) {
  if (to == nullptr) throw error(DS_E_ARG, "output is NULL");
  const std::uint32_t room = to->size;
  if (room < sizeof room)
    throw error(DS_E_ARG, "output: size is " + std::to_string(room) + " bytes");
  std::memcpy(to, &value, std::min<std::size_t>(room, sizeof value));
  to->size = std::min<std::uint32_t>(room, sizeof value);
}

// ---- Tensors ----

struct bf16 {
  std::uint16_t bits;
  explicit operator float() const {
    const std::uint32_t word = std::uint32_t{bits} << 16;
    float out;
    std::memcpy(&out, &word, sizeof out);
    return out;
  }
};

/// Storage only: pages and weights on a GPU.
struct f16 {
  std::uint16_t bits;
};

template <class T>
constexpr ds_dtype dtype_of() {
  using U = std::remove_const_t<T>;
  constexpr auto width = static_cast<std::uint8_t>(8 * sizeof(U));
  if constexpr (std::same_as<U, bf16>) {
    return {DS_BFLOAT, 16, 1};
  } else if constexpr (std::same_as<U, f16>) {
    return {DS_FLOAT, 16, 1};
  } else if constexpr (std::floating_point<U>) {
    return {DS_FLOAT, width, 1};
  } else if constexpr (std::signed_integral<U>) {
    return {DS_INT, width, 1};
  } else {
    static_assert(std::unsigned_integral<U>, "no ds_dtype for this type");
    return {DS_UINT, width, 1};
  }
}

inline std::string shape_text(const std::int64_t* shape, std::size_t n) {
  std::string out = "[";
  for (std::size_t i = 0; i < n; ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

/// What makes a tensor unusable to flat(): only called when something does.
[[noreturn, gnu::cold, gnu::noinline]] inline void refuse_flat(
    const ds_tensor* tensor, std::string_view name, ds_dtype want, bool writable,
    std::size_t element, std::initializer_list<std::int64_t> shape, std::int32_t device) {
  const auto refuse = [&](ds_code code, const std::string& why) {
    throw error(code, std::string(name) + ": " + why);
  };
  if (tensor == nullptr) refuse(DS_E_ARG, "missing");
  const ds_tensor& t = *tensor;
  if (t.dtype.code != want.code || t.dtype.bits != want.bits || t.dtype.lanes != 1)
    refuse(DS_E_DTYPE, "type code " + std::to_string(t.dtype.code) + " with " +
                           std::to_string(t.dtype.bits) + " bits, expected code " +
                           std::to_string(want.code) + " with " + std::to_string(want.bits));
  if (t.device.type == DS_DEV_CUDA && device != DS_DEV_CUDA)
    refuse(DS_E_DEVICE, "on a GPU, expected host memory");
  if (t.device.type != DS_DEV_CUDA && device == DS_DEV_CUDA)
    refuse(DS_E_DEVICE, "in host memory, expected a GPU's");
  if (t.packing != DS_PACK_NONE) refuse(DS_E_SHAPE, "packed, expected plain rows");
  if (writable && (t.flags & DS_T_READONLY) != 0) refuse(DS_E_ARG, "read-only");
  if (t.ndim < 0 || t.ndim > 8) refuse(DS_E_SHAPE, std::to_string(t.ndim) + " dimensions");
  const auto dims = static_cast<std::size_t>(t.ndim);
  bool fits = shape.size() == 0 || shape.size() == dims;
  for (std::size_t i = 0; fits && i < shape.size(); ++i)
    fits = shape.begin()[i] == -1 || shape.begin()[i] == t.shape[i];
  if (!fits)
    refuse(DS_E_SHAPE,
           shape_text(t.shape, dims) + ", expected " + shape_text(shape.begin(), shape.size()));
  std::int64_t count = 1;
  for (std::size_t i = dims; i-- > 0;) {
    if (t.shape[i] < 0 || (t.shape[i] > 1 && t.strides[i] != count))
      refuse(DS_E_SHAPE, "not contiguous");
    if (__builtin_mul_overflow(count, t.shape[i], &count)) refuse(DS_E_SHAPE, "shape overflows");
  }
  const auto n = static_cast<std::uint64_t>(count);
  if (t.byte_offset > t.bytes || n > (t.bytes - t.byte_offset) / element)
    refuse(DS_E_SHAPE, "buffer of " + std::to_string(t.bytes) + " bytes is too small");
  throw error(DS_E_ARG, std::string(name) + ": no data");
}

/// Elements of a contiguous tensor of T, checked: type, device, writability, bounds. `shape`, if
/// given, must be the tensor's; -1 in it fits any size. `device` DS_DEV_CUDA: it must be in a GPU's
/// memory, which only kernels can read; else it must be in the host's.
template <class T>
std::span<T> flat(const ds_tensor* tensor, std::string_view name,
                  std::initializer_list<std::int64_t> shape = {},
                  std::int32_t device = DS_DEV_CPU) {
  constexpr ds_dtype want = dtype_of<T>();
  constexpr bool writable = !std::is_const_v<T>;
  const auto refuse = [&] { refuse_flat(tensor, name, want, writable, sizeof(T), shape, device); };
  if (tensor == nullptr) refuse();
  const ds_tensor& t = *tensor;
  const auto dims = static_cast<std::size_t>(t.ndim);
  if (t.dtype.code != want.code || t.dtype.bits != want.bits || t.dtype.lanes != 1 ||
      (t.device.type == DS_DEV_CUDA) != (device == DS_DEV_CUDA) || t.packing != DS_PACK_NONE ||
      (writable && (t.flags & DS_T_READONLY) != 0) || dims > 8 ||
      (shape.size() != 0 && shape.size() != dims))
    refuse();
  std::int64_t count = 1;
  for (std::size_t i = dims; i-- > 0;) {
    const std::int64_t size = t.shape[i];
    const bool fits = shape.size() == 0 || shape.begin()[i] == -1 || shape.begin()[i] == size;
    if (!fits || size < 0 || (size > 1 && t.strides[i] != count) ||
        __builtin_mul_overflow(count, size, &count))
      refuse();
  }
  const auto n = static_cast<std::uint64_t>(count);
  if (t.byte_offset > t.bytes || n > (t.bytes - t.byte_offset) / sizeof(T) ||
      (n > 0 && t.data == nullptr))
    refuse();
  return {reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset),
          static_cast<std::size_t>(n)};
}

template <class T>
std::span<T> flat(const ds_tensor& tensor, std::string_view name,
                  std::initializer_list<std::int64_t> shape = {},
                  std::int32_t device = DS_DEV_CPU) {
  return flat<T>(&tensor, name, shape, device);
}

/// Size of dimension i of a tensor with `ndim` dimensions.
inline std::int64_t dim(const ds_tensor* t, std::string_view name, std::int32_t ndim,
                        std::int32_t i) {
  if (t == nullptr) throw error(DS_E_ARG, std::string(name) + ": missing");
  if (t->ndim != ndim)
    throw error(DS_E_SHAPE, std::string(name) + ": " + std::to_string(t->ndim) +
                                " dimensions, expected " + std::to_string(ndim));
  return t->shape[i];
}

// ---- The host ----

/// A byte stream of the host's as a function; throws what the host returns.
inline void write(const ds_sink* sink, std::string_view bytes) {
  if (sink == nullptr) throw error(DS_E_ARG, "no sink");
  if (const ds_code code = sink->write(sink->ctx, bytes.data(), bytes.size()))
    throw error(code, "sink refused");
}
inline std::string read_all(const ds_source* source) {
  if (source == nullptr) throw error(DS_E_ARG, "no source");
  std::string out;
  char piece[4096];
  for (std::uint64_t got = 0;; out.append(piece, got)) {
    if (const ds_code code = source->read(source->ctx, piece, sizeof piece, &got))
      throw error(code, "source failed");
    if (got == 0) return out;
    if (got > sizeof piece) throw error(DS_E_STATE, "source gave more than asked");
  }
}

/// Runs f(i) for each i in [0, count) on the host's pool. The index, never the thread, decides what
/// a task computes. The first exception of a task is thrown here after all have ended.
template <class F>
void parallel_for(const ds_call& call, std::int64_t count, F&& f) {
  struct Box {
    std::remove_reference_t<F>* f;
    std::exception_ptr thrown;
    std::atomic_flag caught;
  } box{&f, {}, {}};
  const ds_task_fn task = [](void* user, std::int64_t i) {
    auto* b = static_cast<Box*>(user);
    try {
      (*b->f)(i);
    } catch (...) {
      if (!b->caught.test_and_set()) b->thrown = std::current_exception();
    }
  };
  if (call.parallel != nullptr) {
    call.parallel->run(call.parallel->ctx, count, task, &box);
  } else {
    for (std::int64_t i = 0; i < count; ++i) task(&box, i);
  }
  if (box.thrown) std::rethrow_exception(box.thrown);
}

/// Throws when the host has asked to stop. Cheap: call it between pieces of work.
inline void check_cancelled(const ds_call& call) {
  if (call.cancel != nullptr && __atomic_load_n(call.cancel, __ATOMIC_RELAXED) != 0)
    throw error(DS_E_CANCELLED, "cancelled by the host");
}

/// What a component is created with.
struct context {
  const ds_host* host = nullptr;
  const ds_config* config = nullptr;
  ds_device device{DS_DEV_CPU, 0};

  /// A key of the config, or `otherwise` if it has neither a value nor a default in the schema.
  std::int64_t get(const char* path, std::integral auto otherwise) const {
    auto out = static_cast<std::int64_t>(otherwise);
    if (config != nullptr && DS_HAS(ds_host, host, config_int))
      (void)host->config_int(config, path, &out);
    return out;
  }
  double get(const char* path, std::floating_point auto otherwise) const {
    auto out = static_cast<double>(otherwise);
    if (config != nullptr && DS_HAS(ds_host, host, config_number))
      (void)host->config_number(config, path, &out);
    return out;
  }
  std::string get(const char* path, std::string_view otherwise) const {
    ds_str out = str(otherwise);
    if (config != nullptr && DS_HAS(ds_host, host, config_text))
      (void)host->config_text(config, path, &out);
    return std::string(view(out));
  }
  void log(int level, std::string_view who, std::string_view text) const {
    if (!DS_HAS(ds_host, host, log)) return;
    if (DS_HAS(ds_host, host, log_enabled) && host->log_enabled(host->ctx, level) == 0) return;
    host->log(host->ctx, level, str(who), str(text));
  }
};

}  // namespace ds::sdk

#include "ds/plugin_kinds.hpp"
#include "ds/plugin_views.hpp"

namespace ds::sdk {

// ---- From a class to its component and its plugin ----

template <class T>
constexpr std::uint64_t caps_of() {
  std::uint64_t out = DS_CAP_CPU;
  if constexpr (requires { T::caps; }) out = T::caps;
  if constexpr (requires(T t) { t.save(); }) out |= DS_CAP_STATEFUL;
  if constexpr (requires(T t) { t.parameters(); }) out |= DS_CAP_TRAINABLE;
  return out;
}

template <class T>
ds_code create(const ds_host* host, const ds_config* config, ds_device device, ds_instance** out,
               ds_status* st) {
  return guard(st, [&] {
    if (out == nullptr) throw error(DS_E_ARG, "output is NULL");
    if ((caps_of<T>() & (device.type == DS_DEV_CUDA ? DS_CAP_CUDA : DS_CAP_CPU)) == 0)
      throw error(DS_E_DEVICE, "device type " + std::to_string(device.type) +
                                   ", not among the component's capabilities");
    *out = reinterpret_cast<ds_instance*>(new holder<T>(context{host, config, device}));
  });
}

/// destroy, and what else the class has of health(), reconfigure(context), save() -> std::string,
/// restore(bytes, version), stats() -> JSON, parameters() -> span, parameters_changed().
template <class T>
inline constexpr ds_instance_ops instance_ops = [] {
  ds_instance_ops o{};
  o.size = sizeof o;
  o.destroy = [](ds_instance* i) { delete reinterpret_cast<holder<T>*>(i); };
  if constexpr (requires(T t) { t.health(); })
    o.health = [](ds_instance* i, ds_status* st) {
      return guard(st, [&] { self<T>(i).health(); });
    };
  if constexpr (requires(T t, context c) { t.reconfigure(c); })
    o.reconfigure = [](ds_instance* i, const ds_config* c, ds_status* st) {
      return guard(st, [&] {
        context now = reinterpret_cast<holder<T>*>(i)->made_with;
        now.config = c;
        self<T>(i).reconfigure(now);
      });
    };
  if constexpr (requires(T t) { t.save(); })
    o.save = [](ds_instance* i, const ds_sink* sink, ds_status* st) {
      return guard(st, [&] { write(sink, self<T>(i).save()); });
    };
  if constexpr (requires(T t, std::string s, std::string_view v) { t.restore(s, v); })
    o.restore = [](ds_instance* i, const ds_source* source, ds_str by, ds_status* st) {
      return guard(st, [&] { self<T>(i).restore(read_all(source), view(by)); });
    };
  if constexpr (requires(T t) { t.stats(); })
    o.stats = [](ds_instance* i, const ds_sink* sink, ds_status* st) {
      return guard(st, [&] { write(sink, self<T>(i).stats()); });
    };
  if constexpr (requires(T t) { t.parameters(); })
    o.parameters = [](ds_instance* i, const ds_parameter* const** out, std::uint32_t* n,
                      ds_status* st) {
      return guard(st, [&] {
        const std::span<const ds_parameter* const> all = self<T>(i).parameters();
        *out = all.data();
        *n = static_cast<std::uint32_t>(all.size());
      });
    };
  if constexpr (requires(T t) { t.parameters_changed(); })
    o.parameters_changed = [](ds_instance* i, ds_status* st) {
      return guard(st, [&] { self<T>(i).parameters_changed(); });
    };
  return o;
}();

// GCC does not take the address of a function as constant under -fsanitize=undefined (bug 71962):
// then nothing is said here.
#define DS_SDK_FITS(table, member)                                                      \
  static_assert(                                                                        \
      !requires { &T::member; } || !__builtin_constant_p(table<T>.member != nullptr) || \
          table<T>.member != nullptr,                                                   \
      #member ": the class has it, but with another signature than the SDK calls")

/// An optional member that is slightly off would be passed over in silence: refuses it.
template <class T>
constexpr void check_optional_members() {
  DS_SDK_FITS(instance_ops, health);
  DS_SDK_FITS(instance_ops, reconfigure);
  DS_SDK_FITS(instance_ops, save);
  DS_SDK_FITS(instance_ops, restore);
  DS_SDK_FITS(instance_ops, stats);
  DS_SDK_FITS(instance_ops, parameters);
  DS_SDK_FITS(instance_ops, parameters_changed);
  if constexpr (kind_of<T>() == DS_KIND_ENCODER) {
    DS_SDK_FITS(encoder_table, backward);
  } else if constexpr (kind_of<T>() == DS_KIND_ATTENTION) {
    DS_SDK_FITS(attention_table, decode);
    DS_SDK_FITS(attention_table, backward);
    DS_SDK_FITS(attention_table, explain);
  } else if constexpr (kind_of<T>() == DS_KIND_QUANTIZER) {
    DS_SDK_FITS(quantizer_table, observe);
    DS_SDK_FITS(quantizer_table, plan);
    DS_SDK_FITS(quantizer_table, prepare);
    DS_SDK_FITS(quantizer_table, linear);
    DS_SDK_FITS(quantizer_table, fake_quant);
    DS_SDK_FITS(quantizer_table, fake_quant_backward);
  } else if constexpr (kind_of<T>() == DS_KIND_LEARNER) {
    DS_SDK_FITS(learner_table, round_begin);
    DS_SDK_FITS(learner_table, coefficients);
    DS_SDK_FITS(learner_table, combine);
    DS_SDK_FITS(learner_table, stepped);
    DS_SDK_FITS(learner_table, round_end);
    DS_SDK_FITS(learner_table, forget);
  } else if constexpr (kind_of<T>() == DS_KIND_CURRICULUM) {
    DS_SDK_FITS(curriculum_table, score);
    DS_SDK_FITS(curriculum_table, outcome);
  } else if constexpr (kind_of<T>() == DS_KIND_TOOL) {
    DS_SDK_FITS(tool_table, analyse);
    DS_SDK_FITS(tool_table, invoke);
  }
}
#undef DS_SDK_FITS

template <class T>
inline constexpr ds_component component = [] {
  static_assert(
      kind_of<T>() != 0,
      "this class is none of encoder, attention, quantizer, learner, curriculum, retriever, tool: "
      "static_assert(ds::sdk::quantizer<your_class>) says what it lacks for one of them");
  check_optional_members<T>();
  ds_component c{};
  c.size = sizeof c;
  c.kind = kind_of<T>();
  c.name = str(T::name);
  if constexpr (requires { T::summary; }) c.summary = str(T::summary);
  if constexpr (requires { T::config_schema; }) c.config_schema = str(T::config_schema);
  c.caps = caps_of<T>();
  if constexpr (requires { T::min_sm; }) c.min_sm = T::min_sm;
  if constexpr (requires { T::min_host_minor; }) c.min_host_minor = T::min_host_minor;
  c.create = &create<T>;
  c.ops = &instance_ops<T>;
  c.table = table_of<T>();
  return c;
}();

template <class... T>
struct plugin {
  static constexpr std::array<const ds_component*, sizeof...(T)> list{&component<T>...};
  static constexpr ds_plugin make(std::string_view id, std::string_view version,
                                  std::string_view license) {
    ds_plugin p{};
    p.size = sizeof p;
    p.abi_minor = DS_ABI_MINOR;
    p.id = str(id);
    p.version = str(version);
    p.license = str(license);
    p.component_count = sizeof...(T);
    p.components = list.data();
    return p;
  }
  static constexpr std::uint32_t kinds() { return ((1u << kind_of<T>()) | ...); }
};

template <std::size_t N>
constexpr ds_note note(const char (&id)[N], std::uint32_t kinds) {
  static_assert(N <= 96, "the plugin's id is too long: at most 95 bytes");
  ds_note n{12 - 1,
            112,
            1,
            {'D', 'r', 'i', 'f', 't', 's', 't', 'o', 'n', 'e'},
            DS_ABI_MAJOR,
            DS_ABI_MINOR,
            kinds,
            DS_CPU_BUILT_FOR,
            {}};
  for (std::size_t i = 0; i < N; ++i) n.id[i] = id[i];
  return n;
}

}  // namespace ds::sdk

/// DS_PLUGIN("org.acme.nf4", "1.2.0", "Apache-2.0", class...): the note and the one exported
/// symbol.
#define DS_PLUGIN(ID, VERSION, LICENSE, ...)                                                      \
  __attribute__((section(".note.driftstone"), used,                                               \
                 aligned(4))) static constexpr ds_note ds_note_ =                                 \
      ::ds::sdk::note(ID, ::ds::sdk::plugin<__VA_ARGS__>::kinds());                               \
  extern "C" DS_EXPORT ds_code ds_plugin_entry_v1(const ds_host* host, const ds_plugin** out,     \
                                                  ds_status* st) {                                \
    static constexpr ds_plugin self = ::ds::sdk::plugin<__VA_ARGS__>::make(ID, VERSION, LICENSE); \
    if (host == nullptr || out == nullptr)                                                        \
      return ::ds::sdk::fail(st, DS_E_ARG, "no host or no output");                               \
    *out = &self;                                                                                 \
    return DS_OK;                                                                                 \
  }
