// SPDX-License-Identifier: Apache-2.0
// What a round and a step of it consist of; private to the round trainer.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "learn/learner_session.h"
#include "learn/round_trainer.h"

namespace ds {

// Tokens of a step, which bound its memory: 0.7 MB each with SmolLM2-135M, and 0.2 MB per target.
constexpr int64_t kStepTokens = 2048;
constexpr int64_t kLeastStepTokens = 32;  // where there is no memory for more: one sequence
constexpr int64_t kLessonTokens = 1024;
constexpr int64_t kAnchorTokens = 512;  // of these beside a full step
constexpr size_t kSlots = 4;            // gradient slots of the plugin ABI

/// What is behind a sample.
struct RoundTrainer::Entry {
  const Lesson* lesson = nullptr;                     // fresh and replay
  Sequence own;                                       // anchor and contrast
  StoredTopK of_base, of_parent;                      // of `own`; empty until drawn
  std::array<std::optional<double>, 2> parent_sum{};  // of the answer, of the rejected one
  int sightings = 0;  // steps in a row in which the lesson met the stop rule
};

struct RoundTrainer::Round {
  Trainable what;
  LearnerSession session;
  std::unique_ptr<Adapters> parent;  // low-rank: as the round began, packed when somebody asks
  bool parent_packed = false;
  std::deque<Entry> entries;  // one per sample
  AdamW* optimizer = nullptr;

  Round(Trainable trained, const LearnerPlugin& learner, const Compute& compute, uint64_t seed)
      : what(trained), session(learner, compute, seed) {}
  void add(const ds_sample& sample, Entry entry) {
    if (session.samples.add(sample))
      entries.push_back(std::move(entry));  // 64 bits: once in an age
  }
  int64_t learned() const {
    return std::ranges::count_if(session.samples.all(), [](const ds_sample& s) {
      return s.pool == DS_POOL_FRESH && (s.flags & DS_SAMPLE_LEARNED) != 0;
    });
  }
};

struct RoundTrainer::Step {
  struct Slot {
    Terms terms;
    std::vector<size_t> ce, kl;           // entry of each term
    std::vector<ds_sequence_stat> stats;  // of each summed sequence
    bool empty() const { return ce.empty() && kl.empty() && stats.empty(); }
  };
  std::array<Slot, kSlots> slots;
  std::deque<Sequence> sequences;  // stable addresses: the terms point at them
  std::deque<StoredTopK> stored;
  int64_t tokens = 0, most_tokens = kStepTokens;

  bool empty() const {
    return std::ranges::all_of(slots, [](const Slot& s) { return s.empty(); });
  }
  bool has_room(const Sequence& s, int64_t extra = 0) const {
    return tokens + std::ssize(s.ids) <= most_tokens + extra;
  }
  const Sequence* keep(Sequence s) {
    tokens += std::ssize(s.ids);
    sequences.push_back(std::move(s));
    return &sequences.back();
  }
};

}  // namespace ds
