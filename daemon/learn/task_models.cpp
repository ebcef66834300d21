// SPDX-License-Identifier: Apache-2.0
#include "learn/task_models.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "log.h"
#include "storage/hash.h"
#include "storage/record.h"

namespace ds {
namespace {

constexpr int64_t kMaxParameters = 64LL << 20;
constexpr size_t kItemsPerRound = 2000, kHeldOutOneIn = 20, kHoldOutFrom = 100;

std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::string out;
  for (const int64_t s : sizes) out += (out.empty() ? "" : ",") + std::to_string(s);
  return out;
}

uint64_t seed_of(const std::string& text) {
  const Sha256Digest digest = sha256(text);
  uint64_t out = 0;
  std::memcpy(&out, digest.data(), sizeof out);
  return out;
}

std::string train_domain(const std::string& model) { return "task/" + model; }
std::string hold_domain(const std::string& model) { return "hold/task/" + model; }

template <class Examples>
std::vector<const TaskExample*> tasks(const Examples& examples) {
  std::vector<const TaskExample*> out;
  for (const auto& e : examples) out.push_back(&e.task);
  return out;
}

}  // namespace

TaskModels::TaskModels(ReplayStore& store, VersionStore& files, Config& config, Plugins& plugins,
                       Pool& pool, const Ops& ops, EventBus& events, Clock& clock)
    : store_(store),
      files_(files),
      config_(config),
      plugins_(plugins),
      events_(events),
      clock_(clock),
      training_{&ops, {pool.background(), nullptr}},
      serving_{&ops, {serial_parallel(), nullptr}} {}

Status TaskModels::open() {
  const auto names = store_.meta("task_models");
  if (!names) return {};
  for (const auto& [name, sizes] : names->items())
    DS_TRY(attach(name, sizes.get<std::vector<int64_t>>()));
  return {};
}

Status TaskModels::attach(const std::string& name, const std::vector<int64_t>& sizes) {
  const std::string base = to_hex(sha256("mlp " + name + " " + sizes_text(sizes)));
  const LoadWeights load =
      [this, sizes, base](const VersionManifest& m) -> Result<std::shared_ptr<const Weights>> {
    auto mlp = std::make_shared<Mlp>(sizes, seed_of(base));
    if (m.method != "base") {
      DS_ASSIGN(const std::vector<StoredTensor> tensors, files_.read_delta(m.model, m.number));
      DS_TRY(mlp->set_tensors(tensors));
    }
    auto weights = std::make_shared<Weights>(*make_weights(m, nullptr, nullptr));
    weights->mlp = std::move(mlp);
    return std::shared_ptr<const Weights>(std::move(weights));
  };
  Model model;
  model.sizes = sizes;
  DS_ASSIGN(model.versions, Versions::open(name, base, store_, files_, clock_, load,
                                           config_.integer("versions.keep")));
  model.versions->on_change([this, name](const Json& event) {
    Json body = event;
    body["model"] = name;
    events_.publish("version", body);
  });
  std::lock_guard lock(mutex_);
  models_.emplace(name, std::move(model));
  return {};
}

Result<Json> TaskModels::create(const std::string& name, const std::vector<int64_t>& sizes) {
  DS_TRY(check_name("model name", name));
  if (name == "default") return conflict("model name: \"default\" is the language model");
  if (find(name) != nullptr) return conflict("model " + name + " exists already");
  if (sizes.size() < 2 || sizes.size() > 16) {
    return invalid("mlp: " + std::to_string(sizes.size()) +
                   " sizes, expected 2 to 16 (inputs, hidden..., classes)");
  }
  int64_t parameters = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 1 || sizes[i] > 1 << 20)
      return invalid("mlp: size " + std::to_string(sizes[i]) + ", expected 1 to 1048576");
    if (i > 0) parameters += sizes[i] * (sizes[i - 1] + 1);
  }
  if (parameters > kMaxParameters) {
    return invalid("mlp: " + std::to_string(parameters) + " parameters, at most " +
                   std::to_string(kMaxParameters));
  }
  Json known = store_.meta("task_models").value_or(Json::object());
  known[name] = sizes;
  Commit commit;
  commit.meta.emplace_back("task_models", known);
  DS_TRY(store_.commit(commit));
  DS_TRY(attach(name, sizes));
  return Json{{"name", name},
              {"kind", "mlp"},
              {"sizes", sizes},
              {"parameters", parameters},
              {"version", name + "@v1"}};
}

Status TaskModels::unknown(const std::string& name) const {
  std::string known;
  std::lock_guard lock(mutex_);
  for (const auto& [other, model] : models_) known += (known.empty() ? "" : ", ") + other;
  return not_found("no task model " + name + ", known: " + (known.empty() ? "none" : known));
}

const TaskModels::Model* TaskModels::find(const std::string& name) const {
  std::lock_guard lock(mutex_);
  const auto it = models_.find(name);
  return it == models_.end() ? nullptr : &it->second;
}

Json TaskModels::list() const {
  std::lock_guard lock(mutex_);
  Json out = Json::array();
  for (const auto& [name, model] : models_) {
    int64_t parameters = 0;
    for (size_t i = 1; i < model.sizes.size(); ++i)
      parameters += model.sizes[i] * (model.sizes[i - 1] + 1);
    out.push_back({{"name", name},
                   {"kind", "mlp"},
                   {"sizes", model.sizes},
                   {"parameters", parameters},
                   {"version", name + "@" + model.versions->current()->version},
                   {"sha256", model.versions->current()->weight_hash}});
  }
  return out;
}

Result<Json> TaskModels::versions(const std::string& name) const {
  const Model* model = find(name);
  if (model == nullptr) return unknown(name);
  return model->versions->list();
}

std::vector<std::shared_ptr<const void>> TaskModels::keep_files() {
  std::vector<Versions*> all;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [name, model] : models_) all.push_back(model.versions.get());
  }
  std::vector<std::shared_ptr<const void>> kept;
  for (Versions* versions : all) kept.push_back(versions->keep_files());
  return kept;
}

Result<Json> TaskModels::infer(const std::string& ref, const std::vector<float>& input) const {
  const std::string name = ref.substr(0, ref.find('@'));
  const Model* model = find(name);
  if (model == nullptr) return unknown(name);
  DS_ASSIGN(const std::shared_ptr<const Weights> weights, model->versions->find(ref));
  if (static_cast<int64_t>(input.size()) != model->sizes.front()) {
    return invalid("input: " + std::to_string(input.size()) + " numbers, model " + name +
                   " wants " + std::to_string(model->sizes.front()));
  }
  std::vector<float> scores = weights->mlp->forward(serving_, 1, input.data());
  const auto best = std::max_element(scores.begin(), scores.end());
  const int64_t label = best - scores.begin();
  const float top = *best;
  double sum = 0;
  for (const float s : scores) sum += std::exp(s - top);
  for (float& s : scores) s = static_cast<float>(std::exp(s - top) / sum);
  return Json{{"label", label}, {"scores", scores}, {"version", name + "@" + weights->version}};
}

Result<TaskModels::Example> TaskModels::example_of(const FeedbackItem& item,
                                                   const Model& model) const {
  Example e{item, {item.draw_key, {}, 0}};
  DS_ASSIGN(const int64_t label, get_int(item.record, "label"));
  if (label < 0 || label >= model.sizes.back()) {
    return invalid("label " + std::to_string(label) + ", the model has classes 0 to " +
                   std::to_string(model.sizes.back() - 1));
  }
  e.task.label = static_cast<int32_t>(label);
  const Json& input = item.record["input"];
  if (input.is_array()) {
    for (const Json& x : input) e.task.input.push_back(x.get<float>());
  } else {
    const std::string& bytes = item.attachments[input.value("attachment", size_t{0})];
    e.task.input.resize(bytes.size() / sizeof(float));
    std::memcpy(e.task.input.data(), bytes.data(), e.task.input.size() * sizeof(float));
  }
  if (static_cast<int64_t>(e.task.input.size()) != model.sizes.front()) {
    return invalid("input: " + std::to_string(e.task.input.size()) + " numbers, the model wants " +
                   std::to_string(model.sizes.front()));
  }
  return e;
}

std::vector<TaskModels::Example> TaskModels::stored_examples(const std::string& domain,
                                                             const Model& model) const {
  std::vector<Example> out;
  for (const ds::Example& slot : store_.examples(domain)) {
    const Result<FeedbackItem> item = store_.get(slot.offset);
    if (!item.ok() || item->fate.back().state == "reverted") continue;
    Result<Example> e = example_of(*item, model);
    if (e.ok()) out.push_back(std::move(e).value());
  }
  return out;
}

/// Offsets of the labels that wait, for any model; read from the index alone.
std::vector<uint64_t> TaskModels::waiting() const {
  std::vector<uint64_t> labels;
  for (const char* state : {"queued", "stored"}) {
    for (const auto& [offset, kind] : store_.kinds_in_state(state)) {
      if (kind == "label") labels.push_back(offset);
    }
  }
  std::sort(labels.begin(), labels.end());
  return labels;
}

int64_t TaskModels::opens_in(const std::vector<uint64_t>& labels) const {
  if (const int64_t left_ms = back_off_.left_ms(clock_); left_ms > 0) return left_ms;
  const Result<FeedbackItem> oldest = store_.get(labels.front()),
                             newest = store_.get(labels.back());
  if (!oldest.ok() || !newest.ok()) return 0;  // what is damaged holds the others up no longer
  return round_opens_in(round_rule(config_), std::ssize(labels), oldest->received_ms,
                        newest->received_ms, clock_.unix_ms());
}

int64_t TaskModels::train(bool at_once) {
  std::vector<uint64_t> labels = waiting();
  if (labels.empty()) return -1;
  if (!at_once) {
    if (const int64_t wait_ms = opens_in(labels); wait_ms != 0) return wait_ms;
  }
  labels.resize(std::min(labels.size(), kItemsPerRound));
  std::map<std::string, std::vector<Example>> taken;  // by model
  Commit quarantined;
  for (const uint64_t offset : labels) {
    const Result<FeedbackItem> item = store_.get(offset);
    if (!item.ok()) continue;
    const std::string name = item->record.value("model", "");
    const Model* model = find(name);
    const Result<Example> e = model == nullptr ? unknown(name) : example_of(*item, *model);
    if (!e.ok()) {
      quarantined.fates.push_back(
          {offset, {"quarantined", clock_.unix_ms(), "", 0, e.status().message()}});
    } else {
      taken[name].push_back(*e);
    }
  }
  if (taken.empty() && quarantined.fates.empty()) return -1;
  if (const Status done = store_.commit(quarantined); !done.ok()) {
    log(LogLevel::kError, "learn", done.message());
    back_off_.begin(config_, clock_);
    return back_off_.left_ms(clock_);
  }
  for (auto& [name, fresh] : taken) {
    Model* model = nullptr;
    {
      std::lock_guard lock(mutex_);
      model = &models_.at(name);
    }
    if (model->versions->pinned() != 0) return -1;
    if (!train_model(name, *model, std::move(fresh))) {
      back_off_.begin(config_, clock_);
      return back_off_.left_ms(clock_);
    }
  }
  return 0;
}

/// Cross-entropy of each example in nats.
std::vector<double> TaskModels::losses(const Mlp& mlp, const std::vector<Example>& examples) const {
  std::vector<float> x;
  for (const Example& e : examples) x.insert(x.end(), e.task.input.begin(), e.task.input.end());
  const std::vector<float> scores =
      mlp.forward(training_, static_cast<int64_t>(examples.size()), x.data());
  const size_t classes = scores.size() / examples.size();
  std::vector<double> out;
  for (size_t i = 0; i < examples.size(); ++i) {
    const float* row = scores.data() + i * classes;
    const float top = *std::max_element(row, row + classes);
    double sum = 0;
    for (size_t c = 0; c < classes; ++c) sum += std::exp(row[c] - top);
    out.push_back(top + std::log(sum) - row[examples[i].task.label]);
  }
  return out;
}

GateScores TaskModels::measure(const std::string& name, const Mlp& before, const Mlp& after,
                               const std::vector<Example>& fresh,
                               const std::vector<Example>& held) const {
  GateScores scores;
  if (!held.empty()) {
    // The held-out examples are few, and a short round moves their mean by chance as much as by
    // harm: what counts is the rise that chance does not explain.
    const std::vector<double> was = losses(before, held), is = losses(after, held);
    const auto n = static_cast<double>(held.size());
    GateScores::Domain& domain = scores.domains[name];
    double squares = 0;
    for (size_t i = 0; i < held.size(); ++i) {
      domain.before += was[i] / n;
      domain.after += is[i] / n;
      squares += (is[i] - was[i]) * (is[i] - was[i]);
    }
    const double rise = domain.after - domain.before;
    if (held.size() > 1)
      domain.noise = std::sqrt(std::max(0.0, squares / n - rise * rise) / (n - 1));
  }
  if (!fresh.empty()) {
    double was = 0, is = 0;
    for (const double loss : losses(before, fresh)) was += loss;
    for (const double loss : losses(after, fresh)) is += loss;
    const auto n = static_cast<double>(fresh.size());
    scores.items.push_back({name, -was / n, -is / n});
  }
  return scores;
}

Result<LearnerPlugin> TaskModels::learner_for(const std::string& model, int64_t parent) const {
  DS_ASSIGN(const Plugins::Serving serving,
            plugins_.find(DS_KIND_LEARNER, config_.text("learn.task_learner")));
  LearnerMemory memory;
  DS_ASSIGN(const VersionManifest manifest, find(model)->versions->manifest(parent));
  if (manifest.method != "base") {
    DS_ASSIGN(std::vector<StoredTensor> checkpoint, files_.read_checkpoint(model, parent));
    DS_ASSIGN(memory, take_memory(manifest, checkpoint));
  }
  return LearnerPlugin::create(serving, memory);
}

TaskOutcome TaskModels::learn(const std::string& name, int64_t parent, Mlp& mlp,
                              const std::vector<Example>& fresh,
                              const std::vector<Example>& replay) const {
  TaskOutcome failed;
  const Result<LearnerPlugin> learner = learner_for(name, parent);
  failed.failure = learner.status();
  if (!learner.ok()) return failed;
  const uint64_t number = find(name)->versions->ancestors(parent).size();
  return train_task(training_, *learner, mlp, tasks(fresh), tasks(replay),
                    Rng::mix(static_cast<uint64_t>(config_.integer("learn.seed")), number), number,
                    static_cast<float>(config_.number("learn.replay_ratio")));
}

VersionManifest TaskModels::manifest_of(const std::string& name, const Model& model, int64_t parent,
                                        const std::vector<StoredTensor>& tensors) const {
  VersionManifest out;
  out.model = name;
  out.number = model.versions->next_number();
  out.parent = parent;
  const Result<VersionManifest> v1 = model.versions->manifest(1);
  DS_CHECK(v1.ok());
  out.base_sha256 = v1->base_sha256;
  out.method = "mlp";
  out.created_ms = clock_.unix_ms();
  out.weight_hash = weight_hash(out.base_sha256, tensors);
  return out;
}

bool TaskModels::train_model(const std::string& name, Model& model, std::vector<Example> fresh) {
  const int64_t parent = model.versions->current_number();
  const std::shared_ptr<const Weights> before = model.versions->current();
  Commit commit;
  std::vector<Example> held = stored_examples(hold_domain(name), model),
                       replay = stored_examples(train_domain(name), model);
  const bool hold_out = replay.size() + fresh.size() >= kHoldOutFrom;
  std::erase_if(fresh, [&](Example& e) {
    if (!hold_out || seed_of(e.item.draw_key) % kHeldOutOneIn != 0) return false;
    commit.insert.push_back({hold_domain(name), e.item.draw_key, e.item.offset});
    commit.fates.push_back(
        {e.item.offset,
         {"waiting", clock_.unix_ms(), "", 0, "held out: measures the model, never trained"}});
    held.push_back(std::move(e));
    return true;
  });
  Mlp mlp = *before->mlp;
  const TaskOutcome trained = learn(name, parent, mlp, fresh, replay);
  if (!trained.failure.ok()) {  // the items wait for a learner that works
    log(LogLevel::kError, "learn", name + ": " + trained.failure.message());
    return false;
  }
  const int64_t steps = trained.steps;
  GateScores scores;
  if (trained.finite) scores = measure(name, *before->mlp, mlp, fresh, held);
  scores.finite = trained.finite;
  scores.changed = steps > 0;
  const GateVerdict verdict =
      judge(scores, {config_.number("gate.max_drop"), config_.number("gate.max_kl")});

  const std::vector<StoredTensor> tensors = mlp.tensors();
  VersionManifest manifest = manifest_of(name, model, parent, tensors);
  manifest.details = {{"steps", steps},
                      {"gate", to_json(scores, verdict)},
                      {"sizes", model.sizes},
                      {"learner", trained.learner}};
  const std::string version = name + "@v" + std::to_string(manifest.number);
  for (const Example& e : fresh) {
    manifest.items.push_back(e.item.id);
    commit.fates.push_back(
        {e.item.offset,
         {verdict.pass ? "served" : "held", clock_.unix_ms(), verdict.pass ? version : "", steps,
          verdict.pass ? "" : verdict.check + ": " + verdict.reason}});
    if (verdict.pass) commit.insert.push_back({train_domain(name), e.item.draw_key, e.item.offset});
  }
  Json event = {{"model", name},      {"outcome", verdict.pass ? "published" : "held"},
                {"version", version}, {"items", fresh.size()},
                {"steps", steps},     {"gate", to_json(scores, verdict)}};
  Status done;
  if (verdict.pass) {
    auto weights = std::make_shared<Weights>(*make_weights(manifest, nullptr, nullptr));
    weights->mlp = std::make_shared<const Mlp>(std::move(mlp));
    done = model.versions->publish(manifest, tensors, memory_tensors(trained.memory),
                                   std::move(commit), std::move(weights), true);
  } else {
    done = store_.commit(commit);
  }
  if (!done.ok()) {
    log(LogLevel::kError, "learn", version + ": " + done.message());
    event["outcome"] = "failed", event["reason"] = done.message();
  }
  events_.publish("gate", event);
  return done.ok();
}

}  // namespace ds
