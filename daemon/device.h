// SPDX-License-Identifier: Apache-2.0
// What the model computes on: the CPU, or a GPU through the CUDA backend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ds/status.h"
#include "kernels/cuda/backend.h"
#include "kernels/gpu_share.h"
#include "kernels/ops.h"

namespace ds {

class Device {
 public:
  /// `name` is auto, cpu or cuda:N; auto takes the GPU if there is one that `backend`, a file, can
  /// use, and the CPU otherwise. The file is only looked for where a GPU is asked for.
  static Result<std::unique_ptr<Device>> open(const std::string& name, const std::string& backend);
  ~Device();
  Device(const Device&) = delete;

  const Ops& ops() const { return ops_; }
  bool is_gpu() const { return cuda_ != nullptr; }
  /// "cpu-avx512-bf16" or "cuda:0 (NVIDIA H100 80GB HBM3)".
  const std::string& name() const { return name_; }
  /// Why auto did not take a GPU; empty where it did or was not asked to.
  const std::string& why_not_gpu() const { return why_not_; }

  /// A context for one thread at a time, with a stream of its own on a GPU. `urgent` ones go first;
  /// those that have a share do what it says.
  Result<OpContext> context(const ds_parallel* parallel, bool urgent, GpuShare* share = nullptr);
  /// Why a share is of time alone, not of the GPU's SMs; empty where it is of both.
  const std::string& why_not_parted() const { return why_not_parted_; }

 private:
  explicit Device(const Ops& ops) : ops_(ops), name_(ops.name) {}
  static Result<std::unique_ptr<Device>> open_gpu(int index, const std::string& backend);

  const Ops& ops_;
  const CudaBackend* cuda_ = nullptr;
  int index_ = 0;
  std::string name_, why_not_, why_not_parted_;
  std::vector<void*> streams_;
};

}  // namespace ds
