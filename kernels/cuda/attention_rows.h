// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/state.h"

namespace ds::cuda {

/// Paged attention row by row: over all keys of a row, or over its chosen ones. Single rows behind
/// long contexts are split over blocks.
void attend_rows(const StreamState&, const AttentionArgs&, const KeySelection* chosen);

/// The same where each sequence has one row, over pages of 16 bits, in one launch. False, and
/// nothing enqueued, if that kernel does not take the call.
bool attend_one_row_each(const StreamState&, const AttentionArgs&, const KeySelection* chosen);

}  // namespace ds::cuda
