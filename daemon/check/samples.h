// SPDX-License-Identifier: Apache-2.0
// Samples as a round offers them to a learner or a curriculum.
#pragma once

#include <random>
#include <vector>

#include "ds/plugin.h"

namespace ds::check {

/// `n` of them over the four pools; keys are large and in no order.
inline std::vector<ds_sample> random_samples(size_t n, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<float> unit(0, 1);
  std::vector<ds_sample> out(n);
  for (size_t i = 0; i < n; ++i) {
    ds_sample& s = out[i];
    s.key = rng() | 1;
    s.pool = i % 8 < 4 ? uint32_t{DS_POOL_FRESH} : static_cast<uint32_t>(1 + i % 3);
    s.owner = s.pool == DS_POOL_CONTRAST ? out[0].key : 0;
    s.flags = static_cast<uint32_t>(i % 3 ? DS_SAMPLE_SEEN : 0) |
              static_cast<uint32_t>(i % 7 == 6 ? DS_SAMPLE_LEARNED : 0) |
              static_cast<uint32_t>(i % 5 == 0 ? DS_SAMPLE_PAIR : 0) |
              static_cast<uint32_t>(i % 10 == 0 ? DS_SAMPLE_PREFERENCE : 0);
    s.tokens = 1 + static_cast<uint32_t>(rng() % 200);
    s.loss = s.flags & DS_SAMPLE_SEEN ? 4 * unit(rng) : 0;
    s.kl = s.flags & DS_SAMPLE_SEEN ? unit(rng) : 0;
    s.age_s = 1000 * unit(rng);
    s.reward = 2 * unit(rng) - 1;
  }
  return out;
}

}  // namespace ds::check
