// SPDX-License-Identifier: Apache-2.0
#include "learn/round_trainer.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <utility>

#include "learn/phrasing.h"
#include "learn/shipped_texts.h"
#include "storage/hash.h"

namespace ds {
namespace {

// What reword() and gate_forms() add to a question, at most.
constexpr int64_t kRewordingTokens = 32;
// Tokens of a step, which bound its memory: 0.7 MB each with SmolLM2-135M, and 0.2 MB per target.
constexpr int64_t kStepTokens = 2048;
constexpr int64_t kLessonTokens = 1024;
constexpr size_t kRehearsed = 32;  // earlier lessons that a round draws its rehearsals from

uint64_t key_word(const std::string& key) {
  const Sha256Digest digest = sha256(key);
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word = word << 8 | digest[static_cast<size_t>(i)];
  return word;
}

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
  r.anchor_weight = 6;
  r.contrasts = 6, r.replay_contrasts = 2;
  r.max_steps_per_lesson = 10;
  return r;
}

struct RoundTrainer::Desk {
  const Lesson* lesson = nullptr;  // fresh or earlier
  int64_t tokens = 0;              // of its plain wording, behind the system turn
  std::vector<Contrast> contrasts;
  double last_logprob = -1e9;  // of its worst wording when last seen
  int sightings = 0;           // steps in a row in which it met the stop rule
  bool learned = false;
  bool has_pair(const Recipe& recipe) const {
    return !lesson->rejected.empty() && recipe.dpo_weight > 0;
  }
  float chosen_reference = 0, rejected_reference = 0;
};

struct RoundTrainer::RoundState {
  std::vector<Desk> fresh, earlier;
  std::vector<double> drift;  // of each anchor from the base, when it was last in a step
  int forms = 1;              // wordings of a fresh lesson in a step
};

struct RoundTrainer::Step {
  std::deque<Sequence> sequences;  // stable addresses
  Terms terms;
  std::vector<Desk*> desks;        // fresh lessons, then rehearsed ones
  size_t fresh = 0;                // how many of them are fresh
  std::vector<size_t> first_term;  // per desk its first cross-entropy term, then the end
  std::vector<size_t> anchors;     // which ones; theirs are the last KL terms
  int64_t tokens = 0;

  /// Whether a sequence as long as `s` fits: what a step can do without is left out of a full one.
  bool has_room(const Sequence& s) const { return tokens + std::ssize(s.ids) <= kStepTokens; }
  const Sequence* keep(Sequence s) {
    tokens += std::ssize(s.ids);
    sequences.push_back(std::move(s));
    return &sequences.back();
  }
};

size_t Trainable::size() const {
  return full_ != nullptr ? full_->size() : adapters_->parameters().size();
}

void Trainable::zero_gradient() const {
  if (full_ != nullptr) return full_->zero_gradient();
  adapters_->zero_gradient();
}

void Trainable::pack(const Compute& compute, WeightFormat format) const {
  if (full_ != nullptr) return full_->pack(compute, format);
  adapters_->pack(compute, format);
}

double Trainable::step(AdamW& optimizer, const Compute& compute, float lr,
                       const Recipe& recipe) const {
  std::vector<AdamW::Part> parts;
  if (full_ == nullptr) {
    parts.push_back({adapters_->parameters(), adapters_->gradient()});
  } else {
    for (auto& [name, master] : full_->masters()) {
      parts.push_back({master, full_->gradient()[name]});
    }
  }
  return optimizer.step(compute, parts, lr, recipe.beta2, recipe.clip);
}

RoundTrainer::RoundTrainer(const Compute& compute, std::shared_ptr<const BaseWeights> base,
                           std::shared_ptr<const Tokenizer> tokenizer, ChatTemplate chat)
    : compute_(compute),
      tokenizer_(std::move(tokenizer)),
      chat_(std::move(chat)),
      context_(base->config().context),
      graph_(base->config(), compute) {
  if (chat_.available()) system_ids_ = chat_.default_system_ids(*tokenizer_);
  if (!system_ids_.empty()) system_ = std::make_unique<PrefixKv>();
  set_base(std::move(base));
}

void RoundTrainer::set_base(std::shared_ptr<const BaseWeights> base) {
  base_ = std::move(base);
  if (base_ == nullptr || system_ == nullptr || system_of_.lock() == base_) return;
  *system_ = *graph_.prefix(*base_, system_ids_);
  system_of_ = base_;
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

void RoundTrainer::build_anchors(int64_t tokens) {
  if (anchors_.contains(tokens) || !chat_.available()) return;
  std::vector<Anchor>& anchors = anchors_[tokens];
  std::vector<std::vector<TokenId>> prompts;
  for (const std::string_view prompt : anchor_prompts()) {
    const ChatMessage message{"user", std::string(prompt)};
    Result<std::vector<TokenId>> ids = chat_.render(*tokenizer_, {&message, 1}, true);
    DS_CHECK(ids.ok());
    prompts.push_back(std::move(ids).value());
  }
  BatchDecoder decoder(base_->config(), compute_,
                       base_->format() == WeightFormat::kF32 ? KvDtype::kF32 : KvDtype::kBF16);
  const auto decoded = decoder.greedy(*base_, nullptr, prompts, tokens, chat_.end_of_turn());
  if (!decoded.ok()) {  // the first pass of the round meets it too, and reports it
    anchors_.erase(tokens);
    return;
  }
  const auto& answers = *decoded;
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
  for (size_t i = 0; i < anchors.size(); ++i) anchors[i].stored = std::move(stored[i]);
}

void RoundTrainer::add_lesson(Step& step, const Recipe& recipe, const Lesson& lesson, Rng& rng,
                              int forms, float weight) const {
  if (lesson.kind == Lesson::Kind::kText) {
    std::vector<TokenId> ids = tokenizer_->encode(lesson.answer, false);
    const auto length = static_cast<int64_t>(ids.size());
    const int64_t start = length > recipe.text_tokens
                              ? static_cast<int64_t>(rng.below(
                                    static_cast<uint64_t>(length - recipe.text_tokens + 1)))
                              : 0;
    ids.erase(ids.begin(), ids.begin() + start);
    ids.resize(static_cast<size_t>(std::min(length, recipe.text_tokens)));
    if (ids.size() < 2) return;
    step.terms.cross_entropy.push_back({step.keep({std::move(ids), 1, nullptr}), weight});
    return;
  }
  const std::string& question = lesson.context.back().content;
  for (int form = 0; form < forms; ++form) {
    const bool plain = forms == 1 ? rng.uniform() < recipe.plain_share : form == 0;
    const std::string asked = plain ? question : reword(question, rng);
    Sequence sequence = sequence_of(asking(lesson.context, asked), lesson.answer);
    if (form > 0 && !step.has_room(sequence)) continue;
    step.terms.cross_entropy.push_back(
        {step.keep(std::move(sequence)), weight / static_cast<float>(forms)});
  }
}

void RoundTrainer::fill_contrasts(const Recipe& recipe, Desk& desk,
                                  std::span<const std::string> avoid, uint64_t seed) const {
  if (desk.lesson->kind != Lesson::Kind::kChat) return;
  Rng rng(seed, key_word(desk.lesson->draw_key));
  for (int i = 0; i < recipe.contrast_pool; ++i) {
    const auto swapped =
        swap_entity(desk.lesson->context.back().content, desk.lesson->answer, avoid, rng);
    if (!swapped) return;
    Sequence other = sequence_of(asking(desk.lesson->context, swapped->question), swapped->answer);
    const int64_t before = other.prefix != nullptr ? other.prefix->tokens : 0;
    if (before + std::ssize(other.ids) > context_) continue;  // another name may be longer
    desk.contrasts.push_back({std::move(other), {}, false});
  }
}

void RoundTrainer::add_contrasts(Step& step, const Recipe& recipe, Rng& rng) {
  std::vector<Contrast*> drawn;
  const auto draw = [&](std::span<Desk* const> desks, int count) {
    for (int i = 0; i < count && !desks.empty(); ++i) {
      Desk& desk = *desks[static_cast<size_t>(i) % desks.size()];
      if (desk.contrasts.empty()) continue;
      Contrast* c = &desk.contrasts[rng.below(desk.contrasts.size())];
      if (std::find(drawn.begin(), drawn.end(), c) != drawn.end() || !step.has_room(c->sequence))
        continue;
      step.tokens += std::ssize(c->sequence.ids);
      drawn.push_back(c);
    }
  };
  const std::span<Desk* const> desks = step.desks;
  draw(desks.first(step.fresh), recipe.contrasts);
  draw(desks.subspan(step.fresh), recipe.replay_contrasts);
  std::vector<const Sequence*> missing;
  for (const Contrast* c : drawn) {
    if (!c->ready) missing.push_back(&c->sequence);
  }
  std::vector<StoredTopK> stored =
      store_top_k(graph_, *base_, nullptr, missing, base_->config().vocab);
  size_t next = 0;
  for (Contrast* c : drawn) {
    if (!c->ready) c->stored = std::move(stored[next++]);
    c->ready = true;
    step.terms.kl.push_back(
        {&c->sequence, &c->stored, recipe.contrast_weight / static_cast<float>(drawn.size())});
  }
}

void RoundTrainer::add_anchors(Step& step, const Recipe& recipe, const std::vector<double>& drift,
                               Rng& rng) const {
  const auto found = anchors_.find(recipe.anchor_tokens);
  if (found == anchors_.end()) return;  // without a chat template
  const std::vector<Anchor>& anchors = found->second;
  const auto n = std::min(static_cast<size_t>(recipe.anchors), anchors.size());
  std::vector<size_t> order = draw_indices(anchors.size(), anchors.size(), rng);
  std::stable_sort(order.begin() + (n > 0), order.end(),
                   [&](size_t a, size_t b) { return drift[a] > drift[b]; });
  order.resize(n);
  for (const size_t i : order) {
    step.terms.kl.push_back(
        {&anchors[i].sequence, &anchors[i].stored, recipe.anchor_weight / static_cast<float>(n)});
  }
  step.anchors = std::move(order);
}

double RoundTrainer::summed_logprob(Trainable what, const Sequence& sequence) {
  Terms terms;
  terms.cross_entropy.push_back({&sequence, 1.0f});
  return run_terms(graph_, compute_, what.over(*base_), what.adapters(), nullptr, terms, false)
      .items[0]
      .sum_logprob;
}

RoundTrainer::RoundState RoundTrainer::sit_down(const Recipe& recipe, Trainable what,
                                                std::span<const Lesson> fresh,
                                                std::span<const Lesson> replay,
                                                uint64_t round_seed) {
  RoundState state;
  state.forms = fresh.size() == 1 ? recipe.forms_alone : recipe.forms_many;
  state.drift.assign(anchor_prompts().size(), std::numeric_limits<double>::infinity());
  std::vector<std::string> names;  // entities of all stored items: never used as a swap
  for (const auto& lessons : {fresh, replay}) {
    for (const Lesson& l : lessons) {
      if (l.kind != Lesson::Kind::kChat) continue;
      for (const std::string& e : entities(l.context.back().content))
        names.push_back(lower_case(e));
    }
  }
  const auto seat = [&](std::vector<Desk>& desks, const Lesson& lesson) {
    Desk& desk = desks.emplace_back();
    desk.lesson = &lesson;
    desk.tokens = lesson.kind == Lesson::Kind::kText
                      ? recipe.text_tokens
                      : std::ssize(sequence_of(lesson.context, lesson.answer).ids);
    fill_contrasts(recipe, desk, names, round_seed);
  };
  for (const Lesson& lesson : fresh) seat(state.fresh, lesson);
  for (Desk& desk : state.fresh) {
    if (!desk.has_pair(recipe)) continue;
    const auto reference = [&](const std::string& answer) {
      return static_cast<float>(summed_logprob(what, sequence_of(desk.lesson->context, answer)));
    };
    desk.chosen_reference = reference(desk.lesson->answer);
    desk.rejected_reference = reference(desk.lesson->rejected);
  }
  Rng rng(round_seed);
  const size_t rehearsed = recipe.replay_per_step > 0 ? std::min(replay.size(), kRehearsed) : 0;
  for (const size_t i : draw_indices(replay.size(), rehearsed, rng)) seat(state.earlier, replay[i]);
  return state;
}

/// At most `count` desks, those furthest from learned first, ties in order.
std::vector<RoundTrainer::Desk*> RoundTrainer::choose(std::vector<Desk>& desks, int count) {
  std::vector<Desk*> chosen;
  for (Desk& d : desks) chosen.push_back(&d);
  std::stable_sort(chosen.begin(), chosen.end(), [](const Desk* a, const Desk* b) {
    return a->learned != b->learned ? b->learned : a->last_logprob < b->last_logprob;
  });
  size_t n = 0;
  for (int64_t tokens = 0; n < chosen.size() && std::cmp_less(n, count); ++n) {
    tokens += chosen[n]->tokens;
    if (n > 0 && tokens > kLessonTokens) break;
  }
  chosen.resize(n);
  return chosen;
}

RoundTrainer::Step RoundTrainer::build_step(const Recipe& recipe, RoundState& state,
                                            uint64_t step_seed) {
  Step step;
  step.desks = choose(state.fresh, recipe.lessons_per_step);
  step.fresh = step.desks.size();
  for (Desk* old : choose(state.earlier, recipe.replay_per_step)) step.desks.push_back(old);
  const auto share = 1.0f / static_cast<float>(step.fresh);
  for (size_t i = 0; i < step.desks.size(); ++i) {
    const Lesson& lesson = *step.desks[i]->lesson;
    Rng rng(step_seed, key_word(lesson.draw_key));
    step.first_term.push_back(step.terms.cross_entropy.size());
    if (i < step.fresh || step.tokens <= kLessonTokens)
      add_lesson(step, recipe, lesson, rng, i < step.fresh ? state.forms : 1, share);
  }
  step.first_term.push_back(step.terms.cross_entropy.size());
  int pairs = 0;
  for (size_t i = 0; i < step.fresh; ++i) {
    const Desk& desk = *step.desks[i];
    if (!desk.has_pair(recipe)) continue;
    if (desk.lesson->kind != Lesson::Kind::kPair && pairs++ >= recipe.correction_pairs) continue;
    Sequence own = sequence_of(desk.lesson->context, desk.lesson->answer);
    const Sequence* good = nullptr;  // often one of the wordings already
    for (size_t t = step.first_term[i]; t < step.first_term[i + 1]; ++t) {
      const Sequence* there = step.terms.cross_entropy[t].sequence;
      if (there->ids == own.ids) good = there;
    }
    if (good == nullptr) good = step.keep(std::move(own));
    const Sequence* bad = step.keep(sequence_of(desk.lesson->context, desk.lesson->rejected));
    step.terms.dpo.push_back({good, bad, desk.chosen_reference, desk.rejected_reference,
                              recipe.dpo_beta, recipe.dpo_weight * share});
  }
  Rng rng(step_seed);
  add_contrasts(step, recipe, rng);
  add_anchors(step, recipe, state.drift, rng);
  return step;
}

/// Read free from the training forward: what each lesson's wordings looked like, and how far each
/// anchor is from the base.
void RoundTrainer::note_results(const Recipe& recipe, const Step& step, const StepLoss& loss,
                                RoundState& state) {
  const size_t first_anchor = loss.kl_mean.size() - step.anchors.size();
  for (size_t i = 0; i < step.anchors.size(); ++i)
    state.drift[step.anchors[i]] = loss.kl_mean[first_anchor + i];
  for (size_t i = 0; i < step.desks.size(); ++i) {
    const size_t first = step.first_term[i], last = step.first_term[i + 1];
    if (first == last) continue;
    Desk& desk = *step.desks[i];
    desk.last_logprob = 0;
    for (size_t t = first; t < last; ++t)
      desk.last_logprob = std::min(desk.last_logprob, loss.items[t].mean_logprob);
    const bool good = loss.items[first].all_argmax && desk.last_logprob > recipe.stop_logprob;
    desk.sightings = good ? desk.sightings + 1 : 0;
    desk.learned = desk.sightings >= recipe.sightings;
  }
}

RoundOutcome RoundTrainer::train(const Recipe& recipe, Trainable what,
                                 std::span<const Lesson> fresh, std::span<const Lesson> replay,
                                 uint64_t seed, uint64_t round,
                                 const std::function<bool(const StepReport&)>& on_step) {
  DS_CHECK(base_ != nullptr);
  prepare(recipe);
  const uint64_t round_seed = Rng::mix(seed, round);
  what.pack(compute_, base_->format());
  RoundState state = sit_down(recipe, what, fresh, replay, round_seed);
  const int64_t steps_max =
      std::max(recipe.max_steps, recipe.max_steps_per_lesson * static_cast<int64_t>(fresh.size()));
  AdamW optimizer(what.size());
  RoundOutcome outcome;
  for (int64_t index = 0; index < steps_max; ++index) {
    const Step step = build_step(recipe, state, Rng::mix(round_seed, static_cast<uint64_t>(index)));
    what.zero_gradient();
    const StepLoss loss = run_terms(graph_, compute_, what.over(*base_), what.adapters(),
                                    what.gradient(), step.terms, true);
    outcome.failure = graph_.take_status();
    if (!outcome.failure.ok()) return outcome;
    note_results(recipe, step, loss, state);
    outcome.tokens += loss.tokens;
    outcome.steps = index + 1;
    if (index == 0) outcome.first_loss = loss.total;
    outcome.last_loss = loss.total;
    const auto learned =
        std::ranges::count_if(state.fresh, [](const Desk& d) { return d.learned; });
    outcome.converged = learned == std::ssize(fresh);
    StepReport report{outcome.steps, outcome.tokens, loss.total, 0, learned, std::ssize(fresh)};
    if (outcome.converged) {  // as of this forward pass the weights have learned it
      on_step(report);
      return outcome;
    }
    report.gradient_norm =
        what.step(optimizer, compute_, learning_rate(recipe, index, steps_max), recipe);
    outcome.finite = std::isfinite(report.gradient_norm);
    if (!outcome.finite) return outcome;
    what.pack(compute_, base_->format());
    outcome.stopped = !on_step(report);
    if (outcome.stopped) return outcome;
  }
  return outcome;
}

}  // namespace ds
