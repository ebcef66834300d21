// SPDX-License-Identifier: Apache-2.0
#include "learn/learner_session.h"

namespace ds {

Status LearnerSession::give_vectors(std::span<float> weights, std::span<float> gradient) {
  DS_ASSIGN(vectors_, RoundVectors::over(compute_, weights, gradient));
  return vectors_->restore(learner_.vectors()).in(std::string(learner_.name()));
}

Status LearnerSession::begin(uint64_t number, uint64_t max_steps, float replay_ratio) {
  ds_round round{};
  round.size = sizeof round;
  round.round = number;
  round.seed = at_.seed;
  for (const ds_sample& s : samples.all()) {
    round.n_fresh += s.pool == DS_POOL_FRESH;
    round.n_replay += s.pool == DS_POOL_REPLAY;
  }
  round.max_steps = max_steps;
  round.replay_ratio = replay_ratio;
  return learner_.begin(round);
}

Result<std::vector<ds_draw>> LearnerSession::draws(uint64_t step) {
  at_.step = step;
  return learner_.draws(at_, samples);
}

void LearnerSession::begin_passes() {
  if (vectors_ != nullptr) vectors_->begin_step();
}

Status LearnerSession::passed(uint32_t slot) {
  if (slot == 0) return {};
  return vectors_->move_gradient_to(slot);  // drawn by one that combines: it has vectors
}

Status LearnerSession::combine() const {
  return vectors_ == nullptr ? Status() : learner_.combine(at_, vectors_->table());
}

Status LearnerSession::stepped(double loss, double gradient_norm) const {
  if (vectors_ == nullptr) return {};
  ds_step_report report{};
  report.size = sizeof report;
  report.step = at_.step;
  report.loss = loss;
  report.gradient_norm = gradient_norm;
  report.samples = samples.all().data();
  report.n_samples = samples.all().size();
  return learner_.stepped(at_, vectors_->table(), report);
}

Result<LearnerMemory> LearnerSession::end() const {
  if (vectors_ != nullptr) DS_TRY(learner_.end(at_, vectors_->table()));
  return learner_.save(vectors_.get());
}

}  // namespace ds
