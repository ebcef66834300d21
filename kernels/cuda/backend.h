// SPDX-License-Identifier: Apache-2.0
// The CUDA backend as the host sees it: what libds_cuda.so exports, and how it is loaded. No CUDA
// header is needed to use it, and a machine without CUDA never opens the file.
//
// Rules beyond ops.h:
// - A process computes on one GPU: the first one that open() accepted.
// - OpContext::stream is a cudaStream_t made by stream_create(), or null: the default stream, which
//   open() prepares. Each stream owns the scratch of its ops, so one thread at a time calls ops on
//   a stream; different streams are independent.
// - Ops may be captured into a graph, but for finish, allocate, release, upload and download.
// - Matrix products of a call depend on the number of its rows only through one step, from the
//   kernel for few rows to cuBLAS (linear.h): bits may differ across it, and between cuBLAS
//   kernels.
#pragma once

#include <cstdint>
#include <string>

#include "ds/status.h"
#include "kernels/ops.h"

namespace ds {

struct CudaBackend {
  const char* build_id;  ///< first, so that it can be read whatever follows
  const Ops* ops;

  int (*device_count)();            ///< 0 where there is no driver
  const char* (*device_name)(int);  ///< "NVIDIA H100 80GB HBM3", or "" if there is none
  int (*compute_capability)(int);   ///< 90 for 9.0, 0 if there is none
  /// Makes the GPU the one that ops run on. Null, or why not. The same GPU may be opened again.
  const char* (*open)(int device);
  void (*memory)(int64_t* free_bytes, int64_t* total_bytes);
  /// Memory that the host and the GPU both reach, for tests and tools; given back with
  /// ops->release(). The host may touch it only while no op that uses it is enqueued.
  void* (*allocate_shared)(int64_t bytes);

  /// A stream with scratch of its own (about 290 MiB); `urgent` ones go before others where both
  /// have work. Null: there is not enough memory, finish() of the default stream says more.
  void* (*stream_create)(bool urgent);
  void (*stream_destroy)(void* stream);  ///< waits for it; null is fine
};

/// Opens the shared object, if there is a driver for it: `<executable>/../lib/libds_cuda.so` in a
/// normal installation.
Result<const CudaBackend*> load_cuda_backend(const std::string& path);

/// The backend that this process has already loaded, else null. Plugins get at the kernels this
/// way.
const CudaBackend* loaded_cuda_backend();

}  // namespace ds

extern "C" const ds::CudaBackend* ds_cuda_backend();
