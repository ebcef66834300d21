// SPDX-License-Identifier: Apache-2.0
// The table, the one GPU of the process, its streams and its memory.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/quant.h"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kBuiltFor = 90;

/// Everything of the process. Never destroyed: threads may still run when static objects die, and
/// the driver may be gone by then.
struct Process {
  std::mutex mutex;
  std::atomic<int> device{-1};
  std::atomic<bool> failed{false};
  std::string failure;       ///< guarded until `failed`, then constant
  std::string open_failure;  ///< of the last open()
  std::vector<std::unique_ptr<StreamState>> streams;
};

Process& process() {
  // Never destroyed: threads and static objects may still give memory back while the process ends.
  alignas(Process) static std::byte room[sizeof(Process)];
  static Process* one = std::construct_at(reinterpret_cast<Process*>(room));
  return *one;
}

/// The current device is a thread's own.
bool make_current(int device) {
  thread_local int current = -1;
  if (current == device) return true;
  if (!check(cudaSetDevice(device), "choosing the GPU")) return false;
  current = device;
  return true;
}

StreamState* find_stream(void* stream) {
  Process& p = process();
  const std::lock_guard lock(p.mutex);
  for (const auto& s : p.streams) {
    if (s->id() == stream || (stream != nullptr && s->has(stream))) return s.get();
  }
  return nullptr;
}

StreamState* add_stream(cudaStream_t stream, bool owned, int priority) {
  auto state = std::make_unique<StreamState>(stream, owned, priority);
  if (!state->init()) return nullptr;
  Process& p = process();
  const std::lock_guard lock(p.mutex);
  p.streams.push_back(std::move(state));
  return p.streams.back().get();
}

}  // namespace

void fail(const std::string& what) {
  Process& p = process();
  const std::lock_guard lock(p.mutex);
  if (p.failed.load(std::memory_order_relaxed)) return;
  p.failure = what;
  p.failed.store(true, std::memory_order_release);
}

bool check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return true;
  fail("CUDA: " + std::string(what) + ": " + cudaGetErrorString(error));
  return false;
}

bool check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  fail("cuBLAS: " + std::string(what) + ": " + cublasLtGetStatusString(status));
  return false;
}

namespace {

StreamState* state_of(const OpContext& context) {
  Process& p = process();
  if (p.failed.load(std::memory_order_acquire)) return nullptr;
  const int device = p.device.load(std::memory_order_acquire);
  if (device < 0) {
    fail("CUDA: an op was called before a GPU was opened");
    return nullptr;
  }
  if (!make_current(device)) return nullptr;
  StreamState* state = find_stream(context.stream);
  if (state == nullptr)
    fail("CUDA: an op was called on a stream that stream_create() did not make");
  return state;
}

}  // namespace

StreamState* enter(const OpContext& context) {
  StreamState* state = state_of(context);
  // Not within the call of a plugin, which has the CUDA stream itself.
  if (state != nullptr && state->id() == context.stream) state->give_way();
  return state;
}

namespace {

void* allocate_with(cudaError_t (*from)(void** memory, size_t bytes), int64_t bytes) {
  Process& p = process();
  const int device = p.device.load(std::memory_order_acquire);
  if (device < 0 || p.failed.load(std::memory_order_acquire) || !make_current(device)) {
    return nullptr;
  }
  void* memory = nullptr;
  const cudaError_t error = from(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 256)));
  if (error == cudaSuccess) return memory;
  cudaGetLastError();  // too little memory is the caller's to handle, no failure of the backend
  if (error != cudaErrorMemoryAllocation) check(error, "allocate");
  return nullptr;
}

void* allocate(int64_t bytes) {
  return allocate_with([](void** memory, size_t n) { return cudaMalloc(memory, n); }, bytes);
}

void* allocate_shared(int64_t bytes) {
  return allocate_with(
      [](void** memory, size_t n) { return cudaMallocManaged(memory, n, cudaMemAttachGlobal); },
      bytes);
}

void* allocate_pinned(int64_t bytes) {
  return allocate_with([](void** memory, size_t n) { return cudaMallocHost(memory, n); }, bytes);
}

void release_with(cudaError_t (*to)(void* memory), void* memory) {
  const int device = process().device.load(std::memory_order_acquire);
  if (memory == nullptr || device < 0 || !make_current(device)) return;
  check(to(memory), "release");
}

void release_pinned(void* memory) { release_with(cudaFreeHost, memory); }
void release(void* memory) { release_with(cudaFree, memory); }

/// Pageable memory is staged before cudaMemcpyAsync returns. Pinned memory is read later, so the
/// call waits for it.
void upload(const OpContext& context, void* to, const void* host, int64_t bytes) {
  const StreamState* s = enter(context);
  if (s == nullptr || bytes == 0) return;
  if (!check(cudaMemcpyAsync(to, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                             s->stream()),
             "upload")) {
    return;
  }
  cudaPointerAttributes attributes{};
  if (!check(cudaPointerGetAttributes(&attributes, host), "upload")) return;
  if (attributes.type == cudaMemoryTypeUnregistered) return;
  check(cudaStreamSynchronize(s->stream()), "upload");
}

void download(const OpContext& context, void* host, const void* from, int64_t bytes) {
  const StreamState* s = enter(context);
  if (s == nullptr || bytes == 0) return;
  check(
      cudaMemcpyAsync(host, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, s->stream()),
      "download");
}

void copy(const OpContext& context, void* to, const void* from, int64_t bytes) {
  const StreamState* s = enter(context);
  if (s == nullptr || bytes == 0) return;
  check(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, s->stream()),
      "copy");
}

void zero(const OpContext& context, void* to, int64_t bytes) {
  const StreamState* s = enter(context);
  if (s == nullptr || bytes == 0) return;
  check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), s->stream()), "zero");
}

const char* finish(const OpContext& context) {
  // The current lane's stream has waited for the others.
  const StreamState* s = state_of(context);
  if (s != nullptr) check(cudaStreamSynchronize(s->stream()), "what was enqueued");
  const Process& p = process();
  return p.failed.load(std::memory_order_acquire) ? p.failure.c_str() : nullptr;
}

uint64_t recording_place(const OpContext& context) {
  const StreamState* s = enter(context);
  return s == nullptr ? 0 : s->place();
}

bool begin_recording(const OpContext& context) {
  StreamState* s = state_of(context);
  // Other threads may allocate and wait meanwhile.
  if (s == nullptr || !check(cudaStreamBeginCapture(s->stream(), cudaStreamCaptureModeThreadLocal),
                             "beginning to record"))
    return false;
  s->set_recording(true);
  return true;
}

void* end_recording(const OpContext& context) {
  StreamState* s = state_of(context);
  if (s == nullptr) return nullptr;
  s->set_recording(false);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  if (cudaStreamEndCapture(s->stream(), &graph) != cudaSuccess || graph == nullptr) {
    cudaGetLastError();  // a call that cannot be recorded: it has to be enqueued each time
    return nullptr;
  }
  check(cudaGraphInstantiate(&ready, graph, 0), "making a recording ready");
  cudaGraphDestroy(graph);
  return ready;
}

void replay(const OpContext& context, void* recording) {
  const StreamState* s = state_of(context);
  if (s == nullptr) return;
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording), s->stream()), "a recording");
}

void release_recording(void* recording) {
  if (recording != nullptr)
    check(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recording)), "a recording");
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

const char* device_name(int device) {
  thread_local cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) return properties.name;
  cudaGetLastError();
  return "";
}

int compute_capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    return major * 10 + minor;
  }
  cudaGetLastError();
  return 0;
}

/// Empty, or why ops cannot run on this GPU.
std::string refusal(int device) {
  const std::string gpu = "GPU " + std::to_string(device);
  const int count = device_count();
  if (count == 0) return "there is no GPU with a working driver";
  if (device < 0 || device >= count) {
    return gpu + ": there are only " + std::to_string(count) + ", numbered from 0";
  }
  const int capability = compute_capability(device);
  if (capability != kBuiltFor) {
    return gpu + " (" + device_name(device) + ") is sm_" + std::to_string(capability) +
           ": the CUDA kernels are built for sm_" + std::to_string(kBuiltFor);
  }
  return "";
}

const char* open(int device) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Process& p = process();
  const int opened = p.device.load(std::memory_order_acquire);
  if (p.failed.load(std::memory_order_acquire)) return p.failure.c_str();
  if (opened == device) return nullptr;
  p.open_failure = opened >= 0 ? "GPU " + std::to_string(opened) + " is open: a process uses one"
                               : refusal(device);
  if (p.open_failure.empty() &&
      (!make_current(device) || add_stream(nullptr, false, 0) == nullptr)) {
    p.open_failure = p.failure;
  }
  if (!p.open_failure.empty()) return p.open_failure.c_str();
  p.device.store(device, std::memory_order_release);
  return nullptr;
}

void memory(int64_t* free_bytes, int64_t* total_bytes) {
  *free_bytes = *total_bytes = 0;
  const int device = process().device.load(std::memory_order_acquire);
  size_t free_now = 0, total = 0;
  if (device < 0 || !make_current(device)) return;
  if (!check(cudaMemGetInfo(&free_now, &total), "memory")) return;
  *free_bytes = static_cast<int64_t>(free_now);
  *total_bytes = static_cast<int64_t>(total);
}

void* stream_create(bool urgent) {
  if (state_of({}) == nullptr) return nullptr;
  int least = 0, greatest = 0;
  cudaStream_t stream = nullptr;
  if (!check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities")) return nullptr;
  const int priority = urgent ? greatest : least;
  if (!check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority), "stream"))
    return nullptr;
  return add_stream(stream, true, priority);
}

void* native_stream(void* stream) {
  const StreamState* s = state_of({.stream = stream});
  return s == nullptr ? nullptr : s->stream();
}

const char* stream_give_way(void* stream, StreamGate gate) {
  StreamState* s = state_of({.stream = stream});
  return s == nullptr ? process().failure.c_str() : s->set_gate(gate);
}

void stream_destroy(void* stream) {
  if (stream == nullptr || state_of({}) == nullptr) return;
  std::unique_ptr<StreamState> gone;
  Process& p = process();
  const std::lock_guard lock(p.mutex);
  for (auto& s : p.streams) {
    if (s->id() != stream) continue;
    gone = std::move(s);
    s = std::move(p.streams.back());
    p.streams.pop_back();
    return;
  }
}

constexpr Ops kTable = {.name = "cuda-sm90",
                        .host_memory = false,
                        .reads_transposed = true,
                        .rows_side_by_side = true,
                        .fuses_phases = true,
                        .allocate = allocate,
                        .allocate_pinned = allocate_pinned,
                        .release_pinned = release_pinned,
                        .release = release,
                        .upload = upload,
                        .download = download,
                        .copy = copy,
                        .zero = zero,
                        .finish = finish,
                        .recording_place = recording_place,
                        .begin_recording = begin_recording,
                        .end_recording = end_recording,
                        .replay = replay,
                        .release_recording = release_recording,
                        .packed_bytes = packed_bytes,
                        .pack = pack,
                        .unpack = unpack,
                        .pack_all = pack_all,
                        .pack_factors = pack_factors,
                        .prepared_bytes = prepared_bytes,
                        .prepare = prepare,
                        .linear = linear,
                        .outer_accumulate = outer_accumulate,
                        .rmsnorm = rmsnorm,
                        .rmsnorm_backward = rmsnorm_backward,
                        .rope_append = rope_append,
                        .rope = rope,
                        .attention = attention,
                        .attention_train = attention_train,
                        .attention_train_backward = attention_train_backward,
                        .choose_keys = choose_keys,
                        .choose_train_keys = choose_train_keys,
                        .attention_selected = attention_selected,
                        .attention_selected_train = attention_selected_train,
                        .attention_selected_train_backward = attention_selected_train_backward,
                        .swiglu = swiglu,
                        .swiglu_backward = swiglu_backward,
                        .relu = relu,
                        .relu_backward = relu_backward,
                        .embed = embed,
                        .gather_rows = gather_rows,
                        .scatter_rows = scatter_rows,
                        .embed_backward = embed_backward,
                        .sample = sample,
                        .cross_entropy = cross_entropy,
                        .kl_topk = kl_topk,
                        .adamw = adamw,
                        .dot = dot,
                        .axpby = axpby,
                        .multiply_add = multiply_add};

constexpr CudaBackend kBackend = {.build_id = DS_BUILD_ID,
                                  .ops = &kTable,
                                  .quant = &kQuantTable,
                                  .device_count = device_count,
                                  .device_name = device_name,
                                  .compute_capability = compute_capability,
                                  .open = open,
                                  .memory = memory,
                                  .allocate_shared = allocate_shared,
                                  .stream_create = stream_create,
                                  .native_stream = native_stream,
                                  .stream_destroy = stream_destroy,
                                  .stream_give_way = stream_give_way};

}  // namespace
}  // namespace ds::cuda

extern "C" __attribute__((visibility("default"))) const ds::CudaBackend* ds_cuda_backend() {
  return &ds::cuda::kBackend;
}
