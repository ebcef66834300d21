// SPDX-License-Identifier: Apache-2.0
// How the built-in learners choose among samples.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "ds/plugin.hpp"
#include "ds/rng.h"

namespace ds::modules {

using Samples = std::vector<const ds_sample*>;

inline Samples of_pool(std::span<const ds_sample> samples, std::uint32_t pool) {
  Samples out;
  for (const ds_sample& s : samples) {
    if (s.pool == pool) out.push_back(&s);
  }
  return out;
}

/// Tokens of lessons that a step takes: longer ones share it with fewer others.
constexpr std::uint64_t kLessonTokens = 1024;

/// At most `count` of them, those furthest from learned first; what was never seen counts as
/// furthest, ties stay in order. At least one, however long.
inline Samples furthest(Samples samples, std::size_t count) {
  const auto distance = [](const ds_sample* s) {
    return (s->flags & DS_SAMPLE_SEEN) != 0 ? s->loss : HUGE_VALF;
  };
  std::ranges::stable_sort(samples, [&](const ds_sample* a, const ds_sample* b) {
    const bool a_learned = (a->flags & DS_SAMPLE_LEARNED) != 0;
    const bool b_learned = (b->flags & DS_SAMPLE_LEARNED) != 0;
    return a_learned != b_learned ? b_learned : distance(a) > distance(b);
  });
  std::size_t n = 0;
  for (std::uint64_t tokens = 0; n < samples.size() && n < count; ++n) {
    tokens += samples[n]->tokens;
    if (n > 0 && tokens > kLessonTokens) break;
  }
  samples.resize(n);
  return samples;
}

/// The first `count` in random order.
inline void shuffle_first(Samples& samples, std::size_t count, Rng& rng) {
  for (std::size_t i = 0; i < count; ++i)
    std::swap(samples[i], samples[i + rng.below(samples.size() - i)]);
}

/// Fresh lessons of a step: as many as configured, and enough that each gets its turn in the round.
inline std::size_t lessons_per_step(std::int64_t configured, const ds_round& round) {
  const std::uint64_t steps = std::max<std::uint64_t>(round.max_steps, 1);
  return std::max(static_cast<std::size_t>(configured),
                  static_cast<std::size_t>((round.n_fresh + steps - 1) / steps));
}

/// Earlier lessons beside `fresh` ones, as the operator asks for them.
inline std::size_t rehearsals(std::size_t fresh, const ds_round& round) {
  const double ratio = std::clamp(static_cast<double>(round.replay_ratio), 0.0, 0.99);
  return static_cast<std::size_t>(0.5 + ratio / (1 - ratio) * static_cast<double>(fresh));
}

inline ds_draw draw(const ds_sample& s, std::uint32_t term, double weight,
                    std::uint32_t wordings = 1) {
  ds_draw d{};
  d.key = s.key;
  d.term = term;
  d.weight = static_cast<float>(weight);
  d.wordings = wordings;
  return d;
}

}  // namespace ds::modules
