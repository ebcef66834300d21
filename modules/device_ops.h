// SPDX-License-Identifier: Apache-2.0
// The kernels for the device of a call.
#pragma once

#include <atomic>

#include "ds/plugin.hpp"
#include "kernels/cuda/backend.h"
#include "kernels/ops.h"

namespace ds::modules {

inline OpContext op_context(const ds_call& call) {
  if (call.stream == nullptr) return {call.parallel};
  return {call.parallel, call.stream->native, call.stream->device.index};
}

class DeviceOps {
 public:
  const Ops& of(const ds_call& call) const {
    if (call.stream == nullptr) return cpu_;
    const Ops* gpu = gpu_.load(std::memory_order_relaxed);
    if (gpu != nullptr) return *gpu;
    const CudaBackend* backend = loaded_cuda_backend();
    if (backend == nullptr)
      throw sdk::error(DS_E_DEVICE,
                       "a call for a GPU in a process without Driftstone's CUDA kernels");
    gpu_.store(backend->ops, std::memory_order_relaxed);
    return *backend->ops;
  }
  const Ops& cpu() const { return cpu_; }

 private:
  const Ops& cpu_ = cpu_ops(best_cpu_isa());
  mutable std::atomic<const Ops*> gpu_{nullptr};
};

}  // namespace ds::modules
