// SPDX-License-Identifier: Apache-2.0
// Takes all memory of the first GPU that is free, says so in a line, and holds it until its input
// ends. By the driver alone, so that it builds where there is no CUDA.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace {

void* driver = nullptr;

template <typename... Arguments>
int call(const char* name, Arguments... arguments) {
  const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver, name));
  return function == nullptr ? -1 : function(arguments...);
}

bool worked(int result, const char* what) {
  if (result != 0) std::fprintf(stderr, "hog: %s: error %d\n", what, result);
  return result == 0;
}

}  // namespace

int main() {
  driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return std::fprintf(stderr, "hog: no NVIDIA driver\n"), 1;
  int device = 0;
  void* context = nullptr;
  if (!worked(call("cuInit", 0u), "cuInit") ||
      !worked(call("cuDeviceGet", &device, 0), "cuDeviceGet") ||
      !worked(call("cuDevicePrimaryCtxRetain", &context, device), "cuDevicePrimaryCtxRetain") ||
      !worked(call("cuCtxSetCurrent", context), "cuCtxSetCurrent"))
    return 1;
  size_t taken = 0;
  for (size_t bytes = size_t{16} << 30; bytes >= size_t{64} << 10;) {
    uint64_t address = 0;
    if (call("cuMemAlloc_v2", &address, bytes) == 0) {
      taken += bytes;
    } else {
      bytes /= 2;
    }
  }
  std::printf("holds %zu MiB\n", taken >> 20);
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  return 0;  // the driver takes it all back
}
