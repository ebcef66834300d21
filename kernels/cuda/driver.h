// SPDX-License-Identifier: Apache-2.0
// Functions of the driver. They come from the runtime, so that nothing here links to the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace ds::cuda {

/// False where the driver is older than the toolkit.
template <typename Function>
bool find_in_driver(const char* name, Function* function) {
  constexpr unsigned kVersion = 13000;  // of the declarations in cuda.h
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  if (cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return false;
  }
  *function = reinterpret_cast<Function>(found);
  return true;
}

}  // namespace ds::cuda
