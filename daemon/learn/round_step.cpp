// SPDX-License-Identifier: Apache-2.0
// From what a learner draws to the terms of a step, and their passes.
#include <algorithm>
#include <map>

#include "learn/phrasing.h"
#include "learn/round_parts.h"

namespace ds {

/// Makes the terms of one step, draw by draw.
class RoundTrainer::StepBuilder {
 public:
  StepBuilder(RoundTrainer& trainer, const Recipe& recipe, Round& round, Step& step)
      : trainer_(trainer), recipe_(recipe), round_(round), step_(step) {}

  Status add(const ds_draw& draw) {
    index_ = round_.session.samples.find(draw.key);
    if (draw.term == DS_TERM_CE) add_cross_entropy(draw);
    if (draw.term == DS_TERM_KL_BASE) add_kl(draw, of_base_);
    if (draw.term == DS_TERM_KL_PARENT) add_kl(draw, of_parent_);
    if (draw.term == DS_TERM_SEQUENCE) DS_TRY(add_summed(draw));
    if (step_.tokens <= 4 * kStepTokens) return {};
    return {Code::kPlugin, std::string(round_.session.learner().name()) +
                               ": draws sequences of more than " + std::to_string(4 * kStepTokens) +
                               " tokens for a step"};
  }
  /// Computes the distributions that KL terms point at and nobody has needed before.
  Status fill() {
    DS_TRY(fill(of_base_, nullptr));
    if (of_parent_.empty()) return {};
    DS_ASSIGN(const Adapters* parent, trainer_.parent_of(round_));
    return fill(of_parent_, parent);
  }

 private:
  using Missing = std::vector<std::pair<const Sequence*, StoredTopK*>>;

  Sequence text_piece(const Lesson& lesson, Rng& rng) const {
    std::vector<TokenId> ids = trainer_.tokenizer_->encode(lesson.answer, false);
    const int64_t length = std::ssize(ids), room = recipe_.text_tokens;
    const uint64_t starts = length > room ? static_cast<uint64_t>(length - room + 1) : 1;
    ids.erase(ids.begin(),
              ids.begin() + (starts > 1 ? static_cast<int64_t>(rng.below(starts)) : 0));
    ids.resize(static_cast<size_t>(std::min(length, room)));
    return {std::move(ids), 1, nullptr};
  }

  /// A lesson's own question, or a random other wording of it; of a long text a random piece.
  Sequence wording(const Lesson& lesson, bool plain, Rng& rng) const {
    if (lesson.kind == Lesson::Kind::kText) return text_piece(lesson, rng);
    std::vector<ChatMessage> context = lesson.context;
    if (!plain) context.back().content = reword(context.back().content, rng);
    return trainer_.sequence_of(context, lesson.answer);
  }

  /// The sequences of a draw, as many as fit.
  std::vector<const Sequence*> place(const ds_draw& draw) {
    const Entry& entry = round_.entries[index_];
    const ds_sample& sample = round_.session.samples[index_];
    if (entry.lesson == nullptr) {
      if (!step_.has_room(entry.own, sample.pool == DS_POOL_ANCHOR ? kAnchorTokens : 0)) return {};
      step_.tokens += std::ssize(entry.own.ids);
      return {&entry.own};
    }
    if (sample.pool == DS_POOL_REPLAY && step_.tokens > kLessonTokens) return {};
    Rng rng(Rng::mix(round_.session.seed(), round_.session.step()), sample.key);
    std::vector<const Sequence*> out;
    for (uint32_t n = 0; n < wordings(draw); ++n) {
      const bool text = entry.lesson->kind == Lesson::Kind::kText;
      const bool plain =
          !text && (wordings(draw) == 1 ? rng.uniform() < recipe_.plain_share : n == 0);
      Sequence sequence = wording(*entry.lesson, plain, rng);
      if (step_.has_room(sequence) || step_.tokens == 0)
        out.push_back(step_.keep(std::move(sequence)));
    }
    return out;
  }
  uint32_t wordings(const ds_draw& draw) const {
    const Lesson* lesson = round_.entries[index_].lesson;
    if (lesson == nullptr || lesson->kind == Lesson::Kind::kText) return 1;
    return std::clamp(draw.wordings, 1u, kMostWordings);
  }
  float share(const ds_draw& draw) const {
    return draw.weight / static_cast<float>(wordings(draw));
  }

  void add_cross_entropy(const ds_draw& draw) {
    Step::Slot& slot = step_.slots[draw.slot];
    for (const Sequence* s : place(draw)) {
      slot.terms.cross_entropy.push_back({s, share(draw)});
      slot.ce.push_back(index_);
    }
  }

  void add_kl(const ds_draw& draw, Missing& missing) {
    Step::Slot& slot = step_.slots[draw.slot];
    Entry& entry = round_.entries[index_];
    for (const Sequence* s : place(draw)) {
      StoredTopK* side = s != &entry.own         ? &step_.stored.emplace_back()
                         : &missing == &of_base_ ? &entry.of_base
                                                 : &entry.of_parent;
      if (side->index.empty()) missing.emplace_back(s, side);
      slot.terms.kl.push_back({s, side, share(draw)});
      slot.kl.push_back(index_);
    }
  }

  /// The answer to the lesson's own question, or its rejected one.
  Status add_summed(const ds_draw& draw) {
    Step::Slot& slot = step_.slots[draw.slot];
    Entry& entry = round_.entries[index_];
    Sequence own = entry.own;
    if (const Lesson* lesson = entry.lesson; lesson != nullptr) {
      Rng rng(round_.session.seed(), draw.key);  // a long text's piece stays the same for the round
      own = draw.rejected != 0 ? trainer_.sequence_of(lesson->context, lesson->rejected)
                               : wording(*lesson, true, rng);
    }
    const Sequence* at = nullptr;  // often one of the wordings already
    for (size_t i = 0; i < slot.ce.size(); ++i) {
      const Sequence* there = slot.terms.cross_entropy[i].sequence;
      if (slot.ce[i] == index_ && there->ids == own.ids) at = there;
    }
    if (at == nullptr) at = step_.keep(std::move(own));
    std::optional<double>& before = entry.parent_sum[draw.rejected != 0 ? 1 : 0];
    if (!before) {
      DS_ASSIGN(before, trainer_.parent_logprob(round_, *at));
    }
    slot.terms.summed.sequences.push_back(at);
    slot.stats.push_back(
        {draw.key, 0, *before, static_cast<uint32_t>(at->targets()), draw.rejected != 0});
    return {};
  }

  Status fill(const Missing& missing, const Adapters* adapters) {
    std::vector<const Sequence*> sequences;
    for (const auto& [sequence, side] : missing) sequences.push_back(sequence);
    const BaseWeights& base = *trainer_.base_;
    std::vector<StoredTopK> stored =
        store_top_k(trainer_.graph_, base, adapters, sequences, base.config().vocab);
    DS_TRY(trainer_.graph_.take_status());
    for (size_t i = 0; i < missing.size(); ++i) *missing[i].second = std::move(stored[i]);
    return {};
  }

  static constexpr uint32_t kMostWordings = 16;
  RoundTrainer& trainer_;
  const Recipe& recipe_;
  Round& round_;
  Step& step_;
  size_t index_ = 0;  // entry of the draw at hand
  Missing of_base_, of_parent_;
};

Status RoundTrainer::build_step(const Recipe& recipe, Round& round, std::span<const ds_draw> draws,
                                Step& step) {
  step.most_tokens = step_tokens_;
  StepBuilder builder(*this, recipe, round, step);
  for (const ds_draw& draw : draws) DS_TRY(builder.add(draw));
  return builder.fill();
}

/// A step of what was drawn, of half as much as long as there is no memory for it.
Status RoundTrainer::run_draws(const Recipe& recipe, Round& round, std::span<const ds_draw> draws,
                               Step& step, StepTotal& total) {
  for (;;) {
    Status done = build_step(recipe, round, draws, step);
    if (done.ok() && !step.empty()) done = run_step(recipe, round, step, total);
    if (done.code() != Code::kResource || step_tokens_ <= kLeastStepTokens) return done;
    DS_TRY(finish(compute_));  // a device that has failed has no memory either
    give_back();               // what is missing may be another's
    step_tokens_ /= 2;
    step = {};
    total = {};
  }
}

/// The weights that the round began with, beside the base; null = the base alone.
Result<Adapters*> RoundTrainer::parent_of(Round& round) {
  if (round.parent != nullptr && !round.parent_packed)
    DS_TRY(round.parent->pack(graph_.formats(*base_)));
  round.parent_packed = true;
  return round.parent.get();
}

/// Summed log-probability of the targets under them.
Result<double> RoundTrainer::parent_logprob(Round& round, const Sequence& sequence) {
  Terms terms;
  terms.cross_entropy.push_back({&sequence, 1.0f});
  DS_ASSIGN(Adapters* const parent, parent_of(round));
  const StepLoss loss = run_terms(graph_, compute_, *base_, parent, nullptr, terms, false);
  DS_TRY(graph_.take_status());
  DS_TRY(Status(loss.failure));
  return loss.items[0].sum_logprob;
}

/// Read free from the training forward: what each lesson's wordings looked like, and how far
/// anchors and contrasts are from where they should be.
void RoundTrainer::note_results(const Recipe& recipe, Round& round, const Step& step, size_t slot,
                                const StepLoss& loss) {
  const std::vector<size_t>&ce = step.slots[slot].ce, &kl = step.slots[slot].kl;
  struct Seen {
    double worst = 0;         // mean log-probability of a wording
    bool all_argmax = false;  // of the first
  };
  std::map<size_t, Seen> seen;
  for (size_t i = 0; i < ce.size(); ++i) {
    const auto [at, first] = seen.try_emplace(ce[i]);
    at->second.worst = std::min(at->second.worst, loss.items[i].mean_logprob);
    if (first) at->second.all_argmax = loss.items[i].all_argmax;
  }
  for (const auto& [index, s] : seen) {
    ds_sample& sample = round.session.samples[index];
    Entry& entry = round.entries[index];
    const bool good = s.all_argmax && s.worst > recipe.stop_logprob;
    entry.sightings = good ? entry.sightings + 1 : 0;
    sample.loss = static_cast<float>(-s.worst);
    sample.flags = (sample.flags & ~uint32_t{DS_SAMPLE_LEARNED}) | DS_SAMPLE_SEEN;
    if (entry.sightings >= recipe.sightings) sample.flags |= DS_SAMPLE_LEARNED;
  }
  for (size_t i = 0; i < kl.size(); ++i) {
    ds_sample& sample = round.session.samples[kl[i]];
    sample.kl = static_cast<float>(loss.kl_mean[i]);
    sample.flags |= DS_SAMPLE_SEEN;
  }
}

/// Forward and backward of all slots, the highest first, so that slot 0's gradient is the one that
/// stays where the optimizer takes it.
Status RoundTrainer::run_step(const Recipe& recipe, Round& round, Step& step, StepTotal& total) {
  DS_TRY(round.what.zero_gradient());
  round.session.begin_passes();
  for (size_t s = kSlots; s-- > 0;) {
    Step::Slot& slot = step.slots[s];
    if (slot.empty()) continue;
    slot.terms.summed.derivative = [&](std::span<const double> logprob, std::span<double> out) {
      for (size_t i = 0; i < logprob.size(); ++i) slot.stats[i].logprob = logprob[i];
      return round.session.coefficients(slot.stats, out);
    };
    // What is to be combined is no gradient yet.
    AdamW* const optimizer = s == 0 && !round.session.combines() ? round.optimizer : nullptr;
    const StepLoss loss =
        run_terms(graph_, compute_, round.what.over(*base_), round.what.adapters(),
                  round.what.gradient(), slot.terms, true, optimizer);
    DS_TRY(graph_.take_status());
    DS_TRY(Status(loss.failure));
    note_results(recipe, round, step, s, loss);
    total.loss += loss.total;
    total.tokens += loss.tokens;
    DS_TRY(round.session.passed(static_cast<uint32_t>(s)));
  }
  return round.session.combine();
}

}  // namespace ds
