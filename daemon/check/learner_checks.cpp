// SPDX-License-Identifier: Apache-2.0
// Learners: a round of three steps as the operation, and level 2: what is drawn exists, weights and
// coefficients are numbers, the same seed draws the same.
#include <algorithm>
#include <cmath>
#include <map>

#include "check/allocations.h"
#include "check/check.h"
#include "check/samples.h"

namespace ds::check {
namespace {

constexpr size_t kVectorFloats = 64;
constexpr int kSteps = 3;

/// The host's vectors: gradient slots, weights, and what the learner makes.
struct Vectors {
  std::map<int32_t, std::vector<float>> all;
  int32_t next = 32;

  explicit Vectors(uint64_t seed) {
    std::mt19937_64 rng(seed);
    for (const int32_t handle : {0, 1, 2, 3, int32_t{DS_VEC_WEIGHTS}, int32_t{DS_VEC_PARENT}}) {
      std::vector<float>& v = all[handle];
      for (size_t i = 0; i < kVectorFloats; ++i)
        v.push_back(std::uniform_real_distribution<float>(-1, 1)(rng));
    }
  }
  std::vector<float>* at(int32_t handle) {
    const auto found = all.find(handle);
    return found == all.end() ? nullptr : &found->second;
  }
  ds_vectors table() {
    ds_vectors t{};
    t.ctx = this;
    t.make = [](void* ctx, ds_str, int32_t* handle) -> ds_code {
      const AllocationPause ours;
      auto* self = static_cast<Vectors*>(ctx);
      self->all[*handle = self->next++].resize(kVectorFloats);
      return DS_OK;
    };
    t.copy = [](void* ctx, int32_t from, int32_t to) -> ds_code {
      const AllocationPause ours;
      auto *x = static_cast<Vectors*>(ctx)->at(from), *y = static_cast<Vectors*>(ctx)->at(to);
      if (x == nullptr || y == nullptr) return DS_E_ARG;
      *y = *x;
      return DS_OK;
    };
    t.scale = [](void* ctx, float a, int32_t x) -> ds_code {
      auto* v = static_cast<Vectors*>(ctx)->at(x);
      if (v == nullptr) return DS_E_ARG;
      for (float& value : *v) value *= a;
      return DS_OK;
    };
    t.axpy = [](void* ctx, float a, int32_t x, int32_t y) -> ds_code {
      auto *from = static_cast<Vectors*>(ctx)->at(x), *to = static_cast<Vectors*>(ctx)->at(y);
      if (from == nullptr || to == nullptr) return DS_E_ARG;
      for (size_t i = 0; i < kVectorFloats; ++i) (*to)[i] += a * (*from)[i];
      return DS_OK;
    };
    t.multiply = [](void* ctx, float a, int32_t x, int32_t z, int32_t y) -> ds_code {
      auto *u = static_cast<Vectors*>(ctx)->at(x), *v = static_cast<Vectors*>(ctx)->at(z),
           *to = static_cast<Vectors*>(ctx)->at(y);
      if (u == nullptr || v == nullptr || to == nullptr) return DS_E_ARG;
      for (size_t i = 0; i < kVectorFloats; ++i) (*to)[i] += a * (*u)[i] * (*v)[i];
      return DS_OK;
    };
    t.dot = [](void* ctx, int32_t x, int32_t y, double* out) -> ds_code {
      auto *u = static_cast<Vectors*>(ctx)->at(x), *v = static_cast<Vectors*>(ctx)->at(y);
      if (u == nullptr || v == nullptr) return DS_E_ARG;
      *out = 0;
      for (size_t i = 0; i < kVectorFloats; ++i) *out += double{(*u)[i]} * (*v)[i];
      return DS_OK;
    };
    return t;
  }
};

struct Round {
  std::vector<ds_draw> draws;  // of all steps
  std::vector<double> coefficients;
  bool bad_gradient = false;
};

bool coefficients_of(Trial& t, const ds_call* call, const std::vector<ds_draw>& draws, Round& out) {
  const auto table = table_of<ds_learner>(t.component);
  std::vector<ds_sequence_stat> stats;
  for (const ds_draw& d : draws) {
    if (d.term == DS_TERM_SEQUENCE)
      stats.push_back({d.key, -12.5 - double(stats.size()), -12, 20, d.rejected});
  }
  if (table.coefficients == nullptr || stats.empty()) return true;
  auto* to = reinterpret_cast<double*>(t.buffer(stats.size() * sizeof(double)));
  if (!t.invoke("coefficients", [&](ds_status* st) {
        return table.coefficients(t.instance, call, stats.data(), stats.size(), to, st);
      }))
    return false;
  out.coefficients.insert(out.coefficients.end(), to, to + stats.size());
  t.add_output(to, stats.size() * sizeof(double));
  return true;
}

/// One step; false = a call failed or the round is over.
bool step(Trial& t, uint64_t number, const std::vector<ds_sample>& samples,
          const ds_vectors* vectors, Round& out) {
  const auto table = table_of<ds_learner>(t.component);
  const ds_call* call = t.call(0, number);
  std::vector<ds_draw> draws;
  const auto emit = [](void* ctx, const ds_draw* d) -> ds_code {
    const AllocationPause ours;
    static_cast<std::vector<ds_draw>*>(ctx)->push_back(full_struct(d));
    return DS_OK;
  };
  if (!t.invoke("draws", [&](ds_status* st) {
        return table.draws(t.instance, call, samples.data(), samples.size(), &draws, emit, st);
      }))
    return false;
  for (const ds_draw& d : draws) t.add_output(&d, sizeof d);
  out.draws.insert(out.draws.end(), draws.begin(), draws.end());
  if (draws.empty() || !coefficients_of(t, call, draws, out)) return false;
  if (table.combine != nullptr && !t.invoke("combine", [&](ds_status* st) {
        return table.combine(t.instance, call, vectors, st);
      }))
    return false;
  ds_step_report report{};
  report.step = number;
  report.loss = 2.5;
  report.gradient_norm = 1;
  report.samples = samples.data();
  report.n_samples = samples.size();
  const ds_step_report* given = t.give("ds_step_report", report);
  return table.stepped == nullptr || t.invoke("stepped", [&](ds_status* st) {
    return table.stepped(t.instance, call, vectors, given, st);
  });
}

Round round_of(Trial& t, const std::vector<ds_sample>& samples) {
  const auto table = table_of<ds_learner>(t.component);
  Round out;
  Vectors vectors(t.options.content);
  const ds_vectors* given = t.give("ds_vectors", vectors.table());
  ds_round r{};
  r.seed = t.options.seed;
  r.round = 1;
  for (const ds_sample& s : samples) ++(s.pool == DS_POOL_FRESH ? r.n_fresh : r.n_replay);
  r.max_steps = kSteps;
  r.replay_ratio = 0.5f;
  const ds_round* round = t.give("ds_round", r);
  if (table.round_begin != nullptr && !t.invoke("round_begin", [&](ds_status* st) {
        return table.round_begin(t.instance, round, st);
      }))
    return out;
  for (uint64_t i = 0; i < kSteps; ++i) {
    if (!step(t, i, samples, given, out)) break;
  }
  if (t.code != DS_OK) return out;
  for (const float g : vectors.all[DS_VEC_GRADIENT0]) {
    out.bad_gradient = out.bad_gradient || !std::isfinite(g);
    t.add_output(&g, sizeof g);
  }
  const ds_call* call = t.call(0);
  if (table.round_end != nullptr && !t.invoke("round_end", [&](ds_status* st) {
        return table.round_end(t.instance, call, given, st);
      }))
    return out;
  if (table.forget != nullptr && !samples.empty())
    t.invoke("forget",
             [&](ds_status* st) { return table.forget(t.instance, &samples[0].key, 1, st); });
  return out;
}

std::vector<ds_sample> samples_for(const TrialOptions& o) {
  return random_samples(o.empty ? 0 : static_cast<size_t>(24 * o.scale), o.content);
}
void one_round(Trial& t) { (void)round_of(t, samples_for(t.options)); }

Round fresh_round(Bench& bench, const TrialOptions& options,
                  const std::vector<ds_sample>& samples) {
  const Instance instance(bench);
  Trial trial(bench.component, instance.get(), options);
  return round_of(trial, samples);
}

Verdict draws_exist(Bench& bench) {
  for (uint64_t content = 1; content <= 8; ++content) {
    TrialOptions options;
    options.content = bench.settings.seed * 100 + content;
    options.seed = content;
    const std::vector<ds_sample> samples = samples_for(options);
    for (const ds_draw& d : fresh_round(bench, options, samples).draws) {
      const auto sample = std::find_if(samples.begin(), samples.end(),
                                       [&](const ds_sample& s) { return s.key == d.key; });
      if (sample == samples.end())
        return failed("it draws the key " + std::to_string(d.key) + ", which no sample has");
      if (!std::isfinite(d.weight)) return failed("a draw's weight is not finite");
      if (d.term < DS_TERM_CE || d.term > DS_TERM_SEQUENCE)
        return failed("term " + std::to_string(d.term) + ", expected 1 to 5");
      if (d.slot > 3) return failed("slot " + std::to_string(d.slot) + ", expected 0 to 3");
      if (d.rejected > 1 || (d.rejected == 1 && (sample->flags & DS_SAMPLE_PAIR) == 0))
        return failed("it draws a rejected answer of a sample that has none");
    }
  }
  return pass();
}

Verdict finite(Bench& bench) {
  TrialOptions options;
  const Round round = fresh_round(bench, options, samples_for(options));
  for (const double c : round.coefficients) {
    if (!std::isfinite(c)) return failed("a coefficient is not finite");
  }
  if (round.bad_gradient) return failed("combine leaves a gradient that is not finite");
  return pass(std::to_string(round.coefficients.size()) + " coefficients");
}

Verdict seeded(Bench& bench) {
  TrialOptions options;
  const Operation operation = learner_operations()[0];
  const Trace first = trace_of(bench, operation, options);
  if (!first.same_as(trace_of(bench, operation, options)))
    return failed("the same seed and samples give another round");
  return pass();
}

}  // namespace

std::vector<Operation> learner_operations() {
  return {{"round", [](const ds_component&) { return true; }, one_round}};
}

std::vector<Check> learner_checks() {
  const uint32_t kind = DS_KIND_LEARNER;
  return {{"numerics.draws", 2, kind, {}, draws_exist},
          {"numerics.finite", 2, kind, {}, finite},
          {"numerics.seed", 2, kind, {"numerics.determinism"}, seeded}};
}

}  // namespace ds::check
