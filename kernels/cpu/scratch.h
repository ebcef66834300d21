// SPDX-License-Identifier: Apache-2.0
// Working memory of one thread for one call: grown to the largest use, kept until the thread ends,
// so that no op allocates per token. Tasks and the caller of an op have separate buffers, because
// the caller's thread also runs tasks while its own buffer is in use.
#pragma once

#include <cstddef>

namespace ds {

/// Buffer of the task running on this thread, 64-byte aligned; contents undefined. Valid until the
/// next call on this thread.
float* task_scratch(size_t floats);

/// The same for the thread that calls the op, valid until its next op.
void* call_scratch(size_t bytes);

}  // namespace ds
