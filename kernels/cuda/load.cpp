// SPDX-License-Identifier: Apache-2.0
// Finds the CUDA backend at run time, so that one build of the daemon runs with and without a GPU.
#include <dlfcn.h>

#include <cstring>

#include "kernels/cuda/backend.h"

namespace ds {
namespace {

constexpr const char* kSymbol = "ds_cuda_backend";
constexpr const char* kSoname = "libds_cuda.so";
constexpr const char* kDriver = "libcuda.so.1";

using Entry = const CudaBackend* (*)();

std::string why() {
  const char* text = dlerror();
  return text == nullptr ? "unknown reason" : text;
}

/// The object stays loaded for the life of the process: its functions may be anywhere by then.
Result<const CudaBackend*> backend_of(void* object, const std::string& name) {
  const auto entry = reinterpret_cast<Entry>(dlsym(object, kSymbol));
  if (entry == nullptr) {
    return invalid(name + ": is no CUDA backend of Driftstone: it has no symbol " + kSymbol);
  }
  const CudaBackend* backend = entry();
  if (std::strcmp(backend->build_id, DS_BUILD_ID) != 0) {
    return invalid(name + ": built from other headers than this program (" + backend->build_id +
                   ", expected " + DS_BUILD_ID + "): install both from one build");
  }
  return backend;
}

}  // namespace

Result<const CudaBackend*> load_cuda_backend(const std::string& path) {
  // cuBLAS, which comes with the object, maps half a gigabyte: not on a machine that has no GPU.
  if (dlopen(kDriver, RTLD_LAZY | RTLD_LOCAL) == nullptr)
    return unavailable(std::string("there is no NVIDIA driver (") + kDriver + ")");
  void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (object == nullptr) return unavailable("the CUDA backend cannot be loaded: " + why());
  return backend_of(object, path);
}

const CudaBackend* loaded_cuda_backend() {
  void* object = dlopen(kSoname, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (object == nullptr) return nullptr;
  auto backend = backend_of(object, kSoname);
  return backend.ok() ? *backend : nullptr;
}

void* native_stream(const OpContext& context) {
  static const CudaBackend* const backend = loaded_cuda_backend();  // who else made the stream?
  return backend->native_stream(context.stream);
}

}  // namespace ds
