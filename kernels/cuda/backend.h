// SPDX-License-Identifier: Apache-2.0
// The CUDA backend as the host sees it: what libds_cuda.so exports, and how it is loaded. No CUDA
// header is needed to use it, and a machine without CUDA never opens the file.
//
// Rules beyond ops.h:
// - A process computes on one GPU: the first one that open() accepted.
// - OpContext::stream is made by stream_create(), or null: the default stream, which open()
//   prepares. Each stream owns the scratch of its ops, so one thread at a time calls ops on
//   a stream; different streams are independent.
// - A recording runs on the part of the GPU that its stream used when it was recorded, whichever
//   stream replays it. While it is recorded the stream's gate is not asked.
// - Ops may be captured into a graph, but for finish, allocate, release, upload and download.
// - Matrix products of a call depend on the number of its rows through the steps between kernels
//   for few rows and cuBLAS (linear.h): bits may differ across them, and between cuBLAS kernels.
#pragma once

#include <cstdint>
#include <string>

#include "ds/status.h"
#include "kernels/ops.h"
#include "kernels/quant.h"

namespace ds {

/// Multiprocessors (SMs) that a stream's kernels may use. A part of the GPU is a green context's;
/// serving keeps the whole GPU and finds what the trainer's part leaves free at once.
enum class GpuPart : uint8_t {
  kNone,           ///< nothing now
  kQuarter,        ///< the 32 SMs that kThreeQuarters leaves: to confine serving, too
  kHalf,           ///< all but 64
  kThreeQuarters,  ///< all but 32
  kMost,           ///< all but 16
  kWhole,
};
constexpr int kGpuParts = 6;

/// How a stream gives way to others: asked before each op for the part that the op may use. May
/// wait, and does not return kNone.
struct StreamGate {
  GpuPart (*pass)(void* user) = nullptr;
  void* user = nullptr;
};

struct CudaBackend {
  const char* build_id;  ///< first, so that it can be read whatever follows
  const Ops* ops;
  const QuantOps* quant;

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
  /// The cudaStream_t that the stream's ops are enqueued on now, for kernels of others: these come
  /// after the ops before and before the ops after them. Ops may be called on it, too; they do not
  /// give way. Holds until the next op on the stream itself.
  void* (*native_stream)(void* stream);
  void (*stream_destroy)(void* stream);  ///< waits for it; null is fine
  /// From now on the stream's ops ask `gate`, and at most about 200 us of them are enqueued ahead
  /// of the GPU (or one op that takes longer): what the gate says takes effect that soon. Null, or
  /// why the GPU cannot be parted: the stream then uses the whole of it whenever it may run.
  /// A gate without a function: it gives way no longer.
  const char* (*stream_give_way)(void* stream, StreamGate gate);
};

/// Opens the shared object, if there is a driver for it: `<executable>/../lib/libds_cuda.so` in a
/// normal installation.
Result<const CudaBackend*> load_cuda_backend(const std::string& path);

/// The backend that this process has already loaded, else null. Plugins get at the kernels this
/// way.
const CudaBackend* loaded_cuda_backend();

/// CudaBackend::native_stream of a context that has a stream.
void* native_stream(const OpContext& context);

}  // namespace ds

extern "C" const ds::CudaBackend* ds_cuda_backend();
