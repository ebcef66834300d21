// SPDX-License-Identifier: Apache-2.0
// How feedback becomes weights: the steps of one round. Fresh lessons in several wordings, earlier
// lessons rehearsed, KL anchors that hold the base's manners, swapped-entity contrasts that keep a
// fact from spreading. Deterministic: every draw is a function of (seed, round, step, draw key).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/batch_decoder.h"
#include "engine/full_weights.h"
#include "engine/tokenizer.h"
#include "learn/learner_plugin.h"
#include "learn/objective.h"
#include "storage/seams.h"

namespace ds {

/// One thing to learn.
struct Lesson {
  enum class Kind { kChat, kPair, kText };
  Kind kind = Kind::kChat;
  std::string draw_key;
  std::vector<ChatMessage> context;  ///< chat and pair: messages before the answer
  std::string answer;    ///< chat: the right answer; pair: the chosen one; text: the text
  std::string rejected;  ///< pair, or the answer that a correction replaces; may be empty
  float age_s = 0;       ///< before the newest of the round; 0 = unknown
};

/// What the host decides of a round; what its steps train on is the learner plugin's choice.
struct Recipe {
  int64_t rank = 8;
  float scale = 2.0f;
  uint32_t targets = 1u << kGate | 1u << kUp | 1u << kDown;
  /// Falls linearly over `lr_decay_steps` (0: all that the round may take) to lr * lr_decay_to,
  /// then stays: large steps find the answer, smaller ones settle it with half the drift.
  float lr = 2e-3f, lr_decay_to = 0.5f;
  int64_t lr_decay_steps = 10;
  float beta2 = 0.99f, clip = 1.0f;
  float plain_share = 0.34f;  ///< how often an only wording is the lesson's own
  float replay_ratio = 0.5f;  ///< share of earlier lessons in a step that is asked for
  int64_t anchor_tokens = 8;
  int contrast_pool = 12;  ///< swapped forms of a lesson that can be drawn
  int64_t max_steps = 60, max_steps_per_lesson = 12;
  float stop_logprob = -0.1f;  ///< mean log-probability of every wording, with all argmax
  int sightings = 2;           ///< steps in a row in which a lesson must meet that
  int64_t text_tokens = 256;   ///< longest piece of a raw text
};

/// The defaults for one waiting lesson and for several (measured:
/// tests/bench/correction_bench.cpp).
Recipe single_recipe();
Recipe group_recipe();

/// What a round trains: low-rank factors beside a base that stays, or every weight. A view.
class Trainable {
 public:
  Trainable(Adapters& adapters) : adapters_(&adapters) {}
  Trainable(FullWeights& full) : full_(&full) {}

  Adapters* adapters() const { return adapters_; }  ///< null when every weight is trained
  FullGradients* gradient() const { return full_ != nullptr ? &full_->gradient() : nullptr; }
  /// What the passes run over: `base`, or the trained copy of all weights.
  const BaseWeights& over(const BaseWeights& base) const {
    return full_ != nullptr ? *full_->packed() : base;
  }
  // In the memory of the backend.
  std::span<float> weights() const {
    return full_ != nullptr ? full_->masters() : adapters_->parameters().all();
  }
  std::span<float> gradients() const {
    return full_ != nullptr ? full_->gradient().all() : adapters_->gradient().all();
  }
  Status zero_gradient() const {
    return full_ != nullptr ? full_->zero_gradient() : adapters_->zero_gradient();
  }
  Status pack(const OperandFormats& formats) const {
    return full_ != nullptr ? full_->pack(formats.format()) : adapters_->pack(formats);
  }

 private:
  Adapters* adapters_ = nullptr;  // one of the two
  FullWeights* full_ = nullptr;
};

struct StepReport {
  int64_t step = 0, tokens = 0;
  double loss = 0, gradient_norm = 0;
  int64_t learned = 0, lessons = 0;  ///< fresh lessons that meet the stop rule
  int64_t saturated = 0;             ///< values in inputs of linear layers that FP16 could not hold
};

struct RoundOutcome {
  int64_t steps = 0, tokens = 0;
  bool converged = false;  ///< every fresh lesson met the stop rule
  bool stopped = false;    ///< on_step said so
  bool finite = true;
  Status failure;  ///< of a plugin, the device or memory; the weights are as the last good step
                   ///< left them
  double first_loss = 0, last_loss = 0;
  LearnerMemory memory;
};

/// What a round is about.
struct RoundInput {
  std::span<const Lesson> fresh, replay;  ///< `replay`: all earlier lessons
  uint64_t seed = 0, number = 1;          ///< `number`: in the lineage
};

class RoundTrainer {
 public:
  /// `base` gives the anchors' answers, in whatever weights rounds go on from, and is the first
  /// round's base.
  RoundTrainer(const Compute& compute, std::shared_ptr<const BaseWeights> base,
               std::shared_ptr<const Tokenizer> tokenizer, ChatTemplate chat);

  /// Builds what every round needs (the base's answers to the anchor prompts); train() does it if
  /// nobody has, an idle learner does it before.
  Status prepare(const Recipe& recipe) { return build_anchors(recipe.anchor_tokens); }

  /// The weights that the next rounds start from, before any adapters: the system turn and the
  /// contrasts are theirs. Null lets go of them until the next call, which must come before
  /// train(). What fails is tried again by train().
  Status set_base(std::shared_ptr<const BaseWeights> base);

  /// Gives back the workspace of the passes, which make it anew: for whoever is short of memory.
  void give_back() { graph_.release(); }

  /// Trains `what` on the fresh lessons as `learner` says. `on_step` is called after each step;
  /// false ends the round early.
  RoundOutcome train(const Recipe& recipe, const LearnerPlugin& learner, Trainable what,
                     const RoundInput& input,
                     const std::function<bool(const StepReport&)>& on_step);

  /// Whether it can be a lesson of this model at all: long enough, not too long for the context,
  /// and the template knows its roles. The rest of this class takes that for granted.
  Status check(const Lesson& lesson) const;

  /// Prompt and answer of a chat lesson as one sequence; behind the frozen system turn when it has
  /// the template's default one.
  Sequence sequence_of(std::span<const ChatMessage> context, const std::string& answer) const;
  /// The same without a prefix: all ids, as serving sees them.
  std::vector<TokenId> full_ids(std::span<const ChatMessage> context, const std::string& answer,
                                int64_t& first_target) const;

 private:
  struct Anchor {
    Sequence sequence;
    StoredTopK stored;
  };
  struct Entry;  // what is behind a sample, and its state during a round
  struct Round;
  struct Step;  // terms of one step and the sequences they point at
  struct StepTotal {
    double loss = 0;
    int64_t tokens = 0;
  };
  class StepBuilder;
  RoundOutcome run_round(const Recipe& recipe, const LearnerPlugin& learner, Trainable what,
                         const RoundInput& input,
                         const std::function<bool(const StepReport&)>& on_step);
  Status build_anchors(int64_t tokens);
  void lay_out(const Recipe& recipe, const RoundInput& input, Round& round) const;
  void add_lesson(const Recipe& recipe, Round& round, const Lesson& lesson, uint32_t pool) const;
  void add_contrasts(const Recipe& recipe, Round& round, std::span<const std::string> avoid) const;
  void add_anchors(const Recipe& recipe, Round& round) const;
  Status begin_round(const Recipe& recipe, const RoundInput& input, int64_t steps_max,
                     Round& round) const;
  Status build_step(const Recipe& recipe, Round& round, std::span<const ds_draw> draws, Step& step);
  Status run_draws(const Recipe& recipe, Round& round, std::span<const ds_draw> draws, Step& step,
                   StepTotal& total);
  Status run_step(const Recipe& recipe, Round& round, Step& step, StepTotal& total);
  bool finish_step(const Recipe& recipe, Round& round, AdamW& optimizer, float lr,
                   StepReport& report, RoundOutcome& outcome);
  void end_round(Round& round, RoundOutcome& outcome);
  Result<Adapters*> parent_of(Round& round);
  Result<double> parent_logprob(Round& round, const Sequence& sequence);
  static void note_results(const Recipe& recipe, Round& round, const Step& step, size_t slot,
                           const StepLoss& loss);

  Compute compute_;
  std::shared_ptr<const BaseWeights> base_;  // of the round
  std::shared_ptr<const Tokenizer> tokenizer_;
  ChatTemplate chat_;
  int64_t context_;
  int64_t step_tokens_;  ///< of a step; fewer once the device had no memory for as many
  TrainGraph graph_;
  std::vector<TokenId> system_ids_;
  std::unique_ptr<PrefixKv> system_;  // by the weights of `system_of_`; sequences point at it
  std::weak_ptr<const BaseWeights> system_of_;
  std::map<int64_t, std::vector<Anchor>> anchors_;  // by their length in tokens
};

}  // namespace ds
