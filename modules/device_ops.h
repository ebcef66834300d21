// SPDX-License-Identifier: Apache-2.0
// The kernels for the device of a call.
#pragma once

#include <atomic>

#include "ds/plugin.hpp"
#include "kernels/cuda/backend.h"
#include "kernels/ops.h"
#include "kernels/quant.h"

namespace ds::modules {

inline OpContext op_context(const ds_call& call) {
  if (call.stream == nullptr) return {call.parallel};
  return {call.parallel, call.stream->native, call.stream->device.index};
}

inline std::int32_t device_type(const ds_call& call) {
  return call.stream == nullptr ? DS_DEV_CPU : DS_DEV_CUDA;
}

class DeviceOps {
 public:
  const Ops& of(const ds_call& call) const { return call.stream == nullptr ? cpu_ : *gpu().ops; }
  const QuantOps& quant(const ds_call& call) const {
    return call.stream == nullptr ? cpu_quant_ : *gpu().quant;
  }
  const Ops& cpu() const { return cpu_; }
  const QuantOps& cpu_quant() const { return cpu_quant_; }

 private:
  const CudaBackend& gpu() const {
    const CudaBackend* known = gpu_.load(std::memory_order_relaxed);
    if (known != nullptr) return *known;
    const CudaBackend* backend = loaded_cuda_backend();
    if (backend == nullptr)
      throw sdk::error(DS_E_DEVICE,
                       "a call for a GPU in a process without Driftstone's CUDA kernels");
    gpu_.store(backend, std::memory_order_relaxed);
    return *backend;
  }

  const Ops& cpu_ = cpu_ops(best_cpu_isa());
  const QuantOps& cpu_quant_ = cpu_quant_ops(best_cpu_isa());
  mutable std::atomic<const CudaBackend*> gpu_{nullptr};
};

}  // namespace ds::modules
