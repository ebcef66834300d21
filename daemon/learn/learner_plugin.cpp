// SPDX-License-Identifier: Apache-2.0
#include "learn/learner_plugin.h"

#include <algorithm>
#include <cmath>

namespace ds {
namespace {

constexpr size_t kMostDraws = 4096;  // of a step

}  // namespace

Result<LearnerPlugin> LearnerPlugin::create(const Plugins::Serving& serving,
                                            const LearnerMemory& memory) {
  DS_ASSIGN(const std::shared_ptr<PluginInstance> own, serving.instance->another());
  LearnerPlugin out(own, serving.generation);
  if (memory.learner != out.name()) return out;
  if (!memory.state.empty()) DS_TRY(own->restore(memory.state, memory.version));
  out.vectors_ = memory.vectors;
  return out;
}

Json LearnerPlugin::provenance() const {
  return {{"name", name()},
          {"version", plugin_->library().version()},
          {"sha256", plugin_->library().sha256()},
          {"generation", generation_},
          {"config", plugin_->config()}};
}

Status LearnerPlugin::broken(const std::string& what) const {
  return {Code::kPlugin, std::string(name()) + ": " + what};
}

template <class Function>
Status LearnerPlugin::call(const Step& at, const Function& function) const {
  const auto held = plugin_->one_call();
  ds_call c = host_call(at.parallel);
  c.seed = at.seed;
  c.step = at.step;
  ds_status st{};
  return plugin_status(name(), function(plugin_->handle(), &c, &st), st);
}

Status LearnerPlugin::begin(const ds_round& round) const {
  if (table_.round_begin == nullptr) return {};
  const auto held = plugin_->one_call();
  ds_status st{};
  return plugin_status(name(), table_.round_begin(plugin_->handle(), &round, &st), st);
}

Result<std::vector<ds_draw>> LearnerPlugin::draws(const Step& at,
                                                  const SampleTable& samples) const {
  std::vector<ds_draw> out;
  const auto emit = [](void* ctx, const ds_draw* draw) -> ds_code {
    auto& draws = *static_cast<std::vector<ds_draw>*>(ctx);
    if (draw == nullptr || draws.size() == kMostDraws) return DS_E_ARG;
    draws.push_back(full_struct(draw));
    return DS_OK;
  };
  DS_TRY(call(at, [&](ds_instance* self, const ds_call* c, ds_status* st) {
    return table_.draws(self, c, samples.all().data(), samples.all().size(), &out, emit, st);
  }));
  DS_TRY(check(out, samples));
  return out;
}

Status LearnerPlugin::check(std::span<const ds_draw> draws, const SampleTable& samples) const {
  for (const ds_draw& d : draws) {
    const size_t found = samples.find(d.key);
    if (found == samples.all().size())
      return broken("draws key " + std::to_string(d.key) + ", which no sample has");
    const std::string which = "draw of key " + std::to_string(d.key) + ": ";
    if (d.term < DS_TERM_CE || d.term > DS_TERM_SEQUENCE)
      return broken(which + "term " + std::to_string(d.term) + ", expected 1 to 5");
    if (d.term == DS_TERM_LOGIT_MSE)
      return broken(which + "a squared difference of logits (term 4), but none are stored with it");
    if (!std::isfinite(d.weight))
      return broken(which + "weight " + std::to_string(d.weight) + ", expected a number");
    if (d.slot > 3) return broken(which + "slot " + std::to_string(d.slot) + ", expected 0 to 3");
    if (d.slot > 0 && !combines())
      return broken(which + "slot " + std::to_string(d.slot) + ", but it has no combine");
    if (d.rejected != 0 && (samples[found].flags & DS_SAMPLE_PAIR) == 0)
      return broken(which + "its rejected answer, but it has none");
    if (d.term == DS_TERM_SEQUENCE && table_.coefficients == nullptr)
      return broken(which + "a sequence (term 5), but it has no coefficients");
  }
  return {};
}

Status LearnerPlugin::coefficients(const Step& at, std::span<const ds_sequence_stat> sequences,
                                   std::span<double> out) const {
  DS_TRY(call(at, [&](ds_instance* self, const ds_call* c, ds_status* st) {
    return table_.coefficients(self, c, sequences.data(), sequences.size(), out.data(), st);
  }));
  for (const double value : out) {
    if (!std::isfinite(value)) return broken("a coefficient is not a finite number");
  }
  return {};
}

Status LearnerPlugin::combine(const Step& at, const ds_vectors* vectors) const {
  if (table_.combine == nullptr) return {};
  return call(at, [&](ds_instance* self, const ds_call* c, ds_status* st) {
    return table_.combine(self, c, vectors, st);
  });
}

Status LearnerPlugin::stepped(const Step& at, const ds_vectors* vectors,
                              const ds_step_report& report) const {
  if (table_.stepped == nullptr) return {};
  return call(at, [&](ds_instance* self, const ds_call* c, ds_status* st) {
    return table_.stepped(self, c, vectors, &report, st);
  });
}

Status LearnerPlugin::end(const Step& at, const ds_vectors* vectors) const {
  if (table_.round_end == nullptr) return {};
  return call(at, [&](ds_instance* self, const ds_call* c, ds_status* st) {
    return table_.round_end(self, c, vectors, st);
  });
}

Result<LearnerMemory> LearnerPlugin::save(const RoundVectors* vectors) const {
  LearnerMemory out;
  out.learner = name();
  out.version = plugin_->library().version();
  if ((plugin_->component().caps & DS_CAP_STATEFUL) != 0) {
    DS_ASSIGN(out.state, plugin_->save());
  }
  if (vectors != nullptr) {
    DS_ASSIGN(out.vectors, vectors->named());
  }
  return out;
}

}  // namespace ds
