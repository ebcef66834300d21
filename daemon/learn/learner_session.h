// SPDX-License-Identifier: Apache-2.0
// One round with a learner plugin, whatever model it trains: what can be drawn, the step that runs,
// the vectors. The trainer makes the passes in between.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "learn/learner_plugin.h"

namespace ds {

class LearnerSession {
 public:
  /// `learner` outlives it. `seed`: of the round.
  LearnerSession(const LearnerPlugin& learner, const Compute& compute, uint64_t seed)
      : learner_(learner), compute_(compute), at_{compute.context.parallel, seed, 0} {}

  const LearnerPlugin& learner() const { return learner_; }
  uint64_t seed() const { return at_.seed; }
  uint64_t step() const { return at_.step; }

  /// All of them before begin(); what is known of them is kept up to date by the trainer.
  SampleTable samples;

  /// Before begin(), if learner().uses_vectors(). As in RoundVectors.
  Status give_vectors(std::span<float> weights, std::span<float> gradient);
  /// `number`: of the round in its lineage; `replay_ratio`: share of earlier samples asked for.
  Status begin(uint64_t number, uint64_t max_steps, float replay_ratio);
  /// Begins a step. Nothing drawn = the round is over.
  Result<std::vector<ds_draw>> draws(uint64_t step);
  Status coefficients(std::span<const ds_sequence_stat> sequences, std::span<double> out) const {
    return learner_.coefficients(at_, sequences, out);
  }
  /// Before the passes of a step, and before they are tried again with less: no slot has a
  /// gradient.
  void begin_passes();
  /// The gradient that the passes have just made is that of `slot`. Slot 0, where it stays, is
  /// last.
  Status passed(uint32_t slot);
  Status combine() const;
  bool combines() const { return vectors_ != nullptr; }  ///< combine() may change the gradient
  Status stepped(double loss, double gradient_norm) const;
  Result<LearnerMemory> end() const;

 private:
  const LearnerPlugin& learner_;
  Compute compute_;
  LearnerPlugin::Step at_;
  std::unique_ptr<RoundVectors> vectors_;  // null: the learner does not use them
};

}  // namespace ds
