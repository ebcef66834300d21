// SPDX-License-Identifier: Apache-2.0
// The default: fresh lessons in several wordings and earlier ones rehearsed, while the divergence
// from the base is held down on everyday prompts (anchors) and on the lessons' questions asked of
// somebody else (contrasts), which keeps a fact from spreading. Corrections pull away from the
// answer that they replace (direct preference optimisation, Rafailov et al. 2023, eq. 7).
// Measured: tests/bench/correction_bench.cpp.
#include <map>

#include "modules/learners/choose.h"

namespace ds::modules {
namespace {

struct kl_to_base {
  static constexpr std::string_view name = "kl-to-base";
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "lessons": {"type": "integer", "minimum": 1, "maximum": 1024, "default": 6,
      "description": "fresh lessons in a step, those furthest from learned"},
    "wordings_alone": {"type": "integer", "minimum": 1, "maximum": 16, "default": 3,
      "description": "wordings in a step of a round's only lesson"},
    "wordings": {"type": "integer", "minimum": 1, "maximum": 16, "default": 1,
      "description": "wordings in a step of each of several lessons"},
    "rehearsed": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 4,
      "description": "earlier lessons in a step at most, those that have faded most"},
    "anchors": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 4,
      "description": "everyday prompts in a step: one at random, else those furthest from the base"},
    "anchor_weight_alone": {"type": "number", "minimum": 0, "default": 4,
      "description": "weight of the anchors' mean divergence beside an only lesson"},
    "anchor_weight": {"type": "number", "minimum": 0, "default": 6,
      "description": "the same beside several lessons"},
    "contrasts_alone": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 4,
      "description": "swapped questions in a step of an only lesson"},
    "contrasts": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 6,
      "description": "swapped questions in a step of several lessons"},
    "rehearsed_contrasts_alone": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 1,
      "description": "swapped questions in a step of rehearsed lessons, beside an only fresh one"},
    "rehearsed_contrasts": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 2,
      "description": "the same beside several"},
    "contrast_weight": {"type": "number", "minimum": 0, "default": 1,
      "description": "weight of the contrasts' mean divergence"},
    "pairs": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 1,
      "description": "corrections in a step that also pull away from the answer they replace"},
    "pair_weight": {"type": "number", "minimum": 0, "default": 0.1,
      "description": "weight of a pair's loss"},
    "pair_beta": {"type": "number", "exclusiveMinimum": 0, "default": 0.1,
      "description": "how soon a pair is far enough apart"}}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_DETERMINISTIC;

  explicit kl_to_base(sdk::context c)
      : lessons_(c.get("lessons", 6)),
        wordings_{c.get("wordings_alone", 3), c.get("wordings", 1)},
        rehearsed_(c.get("rehearsed", 4)),
        anchors_(c.get("anchors", 4)),
        anchor_weight_{c.get("anchor_weight_alone", 4.0), c.get("anchor_weight", 6.0)},
        contrasts_{c.get("contrasts_alone", 4), c.get("contrasts", 6)},
        rehearsed_contrasts_{c.get("rehearsed_contrasts_alone", 1),
                             c.get("rehearsed_contrasts", 2)},
        contrast_weight_(c.get("contrast_weight", 1.0)),
        pairs_(c.get("pairs", 1)),
        pair_weight_(c.get("pair_weight", 0.1)),
        pair_beta_(c.get("pair_beta", 0.1)) {}

  void round_begin(const ds_round& round) {
    round_ = round;
    many_ = round.n_fresh > 1;
    per_step_ = lessons_per_step(lessons_, round);
  }

  template <class Emit>
  void draws(const ds_call& call, std::span<const ds_sample> samples, Emit&& emit) {
    const Samples fresh = furthest(of_pool(samples, DS_POOL_FRESH), per_step_);
    if (fresh.empty()) return;
    const std::size_t asked = rehearsals(std::min<std::size_t>(round_.n_fresh, per_step_), round_);
    const Samples earlier = furthest(of_pool(samples, DS_POOL_REPLAY),
                                     std::min(asked, static_cast<std::size_t>(rehearsed_)));
    share_ = 1.0 / double(fresh.size());
    for (const ds_sample* s : fresh)
      emit(draw(*s, DS_TERM_CE, share_, static_cast<std::uint32_t>(wordings_[many_])));
    for (const ds_sample* s : earlier) emit(draw(*s, DS_TERM_CE, share_));
    draw_pairs(fresh, emit);
    Rng rng(Rng::mix(call.seed, call.step));
    draw_contrasts(samples, fresh, earlier, rng, emit);
    draw_anchors(samples, rng, emit);
  }

  /// d loss / d logprob of each pair's two answers.
  void coefficients(const ds_call&, std::span<const ds_sequence_stat> stats,
                    std::span<double> out) const {
    std::ranges::fill(out, 0.0);
    std::map<std::uint64_t, std::size_t> chosen;
    for (std::size_t i = 0; i < stats.size(); ++i) {
      if (stats[i].rejected == 0) {
        chosen[stats[i].key] = i;
        continue;
      }
      const auto other = chosen.find(stats[i].key);
      if (other == chosen.end()) continue;
      const ds_sequence_stat &good = stats[other->second], &bad = stats[i];
      const double margin =
          pair_beta_ * ((good.logprob - good.logprob_parent) - (bad.logprob - bad.logprob_parent));
      const double pull = pair_weight_ * share_ * pair_beta_ / (1 + std::exp(margin));
      out[other->second] = -pull;
      out[i] = pull;
    }
  }

 private:
  /// Preferences always, of corrections the first few.
  template <class Emit>
  void draw_pairs(const Samples& fresh, Emit& emit) const {
    if (pair_weight_ == 0) return;
    std::int64_t corrections = 0;
    for (const ds_sample* s : fresh) {
      if ((s->flags & DS_SAMPLE_PAIR) == 0) continue;
      if ((s->flags & DS_SAMPLE_PREFERENCE) == 0 && corrections++ >= pairs_) continue;
      ds_draw d = draw(*s, DS_TERM_SEQUENCE, 1.0);
      emit(d);
      d.rejected = 1;
      emit(d);
    }
  }

  template <class Emit>
  void draw_contrasts(std::span<const ds_sample> samples, const Samples& fresh,
                      const Samples& earlier, Rng& rng, Emit& emit) const {
    std::map<std::uint64_t, Samples> of_owner;
    for (const ds_sample& s : samples) {
      if (s.pool == DS_POOL_CONTRAST) of_owner[s.owner].push_back(&s);
    }
    Samples drawn;
    const auto add = [&](const Samples& lessons, std::int64_t count) {
      for (std::int64_t i = 0; i < count && !lessons.empty(); ++i) {
        const Samples& own = of_owner[lessons[std::size_t(i) % lessons.size()]->key];
        if (own.empty()) continue;
        const ds_sample* s = own[rng.below(own.size())];
        if (std::ranges::find(drawn, s) == drawn.end()) drawn.push_back(s);
      }
    };
    add(fresh, contrasts_[many_]);
    add(earlier, rehearsed_contrasts_[many_]);
    for (const ds_sample* s : drawn)
      emit(draw(*s, DS_TERM_KL_BASE, contrast_weight_ / double(drawn.size())));
  }

  template <class Emit>
  void draw_anchors(std::span<const ds_sample> samples, Rng& rng, Emit& emit) const {
    Samples anchors = of_pool(samples, DS_POOL_ANCHOR);
    const std::size_t n = std::min(static_cast<std::size_t>(anchors_), anchors.size());
    if (n == 0) return;
    shuffle_first(anchors, anchors.size(), rng);
    const auto drift = [](const ds_sample* s) {
      return (s->flags & DS_SAMPLE_SEEN) != 0 ? s->kl : HUGE_VALF;
    };
    std::stable_sort(anchors.begin() + 1, anchors.end(),
                     [&](const ds_sample* a, const ds_sample* b) { return drift(a) > drift(b); });
    for (std::size_t i = 0; i < n; ++i)
      emit(draw(*anchors[i], DS_TERM_KL_BASE, anchor_weight_[many_] / double(n)));
  }

  // Pairs of values: of a round's only lesson, of several.
  std::int64_t lessons_;
  std::array<std::int64_t, 2> wordings_;
  std::int64_t rehearsed_, anchors_;
  std::array<double, 2> anchor_weight_;
  std::array<std::int64_t, 2> contrasts_, rehearsed_contrasts_;
  double contrast_weight_;
  std::int64_t pairs_;
  double pair_weight_, pair_beta_;
  ds_round round_{};
  bool many_ = false;
  std::size_t per_step_ = 1;
  double share_ = 1;  // of a fresh lesson in the step
};

}  // namespace
}  // namespace ds::modules

DS_PLUGIN("org.driftstone.learner.kl-to-base", "1.0.0", "Apache-2.0", ds::modules::kl_to_base)
