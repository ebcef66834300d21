// SPDX-License-Identifier: Apache-2.0
// What a round trains and what comes of it: from a version to the weights that training goes on
// from, and from trained weights to the files and the servable weights of a new version.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/bases.h"
#include "learn/round_trainer.h"
#include "storage/version_store.h"

namespace ds {

/// Weights in training, owned. One of `adapters` and `full` is set.
struct Trained {
  std::shared_ptr<const BaseWeights> base;  ///< what rounds start from, see RoundTrainer::set_base
  std::unique_ptr<Adapters> adapters;
  std::unique_ptr<FullWeights> full;
  LearnerMemory memory;  ///< of the learner, as it goes with the weights
  Trainable view() const { return full ? Trainable(*full) : Trainable(*adapters); }
};

struct Method {
  bool full = false;
  int64_t rank = 8;   ///< of fresh low-rank factors
  uint64_t seed = 0;  ///< likewise
};

/// What the next round on `version`, whose weights are `serving`, trains. Low-rank: the version's
/// factors from its checkpoint, fresh ones beside a base. Full: the FP32 tensors of its base, with
/// its factors merged into them if it has any.
Result<Trained> trained_from(const VersionManifest& version, const Weights& serving,
                             const Method& method, const VersionStore& files, const Bases& bases,
                             const Compute& compute);

/// The same weights once more, to go back to when what a round makes of them is held.
Result<Trained> copy_of(const Trained& trained);

/// A version that may be published.
struct Candidate {
  VersionManifest manifest;
  std::vector<StoredTensor> delta, checkpoint;
  std::string base_file;  ///< full: the new base's file, to be durable before the version
  std::shared_ptr<const Weights> weights;
};

/// Completes `manifest` (method, base, hash, details of the method).
Result<Candidate> make_candidate(const Trained& trained, VersionManifest manifest,
                                 const Compute& compute, const WeightForm& form);

}  // namespace ds
