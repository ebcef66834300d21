// SPDX-License-Identifier: Apache-2.0
#include "learn/task_round.h"

#include <algorithm>
#include <cmath>

#include "learn/learner_session.h"
#include "learn/objective.h"
#include "storage/hash.h"

namespace ds {
namespace {

constexpr uint64_t kFreshPerStep = 10;
constexpr float kLearningRate = 1e-3f, kBeta2 = 0.999f, kClip = 1.0f;
constexpr uint32_t kSlots = 4;

class TaskRound {
 public:
  TaskRound(const Compute& compute, const LearnerPlugin& learner, Mlp& mlp, uint64_t seed)
      : compute_(compute),
        mlp_(mlp),
        gradient_(mlp.parameters().size()),
        session_(learner, compute, seed) {}

  /// How many of them can be drawn.
  size_t add(TaskExamples examples, uint32_t pool) {
    const size_t before = examples_.size();
    for (const TaskExample* e : examples) {
      ds_sample sample{};
      sample.key = first_word(sha256(e->draw_key));
      sample.pool = pool;
      sample.tokens = 1;
      if (session_.samples.add(sample)) examples_.push_back(e);
    }
    return examples_.size() - before;
  }

  TaskOutcome run(uint64_t number, uint64_t max_steps, float replay_ratio) {
    TaskOutcome out;
    out.learner = session_.learner().provenance();
    if (session_.learner().uses_vectors())
      out.failure = session_.give_vectors(mlp_.parameters(), gradient_);
    if (out.failure.ok()) out.failure = session_.begin(number, max_steps, replay_ratio);
    Result<AdamW> optimizer = AdamW::make(compute_, gradient_.size());
    if (out.failure.ok()) out.failure = optimizer.status();
    for (uint64_t step = 0; out.failure.ok() && step < max_steps; ++step) {
      double loss = 0;
      bool drawn = false;
      out.failure = pass(step, loss, drawn);
      if (!out.failure.ok() || !drawn) break;
      const Result<double> norm =
          optimizer->step(mlp_.parameters(), gradient_, kLearningRate, kBeta2, kClip);
      out.failure = norm.status();
      if (!norm.ok()) return out;
      out.finite = std::isfinite(*norm);
      if (!out.finite) return out;
      ++out.steps;
      out.failure = session_.stepped(loss, *norm);
    }
    if (!out.failure.ok()) return out;
    Result<LearnerMemory> memory = session_.end();
    out.failure = memory.status();
    if (memory.ok()) out.memory = std::move(memory).value();
    return out;
  }

 private:
  /// Forward and backward of what the learner draws.
  Status pass(uint64_t step, double& loss, bool& drawn) {
    DS_ASSIGN(const std::vector<ds_draw> draws, session_.draws(step));
    drawn = !draws.empty();
    std::ranges::fill(gradient_, 0.0f);
    session_.begin_passes();
    for (uint32_t slot = kSlots; slot-- > 0;) DS_TRY(pass_slot(draws, slot, loss));
    return session_.combine();
  }

  Status pass_slot(std::span<const ds_draw> draws, uint32_t slot, double& loss) {
    std::vector<float> x, weight;
    std::vector<int32_t> labels;
    std::vector<size_t> rows;  // their samples
    for (const ds_draw& d : draws) {
      if (d.slot != slot) continue;
      if (d.term != DS_TERM_CE)
        return {Code::kPlugin, std::string(session_.learner().name()) + ": draws term " +
                                   std::to_string(d.term) +
                                   ", but a task model has cross-entropy (term 1) alone"};
      rows.push_back(session_.samples.find(d.key));
      const TaskExample& e = *examples_[rows.back()];
      x.insert(x.end(), e.input.begin(), e.input.end());
      labels.push_back(e.label);
      weight.push_back(d.weight);
    }
    if (rows.empty()) return {};
    std::vector<float> logprob(rows.size());
    loss +=
        mlp_.loss(compute_, std::ssize(rows), x.data(), labels.data(), weight, logprob, gradient_);
    for (size_t i = 0; i < rows.size(); ++i) {
      session_.samples[rows[i]].loss = -logprob[i];
      session_.samples[rows[i]].flags |= DS_SAMPLE_SEEN;
    }
    return session_.passed(slot);
  }

  const Compute& compute_;
  Mlp& mlp_;
  std::vector<float> gradient_;
  LearnerSession session_;
  std::vector<const TaskExample*> examples_;  // one per sample
};

}  // namespace

TaskOutcome train_task(const Compute& compute, const LearnerPlugin& learner, Mlp& mlp,
                       TaskExamples fresh, TaskExamples replay, uint64_t seed, uint64_t number,
                       float replay_ratio) {
  TaskRound run(compute, learner, mlp, seed);
  const uint64_t n_fresh = run.add(fresh, DS_POOL_FRESH);
  run.add(replay, DS_POOL_REPLAY);
  return run.run(number, (n_fresh + kFreshPerStep - 1) / kFreshPerStep, replay_ratio);
}

}  // namespace ds
