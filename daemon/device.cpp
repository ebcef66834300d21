// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <charconv>
#include <filesystem>

namespace ds {

Result<std::unique_ptr<Device>> Device::open(const std::string& name, const std::string& backend) {
  if (name == "cpu" || name == "auto") {
    std::string why;
    if (name == "auto") {
      auto gpu = open_gpu(0, backend);
      if (gpu.ok()) return gpu;
      why = gpu.status().message();
    }
    std::unique_ptr<Device> cpu(new Device(cpu_ops(best_cpu_isa())));
    cpu->why_not_ = std::move(why);
    return cpu;
  }
  constexpr std::string_view kCuda = "cuda:";
  int index = -1;
  const char* end = name.data() + name.size();
  if (name.starts_with(kCuda)) {
    const auto read = std::from_chars(name.data() + kCuda.size(), end, index);
    if (read.ec != std::errc() || read.ptr != end) index = -1;
  }
  if (index < 0) return invalid("--device is \"" + name + "\", expected auto, cpu or cuda:N");
  return open_gpu(index, backend);
}

Result<std::unique_ptr<Device>> Device::open_gpu(int index, const std::string& backend) {
  const std::string name = "cuda:" + std::to_string(index);
  if (!std::filesystem::exists(backend))
    return unavailable(name + ": this build has no CUDA backend (" + backend + ")");
  const auto loaded = load_cuda_backend(backend);
  if (!loaded.ok()) return Status(loaded.status()).in(name);
  const CudaBackend* cuda = *loaded;
  if (index >= cuda->device_count())
    return unavailable(name + ": this machine has " + std::to_string(cuda->device_count()) +
                       " GPUs with a driver");
  const char* failed = cuda->open(index);
  if (failed != nullptr) return unavailable(name + ": " + failed);
  std::unique_ptr<Device> out(new Device(*cuda->ops));
  out->cuda_ = cuda;
  out->index_ = index;
  out->name_ = name + " (" + cuda->device_name(index) + ")";
  return out;
}

Device::~Device() {
  for (void* stream : streams_) cuda_->stream_destroy(stream);
}

Result<OpContext> Device::context(const ds_parallel* parallel, bool urgent, GpuShare* share) {
  if (cuda_ == nullptr) return OpContext{parallel};
  void* stream = cuda_->stream_create(urgent);
  if (stream == nullptr) return unavailable(name_ + ": no memory for a stream");
  streams_.push_back(stream);
  if (share != nullptr) {
    const char* whole = cuda_->stream_give_way(stream, share->gate());
    if (whole != nullptr) why_not_parted_ = whole;
  }
  return OpContext{parallel, stream, index_};
}

}  // namespace ds
