// SPDX-License-Identifier: Apache-2.0
// Task models: small classifiers that are created, asked and taught through the same sockets,
// store, gate and versions as the language model. A version is the model's full weights
// ("digits@v3").
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "config.h"
#include "engine/versions.h"
#include "events.h"
#include "kernels/pool.h"
#include "learn/gate.h"
#include "learn/lessons.h"
#include "learn/task_round.h"

namespace ds {

class TaskModels {
 public:
  TaskModels(ReplayStore& store, VersionStore& files, Config& config, Plugins& plugins, Pool& pool,
             const Ops& ops, EventBus& events, Clock& clock);

  /// Reopens the models that the store knows.
  Status open();
  /// Sizes: inputs, hidden widths, classes. The name must be new and a valid folder name.
  Result<Json> create(const std::string& name, const std::vector<int64_t>& sizes);
  Json list() const;
  Result<Json> versions(const std::string& name) const;
  /// Versions::keep_files() of every model.
  std::vector<std::shared_ptr<const void>> keep_files();
  /// {label, scores (softmax), version} of one input row. Any thread. `ref` is a name or "name@vN".
  Result<Json> infer(const std::string& ref, const std::vector<float>& input) const;

  /// One round on the labels that wait, for whatever models, if the rule of rounds lets it open or
  /// `at_once`. Milliseconds until the next may open: 0 = one has ended, ask again; negative = none
  /// waits, or the model is pinned. What the disk refuses waits on. The learner's thread.
  int64_t train(bool at_once);

 private:
  struct Model {
    std::vector<int64_t> sizes;
    std::unique_ptr<Versions> versions;
  };
  struct Example {
    FeedbackItem item;
    TaskExample task;
  };
  std::vector<uint64_t> waiting() const;
  int64_t opens_in(const std::vector<uint64_t>& labels) const;
  Status attach(const std::string& name, const std::vector<int64_t>& sizes);
  Result<Example> example_of(const FeedbackItem& item, const Model& model) const;
  Result<LearnerPlugin> learner_for(const std::string& model, int64_t parent) const;
  TaskOutcome learn(const std::string& name, int64_t parent, Mlp& mlp,
                    const std::vector<Example>& fresh, const std::vector<Example>& replay) const;
  VersionManifest manifest_of(const std::string& name, const Model& model, int64_t parent,
                              const std::vector<StoredTensor>& tensors) const;
  std::vector<double> losses(const Mlp& mlp, const std::vector<Example>& examples) const;
  GateScores measure(const std::string& name, const Mlp& before, const Mlp& after,
                     const std::vector<Example>& fresh, const std::vector<Example>& held) const;
  bool train_model(const std::string& name, Model& model, std::vector<Example> fresh);
  std::vector<Example> stored_examples(const std::string& domain, const Model& model) const;
  const Model* find(const std::string& name) const;
  Status unknown(const std::string& name) const;  ///< names the known ones

  ReplayStore& store_;
  VersionStore& files_;
  Config& config_;
  Plugins& plugins_;
  EventBus& events_;
  Clock& clock_;
  Compute training_, serving_;
  BackOff back_off_;  ///< the learner's thread
  mutable std::mutex mutex_;
  std::map<std::string, Model> models_;  ///< entries are never removed
};

}  // namespace ds
