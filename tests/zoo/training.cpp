// SPDX-License-Identifier: Apache-2.0
// Learners and curricula that break one rule each.
#include <limits>

#include "tests/zoo/zoo.h"

namespace {

enum fault { sound, foreign_draw, infinite_coefficients, unseeded };
constexpr std::string_view names[] = {"sound_learner", "foreign_draw", "infinite_coefficients",
                                      "unseeded"};

template <fault F>
struct learner {
  static constexpr std::string_view name = names[F];
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | (F == unseeded ? 0ull : std::uint64_t{DS_CAP_DETERMINISTIC});
  explicit learner(ds::sdk::context) {}

  template <class Emit>
  void draws(const ds_call& call, std::span<const ds_sample> samples, Emit&& emit) const {
    if (samples.empty()) return;
    static std::uint64_t times = 0;
    const std::uint64_t start = F == unseeded ? times++ : call.seed + call.step;
    for (std::uint64_t i = 0; i < 4; ++i) {
      const ds_sample& s = samples[(start + i) % samples.size()];
      ds_draw d{};
      d.key = s.key + (F == foreign_draw ? 1 : 0);
      d.term = (s.flags & DS_SAMPLE_PAIR) != 0 ? DS_TERM_SEQUENCE : DS_TERM_CE;
      d.weight = 0.25f;
      emit(d);
    }
  }
  void coefficients(const ds_call&, std::span<const ds_sequence_stat> stats,
                    std::span<double> out) const {
    for (std::size_t i = 0; i < stats.size(); ++i)
      out[i] = F == infinite_coefficients ? std::numeric_limits<double>::infinity() : -0.5;
  }
};

template <bool Sound>
struct curriculum {
  static constexpr std::string_view name = Sound ? "sound_curriculum" : "foreign_keys";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  explicit curriculum(ds::sdk::context) {}
  std::vector<std::uint64_t> pick(const ds_call&, std::span<const ds_sample> samples,
                                  std::uint64_t budget) const {
    std::vector<std::uint64_t> keys;
    for (const ds_sample& s : samples)
      if (keys.size() < budget) keys.push_back(Sound ? s.key : s.key ^ 2);
    return keys;
  }
};

}  // namespace

DS_PLUGIN("org.driftstone.zoo.training", "1.0.0", "Apache-2.0", learner<sound>,
          learner<foreign_draw>, learner<infinite_coefficients>, learner<unseeded>,
          curriculum<true>, curriculum<false>)
