// SPDX-License-Identifier: Apache-2.0
#include "learn/round_trainer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "learn/phrasing.h"
#include "learn/round_parts.h"
#include "learn/shipped_texts.h"
#include "storage/hash.h"

namespace ds {
namespace {

// What reword() and gate_forms() add to a question, at most.
constexpr int64_t kRewordingTokens = 32;
constexpr size_t kRehearsed = 32;  // earlier lessons that a round draws its rehearsals from

/// The context with its last message asking something else.
std::vector<ChatMessage> asking(std::span<const ChatMessage> context, const std::string& question) {
  std::vector<ChatMessage> out(context.begin(), context.end());
  out.back().content = question;
  return out;
}

/// `count` different indices below `size`, in random order.
std::vector<size_t> draw_indices(size_t size, size_t count, Rng& rng) {
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = 0; i < count; ++i) std::swap(order[i], order[i + rng.below(size - i)]);
  order.resize(count);
  return order;
}

float learning_rate(const Recipe& recipe, int64_t step, int64_t steps_max) {
  const int64_t fall = recipe.lr_decay_steps > 0 ? recipe.lr_decay_steps : steps_max;
  const float progress = std::min(1.0f, static_cast<float>(step) / static_cast<float>(fall));
  return recipe.lr * (1.0f + (recipe.lr_decay_to - 1.0f) * progress);
}

}  // namespace

Recipe single_recipe() { return {}; }

Recipe group_recipe() {
  Recipe r;
  r.lr_decay_to = 0.2f, r.lr_decay_steps = 0;
  r.max_steps_per_lesson = 10;
  return r;
}

RoundTrainer::RoundTrainer(const Compute& compute, std::shared_ptr<const BaseWeights> base,
                           std::shared_ptr<const Tokenizer> tokenizer, ChatTemplate chat)
    : compute_(compute),
      tokenizer_(std::move(tokenizer)),
      chat_(std::move(chat)),
      context_(base->config().context),
      step_tokens_(kStepTokens),
      graph_(base->config(), compute) {
  if (chat_.available()) system_ids_ = chat_.default_system_ids(*tokenizer_);
  if (!system_ids_.empty()) system_ = std::make_unique<PrefixKv>();
  (void)set_base(std::move(base));
}

Status RoundTrainer::set_base(std::shared_ptr<const BaseWeights> base) {
  base_ = std::move(base);
  if (base_ == nullptr || system_ == nullptr || system_of_.lock() == base_) return {};
  system_of_.reset();
  DS_ASSIGN(*system_, graph_.prefix(*base_, system_ids_));
  system_of_ = base_;
  return {};
}

Status RoundTrainer::check(const Lesson& lesson) const {
  const auto tokens = [&](const std::string& text) {
    return std::ssize(tokenizer_->encode(text, false));
  };
  if (lesson.kind == Lesson::Kind::kText) {
    const int64_t count = tokens(lesson.answer);
    if (count >= 2) return {};
    return invalid("text: " + std::to_string(count) + " tokens, expected at least 2");
  }
  DS_ASSIGN(const std::vector<TokenId> asked, chat_.render(*tokenizer_, lesson.context, true));
  const int64_t count =
      std::ssize(asked) + std::max(tokens(lesson.answer), tokens(lesson.rejected)) + 1;
  const int64_t room = std::min(context_, kLessonTokens) - kRewordingTokens;
  if (count <= room) return {};
  return invalid("conversation: " + std::to_string(count) + " tokens, at most " +
                 std::to_string(room) + " can be learned");
}

std::vector<TokenId> RoundTrainer::full_ids(std::span<const ChatMessage> context,
                                            const std::string& answer,
                                            int64_t& first_target) const {
  Result<std::vector<TokenId>> ids = chat_.render(*tokenizer_, context, true);
  DS_CHECK(ids.ok());  // check() has passed
  first_target = static_cast<int64_t>(ids->size());
  const std::vector<TokenId> tail = tokenizer_->encode(answer, false);
  ids->insert(ids->end(), tail.begin(), tail.end());
  ids->push_back(chat_.end_of_turn());
  return std::move(ids).value();
}

Sequence RoundTrainer::sequence_of(std::span<const ChatMessage> context,
                                   const std::string& answer) const {
  Sequence out;
  out.ids = full_ids(context, answer, out.first_target);
  const auto skip = static_cast<int64_t>(system_ids_.size());
  if (system_ != nullptr && out.first_target > skip &&
      std::equal(system_ids_.begin(), system_ids_.end(), out.ids.begin())) {
    out.ids.erase(out.ids.begin(), out.ids.begin() + skip);
    out.first_target -= skip;
    out.prefix = system_.get();
  }
  return out;
}

Status RoundTrainer::build_anchors(int64_t tokens) {
  if (anchors_.contains(tokens) || !chat_.available()) return {};
  DS_TRY(set_base(base_));
  std::vector<Anchor> anchors;
  std::vector<std::vector<TokenId>> prompts;
  for (const std::string_view prompt : anchor_prompts()) {
    const ChatMessage message{"user", std::string(prompt)};
    Result<std::vector<TokenId>> ids = chat_.render(*tokenizer_, {&message, 1}, true);
    DS_CHECK(ids.ok());
    prompts.push_back(std::move(ids).value());
  }
  BatchDecoder decoder(base_->config(), compute_, kv_dtype(*compute_.ops, base_->format()));
  DS_ASSIGN(const auto answers,
            decoder.greedy(*base_, nullptr, prompts, tokens, chat_.end_of_turn()));
  std::vector<const Sequence*> sequences;
  for (size_t i = 0; i < prompts.size(); ++i) {
    Anchor anchor;
    anchor.sequence.ids.assign(prompts[i].begin() + static_cast<int64_t>(system_ids_.size()),
                               prompts[i].end());
    anchor.sequence.first_target = static_cast<int64_t>(anchor.sequence.ids.size());
    anchor.sequence.ids.insert(anchor.sequence.ids.end(), answers[i].begin(), answers[i].end());
    anchor.sequence.prefix = system_.get();
    if (anchor.sequence.targets() > 0) anchors.push_back(std::move(anchor));
  }
  for (const Anchor& a : anchors) sequences.push_back(&a.sequence);
  std::vector<StoredTopK> stored =
      store_top_k(graph_, *base_, nullptr, sequences, base_->config().vocab);
  DS_TRY(graph_.take_status());
  for (size_t i = 0; i < anchors.size(); ++i) anchors[i].stored = std::move(stored[i]);
  anchors_.emplace(tokens, std::move(anchors));
  return {};
}

void RoundTrainer::add_lesson(const Recipe& recipe, Round& round, const Lesson& lesson,
                              uint32_t pool) const {
  ds_sample sample{};
  sample.key = first_word(sha256(lesson.draw_key));
  sample.pool = pool;
  if (!lesson.rejected.empty()) sample.flags |= DS_SAMPLE_PAIR;
  if (lesson.kind == Lesson::Kind::kPair) sample.flags |= DS_SAMPLE_PREFERENCE;
  sample.tokens =
      static_cast<uint32_t>(lesson.kind == Lesson::Kind::kText
                                ? recipe.text_tokens
                                : std::ssize(sequence_of(lesson.context, lesson.answer).ids));
  sample.age_s = lesson.age_s;
  Entry entry;
  entry.lesson = &lesson;
  round.add(sample, std::move(entry));
}

/// Swapped forms of the lessons in question, to be drawn beside them.
void RoundTrainer::add_contrasts(const Recipe& recipe, Round& round,
                                 std::span<const std::string> avoid) const {
  const size_t lessons = round.entries.size();
  for (size_t i = 0; i < lessons; ++i) {
    const Lesson& lesson = *round.entries[i].lesson;
    if (lesson.kind != Lesson::Kind::kChat) continue;
    ds_sample sample{};
    sample.owner = round.session.samples[i].key;
    sample.pool = DS_POOL_CONTRAST;
    Rng rng(round.session.seed(), sample.owner);
    for (int n = 0; n < recipe.contrast_pool; ++n) {
      const auto swapped = swap_entity(lesson.context.back().content, lesson.answer, avoid, rng);
      if (!swapped) break;
      Sequence other = sequence_of(asking(lesson.context, swapped->question), swapped->answer);
      const int64_t before = other.prefix != nullptr ? other.prefix->tokens : 0;
      if (before + std::ssize(other.ids) > context_) continue;  // another name may be longer
      sample.key = Rng::mix(sample.owner, static_cast<uint64_t>(n));
      sample.tokens = static_cast<uint32_t>(other.ids.size());
      Entry entry;
      entry.own = std::move(other);
      round.add(sample, std::move(entry));
    }
  }
}

void RoundTrainer::add_anchors(const Recipe& recipe, Round& round) const {
  const auto found = anchors_.find(recipe.anchor_tokens);
  if (found == anchors_.end()) return;  // without a chat template
  for (size_t i = 0; i < found->second.size(); ++i) {
    const Anchor& anchor = found->second[i];
    ds_sample sample{};
    sample.key = Rng::mix(first_word(sha256("anchor")), i);
    sample.pool = DS_POOL_ANCHOR;
    sample.tokens = static_cast<uint32_t>(anchor.sequence.ids.size());
    Entry entry;
    entry.own = anchor.sequence;
    entry.of_base = anchor.stored;
    round.add(sample, std::move(entry));
  }
}

/// What can be drawn: fresh lessons, earlier ones, contrasts of both, anchors.
void RoundTrainer::lay_out(const Recipe& recipe, const RoundInput& input, Round& round) const {
  std::vector<std::string> names;  // entities of all stored items: never used as a swap
  for (const auto& lessons : {input.fresh, input.replay}) {
    for (const Lesson& l : lessons) {
      if (l.kind != Lesson::Kind::kChat) continue;
      for (const std::string& e : entities(l.context.back().content))
        names.push_back(lower_case(e));
    }
  }
  for (const Lesson& lesson : input.fresh) add_lesson(recipe, round, lesson, DS_POOL_FRESH);
  Rng rng(round.session.seed());
  const size_t rehearsed = recipe.replay_ratio > 0 ? std::min(input.replay.size(), kRehearsed) : 0;
  for (const size_t i : draw_indices(input.replay.size(), rehearsed, rng))
    add_lesson(recipe, round, input.replay[i], DS_POOL_REPLAY);
  add_contrasts(recipe, round, names);
  add_anchors(recipe, round);
}

/// The weights as they are now, and the learner's vectors over them.
Status RoundTrainer::begin_round(const Recipe& recipe, const RoundInput& input, int64_t steps_max,
                                 Round& round) const {
  DS_TRY(round.what.zero_gradient());
  if (const Adapters* now = round.what.adapters(); now != nullptr) {
    DS_ASSIGN(round.parent, now->copy());
  }
  if (round.session.learner().uses_vectors())
    DS_TRY(round.session.give_vectors(round.what.weights(), round.what.gradients()));
  return round.session.begin(input.number, static_cast<uint64_t>(steps_max), recipe.replay_ratio);
}

/// The optimizer's step and what the learner makes of it; false = the round is over.
bool RoundTrainer::finish_step(const Recipe& recipe, Round& round, AdamW& optimizer, float lr,
                               StepReport& report, RoundOutcome& outcome) {
  const Result<double> norm =
      optimizer.step(round.what.weights(), round.what.gradients(), lr, recipe.beta2, recipe.clip);
  outcome.failure = norm.status();
  if (!norm.ok()) return false;
  report.gradient_norm = *norm;
  outcome.finite = std::isfinite(*norm);
  if (!outcome.finite) return false;
  outcome.failure = round.session.stepped(report.loss, report.gradient_norm);
  if (!outcome.failure.ok()) return false;
  report.saturated = graph_.settle_saturation();
  if (report.saturated > 0) round.parent_packed = false;  // what falls back is packed anew
  outcome.failure = round.what.pack(graph_.formats(*base_));
  return outcome.failure.ok();
}

void RoundTrainer::end_round(Round& round, RoundOutcome& outcome) {
  if (!outcome.failure.ok() || !outcome.finite || outcome.stopped) return;
  Result<LearnerMemory> memory = round.session.end();
  outcome.failure = memory.status();
  if (memory.ok()) outcome.memory = std::move(memory).value();
  // It may have changed the weights.
  if (memory.ok() && round.session.learner().uses_vectors())
    outcome.failure = round.what.pack(graph_.formats(*base_));
}

RoundOutcome RoundTrainer::train(const Recipe& recipe, const LearnerPlugin& learner, Trainable what,
                                 const RoundInput& input,
                                 const std::function<bool(const StepReport&)>& on_step) {
  DS_CHECK(base_ != nullptr);
  RoundOutcome outcome = run_round(recipe, learner, what, input, on_step);
  if (outcome.failure.code() == Code::kResource)
    give_back();  // the next try needs other things first
  return outcome;
}

RoundOutcome RoundTrainer::run_round(const Recipe& recipe, const LearnerPlugin& learner,
                                     Trainable what, const RoundInput& input,
                                     const std::function<bool(const StepReport&)>& on_step) {
  RoundOutcome outcome;
  graph_.forget_fallen();
  outcome.failure = set_base(base_);
  if (outcome.failure.ok()) outcome.failure = prepare(recipe);
  if (outcome.failure.ok()) outcome.failure = what.pack(graph_.formats(*base_));
  if (!outcome.failure.ok()) return outcome;
  Round round(what, learner, compute_, Rng::mix(input.seed, input.number));
  lay_out(recipe, input, round);
  const auto lessons = std::ssize(input.fresh);
  const int64_t steps_max = std::max(recipe.max_steps, recipe.max_steps_per_lesson * lessons);
  outcome.failure = begin_round(recipe, input, steps_max, round);
  Result<AdamW> optimizer = AdamW::make(compute_, what.weights().size());
  if (outcome.failure.ok()) outcome.failure = optimizer.status();
  if (optimizer.ok()) round.optimizer = &*optimizer;
  for (int64_t index = 0; outcome.failure.ok() && index < steps_max; ++index) {
    const Result<std::vector<ds_draw>> draws = round.session.draws(static_cast<uint64_t>(index));
    Step step;
    StepTotal total;
    outcome.failure = draws.ok() ? run_draws(recipe, round, *draws, step, total) : draws.status();
    if (!outcome.failure.ok() || step.empty()) break;  // nothing drawn: the learner is done
    outcome.tokens += total.tokens;
    outcome.steps = index + 1;
    if (index == 0) outcome.first_loss = total.loss;
    outcome.last_loss = total.loss;
    StepReport report{outcome.steps, outcome.tokens, total.loss, 0, round.learned(), lessons};
    outcome.converged = report.learned == lessons;
    if (outcome.converged) {  // as of this forward pass the weights have learned it
      on_step(report);
      break;
    }
    if (!finish_step(recipe, round, *optimizer, learning_rate(recipe, index, steps_max), report,
                     outcome))
      break;
    outcome.stopped = !on_step(report);
    if (outcome.stopped) break;
  }
  end_round(round, outcome);
  return outcome;
}

}  // namespace ds
