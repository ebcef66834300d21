// SPDX-License-Identifier: Apache-2.0
// Learner: each step trains on the fresh items with the highest loss, held to the base by one
// everyday prompt. The round ends when every item is learned.
#include "ds/plugin.hpp"

struct hardest_first {
  static constexpr std::string_view name = "hardest-first";
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "items": {"type": "integer", "minimum": 1, "default": 4, "description": "items per step"},
    "kl": {"type": "number", "minimum": 0, "default": 0.5, "description": "weight of the KL to the base"}}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_DETERMINISTIC;

  explicit hardest_first(ds::sdk::context c) : items(c.get("items", 4)), kl(c.get("kl", 0.5)) {}

  template <class Emit>
  void draws(const ds_call& call, std::span<const ds_sample> samples, Emit&& emit) const {
    std::vector<const ds_sample*> waiting, anchors;
    for (const ds_sample& s : samples) {
      if (s.pool == DS_POOL_FRESH && (s.flags & DS_SAMPLE_LEARNED) == 0) waiting.push_back(&s);
      if (s.pool == DS_POOL_ANCHOR) anchors.push_back(&s);
    }
    if (waiting.empty()) return;  // no draw: the round is over
    // What was never seen has no loss yet and goes first; equals in the order of their keys.
    const auto rank = [](const ds_sample* s) {
      const bool seen = (s->flags & DS_SAMPLE_SEEN) != 0;
      return std::tuple(seen, seen ? -s->loss : 0.0f, s->key);
    };
    std::ranges::sort(waiting, {}, rank);
    waiting.resize(std::min(waiting.size(), static_cast<std::size_t>(items)));
    for (const ds_sample* s : waiting)
      emit(draw(s->key, DS_TERM_CE, 1.0f / static_cast<float>(waiting.size())));
    if (!anchors.empty() && kl > 0)
      emit(draw(anchors[call.step % anchors.size()]->key, DS_TERM_KL_BASE, static_cast<float>(kl)));
  }

 private:
  static ds_draw draw(std::uint64_t key, std::uint32_t term, float weight) {
    ds_draw d{};
    d.key = key;
    d.term = term;
    d.weight = weight;
    return d;
  }
  std::int64_t items;
  double kl;
};

DS_PLUGIN("org.driftstone.example.hardest-first", "1.0.0", "Apache-2.0", hardest_first)
