// SPDX-License-Identifier: Apache-2.0
// A trial: one operation of a kind in full (plan, allocate, run ...) on one instance, with
// everything that is handed to the plugin placed by the kit, so that one thing of it can be
// damaged.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check/fields.h"
#include "check/guarded.h"
#include "check/loaded_plugin.h"
#include "ds/plugin.h"

namespace ds::check {

enum class Harm {
  kNone,
  kCut,         ///< a struct says it is `bytes` long; behind that is 0x5a
  kCutAtGuard,  ///< the same; behind that is forbidden memory
  kZero,        ///< a struct of full length whose fields from `bytes` on are zero
  kRoom,        ///< an output struct has room for `bytes`; behind that is forbidden memory
  kNull,        ///< a tensor is NULL
  kDtype,       ///< a tensor has another dtype
  kShape,       ///< a tensor's last dimension is one more than its buffer has
  kShort,       ///< a tensor's buffer is one byte too short
};

struct Damage {
  Harm harm = Harm::kNone;
  size_t index = 0;  ///< of the struct, output or tensor, in the order of placing
  uint32_t bytes = 0;
};

struct TrialOptions {
  Damage damage;
  bool exact_workspace = false;  ///< as planned to the byte, between forbidden pages
  bool guard_buffers = false;    ///< the same for tensors
  int threads = 1;
  uint32_t cancel = 0;
  int64_t deadline_ns = 0;
  uint64_t seed = 7;
  uint64_t content = 1;  ///< seed of what the inputs hold
  int scale = 1;         ///< of the input's size
  int layer = 0;        ///< of the weight that a quantizer is shown, so that threads have their own
  bool empty = false;   ///< no rows, no text, no samples ...
  uint64_t refuse = 0;  ///< the number of the allocation inside the plugin's calls to refuse
};

struct PlacedStruct {
  std::string name;
  std::vector<uint32_t> ends;  ///< of its fields
  std::vector<std::byte> bytes;
};
struct PlacedTensor {
  std::string name;
  bool judged;  ///< the operation has to notice damage to it
};

class Trial {
 public:
  Trial(const ds_component& component, ds_instance* instance, const TrialOptions& options);
  ~Trial();
  Trial(const Trial&) = delete;

  // --- Placing ---
  template <class T>
  const T* give(const char* name, T value) {
    value.size = sizeof value;
    structs.push_back({name, {Fields<T>::ends.begin(), Fields<T>::ends.end()}, bytes_of(value)});
    return reinterpret_cast<const T*>(place(structs.back(), structs.size() - 1));
  }
  template <class T>
  T* take(const char* name) {
    T value{};
    value.size = sizeof value;
    outputs.push_back({name, {Fields<T>::ends.begin(), Fields<T>::ends.end()}, bytes_of(value)});
    return reinterpret_cast<T*>(place_output(outputs.back(), outputs.size() - 1));
  }
  /// What came back in `taken`, widened; also part of the output.
  template <class T>
  T taken(const T* from) {
    T out{};
    std::memcpy(&out, from, std::min<size_t>(from->size, sizeof out));
    add_output(&out, sizeof out);
    return out;
  }
  /// Whether an output was cut: its reader has nothing to go on with.
  bool room_was_cut() const { return options.damage.harm == Harm::kRoom; }

  /// A tensor over a copy of `bytes` (zeros if null).
  const ds_tensor* tensor(const char* name, ds_dtype dtype, std::vector<int64_t> shape,
                          const void* bytes, bool written = false, bool judged = true);
  template <class T>
  const ds_tensor* of(const char* name, ds_dtype dtype, std::vector<int64_t> shape,
                      const std::vector<T>& values) {
    return tensor(name, dtype, std::move(shape), values.data());
  }
  /// Memory that lives as long as the trial; 64-byte aligned.
  std::byte* memory(size_t bytes);
  /// The same as a plain buffer of an argument: guarded if the tensors are.
  std::byte* buffer(size_t bytes);
  const ds_call* call(uint64_t workspace_bytes, uint64_t step = 0);

  // --- Calling ---
  /// Runs one function of the plugin. False = it failed, or `stop` was asked for: end the trial.
  bool invoke(const std::string& what, const std::function<ds_code(ds_status*)>& f);
  void add_output(const void* bytes, size_t n);
  void add_output(const ds_tensor* t) { add_output(t->data, t->bytes); }
  void breaks(std::string what) {  ///< a broken promise that the operation itself noticed
    if (broken.empty()) broken = std::move(what);
  }

  // --- What it was made with, and what it gave ---
  const ds_component& component;
  ds_instance* instance;
  TrialOptions options;
  std::vector<PlacedStruct> structs, outputs;
  std::vector<PlacedTensor> tensors;
  std::vector<std::byte> output;
  std::string last_call;
  ds_code code = DS_OK;    ///< of the last call
  std::string text;        ///< of its status
  std::string bad_status;  ///< how a status broke its rules
  std::string broken;
  uint64_t allocations = 0;  ///< of the plugin during its calls on this thread
  bool refused = false;

  bool intact() const;  ///< the patterns around guarded memory

 private:
  template <class T>
  static std::vector<std::byte> bytes_of(const T& value) {
    const auto* begin = reinterpret_cast<const std::byte*>(&value);
    return {begin, begin + sizeof value};
  }
  std::byte* place(const PlacedStruct& item, size_t index);
  std::byte* place_output(const PlacedStruct& item, size_t index);

  std::deque<Guarded> memory_;
  struct Shape {
    std::vector<int64_t> sizes, strides;
    ds_tensor tensor;
  };
  std::deque<Shape> shapes_;
  uint32_t cancel_;
  std::unique_ptr<class CheckPool> pool_;
};

/// One thing that a kind does. `offered`: the component has the functions for it.
struct Operation {
  const char* name;
  bool (*offered)(const ds_component&);
  void (*run)(Trial&);
};
std::vector<Operation> operations_of(const ds_component& component);

inline std::vector<float> floats_of(const ds_tensor* t) {
  const auto* begin = static_cast<const float*>(t->data);
  return {begin, begin + t->bytes / sizeof(float)};
}

constexpr ds_dtype kF32{DS_FLOAT, 32, 1}, kI32{DS_INT, 32, 1}, kU8{DS_UINT, 8, 1},
    kBf16{DS_BFLOAT, 16, 1};

}  // namespace ds::check
