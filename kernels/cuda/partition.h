// SPDX-License-Identifier: Apache-2.0
// Parts of the GPU: green contexts of the CUDA driver, which share memory, modules and handles with
// the runtime's own context, and whose streams' kernels run on some of the SMs.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/backend.h"

namespace ds::cuda {

/// Makes a stream on a part of the current GPU, which is not the whole of it. Null, or why not. The
/// part is there for the life of the process.
const char* stream_on(GpuPart part, int priority, cudaStream_t* stream, int* sms);

}  // namespace ds::cuda
