// SPDX-License-Identifier: Apache-2.0
#include "learn/task_round.h"

#include <cmath>
#include <memory>
#include <unordered_map>

#include "learn/objective.h"
#include "storage/hash.h"

namespace ds {
namespace {

constexpr uint64_t kFreshPerStep = 10;
constexpr float kLearningRate = 1e-3f, kBeta2 = 0.999f, kClip = 1.0f;
constexpr uint32_t kSlots = 4;

class TaskRound {
 public:
  TaskRound(const Compute& compute, const LearnerPlugin& learner, Mlp& mlp)
      : compute_(compute), learner_(learner), mlp_(mlp), gradient_(mlp.parameters().size()) {}

  void add(std::span<const TaskExample> examples, uint32_t pool) {
    for (const TaskExample& e : examples) {
      ds_sample sample{};
      sample.key = first_word(sha256(e.draw_key));
      sample.pool = pool;
      sample.tokens = 1;
      if (!by_key_.emplace(sample.key, samples_.size()).second) continue;
      samples_.push_back(sample);
      examples_.push_back(&e);
    }
  }

  TaskOutcome run(ds_round round) {
    TaskOutcome out;
    out.learner = learner_.provenance();
    if (learner_.uses_vectors()) {
      vectors_ = std::make_unique<RoundVectors>(
          compute_.context.parallel, VectorPieces{mlp_.parameters()}, VectorPieces{gradient_});
      out.failure = vectors_->restore(learner_.vectors());
    }
    at_ = {compute_.context.parallel, round.seed, 0};
    for (const ds_sample& s : samples_)
      ++(s.pool == DS_POOL_FRESH ? round.n_fresh : round.n_replay);
    round.max_steps = (round.n_fresh + kFreshPerStep - 1) / kFreshPerStep;
    if (out.failure.ok()) out.failure = learner_.begin(round);
    AdamW optimizer(gradient_.size());
    for (; out.failure.ok() && at_.step < round.max_steps; ++at_.step) {
      bool drawn = false;
      ds_step_report report{};
      report.size = sizeof report;
      report.step = at_.step;
      out.failure = pass(report.loss, drawn);
      if (!out.failure.ok() || !drawn) break;
      report.gradient_norm =
          optimizer.step(compute_, mlp_.parameters(), gradient_, kLearningRate, kBeta2, kClip);
      out.finite = std::isfinite(report.gradient_norm);
      if (!out.finite) return out;
      ++out.steps;
      report.samples = samples_.data();
      report.n_samples = samples_.size();
      if (vectors_ != nullptr) out.failure = learner_.stepped(at_, vectors_->table(), report);
    }
    finish(out);
    return out;
  }

 private:
  /// Forward and backward of what the learner draws, slot 0 last.
  Status pass(double& loss, bool& drawn) {
    DS_ASSIGN(const std::vector<ds_draw> draws, learner_.draws(at_, samples_));
    drawn = !draws.empty();
    if (vectors_ != nullptr) vectors_->begin_step();
    std::ranges::fill(gradient_, 0.0f);
    for (uint32_t slot = kSlots; slot-- > 0;) {
      DS_TRY(pass_slot(draws, slot, loss));
      if (slot > 0 && vectors_ != nullptr) vectors_->move_gradient_to(slot);
    }
    return vectors_ == nullptr ? Status() : learner_.combine(at_, vectors_->table());
  }

  Status pass_slot(std::span<const ds_draw> draws, uint32_t slot, double& loss) {
    std::vector<float> x, weight;
    std::vector<int32_t> labels;
    std::vector<size_t> rows;  // their samples
    for (const ds_draw& d : draws) {
      if (d.slot != slot) continue;
      if (d.term != DS_TERM_CE)
        return {Code::kPlugin, std::string(learner_.name()) + ": draws term " +
                                   std::to_string(d.term) +
                                   ", but a task model has cross-entropy (term 1) alone"};
      rows.push_back(by_key_.at(d.key));
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
      samples_[rows[i]].loss = -logprob[i];
      samples_[rows[i]].flags |= DS_SAMPLE_SEEN;
    }
    return {};
  }

  void finish(TaskOutcome& out) const {
    if (!out.failure.ok()) return;
    if (vectors_ != nullptr) out.failure = learner_.end(at_, vectors_->table());
    if (!out.failure.ok()) return;
    Result<LearnerMemory> memory = learner_.save(vectors_.get());
    out.failure = memory.status();
    if (memory.ok()) out.memory = std::move(memory).value();
  }

  const Compute& compute_;
  const LearnerPlugin& learner_;
  Mlp& mlp_;
  std::vector<float> gradient_;
  std::unique_ptr<RoundVectors> vectors_;
  LearnerPlugin::Step at_;
  std::vector<ds_sample> samples_;
  std::vector<const TaskExample*> examples_;  // one per sample
  std::unordered_map<uint64_t, size_t> by_key_;
};

}  // namespace

TaskOutcome train_task(const Compute& compute, const LearnerPlugin& learner, Mlp& mlp,
                       std::span<const TaskExample> fresh, std::span<const TaskExample> replay,
                       const ds_round& round) {
  TaskRound run(compute, learner, mlp);
  run.add(fresh, DS_POOL_FRESH);
  run.add(replay, DS_POOL_REPLAY);
  return run.run(round);
}

}  // namespace ds
