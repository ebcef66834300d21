// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/state.h"

namespace ds::cuda {

/// Paged attention of prompts over pages of 16 bits on tensor cores, over all keys or chosen ones.
/// False, and nothing enqueued, if these kernels do not take the call.
bool attend_prompts_on_tensor_cores(const StreamState&, const AttentionArgs&,
                                    const KeySelection* chosen);

/// Attention of training where products may round their operands; otherwise as above.
bool train_on_tensor_cores(const StreamState&, const TrainAttentionArgs&,
                           const KeySelection* chosen, bool backward);

}  // namespace ds::cuda
