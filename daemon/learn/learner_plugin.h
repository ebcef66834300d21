// SPDX-License-Identifier: Apache-2.0
// The learner component that says what a round trains on. Each round has an instance of its own,
// with the state that its parent's round left behind: what a learner remembers belongs to a
// version, and undo and rollback take it back with the weights.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ds/parallel.h"
#include "ds/status.h"
#include "learn/learner_memory.h"
#include "plugin/plugins.h"

namespace ds {

/// What a round's steps draw from.
class SampleTable {
 public:
  /// False, and nothing is added, if the key is taken.
  bool add(const ds_sample& sample) {
    if (!by_key_.emplace(sample.key, all_.size()).second) return false;
    all_.push_back(sample);
    return true;
  }
  std::span<ds_sample> all() { return all_; }
  std::span<const ds_sample> all() const { return all_; }
  ds_sample& operator[](size_t index) { return all_[index]; }
  const ds_sample& operator[](size_t index) const { return all_[index]; }
  /// Its index, or all().size().
  size_t find(uint64_t key) const {
    const auto at = by_key_.find(key);
    return at == by_key_.end() ? all_.size() : at->second;
  }

 private:
  std::vector<ds_sample> all_;
  std::unordered_map<uint64_t, size_t> by_key_;
};

class LearnerPlugin {
 public:
  /// A new instance like the one that serves. What another learner has kept is passed over.
  static Result<LearnerPlugin> create(const Plugins::Serving& serving,
                                      const LearnerMemory& memory = {});

  std::string_view name() const { return plugin_->name(); }
  /// {"name","version","sha256","generation","config"}: which code made the weights.
  Json provenance() const;
  bool combines() const { return table_.combine != nullptr; }
  /// Whether it gets ds_vectors at all, which cost a copy of the weights.
  bool uses_vectors() const {
    return combines() || table_.stepped != nullptr || table_.round_end != nullptr;
  }

  /// Where a call stands: the pool, the round's seed, the step in the round.
  struct Step {
    const ds_parallel* parallel = nullptr;
    uint64_t seed = 0, step = 0;
  };
  Status begin(const ds_round& round) const;
  /// What the step trains on; empty = the round is over. Keys are of `samples`, terms and slots
  /// are known, weights finite.
  Result<std::vector<ds_draw>> draws(const Step& at, const SampleTable& samples) const;
  /// Writes d loss / d logprob of each sequence; finite.
  Status coefficients(const Step& at, std::span<const ds_sequence_stat> sequences,
                      std::span<double> out) const;
  Status combine(const Step& at, const ds_vectors* vectors) const;
  Status stepped(const Step& at, const ds_vectors* vectors, const ds_step_report& report) const;
  Status end(const Step& at, const ds_vectors* vectors) const;
  /// `vectors` may be null.
  Result<LearnerMemory> save(const RoundVectors* vectors) const;
  const RoundVectors::Named& vectors() const { return vectors_; }  ///< of the memory it began with

 private:
  LearnerPlugin(std::shared_ptr<const PluginInstance> plugin, uint64_t generation)
      : plugin_(std::move(plugin)), table_(plugin_->table<ds_learner>()), generation_(generation) {}
  /// function(ds_call, ds_status) under the plugin's lock and name.
  template <class Function>
  Status call(const Step& at, const Function& function) const;
  Status check(std::span<const ds_draw> draws, const SampleTable& samples) const;
  Status broken(const std::string& what) const;

  std::shared_ptr<const PluginInstance> plugin_;
  ds_learner table_;
  uint64_t generation_;
  RoundVectors::Named vectors_;
};

}  // namespace ds
