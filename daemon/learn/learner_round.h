// SPDX-License-Identifier: Apache-2.0
// What the learner's rounds and undos share; private to them.
#pragma once

#include "learn/learner.h"

namespace ds {

/// A candidate in the making.
struct Learner::Round {
  uint64_t number = 0;      // in the store
  uint64_t in_lineage = 1;  // rounds from the base to this one: what the draws depend on
  std::vector<FeedbackItem> items;
  std::vector<Lesson> lessons;
  Trained trained;
  RoundOutcome outcome;
  Json learner;  // which plugin said what to train on
  int64_t started_ms = 0;
  bool rebuilds = false;  // an undo's: a failure leaves the items' fates as they were
  bool retry = false;     // the disk failed, not the candidate: its items wait for another round
  Commit with;            // becomes durable with its publication
};

/// What a command that failed answers with.
inline Json failure(const std::string& message, bool missing = false) {
  return {{"error", message}, {"not_found", missing}};
}

}  // namespace ds
