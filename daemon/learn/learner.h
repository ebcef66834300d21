// SPDX-License-Identifier: Apache-2.0
// The background trainer of the language model. One thread: waits for feedback, runs rounds (train,
// gate, publish or hold), undoes items by rebuilding. Every outcome is durable, as a round record
// and as fates of the items, in the same batch that moves the serving pointer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "config.h"
#include "engine/bases.h"
#include "engine/versions.h"
#include "events.h"
#include "kernels/pool.h"
#include "learn/candidate.h"
#include "learn/gate.h"
#include "learn/lessons.h"
#include "learn/round_trainer.h"
#include "metrics.h"

namespace ds {

struct LearnerParts {
  Versions& versions;
  ReplayStore& store;
  VersionStore& files;
  Bases& bases;
  BaseStore& base_files;
  Config& config;
  Pool& pool;
  const Ops& ops;
  OpContext context;  ///< its stream on a GPU
  const ComponentsSlot& components;
  Plugins& plugins;
  Metrics& metrics;
  EventBus& events;
  Clock& clock;
  std::shared_ptr<const Tokenizer> tokenizer;
  ChatTemplate chat;
  std::function<int64_t(bool at_once)> train_task_models;  ///< TaskModels::train()
  /// Changes a low-rank candidate between training and gate; tests plant damage here. Empty in
  /// production.
  std::function<void(Adapters&)> tamper;
  DeviceState* device = nullptr;  ///< of `ops`; once it is lost nothing is trained. Null: the CPU
};

using OutcomeCallback = std::function<void(Result<Json>)>;

class Learner {
 public:
  explicit Learner(LearnerParts parts);
  ~Learner();  ///< drops a running round; its items wait for the next start

  void start();
  void notify();  ///< something was stored
  Json status() const;
  /// Opens a round now with whatever waits. Without `wait` the answer is {"outcome":"started"}.
  void step(bool wait, OutcomeCallback done);
  Status set_paused(bool paused);
  /// Retracts an item: its waiting record is dropped, or the versions that learned it are rebuilt
  /// without it and the result is published.
  void undo(const std::string& id, OutcomeCallback done);

 private:
  struct Round;    // one candidate in the making
  struct Rebuild;  // what an undo trains again
  struct Command {
    enum class Kind { kStep, kUndo } kind;
    std::string id;
    OutcomeCallback done;
  };

  void loop();
  bool due(int64_t& wait_ms);
  int64_t train_task_models();
  std::vector<uint64_t> waiting() const;
  Json run_round();
  Status undo_retracted(const std::vector<uint64_t>& offsets);
  std::vector<FeedbackItem> take_items(const std::vector<uint64_t>& offsets, size_t limit);
  Json publish_round(Round& round, Candidate candidate, const Json& gate_record);
  Status publish_files(const Candidate& candidate, Commit commit);
  Json run_undo(const std::string& id);
  Result<Rebuild> plan_rebuild(const FeedbackItem& item) const;
  Result<Rebuild> plan_from_log(const FeedbackItem& item) const;
  Status rebuild_round(const Rebuild& plan, const std::vector<FeedbackItem>& items,
                       std::vector<FeedbackItem>& earlier, Round& last);
  Json undo_learned(const FeedbackItem& item, Commit with);
  void bring_back(const FeedbackItem& undone, Commit& commit) const;

  /// Builds trainer and probe unless they are there; why nothing can be trained now.
  Status get_ready();
  Status build_trainer();
  void warn_of_frozen_parts() const;
  void follow_plugins();
  Recipe recipe_for(size_t items, const Trained& trained) const;
  uint64_t lineage_round(int64_t version) const;
  std::vector<FeedbackItem> lineage_items(int64_t version) const;
  template <class Make>
  std::invoke_result_t<Make> with_room(const Make& make) const;
  Result<Trained> trained_of(int64_t version);
  Result<Candidate> candidate_of(const Trained& trained, const VersionManifest& manifest) const;
  Result<std::shared_ptr<const Weights>> servable(const Trained& trained) const;
  /// The lesson of an item, or why this model cannot learn it.
  Result<Lesson> trainable(const FeedbackItem& item) const;
  Result<Round> train_round(int64_t parent, std::vector<FeedbackItem> items,
                            const std::vector<FeedbackItem>& earlier, Trained trained,
                            uint64_t round_in_lineage);
  Status run_training(Round& round, const LearnerPlugin& learner,
                      const std::vector<Lesson>& replay);
  Result<LearnerPlugin> learner_for(const LearnerMemory& memory) const;
  GateScores measure(const Round& round, const Weights& parent, const Weights& candidate);
  Json finish_round(Round& round, int64_t parent, bool gate_it);
  Json drop(Round& round, int64_t parent, const Json& gate);
  Json put_off(std::vector<FeedbackItem> items, int64_t parent, const Status& why);
  Json hold(Round& round, int64_t parent, const std::string& outcome, const std::string& reason,
            const Json& gate);
  void set_fates(Commit& commit, const std::vector<FeedbackItem>& items, const std::string& state,
                 const std::string& version, int64_t step, const std::string& reason) const;
  bool should_drop() const;
  bool device_lost() const { return parts_.device != nullptr && parts_.device->lost(); }
  void report(const StepReport& step);
  void publish_status(const std::string& state);
  void update_share();
  double gpu_share() const;

  LearnerParts parts_;
  ComponentsSlot components_;  ///< of the round
  uint64_t form_key_ = 0;      ///< of the weights that trainer and probe know
  Compute compute_;
  std::unique_ptr<RoundTrainer> trainer_;
  std::unique_ptr<GateProbe> probe_;
  std::thread thread_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Command> commands_;
  bool stop_ = false, changed_ = false;
  std::atomic<bool> paused_ = false;  ///< written under mutex_
  uint64_t epoch_at_start_ = 0;
  BackOff back_off_;  ///< the learner's thread
  std::string state_ = "idle";
  StepReport last_step_;
  uint64_t current_round_ = 0;
  int64_t round_started_ms_ = 0;
  std::deque<Json> outcomes_;  ///< the last ten
  std::deque<double> lags_s_;  ///< feedback to serving, the last 100
  int64_t promoted_ = 0, held_ = 0;
};

}  // namespace ds
