// SPDX-License-Identifier: Apache-2.0
// CUDA driver API, "Green Contexts": a GPU's SMs are split (on sm_90 in groups of eight), what is
// left over is a partition, too.
#include <mutex>

#include "kernels/cuda/driver.h"
#include "kernels/cuda/partition.h"

namespace ds::cuda {
namespace {

struct Driver {
  decltype(&cuDeviceGetDevResource) get_resource = nullptr;
  decltype(&cuDevSmResourceSplitByCount) split = nullptr;
  decltype(&cuDevResourceGenerateDesc) describe = nullptr;
  decltype(&cuGreenCtxCreate) create = nullptr;
  decltype(&cuGreenCtxStreamCreate) create_stream = nullptr;
};

/// Null where the driver is older than the toolkit.
const Driver* driver() {
  static Driver d;
  static const bool complete = find_in_driver("cuDeviceGetDevResource", &d.get_resource) &&
                               find_in_driver("cuDevSmResourceSplitByCount", &d.split) &&
                               find_in_driver("cuDevResourceGenerateDesc", &d.describe) &&
                               find_in_driver("cuGreenCtxCreate", &d.create) &&
                               find_in_driver("cuGreenCtxStreamCreate", &d.create_stream);
  return complete ? &d : nullptr;
}

/// SMs that a part leaves to others; kQuarter is what kThreeQuarters leaves.
constexpr unsigned sms_left(GpuPart part) {
  return part == GpuPart::kMost ? 16 : part == GpuPart::kHalf ? 64 : 32;
}

struct Partition {
  CUgreenCtx context = nullptr;
  int sms = 0;
  const char* failure = nullptr;
};

const char* make(const Driver& d, GpuPart part, Partition* out) {
  int device = 0;  // the runtime's number of a device is the driver's handle of it
  if (cudaGetDevice(&device) != cudaSuccess) return "no GPU is open";
  CUdevResource all{}, few{}, rest{};
  if (d.get_resource(device, &all, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS)
    return "the driver does not tell the GPU's SMs";
  unsigned groups = 1;
  if (d.split(&few, &groups, &all, &rest, 0, sms_left(part)) != CUDA_SUCCESS || groups != 1)
    return "the driver does not split the GPU's SMs";
  CUdevResource& ours = part == GpuPart::kQuarter ? few : rest;
  CUdevResourceDesc description = nullptr;
  if (d.describe(&description, &ours, 1) != CUDA_SUCCESS ||
      d.create(&out->context, description, device, CU_GREEN_CTX_DEFAULT_STREAM) != CUDA_SUCCESS)
    return "the driver makes no context on a part of the GPU";
  out->sms = static_cast<int>(ours.sm.smCount);
  return nullptr;
}

/// An event of the runtime's own context in a stream of a part: what a change of parts needs.
bool takes_events(cudaStream_t stream) {
  cudaEvent_t event = nullptr;
  bool works = cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess &&
               cudaEventRecord(event, stream) == cudaSuccess &&
               cudaStreamWaitEvent(stream, event, 0) == cudaSuccess &&
               cudaEventSynchronize(event) == cudaSuccess;
  if (event != nullptr) cudaEventDestroy(event);
  if (!works) cudaGetLastError();
  return works;
}

}  // namespace

const char* stream_on(GpuPart part, int priority, cudaStream_t* stream, int* sms) {
  static std::mutex one_at_a_time;
  static Partition partitions[kGpuParts];
  const std::lock_guard lock(one_at_a_time);
  const Driver* d = driver();
  if (d == nullptr) return "the driver has no green contexts";
  Partition& partition = partitions[static_cast<size_t>(part)];
  if (partition.context == nullptr && partition.failure == nullptr)
    partition.failure = make(*d, part, &partition);
  if (partition.failure != nullptr) return partition.failure;
  CUstream made = nullptr;
  if (d->create_stream(&made, partition.context, CU_STREAM_NON_BLOCKING, priority) != CUDA_SUCCESS)
    return "the driver makes no stream on a part of the GPU";
  if (!takes_events(made)) {
    cudaStreamDestroy(made);
    return "streams on a part of the GPU take no events";
  }
  *stream = made;
  *sms = partition.sms;
  return nullptr;
}

}  // namespace ds::cuda
