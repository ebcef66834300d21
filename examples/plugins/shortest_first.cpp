// SPDX-License-Identifier: Apache-2.0
// Curriculum: short items before long ones.
#include "ds/plugin.hpp"

struct shortest_first {
  static constexpr std::string_view name = "shortest-first";
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC | DS_CAP_OUT_OF_PROCESS;
  explicit shortest_first(ds::sdk::context) {}

  std::vector<std::uint64_t> pick(const ds_call&, std::span<const ds_sample> samples,
                                  std::uint64_t budget) const {
    std::vector<std::pair<std::uint32_t, std::uint64_t>> order;  // tokens, key: equals by key
    for (const ds_sample& s : samples) order.emplace_back(s.tokens, s.key);
    std::ranges::sort(order);
    std::vector<std::uint64_t> keys;
    for (std::size_t i = 0; i < order.size() && i < budget; ++i) keys.push_back(order[i].second);
    return keys;
  }

  void score(const ds_call&, std::span<const ds_sample> samples,
             std::span<float> difficulty) const {
    for (std::size_t i = 0; i < samples.size(); ++i)
      difficulty[i] =
          static_cast<float>(samples[i].tokens) / (static_cast<float>(samples[i].tokens) + 64);
  }
};

DS_PLUGIN("org.driftstone.example.shortest-first", "1.0.0", "Apache-2.0", shortest_first)
