// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/state.h"

namespace ds::cuda {

/// Paged attention of prompts over BF16 pages on tensor cores. False, and nothing enqueued, if
/// these kernels do not take the call.
bool attend_prompts_on_tensor_cores(const StreamState&, const AttentionArgs&);

/// The same over chosen keys.
bool attend_chosen_on_tensor_cores(const StreamState&, const AttentionArgs&, const KeySelection&);

/// Attention of training where products may round their operands, over all keys or chosen ones;
/// false as above.
bool train_on_tensor_cores(const StreamState&, const TrainAttentionArgs&,
                           const KeySelection* chosen, bool backward);

}  // namespace ds::cuda
