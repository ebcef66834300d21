// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/state.h"

namespace ds::cuda {

/// Paged attention of prompts over BF16 pages on tensor cores. False, and nothing enqueued, if
/// these kernels do not take the call.
bool attend_prompts_on_tensor_cores(const StreamState&, const AttentionArgs&);

/// Attention of training where products may round their operands; false as above.
bool train_on_tensor_cores(const StreamState&, const TrainAttentionArgs&, bool backward);

}  // namespace ds::cuda
