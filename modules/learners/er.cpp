// SPDX-License-Identifier: Apache-2.0
// Experience replay (Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning"): each
// step trains on fresh lessons and, with the same weight, on earlier ones at random.
#include "modules/learners/choose.h"

namespace ds::modules {
namespace {

struct er {
  static constexpr std::string_view name = "er";
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "lessons": {"type": "integer", "minimum": 1, "maximum": 1024, "default": 6,
      "description": "fresh lessons in a step, those furthest from learned"}}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_DETERMINISTIC;

  explicit er(sdk::context c) : lessons_(c.get("lessons", 6)) {}

  void round_begin(const ds_round& round) {
    round_ = round;
    per_step_ = lessons_per_step(lessons_, round);
  }

  /// Earlier ones are those of earlier rounds and those that this one has had in a step.
  template <class Emit>
  void draws(const ds_call& call, std::span<const ds_sample> samples, Emit&& emit) const {
    const Samples fresh = furthest(of_pool(samples, DS_POOL_FRESH), per_step_);
    Samples earlier = of_pool(samples, DS_POOL_REPLAY);
    for (const ds_sample& s : samples) {
      if (s.pool == DS_POOL_FRESH && (s.flags & DS_SAMPLE_SEEN) != 0 &&
          std::ranges::find(fresh, &s) == fresh.end())
        earlier.push_back(&s);
    }
    const std::size_t n = std::min(rehearsals(fresh.size(), round_), earlier.size());
    Rng rng(call.seed, call.step);
    shuffle_first(earlier, n, rng);
    const double weight = 1.0 / double(fresh.size() + n);
    for (const ds_sample* s : fresh) emit(draw(*s, DS_TERM_CE, weight));
    for (std::size_t i = 0; i < n; ++i) emit(draw(*earlier[i], DS_TERM_CE, weight));
  }

 private:
  std::int64_t lessons_;
  ds_round round_{};
  std::size_t per_step_ = 1;
};

}  // namespace
}  // namespace ds::modules

DS_PLUGIN("org.driftstone.learner.er", "1.0.0", "Apache-2.0", ds::modules::er)
