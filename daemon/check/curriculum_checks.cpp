// SPDX-License-Identifier: Apache-2.0
// Curricula: pick, score and outcome, and level 2: what is picked was offered, once, within budget.
#include <algorithm>
#include <set>

#include "check/check.h"
#include "check/samples.h"

namespace ds::check {
namespace {

struct Picked {
  std::vector<uint64_t> keys;
  std::vector<float> scores;
};

Picked pick(Trial& t, const std::vector<ds_sample>& samples, uint64_t budget) {
  const auto table = table_of<ds_curriculum>(t.component);
  Picked out;
  auto* keys = reinterpret_cast<uint64_t*>(t.buffer(budget * sizeof(uint64_t)));
  uint64_t n = 0;
  const ds_call* call = t.call(0);
  if (!t.invoke("pick", [&](ds_status* st) {
        return table.pick(t.instance, call, samples.data(), samples.size(), budget, keys, &n, st);
      }))
    return out;
  if (n > budget) {
    t.breaks("pick gave " + std::to_string(n) + " keys, the budget is " + std::to_string(budget));
    return out;
  }
  out.keys.assign(keys, keys + n);
  t.add_output(keys, n * sizeof(uint64_t));
  if (table.score != nullptr) {
    const size_t bytes = samples.size() * sizeof(float);
    auto* scores = reinterpret_cast<float*>(t.buffer(bytes));
    if (!t.invoke("score", [&](ds_status* st) {
          return table.score(t.instance, call, samples.data(), samples.size(), scores, st);
        }))
      return out;
    out.scores.assign(scores, scores + samples.size());
    t.add_output(scores, bytes);
  }
  if (table.outcome != nullptr)
    t.invoke("outcome", [&](ds_status* st) {
      return table.outcome(t.instance, samples.data(), samples.size(), st);
    });
  return out;
}

void pick_one(Trial& t) {
  const size_t n = t.options.empty ? 0 : static_cast<size_t>(30 * t.options.scale);
  (void)pick(t, random_samples(n, t.options.content), t.options.empty ? 0 : 10);
}

Verdict picks(Bench& bench) {
  for (const auto& [n, budget] :
       {std::pair<size_t, uint64_t>{30, 10}, {5, 50}, {40, 1}, {200, 64}}) {
    const Instance instance(bench);
    Trial t(bench.component, instance.get(), {});
    const std::vector<ds_sample> samples = random_samples(n, bench.settings.seed + n);
    const Picked out = pick(t, samples, budget);
    if (t.code != DS_OK) return failed("it gave " + std::to_string(t.code) + ": " + t.text);
    if (!t.broken.empty()) return failed(t.broken);
    std::set<uint64_t> offered, seen;
    for (const ds_sample& s : samples) offered.insert(s.key);
    for (const uint64_t key : out.keys) {
      if (offered.count(key) == 0)
        return failed("it picks the key " + std::to_string(key) + ", which no sample has");
      if (!seen.insert(key).second) return failed("it picks one key twice");
    }
    for (const float score : out.scores) {
      if (!(score >= 0 && score <= 1))
        return failed("a difficulty is " + std::to_string(score) + ", expected 0 to 1");
    }
  }
  return pass();
}

}  // namespace

std::vector<Operation> curriculum_operations() {
  return {{"pick", [](const ds_component&) { return true; }, pick_one}};
}

std::vector<Check> curriculum_checks() {
  return {{"numerics.picks", 2, DS_KIND_CURRICULUM, {}, picks}};
}

}  // namespace ds::check
