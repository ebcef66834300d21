// SPDX-License-Identifier: Apache-2.0
#include "learn/learner.h"

#include <algorithm>
#include <chrono>

#include "kernels/gpu_share.h"
#include "log.h"

namespace ds {
namespace {

constexpr float kFullLr = 5e-5f;  // every weight moves: at 2e-4 one correction wears the rest down

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

}  // namespace

Learner::Learner(LearnerParts parts)
    : parts_(std::move(parts)), compute_{&parts_.ops, parts_.context, &components_, parts_.device} {
  compute_.context.parallel = parts_.pool.background();
  for (const auto& [number, record] : parts_.store.rounds(0)) {
    outcomes_.push_back(record);
    if (outcomes_.size() > 10) outcomes_.pop_front();
    promoted_ += record.value("outcome", "") == "published";
    held_ += record.value("outcome", "") == "held";
  }
}

Learner::~Learner() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  for (Command& c : commands_) c.done(unavailable("the learner is stopping"));
}

void Learner::start() {
  thread_ = std::thread([this] { loop(); });
}

void Learner::notify() {
  {
    std::lock_guard lock(mutex_);
    changed_ = true;
  }
  wake_.notify_all();
}

void Learner::step(bool wait, OutcomeCallback done) {
  {
    std::lock_guard lock(mutex_);
    commands_.push_back({Command::Kind::kStep, "", wait ? std::move(done) : [](Result<Json>) {}});
  }
  wake_.notify_all();
  if (!wait) done(Json{{"outcome", "started"}});
}

void Learner::undo(const std::string& id, OutcomeCallback done) {
  {
    std::lock_guard lock(mutex_);
    commands_.push_back({Command::Kind::kUndo, id, std::move(done)});
  }
  wake_.notify_all();
}

Status Learner::set_paused(bool paused) {
  {
    std::lock_guard lock(mutex_);
    paused_ = paused;
  }
  publish_status(paused ? "paused" : "idle");
  wake_.notify_all();
  return {};
}

std::vector<uint64_t> Learner::waiting() const {
  std::vector<uint64_t> out;
  for (const char* state : {"queued", "stored"}) {
    for (const auto& [offset, kind] : parts_.store.kinds_in_state(state)) {
      if (!kind.empty() && kind != "label" && kind != "rating") out.push_back(offset);
    }
  }
  std::sort(out.begin(), out.end());
  return out;
}

bool Learner::due(int64_t& wait_ms) {
  wait_ms = -1;
  if (paused_ || !parts_.config.flag("learn.enabled") || parts_.versions.pinned() != 0 ||
      device_lost())
    return false;
  const std::vector<uint64_t> offsets = waiting();
  if (offsets.empty()) return false;
  if (const int64_t left_ms = back_off_.left_ms(parts_.clock); left_ms > 0) {
    wait_ms = left_ms;
    return false;
  }
  const RoundRule rule = round_rule(parts_.config);
  if (parts_.config.flag("learn.deterministic")) {
    // Exactly min_items, whenever they are there. What is taken back fills no round, and waits for
    // none.
    return static_cast<int64_t>(offsets.size()) >= rule.min_items ||
           std::any_of(offsets.begin(), offsets.end(), [&](uint64_t offset) {
             const Result<FeedbackItem> item = parts_.store.get(offset);
             return item.ok() && item->kind == "retract";
           });
  }
  const Result<FeedbackItem> oldest = parts_.store.get(offsets.front()),
                             newest = parts_.store.get(offsets.back());
  if (!oldest.ok() || !newest.ok()) return false;
  wait_ms = round_opens_in(rule, static_cast<int64_t>(offsets.size()), oldest->received_ms,
                           newest->received_ms, parts_.clock.unix_ms());
  return wait_ms == 0;
}

/// A round of the task models if one may open; TaskModels::train() says what is answered.
int64_t Learner::train_task_models() {
  if (paused_ || !parts_.config.flag("learn.enabled") || !parts_.train_task_models) return -1;
  return parts_.train_task_models(false);
}

/// A component without a backward of its own passes no gradient on: what is below it learns less.
void Learner::warn_of_frozen_parts() const {
  const std::shared_ptr<const Components> now = components_.current();
  if (!now->attention->trains())
    log(LogLevel::kWarn, "learn",
        "attention " + std::string(now->attention->name()) +
            " has no backward: what is below it learns through the residual alone");
  if (!now->encoder->trains() && parts_.config.text("learn.method") == "full")
    log(LogLevel::kWarn, "learn",
        "encoder " + std::string(now->encoder->name()) +
            " has no backward: the embedding learns as the head alone, if it is the head");
}

/// Anchors and gate speak of the model file's own weights, whatever serves now. Once they have been
/// asked, those weights need not stay in memory.
Status Learner::build_trainer() {
  trainer_.reset();
  probe_.reset();
  components_.set(parts_.components.current());
  warn_of_frozen_parts();
  form_key_ = parts_.bases.form().key();
  DS_ASSIGN(const auto base, parts_.bases.find(parts_.bases.file_sha256(), compute_));
  const auto stopping = [this] {  // a second each on an idle machine, many under load
    std::lock_guard lock(mutex_);
    return stop_;
  };
  auto trainer = std::make_unique<RoundTrainer>(compute_, base, parts_.tokenizer, parts_.chat);
  if (stopping()) return {Code::kCancelled, "the learner is stopping"};
  auto probe = std::make_unique<GateProbe>(compute_, base, parts_.tokenizer);
  if (stopping()) return {Code::kCancelled, "the learner is stopping"};
  DS_TRY(finish(compute_));
  if (trainer->prepare(single_recipe()).code() == Code::kResource) {
    parts_.bases.drop_idle();
    DS_TRY(trainer->prepare(single_recipe()));
  }
  (void)trainer->prepare(group_recipe());  // a plugin's failure is the round's to tell
  DS_TRY(trainer->set_base(nullptr));
  trainer_ = std::move(trainer);
  probe_ = std::move(probe);
  return {};
}

Status Learner::get_ready() {
  if (device_lost())
    return unavailable("nothing is trained since the device was lost (" +
                       parts_.device->view().reason + "); the items wait for a new start");
  if (trainer_ != nullptr && probe_ != nullptr && !probe_->wants_memory()) return {};
  return build_trainer();
}

/// Between rounds: each is trained and judged with one attention and one form of the weights, and
/// what was kept of the base's answers belongs to those that gave them.
void Learner::follow_plugins() {
  const std::shared_ptr<const Components> now = parts_.components.current();
  const uint64_t form = parts_.bases.form().key();
  if (device_lost()) return;
  if (now->key() != components_.current()->key() || form != form_key_) {
    const Status built = build_trainer();
    if (!built.ok()) log(LogLevel::kWarn, "learn", built.message());
    return;
  }
  components_.set(now);
  // A round that began before the form changed has published on the one before.
  if (parts_.versions.current()->base->form().key() == form) return;
  const Status reloaded = parts_.versions.reload();
  if (!reloaded.ok()) log(LogLevel::kError, "learn", reloaded.message());
}

void Learner::loop() {
  // Here, not in the constructor: the daemon is ready before the learner is.
  if (const Status built = get_ready(); !built.ok() && built.code() != Code::kCancelled)
    log(LogLevel::kWarn, "learn", built.message());
  std::unique_lock lock(mutex_);
  while (!stop_) {
    lock.unlock();
    follow_plugins();
    lock.lock();
    if (!commands_.empty()) {
      Command command = std::move(commands_.front());
      commands_.pop_front();
      lock.unlock();
      if (command.kind == Command::Kind::kStep && parts_.train_task_models) {
        while (parts_.train_task_models(true) == 0) {
        }
      }
      Json outcome = command.kind == Command::Kind::kStep ? run_round() : run_undo(command.id);
      const std::string error = outcome.value("error", "");
      if (error.empty()) {
        command.done(std::move(outcome));
      } else {
        command.done(outcome.value("not_found", false) ? not_found(error) : unavailable(error));
      }
      lock.lock();
      continue;
    }
    changed_ = false;
    int64_t wait_ms = -1;
    lock.unlock();
    bool now = due(wait_ms);
    if (now && !run_round().value("error", "").empty()) {
      back_off_.begin(parts_.config, parts_.clock);
      now = false;
    }
    const int64_t task_wait_ms = train_task_models();
    now = now || task_wait_ms == 0;
    if (task_wait_ms > 0 && (wait_ms <= 0 || task_wait_ms < wait_ms)) wait_ms = task_wait_ms;
    update_share();
    lock.lock();
    if (now) continue;
    const auto ready = [&] { return stop_ || changed_ || !commands_.empty(); };
    // Settings may change and items expire without a notice: look again after a while.
    wake_.wait_for(lock, std::chrono::milliseconds(wait_ms > 0 ? wait_ms : 500), ready);
  }
}

bool Learner::should_drop() const {
  {
    std::lock_guard lock(mutex_);
    if (stop_) return true;
  }
  return parts_.versions.lineage_epoch() != epoch_at_start_;
}

void Learner::update_share() {
  // Behind by more than max_lag: the trainer is owed its share of the pool until it has caught up.
  const std::vector<uint64_t> offsets = waiting();
  bool behind = false;
  if (!offsets.empty() && parts_.versions.pinned() == 0) {
    const Result<FeedbackItem> oldest = parts_.store.get(offsets.front());
    behind = oldest.ok() &&
             parts_.clock.unix_ms() - oldest->received_ms > parts_.config.integer("learn.max_lag");
  }
  parts_.pool.set_background_share(behind ? parts_.config.number("learn.min_share") : 0.0);
}

double Learner::gpu_share() const {
  return share_of(parts_.pool.gpu_share().part(parts_.clock.monotonic_ns()));
}

void Learner::report(const StepReport& step) {
  {
    std::lock_guard lock(mutex_);
    last_step_ = step;
  }
  if (step.step % 8 == 1) update_share();
  parts_.metrics.counter("ds_learn_steps_total", "Optimizer steps").add();
  if (step.saturated > 0) {
    parts_.metrics
        .counter("ds_learn_saturated_total",
                 "Values in inputs of linear layers that FP16 could not hold")
        .add(static_cast<double>(step.saturated));
    log(LogLevel::kWarn, "learn",
        std::to_string(step.saturated) +
            " values in inputs of linear layers saturated in FP16; the layers that read them go on "
            "in BF16");
  }
  parts_.metrics.gauge("ds_learn_loss", "Loss of the last step").set(step.loss);
  parts_.events.publish("step", {{"round", current_round_},
                                 {"step", step.step},
                                 {"loss", step.loss},
                                 {"learned", step.learned},
                                 {"lessons", step.lessons},
                                 {"tokens", step.tokens}});
}

void Learner::publish_status(const std::string& state) {
  std::lock_guard lock(mutex_);
  state_ = state;
}

Json Learner::status() const {
  std::vector<uint64_t> offsets = waiting();
  double oldest_s = 0;
  if (!offsets.empty()) {
    const Result<FeedbackItem> oldest = parts_.store.get(offsets.front());
    if (oldest.ok())
      oldest_s = static_cast<double>(parts_.clock.unix_ms() - oldest->received_ms) / 1000.0;
  }
  std::lock_guard lock(mutex_);
  const bool busy = state_ == "training" || state_ == "gating";
  const double seconds = static_cast<double>(parts_.clock.unix_ms() - round_started_ms_) / 1000.0;
  const std::vector<double> lags(lags_s_.begin(), lags_s_.end());
  const std::string state = device_lost() ? "device lost, feedback waits" : state_;
  return {{"state", paused_ ? "paused" : state},
          {"enabled", parts_.config.flag("learn.enabled")},
          {"method", parts_.config.text("learn.method")},
          {"pinned", parts_.versions.pinned()},
          {"queued", offsets.size()},
          {"oldest_wait_s", oldest_s},
          {"round", current_round_},
          {"step", last_step_.step},
          {"max_steps", parts_.config.integer("learn.max_steps")},
          {"loss", last_step_.loss},
          {"learned", last_step_.learned},
          {"lessons", last_step_.lessons},
          {"tokens_per_s",
           busy && seconds > 0 ? static_cast<double>(last_step_.tokens) / seconds : 0.0},
          {"share", parts_.ops.host_memory ? Json() : Json(gpu_share())},
          {"lag_s_last", lags.empty() ? 0.0 : lags.back()},
          {"lag_s_p50", quantile(lags, 0.5)},
          {"gate", {{"promoted", promoted_}, {"held", held_}}},
          {"promoted", promoted_},
          {"held", held_},
          {"rounds", Json(std::vector<Json>(outcomes_.begin(), outcomes_.end()))}};
}

Recipe Learner::recipe_for(size_t items, const Trained& trained) const {
  Recipe recipe = items == 1 ? single_recipe() : group_recipe();
  if (trained.full) recipe.lr = kFullLr, recipe.lr_decay_to = 1.0f;
  if (trained.adapters) recipe.rank = trained.adapters->rank();
  recipe.lr *= static_cast<float>(parts_.config.number("learn.lr") / 0.002);
  recipe.max_steps = parts_.config.integer("learn.max_steps");
  recipe.replay_ratio = static_cast<float>(parts_.config.number("learn.replay_ratio"));
  return recipe;
}

Result<LearnerPlugin> Learner::learner_for(const LearnerMemory& memory) const {
  DS_ASSIGN(const Plugins::Serving serving,
            parts_.plugins.find(DS_KIND_LEARNER, parts_.config.text("learn.learner")));
  return LearnerPlugin::create(serving, memory);
}

}  // namespace ds
