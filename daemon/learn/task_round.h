// SPDX-License-Identifier: Apache-2.0
// A round of a task model: what its steps train on is a learner plugin's choice, too.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/mlp.h"
#include "learn/learner_plugin.h"

namespace ds {

struct TaskExample {
  std::string draw_key;
  std::vector<float> input;
  int32_t label = 0;
};

struct TaskOutcome {
  int64_t steps = 0;
  bool finite = true;
  Status failure;  ///< of the plugin
  LearnerMemory memory;
  Json learner;  ///< which plugin said what to train on
};

using TaskExamples = std::span<const TaskExample* const>;

/// One pass over `fresh`, in steps of about ten, on `mlp`. A learner draws from fresh and earlier
/// examples; other pools and terms than cross-entropy are the language model's. `number`: of the
/// round in the lineage.
TaskOutcome train_task(const Compute& compute, const LearnerPlugin& learner, Mlp& mlp,
                       TaskExamples fresh, TaskExamples replay, uint64_t seed, uint64_t number,
                       float replay_ratio);

}  // namespace ds
