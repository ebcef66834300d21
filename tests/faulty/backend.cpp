// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/backend.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <string>

#include "kernels/buffer.h"
#include "tests/faulty/control.h"

namespace ds::test {
namespace {

FaultyControl& control() {
  static FaultyControl one;
  return one;
}

const Ops& cpu() { return cpu_ops(best_cpu_isa()); }

/// Sizes by address. What the device held is lost when it fails, and says so: NaN.
struct Memory {
  std::mutex mutex;
  std::map<void*, int64_t> sizes;
};
Memory& memory() {
  static auto* one = new Memory;  // static objects give back buffers while the process ends
  return *one;
}

constexpr int kJunk = 0xff;  // as FP32 and BF16: NaN

/// An op that computes. Memory must not turn to junk under one: the last to end sees to it. (To
/// wait for them would not do: those of the trainer wait for the engine's step.)
class Computing {
 public:
  Computing() { ++count_; }
  ~Computing() {
    if (--count_ == 0 && control().failed) lose_memory();
  }
  static void fail() {
    const Computing here;
    control().failed = true;
  }

 private:
  static void lose_memory() {
    const std::lock_guard lock(memory().mutex);
    for (const auto& [address, bytes] : memory().sizes)
      std::memset(address, kJunk, static_cast<size_t>(bytes));
  }
  static inline std::atomic<int> count_{0};
};

std::string told(const char* name) {
  static const char* const folder = std::getenv("DS_FAULTY_DEVICE");
  return folder == nullptr ? "" : std::string(folder) + "/" + name;
}

/// The nth of a countdown; it ends at 0.
bool reaches_zero(std::atomic<int64_t>& countdown) {
  return countdown.load() > 0 && countdown.fetch_sub(1) == 1;
}

/// Before each op. False: the device has failed, and the op does nothing.
bool computes() {
  if (control().failed) return false;
  ++control().calls;
  if (!reaches_zero(control().fail_at_call)) return true;
  Computing::fail();
  return false;
}

const Ops& original(const Ops*) { return cpu(); }
const QuantOps& original(const QuantOps*) { return cpu_quant_ops(best_cpu_isa()); }

template <auto Member>
struct Through;
template <typename Table, typename Return, typename... Rest,
          Return (*Table::*Member)(const OpContext&, Rest...)>
struct Through<Member> {
  static Return call(const OpContext& context, Rest... rest) {
    if (!computes()) return Return();
    const Computing here;
    if (control().failed) return Return();
    return (original(static_cast<const Table*>(nullptr)).*Member)({context.parallel}, rest...);
  }
};

void* allocate(int64_t bytes) {
  FaultyControl& c = control();
  if (c.failed) return nullptr;
  ++c.allocations;
  int64_t limit = c.limit_bytes;
  if (const std::string file = told("memory"); limit == 0 && !file.empty())
    std::ifstream(file) >> limit;
  const bool refused = (bytes >= c.refuse_from_bytes && reaches_zero(c.refuse_at_allocation)) ||
                       (limit > 0 && c.bytes + bytes > limit);
  if (refused) {
    ++c.refused;
    return nullptr;
  }
  void* const out = cpu().allocate(bytes);
  if (out == nullptr) return nullptr;
  std::memset(out, kJunk, static_cast<size_t>(bytes));
  c.bytes += bytes;
  const std::lock_guard lock(memory().mutex);
  memory().sizes[out] = bytes;
  return out;
}

void release(void* address) {
  if (address == nullptr) return;
  {
    const std::lock_guard lock(memory().mutex);
    const auto found = memory().sizes.find(address);
    control().bytes -= found->second;
    memory().sizes.erase(found);
  }
  cpu().release(address);
}

const char* finish(const OpContext&) {
  if (const std::string file = told("fault"); !file.empty() && unlink(file.c_str()) == 0)
    Computing::fail();
  return control().failed ? "an illegal address, as the test wants" : nullptr;
}

/// A GPU's embedding is plain rows, as plugins are told; panels look like them where the rows are a
/// multiple of 16 and nobody reads one alone.
int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return n == 1 ? k * (format == WeightFormat::kBF16 ? 2 : 4) : cpu().packed_bytes(format, n, k);
}

/// What tests/faulty/breaker.cpp calls to break a GPU breaks this one.
void relu(const OpContext& context, int64_t n, float* x) {
  constexpr uintptr_t kNowhere = 4096;
  if (reinterpret_cast<uintptr_t>(x) < kNowhere) return Computing::fail();
  Through<&Ops::relu>::call(context, n, x);
}

/// Nobody asks for prepared rows, which the CPU's ops give beside FP32 alone.
int64_t prepared_bytes(WeightFormat, int64_t, int64_t) { return 0; }

void linear(const OpContext& context, const LinearArgs& args) {
  LinearArgs with = args;
  const WeightView& w = args.w[0];
  const int64_t bytes = cpu().prepared_bytes(w.format, args.rows, w.k);
  const Buffer prepared(static_cast<size_t>(bytes));
  if (bytes > 0) {
    const Computing here;
    cpu().prepare({context.parallel}, args.rows, w.k, args.x, args.x_stride,
                  {prepared.data(), w.format});
    with.x_prepared = prepared.data();
  }
  Through<&Ops::linear>::call(context, with);
}

bool begin_recording(const OpContext&) { return false; }

const Ops& table() {
  static const Ops made = [] {
    Ops t = cpu();
    t.name = "faulty";
    t.host_memory = false;
    t.allocate = t.allocate_pinned = allocate;
    t.release = t.release_pinned = release;
    t.finish = finish;
    t.begin_recording = begin_recording;
    t.relu = relu;
    t.packed_bytes = packed_bytes;
    t.prepared_bytes = prepared_bytes;
    t.linear = linear;
#define DS_THROUGH(op) t.op = Through<&Ops::op>::call
    DS_THROUGH(upload);
    DS_THROUGH(download);
    DS_THROUGH(copy);
    DS_THROUGH(zero);
    DS_THROUGH(pack);
    DS_THROUGH(unpack);
    DS_THROUGH(pack_all);
    DS_THROUGH(pack_factors);
    DS_THROUGH(outer_accumulate);
    DS_THROUGH(rmsnorm);
    DS_THROUGH(rmsnorm_backward);
    DS_THROUGH(rope_append);
    DS_THROUGH(rope);
    DS_THROUGH(attention);
    DS_THROUGH(attention_train);
    DS_THROUGH(attention_train_backward);
    DS_THROUGH(choose_keys);
    DS_THROUGH(choose_train_keys);
    DS_THROUGH(attention_selected);
    DS_THROUGH(attention_selected_train);
    DS_THROUGH(attention_selected_train_backward);
    DS_THROUGH(swiglu);
    DS_THROUGH(swiglu_backward);
    DS_THROUGH(embed);
    DS_THROUGH(gather_rows);
    DS_THROUGH(scatter_rows);
    DS_THROUGH(embed_backward);
    DS_THROUGH(sample);
    DS_THROUGH(cross_entropy);
    DS_THROUGH(kl_topk);
    DS_THROUGH(adamw);
    DS_THROUGH(dot);
    DS_THROUGH(axpby);
    DS_THROUGH(multiply_add);
#undef DS_THROUGH
    return t;
  }();
  return made;
}

const QuantOps& quant_table() {
  static const QuantOps made = [] {
    QuantOps t = cpu_quant_ops(best_cpu_isa());
    t.dequantize = Through<&QuantOps::dequantize>::call;
    t.prepare = Through<&QuantOps::prepare>::call;
    t.linear = Through<&QuantOps::linear>::call;
    return t;
  }();
  return made;
}

constexpr int kStreams = 64;
char streams[kStreams];

/// Addresses are all that is asked of them.
void* stream_create(bool) {
  static std::atomic<int> next{0};
  return control().failed ? nullptr : &streams[next++ % kStreams];
}

}  // namespace
}  // namespace ds::test

extern "C" __attribute__((visibility("default"))) ds::test::FaultyControl* ds_faulty_control() {
  return &ds::test::control();
}

extern "C" __attribute__((visibility("default"))) const ds::CudaBackend* ds_cuda_backend() {
  using namespace ds::test;
  static const ds::CudaBackend backend = {
      .build_id = DS_BUILD_ID,
      .ops = &table(),
      .quant = &quant_table(),
      .device_count = [] { return 1; },
      .device_name = [](int) { return "a faulty device"; },
      .compute_capability = [](int) { return 90; },
      .open = [](int) -> const char* { return nullptr; },
      .memory = [](int64_t* free_bytes, int64_t* total) { *free_bytes = *total = 0; },
      .allocate_shared = allocate,
      .stream_create = stream_create,
      .native_stream = [](void* stream) { return stream; },
      .stream_destroy = [](void*) {},
      .stream_give_way = [](void*, ds::StreamGate) -> const char* { return nullptr; }};
  return &backend;
}
