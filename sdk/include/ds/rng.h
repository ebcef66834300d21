// SPDX-License-Identifier: Apache-2.0
// Chance that can be repeated, for the daemon and for plugins alike.
#pragma once

#include <cstdint>

namespace ds {

/// Counter-based: every draw is a pure function of (seed, stream, counter), so that one can be
/// repeated without replaying what came before. SplitMix64's finaliser over the three words.
class Rng {
 public:
  explicit Rng(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  std::uint64_t next() { return mix(mix(seed_, stream_), counter_++); }

  /// Uniform in [0, bound), bound > 0. Lemire: "Fast Random Integer Generation in an Interval"
  /// (2019); the rejection keeps it unbiased.
  std::uint64_t below(std::uint64_t bound) {
    unsigned __int128 product = static_cast<unsigned __int128>(next()) * bound;
    if (static_cast<std::uint64_t>(product) < bound) {
      const std::uint64_t threshold = -bound % bound;
      while (static_cast<std::uint64_t>(product) < threshold)
        product = static_cast<unsigned __int128>(next()) * bound;
    }
    return static_cast<std::uint64_t>(product >> 64);
  }

  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  ///< [0, 1)

  static std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
    std::uint64_t z = a + (b + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t seed_, stream_, counter_ = 0;
};

}  // namespace ds
