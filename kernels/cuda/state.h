// SPDX-License-Identifier: Apache-2.0
// What the ops share on the host: the opened GPU, the first failure, and per stream the scratch and
// the cuBLAS handle that its ops use.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "kernels/ops.h"

namespace ds::cuda {

/// Bytes that one op may use beside its arguments: products that wait for an epilogue, rounded
/// inputs, partial sums. Ops work in pieces where more would be needed.
constexpr int64_t kScratchBytes = int64_t{256} << 20;
constexpr int64_t kBlasBytes = int64_t{32} << 20;  // what cuBLAS recommends for Hopper

/// One stream and what belongs to it. Members are null until init() succeeded.
class StreamState {
 public:
  explicit StreamState(cudaStream_t stream, bool owned) : stream_(stream), owned_(owned) {}
  ~StreamState();
  StreamState(const StreamState&) = delete;
  StreamState& operator=(const StreamState&) = delete;

  bool init();
  cudaStream_t stream() const { return stream_; }
  cublasHandle_t blas() const { return blas_; }
  /// A kernel that writes weights has been enqueued: the next one that asks for weights ahead of
  /// its input (launch_next) must not start early, as only its wait makes what was written visible.
  void weights_change() const { weights_changed_ = true; }
  bool take_weights_changed() const { return std::exchange(weights_changed_, false); }
  /// kScratchBytes, free between ops: an op finds nothing there and leaves nothing.
  template <typename T>
  T* scratch() const {
    return static_cast<T*>(scratch_);
  }

 private:
  cudaStream_t stream_;
  bool owned_;
  cublasHandle_t blas_ = nullptr;
  void* scratch_ = nullptr;
  mutable bool weights_changed_ = false;
  void* blas_scratch_ = nullptr;
};

/// The state of the call's stream, with the GPU made current in this thread. Null if the backend
/// has failed: the op then returns at once.
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

constexpr int64_t kSms = 132;  // of an H100

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// Elements of a packed row: k rounded up to 16 bytes.
__host__ __device__ constexpr int64_t padded_k(WeightFormat format, int64_t k) {
  const int64_t each = format == WeightFormat::kF32 ? 4 : 8;
  return ceil_div(k, each) * each;
}
constexpr int64_t element_bytes(WeightFormat format) {
  return format == WeightFormat::kF32 ? 4 : 2;
}

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
    fail("attention: heads of this size need " + std::to_string(bytes) +
         " bytes of shared memory, a block has " + std::to_string(kMaxSharedBytes));
    return false;
  }
  return check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "shared memory");
}

}  // namespace ds::cuda
