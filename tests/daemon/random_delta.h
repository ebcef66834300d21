// SPDX-License-Identifier: Apache-2.0
// A delta of random factors for all weights but those of k.
#pragma once

#include <random>

#include "engine/model.h"

namespace ds::test {

inline std::shared_ptr<const LoraDelta> random_delta(const BaseWeights& base,
                                                     const Compute& compute, int64_t rank,
                                                     uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<LoraDelta::LayerFactors> factors(static_cast<size_t>(base.config().n_layers));
  for (LoraDelta::LayerFactors& layer : factors) {
    for (int t = 0; t < kTargets; ++t) {
      if (t == kK) continue;  // a weight without a low-rank part
      const auto [n, k] = target_shape(base.config(), static_cast<Target>(t));
      layer[t].a.resize(static_cast<size_t>(rank * k));
      layer[t].b.resize(static_cast<size_t>(n * rank));
      for (auto* part : {&layer[t].a, &layer[t].b}) {
        for (float& x : *part) x = normal(rng);
      }
    }
  }
  auto packed = LoraDelta::pack(base, compute, rank, 0.5f, factors);
  DS_CHECK(packed.ok());
  return *packed;
}

}  // namespace ds::test
