// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/memory.h"

#include <cstdlib>
#include <cstring>

#include "ds/status.h"

namespace ds {

void* host_allocate(int64_t bytes) {
  constexpr int64_t kAlign = 256;
  const int64_t rounded = (bytes > 0 ? bytes + kAlign - 1 : kAlign) / kAlign * kAlign;
  return std::aligned_alloc(kAlign, static_cast<size_t>(rounded));
}

void host_release(void* memory) { std::free(memory); }

void host_copy(const OpContext&, void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

void host_zero(const OpContext&, void* to, int64_t bytes) {
  if (bytes > 0) std::memset(to, 0, static_cast<size_t>(bytes));
}

const char* host_finish(const OpContext&) { return nullptr; }

uint64_t host_recording_place(const OpContext&) { return 0; }
bool host_begin_recording(const OpContext&) { return false; }
void* host_end_recording(const OpContext&) { return nullptr; }
void host_replay(const OpContext&, void*) { DS_CHECK(!"a CPU has no recordings"); }
void host_release_recording(void*) {}

}  // namespace ds
