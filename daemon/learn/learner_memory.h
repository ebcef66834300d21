// SPDX-License-Identifier: Apache-2.0
// What a learner plugin keeps from round to round, and its place in a version's checkpoint.
#pragma once

#include <string>
#include <vector>

#include "learn/round_vectors.h"
#include "storage/version_store.h"

namespace ds {

struct LearnerMemory {
  std::string learner, version;  ///< component and version of the plugin that wrote it
  std::string state;             ///< of its instance; may be empty
  RoundVectors::Named vectors;
};

/// Tensors "learner.state" (bytes) and "learner.vector.<name>" (F32) for a checkpoint.
std::vector<StoredTensor> memory_tensors(const LearnerMemory& memory);
/// Takes those out of the checkpoint of a version; who wrote them is in its details. Error: a
/// vector that is not F32.
Result<LearnerMemory> take_memory(const VersionManifest& version,
                                  std::vector<StoredTensor>& checkpoint);

}  // namespace ds
