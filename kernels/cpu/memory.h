// SPDX-License-Identifier: Apache-2.0
// The memory part of the CPU's tables: the host's own, the same for every ISA.
#pragma once

#include "kernels/ops.h"

namespace ds {

void* host_allocate(int64_t bytes);
void host_release(void* memory);
void host_copy(const OpContext& context, void* to, const void* from, int64_t bytes);
void host_zero(const OpContext& context, void* to, int64_t bytes);
const char* host_finish(const OpContext& context);
uint64_t host_recording_place(const OpContext& context);
bool host_begin_recording(const OpContext& context);
void* host_end_recording(const OpContext& context);
void host_replay(const OpContext& context, void* recording);
void host_release_recording(void* recording);

}  // namespace ds
