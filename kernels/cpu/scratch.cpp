// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/scratch.h"

#include <cstdlib>

#include "ds/status.h"

namespace ds {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  ~Buffer() { std::free(data); }

  void* grow(size_t wanted) {
    if (wanted <= bytes) return data;
    std::free(data);
    bytes = (wanted + 4095) / 4096 * 4096;
    data = std::aligned_alloc(64, bytes);
    DS_CHECK(data != nullptr);
    return data;
  }
};

thread_local Buffer task_buffer;
thread_local Buffer call_buffer;

}  // namespace

float* task_scratch(size_t floats) {
  return static_cast<float*>(task_buffer.grow(floats * sizeof(float)));
}

void* call_scratch(size_t bytes) { return call_buffer.grow(bytes); }

}  // namespace ds
