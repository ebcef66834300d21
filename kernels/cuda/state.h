// SPDX-License-Identifier: Apache-2.0
// What the ops share on the host: the opened GPU, the first failure, and per stream the scratch and
// the planned products that its ops use.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/pace.h"

namespace ds::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kSms = 132;  // of an H100

/// Bytes that one op may use beside its arguments: products that wait for an epilogue, rounded
/// inputs, partial sums. Ops work in pieces where more would be needed.
constexpr int64_t kScratchBytes = int64_t{256} << 20;

/// One stream of the host's, and what belongs to it: a CUDA stream for each part of the GPU that it
/// may use, of which one is current, and scratch that these share. Members are null until init()
/// succeeded.
class StreamState {
 public:
  StreamState(cudaStream_t whole, bool owned, int priority);
  ~StreamState();
  StreamState(const StreamState&) = delete;
  StreamState& operator=(const StreamState&) = delete;

  bool init();
  /// What the host's OpContext::stream says; null for the default stream.
  void* id() { return owned_ ? this : nullptr; }
  bool has(void* native) const;
  cudaStream_t stream() const { return current_->stream; }
  /// SMs of its part.
  int64_t sms() const { return current_->sms != 0 ? current_->sms : kSms; }
  /// Which part of the GPU stream() is on.
  uint64_t place() const { return static_cast<uint64_t>(current_ - lanes_); }
  /// Enqueues a product; false, and kept for finish(), if it cannot be.
  bool multiply(const Product& product, const char* what) const;
  /// A kernel that writes weights has been enqueued: the next one that asks for weights ahead of
  /// its input (launch_next) must not start early, as only its wait makes what was written visible.
  void weights_change() const { weights_changed_ = true; }
  bool take_weights_changed() const { return std::exchange(weights_changed_, false); }
  /// kScratchBytes, free between ops: an op finds nothing there and leaves nothing.
  template <typename T>
  T* scratch() const {
    return static_cast<T*>(scratch_);
  }

  /// See CudaBackend::stream_give_way.
  const char* set_gate(StreamGate gate);
  /// Before each op: holds the queue short, then asks the gate and changes to the part it says.
  void give_way();
  /// enqueue(from, count) for all elements of a long op, `few` at a time, about 20 us of work,
  /// where there are others to give way to between such chunks; until it says that it failed.
  template <typename F>
  void in_chunks(int64_t all, int64_t few, const F& enqueue) {
    const int64_t each = gate_.pass == nullptr ? all : few;
    for (int64_t from = 0; from < all; from += each) {
      if (from > 0) give_way();
      if (!enqueue(from, smaller(each, all - from))) return;
    }
  }
  /// Neither changes streams nor waits meanwhile: a capture forbids both.
  void set_recording(bool recording) { recording_ = recording; }

 private:
  struct Lane {
    std::atomic<cudaStream_t> stream = nullptr;  // other threads look for theirs among all
    int sms = 0;                                 // that a product may use, 0: all
    bool tried = false, ready = false;
  };
  Lane& lane_of(GpuPart part) { return lanes_[static_cast<size_t>(part)]; }
  const Lane& lane_of(GpuPart part) const { return lanes_[static_cast<size_t>(part)]; }
  const char* open_lane(GpuPart part);
  void use(GpuPart part);
  void mark();

  Lane lanes_[kGpuParts];
  Lane* current_;
  bool owned_;
  int priority_;
  void* scratch_ = nullptr;
  mutable bool weights_changed_ = false;
  void* blas_scratch_ = nullptr;
  mutable Products products_;

  StreamGate gate_;
  bool recording_ = false;
  Pace pace_;
  cudaEvent_t marks_[3] = {};  // the last ones in the stream
  int64_t n_marks_ = 0;
  cudaEvent_t changed_ = nullptr;  // between two lanes
};

/// The state of the call's stream, with the GPU made current in this thread. Null if the backend
/// has failed: the op then returns at once. Called once at the beginning of each op: here a stream
/// gives way to others.
StreamState* enter(const OpContext& context);

/// Keeps the first failure for finish().
void fail(const std::string& what);
bool check(cudaError_t error, const char* what);
bool check(cublasStatus_t status, const char* what);
/// After each launch.
inline bool launched(const char* kernel) { return check(cudaGetLastError(), kernel); }

struct Launching {
  /// The kernel calls begin_after_previous(), and is set up while the one before it still runs
  /// (programmatic dependent launch), which is what short kernels in a row spend their time on.
  bool early = true;
  unsigned cluster = 1;  ///< blocks along x that are a cluster
};

template <typename... Parameters, typename... Arguments>
bool launch(const char* what, const Launching& how, void (*kernel)(Parameters...), dim3 grid,
            int threads, size_t shared, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = how.early ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = how.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = how.cluster > 1 ? 2 : 1;
  return check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}
template <typename... Parameters, typename... Arguments>
bool launch_next(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads,
                 size_t shared, cudaStream_t stream, Arguments... arguments) {
  return launch(what, Launching{}, kernel, grid, threads, shared, stream, arguments...);
}

/// Elements of a packed row: k rounded up to 16 bytes.
__host__ __device__ constexpr int64_t padded_k(WeightFormat format, int64_t k) {
  const int64_t each = is_f32(format) ? 4 : 8;
  return ceil_div(k, each) * each;
}
constexpr int64_t element_bytes(WeightFormat format) { return is_f32(format) ? 4 : 2; }

/// Blocks of a loop over n elements in which each thread takes every (blocks * threads)-th.
constexpr unsigned loop_blocks(int64_t n, int64_t threads) {
  return static_cast<unsigned>(larger(1, smaller(ceil_div(n, threads), kSms * 16)));
}

constexpr int64_t kMaxSharedBytes = 227 * 1024;  // a block's largest on sm_90

/// Lets a kernel use more shared memory than the 48 KiB that every kernel may.
template <typename Kernel>
bool allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return true;
  if (bytes > kMaxSharedBytes) {
    fail("a kernel needs " + std::to_string(bytes) + " bytes of shared memory, a block has " +
         std::to_string(kMaxSharedBytes));
    return false;
  }
  return check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "shared memory");
}

}  // namespace ds::cuda
