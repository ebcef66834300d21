// SPDX-License-Identifier: Apache-2.0
// One round of the learner: choose items, train, gate, publish or hold.
#include "learn/learner_round.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "learn/admission.h"
#include "learn/phrasing.h"
#include "log.h"

namespace ds {
namespace {

constexpr size_t kMaxItemsPerRound = 32;
constexpr size_t kItemsLookedAt = 1024;  // of those that wait, when a round chooses
constexpr size_t kHeldOutTextsPerDomain = 12;
constexpr int64_t kHeldOutTokens = 48;

/// Whether the same may succeed later.
bool passes_by(const Status& status) {
  return status.code() == Code::kResource || status.code() == Code::kDeviceLost;
}

/// The draw key's occurrence number as the lineage counts it: the store counts what it ever got,
/// and an item that was undone must leave no trace in the draws of its later twins.
void count_occurrence(std::string& draw_key, std::map<std::string, int>& seen) {
  const std::string record = draw_key.substr(0, draw_key.find('#'));
  draw_key = record + "#" + std::to_string(seen[record]++);
}

std::vector<std::string> ids_of(const std::vector<FeedbackItem>& items) {
  std::vector<std::string> out;
  for (const FeedbackItem& item : items) out.push_back(item.id);
  return out;
}

}  // namespace

void Learner::set_fates(Commit& commit, const std::vector<FeedbackItem>& items,
                        const std::string& state, const std::string& version, int64_t step,
                        const std::string& reason) const {
  for (const FeedbackItem& item : items) {
    commit.fates.push_back({item.offset, {state, parts_.clock.unix_ms(), version, step, reason}});
  }
}

uint64_t Learner::lineage_round(int64_t version) const {
  const Result<VersionManifest> manifest = parts_.versions.manifest(version);
  return manifest.ok() ? manifest->details.value("round_in_lineage", uint64_t{0}) + 1 : 1;
}

std::vector<FeedbackItem> Learner::lineage_items(int64_t version) const {
  std::vector<FeedbackItem> out;
  for (const VersionManifest& ancestor : parts_.versions.lineage(version)) {
    for (const std::string& id : ancestor.items) {
      Result<FeedbackItem> item = parts_.store.get(id);
      if (item.ok()) out.push_back(std::move(item).value());
    }
  }
  std::sort(out.begin(), out.end(),
            [](const FeedbackItem& a, const FeedbackItem& b) { return a.offset < b.offset; });
  return out;
}

/// Bases that nobody decodes with, and the trainer's workspace, make room where there is none.
template <class Make>
std::invoke_result_t<Make> Learner::with_room(const Make& make) const {
  auto made = make();
  if (made.ok() || made.status().code() != Code::kResource) return made;
  parts_.bases.drop_idle();
  if (trainer_ != nullptr) trainer_->give_back();
  return make();
}

Result<Trained> Learner::trained_of(int64_t version) {
  DS_ASSIGN(const VersionManifest manifest, parts_.versions.manifest(version));
  DS_ASSIGN(const auto serving, parts_.versions.find(version_name(version)));
  const Method method{parts_.config.text("learn.method") == "full",
                      parts_.config.integer("learn.rank"),
                      static_cast<uint64_t>(parts_.config.integer("learn.seed"))};
  return with_room([&] {
    return trained_from(manifest, *serving, method, parts_.files, parts_.bases, compute_);
  });
}

Result<Candidate> Learner::candidate_of(const Trained& trained,
                                        const VersionManifest& manifest) const {
  return with_room(
      [&] { return make_candidate(trained, manifest, compute_, parts_.bases.form()); });
}

Result<std::shared_ptr<const Weights>> Learner::servable(const Trained& trained) const {
  DS_ASSIGN(Candidate candidate, candidate_of(trained, {}));
  return std::move(candidate.weights);
}

Result<Lesson> Learner::trainable(const FeedbackItem& item) const {
  DS_ASSIGN(Lesson lesson, lesson_of(item));
  DS_TRY(trainer_->check(lesson));
  return lesson;
}

Result<Learner::Round> Learner::train_round(int64_t parent, std::vector<FeedbackItem> items,
                                            const std::vector<FeedbackItem>& earlier,
                                            Trained trained, uint64_t round_in_lineage) {
  DS_ASSIGN(const LearnerPlugin learner, learner_for(trained.memory));
  Round round;
  round.started_ms = parts_.clock.unix_ms();
  round.in_lineage = round_in_lineage;
  round.number = parts_.store.last_round() + 1;
  {
    std::lock_guard lock(mutex_);
    state_ = "training";
    current_round_ = round.number;
    round_started_ms_ = round.started_ms;
    last_step_ = {};
  }
  Commit queued;
  for (FeedbackItem& item : items) {
    Result<Lesson> lesson = trainable(item);
    if (!lesson.ok()) {  // stays out for good, with the reason
      queued.fates.push_back(
          {item.offset, {"quarantined", parts_.clock.unix_ms(), "", 0, lesson.status().message()}});
      continue;
    }
    if (item.fate.empty() || item.fate.back().state == "stored") {
      queued.fates.push_back(
          {item.offset,
           {"queued", parts_.clock.unix_ms(), "", 0, "round " + std::to_string(round.number)}});
    }
    round.lessons.push_back(std::move(lesson).value());
    round.items.push_back(std::move(item));
  }
  DS_TRY(parts_.store.commit(queued));
  if (!parts_.config.flag("learn.deterministic")) {  // there, times decide nothing
    int64_t newest_ms = 0;
    for (const FeedbackItem& item : round.items) newest_ms = std::max(newest_ms, item.received_ms);
    for (size_t i = 0; i < round.items.size(); ++i)
      round.lessons[i].age_s = static_cast<float>(newest_ms - round.items[i].received_ms) / 1000.0f;
  }
  std::vector<Lesson> replay;
  std::map<std::string, int> seen;
  for (const FeedbackItem& item : not_superseded(earlier, round.items)) {
    Result<Lesson> lesson = trainable(item);
    if (!lesson.ok()) continue;
    replay.push_back(std::move(lesson).value());
    count_occurrence(replay.back().draw_key, seen);
  }
  for (Lesson& lesson : round.lessons) count_occurrence(lesson.draw_key, seen);
  round.trained = std::move(trained);
  if (round.lessons.empty()) return round;
  log(LogLevel::kInfo, "learn",
      "round " + std::to_string(round.number) + ": " + std::to_string(round.lessons.size()) +
          " items on v" + std::to_string(parent));
  DS_TRY(run_training(round, learner, replay));
  return round;
}

Status Learner::run_training(Round& round, const LearnerPlugin& learner,
                             const std::vector<Lesson>& replay) {
  Trained& trained = round.trained;
  if (!trained.base) {  // the second round of a rebuild starts from what the first has made
    DS_TRY(trained.full->pack(parts_.bases.format()));
    trained.base = trained.full->packed();
  }
  (void)trainer_->set_base(trained.base);  // train() tries again and tells
  const RoundInput input{round.lessons, replay,
                         static_cast<uint64_t>(parts_.config.integer("learn.seed")),
                         round.in_lineage};
  round.outcome = trainer_->train(recipe_for(round.lessons.size(), trained), learner,
                                  trained.view(), input, [&](const StepReport& step) {
                                    report(step);
                                    return !should_drop();
                                  });
  trained.memory = std::move(round.outcome.memory);
  round.learner = learner.provenance();
  (void)trainer_->set_base(nullptr);
  if (trained.full) {  // the masters are all that the next round or the candidate needs
    trained.full->release();
    trained.base.reset();
  }
  if (parts_.tamper && trained.adapters) parts_.tamper(*trained.adapters);
  return {};
}

GateScores Learner::measure(const Round& round, const Weights& parent, const Weights& candidate) {
  std::vector<std::pair<std::string, HeldOut>> items;
  for (size_t i = 0; i < round.lessons.size(); ++i) {
    const Lesson& lesson = round.lessons[i];
    HeldOut wordings;
    if (lesson.kind == Lesson::Kind::kText) {
      std::vector<TokenId> ids = parts_.tokenizer->encode(lesson.answer, false);
      ids.resize(std::min<size_t>(ids.size(), 64));
      if (ids.size() < 2) continue;
      wordings.sequences.push_back(std::move(ids));
      wordings.first_target.push_back(1);
    } else {
      std::vector<std::string> questions = {lesson.context.back().content};
      if (round.lessons.size() <=
          4) {  // a paraphrase by template; many items: the plain form speaks
        questions.push_back(gate_forms(questions[0]).front());
      }
      for (const std::string& question : questions) {
        std::vector<ChatMessage> context = lesson.context;
        context.back().content = question;
        int64_t first = 0;
        wordings.sequences.push_back(trainer_->full_ids(context, lesson.answer, first));
        wordings.first_target.push_back(first);
      }
    }
    items.emplace_back(round.items[i].id, std::move(wordings));
  }
  std::vector<HeldOut> domains;
  for (const std::string& name : parts_.store.domains()) {
    HeldOut held;
    held.domain = name;
    for (const Example& e : parts_.store.examples("hold/" + name)) {
      const Result<FeedbackItem> item = parts_.store.get(e.offset);
      if (!item.ok() || held.sequences.size() >= kHeldOutTextsPerDomain) continue;
      std::vector<TokenId> ids = parts_.tokenizer->encode(item->record.value("text", ""), false);
      ids.resize(std::min<size_t>(ids.size(), kHeldOutTokens));
      if (ids.size() < 2) continue;
      held.sequences.push_back(std::move(ids));
      held.first_target.push_back(1);
    }
    if (!held.sequences.empty()) domains.push_back(std::move(held));
  }
  return probe_->measure(parent, candidate, items, domains);
}

Json Learner::hold(Round& round, int64_t parent, const std::string& outcome,
                   const std::string& reason, const Json& gate) {
  Json record = {
      {"round", round.number},
      {"outcome", outcome},
      {"parent", version_name(parent)},
      {"items", ids_of(round.items)},
      {"steps", round.outcome.steps},
      {"reason", reason},
      {"learner", round.learner},
      {"gate", gate},
      {"tokens", round.outcome.tokens},
      {"seconds", static_cast<double>(parts_.clock.unix_ms() - round.started_ms) / 1000.0}};
  Commit commit;
  const std::string state = round.retry ? "queued" : outcome == "dropped" ? "reverted" : "held";
  for (const FeedbackItem& item : round.items) {
    const bool told = !item.fate.empty() && item.fate.back().reason == reason;  // the last time
    if (!round.rebuilds && !told) set_fates(commit, {item}, state, "", round.outcome.steps, reason);
  }
  commit.rounds.emplace_back(round.number, record);
  const Status stored = parts_.store.commit(commit);
  if (!stored.ok()) log(LogLevel::kError, "learn", "round record not stored: " + stored.message());
  if (!round.rebuilds && (round.retry || !stored.ok()))
    back_off_.begin(parts_.config, parts_.clock);
  log(LogLevel::kWarn, "learn",
      "round " + std::to_string(round.number) + " " + outcome + ": " + reason);
  parts_.events.publish("gate", record);
  parts_.metrics
      .counter("ds_version_promotions_total", "Candidates by outcome", {{"result", outcome}})
      .add();
  std::lock_guard lock(mutex_);
  held_ += outcome == "held";
  outcomes_.push_back(record);
  if (outcomes_.size() > 10) outcomes_.pop_front();
  state_ = "idle";
  return record;
}

/// A round that cannot begin as things are: its items wait, with the reason.
Json Learner::put_off(std::vector<FeedbackItem> items, int64_t parent, const Status& why) {
  Round round;
  round.number = parts_.store.last_round() + 1;
  round.started_ms = parts_.clock.unix_ms();
  round.items = std::move(items);
  round.retry = true;
  return hold(round, parent, "held", why.message(), {});
}

/// What a candidate comes to that may not be finished: the daemon stops, or its parent is gone.
Json Learner::drop(Round& round, int64_t parent, const Json& gate) {
  publish_status("idle");
  {
    std::lock_guard lock(mutex_);
    if (stop_)
      return {{"outcome", "dropped"},
              {"reason", "the daemon stops; the items wait for its next start"}};
  }
  return hold(round, parent, "dropped", "its parent left the lineage while it was trained", gate);
}

Json Learner::finish_round(Round& round, int64_t parent, bool gate_it) {
  {
    std::lock_guard lock(mutex_);
    state_ = "gating";
  }
  // Of a plugin, the device or memory: the items wait for one that works.
  const auto hold_for_later = [&](const Status& why, const Json& gate = {}) {
    round.retry = true;
    return hold(round, parent, "held", why.message(), gate);
  };
  if (!round.outcome.failure.ok()) return hold_for_later(round.outcome.failure);
  if (!round.outcome.finite)
    return hold(round, parent, "held", "the loss or its gradient became NaN or infinite", {});
  VersionManifest manifest;
  manifest.model = "default";
  manifest.number = parts_.versions.next_number();
  manifest.parent = parent;
  manifest.round = round.number;
  manifest.created_ms = parts_.clock.unix_ms();
  manifest.items = ids_of(round.items);
  Result<Candidate> candidate = candidate_of(round.trained, manifest);
  if (!candidate.ok() && passes_by(candidate.status())) return hold_for_later(candidate.status());
  if (!candidate.ok()) return hold(round, parent, "held", candidate.status().message(), {});

  Json gate_record = Json::object();
  if (gate_it) {
    const Result<std::shared_ptr<const Weights>> before =
        parts_.versions.find(version_name(parent));
    if (!before.ok()) return hold_for_later(before.status());
    GateScores scores = measure(round, **before, *candidate->weights);
    scores.changed =
        candidate->manifest.weight_hash != (*before)->weight_hash && round.outcome.steps > 0;
    const GateLimits limits{parts_.config.number("gate.max_drop"),
                            parts_.config.number("gate.max_kl")};
    const GateVerdict verdict = judge(scores, limits);
    gate_record = to_json(scores, verdict);
    if (!scores.failure.empty()) return hold_for_later(unavailable(scores.failure), gate_record);
    if (!verdict.pass)
      return hold(round, parent, "held", verdict.check + ": " + verdict.reason, gate_record);
  }
  if (should_drop()) return drop(round, parent, gate_record);
  return publish_round(round, std::move(candidate).value(), gate_record);
}

/// A new base is durable before the version that needs it. A base that no version names goes: the
/// new one, or what there is of it, when it is not published, an old one with the last version that
/// stood on it. A crash in between leaves it to the next start.
Status Learner::publish_files(const Candidate& candidate, Commit commit) {
  const std::string& base = candidate.manifest.base_sha256;
  const bool new_base = !candidate.base_file.empty();
  Status published;
  if (new_base) published = parts_.base_files.write(base, candidate.base_file);
  if (published.ok()) {
    published = parts_.versions.publish(candidate.manifest, candidate.delta, candidate.checkpoint,
                                        std::move(commit), candidate.weights, true);
  }
  if (new_base && published.ok()) parts_.bases.add(candidate.weights->base);
  const Status removed = parts_.base_files.keep_only(parts_.versions.bases());
  if (!removed.ok()) log(LogLevel::kWarn, "learn", removed.message());
  return published;
}

Json Learner::publish_round(Round& round, Candidate candidate, const Json& gate_record) {
  VersionManifest& manifest = candidate.manifest;
  const std::string version = version_name(manifest.number);
  const double seconds = static_cast<double>(parts_.clock.unix_ms() - round.started_ms) / 1000.0;
  manifest.details.update({{"steps", round.outcome.steps},
                           {"tokens", round.outcome.tokens},
                           {"first_loss", round.outcome.first_loss},
                           {"last_loss", round.outcome.last_loss},
                           {"converged", round.outcome.converged},
                           {"seconds", seconds},
                           {"learner", round.learner},
                           {"gate", gate_record},
                           {"round_in_lineage", round.in_lineage}});
  Json record = {{"round", round.number},
                 {"outcome", "published"},
                 {"parent", version_name(manifest.parent)},
                 {"version", version},
                 {"items", manifest.items},
                 {"steps", round.outcome.steps},
                 {"tokens", round.outcome.tokens},
                 {"seconds", seconds},
                 {"gate", gate_record},
                 {"seed", parts_.config.integer("learn.seed")},
                 {"learner", round.learner},
                 {"weight_hash", manifest.weight_hash}};
  Commit commit = std::move(round.with);
  set_fates(commit, round.items, "trained", version, round.outcome.steps, "");
  set_fates(commit, round.items, "served", version, round.outcome.steps, "");
  for (const FeedbackItem& item : round.items)
    commit.insert.push_back({item.domain, item.draw_key, item.offset});
  commit.rounds.emplace_back(round.number, record);
  const Status published = publish_files(candidate, std::move(commit));
  const bool moved = should_drop() || parts_.versions.pinned() != 0;  // a moment ago
  round.retry = !moved && published.code() == Code::kIo;
  if (!published.ok())
    return hold(round, manifest.parent, moved ? "dropped" : "held",
                "not published: " + published.message(), gate_record);
  log(LogLevel::kInfo, "learn",
      "round " + std::to_string(round.number) + " published " + version + " after " +
          std::to_string(round.outcome.steps) + " steps");
  parts_.events.publish("gate", record);
  parts_.metrics
      .counter("ds_version_promotions_total", "Candidates by outcome", {{"result", "promoted"}})
      .add();
  std::lock_guard lock(mutex_);
  ++promoted_;
  for (const FeedbackItem& item : round.items) {
    lags_s_.push_back(static_cast<double>(parts_.clock.unix_ms() - item.received_ms) / 1000.0);
    if (lags_s_.size() > 100) lags_s_.pop_front();
  }
  outcomes_.push_back(record);
  if (outcomes_.size() > 10) outcomes_.pop_front();
  state_ = "idle";
  return record;
}

/// The first `limit` items of these that can be trained. Passes over texts that are held out to
/// measure their domain, and what no lesson can be made of: neither takes a place in a round.
/// Admission sorts out the rest; in deterministic mode offsets alone decide.
std::vector<FeedbackItem> Learner::take_items(const std::vector<uint64_t>& offsets, size_t limit) {
  const bool deterministic = parts_.config.flag("learn.deterministic");
  std::vector<FeedbackItem> items;
  Commit passed;
  for (const uint64_t offset : offsets) {
    if (items.size() == (deterministic ? limit : kItemsLookedAt)) break;
    Result<FeedbackItem> item = parts_.store.get(offset);
    if (!item.ok()) continue;
    const auto clusters = static_cast<int64_t>(parts_.store.examples(item->domain).size());
    if (item->kind == "text" && held_out(item->record.value("text", ""), clusters)) {
      passed.insert.push_back({"hold/" + item->domain, item->draw_key, offset});
      set_fates(passed, {*item}, "waiting", "", 0, "held out: measures its domain, never trained");
    } else if (const Result<Lesson> lesson = trainable(*item); !lesson.ok()) {
      set_fates(passed, {*item}, "quarantined", "", 0, lesson.status().message());
    } else {
      items.push_back(std::move(item).value());
    }
  }
  if (!deterministic) {
    Admission admission = admit(fair_share(std::move(items), limit));
    for (const Rejected& r : admission.quarantined)
      set_fates(passed, {r.item}, "quarantined", "", 0, r.reason);
    items = std::move(admission.admitted);
  }
  const Status done = parts_.store.commit(passed);
  if (!done.ok()) log(LogLevel::kError, "learn", done.message());
  return items;
}

Json Learner::run_round() {
  std::vector<uint64_t> offsets = waiting();
  const bool deterministic = parts_.config.flag("learn.deterministic");
  const auto min_items = static_cast<size_t>(parts_.config.integer("learn.min_items"));
  if (parts_.versions.pinned() != 0) {
    return {
        {"outcome", "empty"},
        {"reason", version_name(parts_.versions.pinned()) + " is pinned: promote or unpin first"}};
  }
  if (const Status ready = get_ready(); !ready.ok()) return failure(ready.message());
  if (const Status undone = undo_retracted(offsets); !undone.ok()) return failure(undone.message());
  offsets = waiting();
  const size_t take = deterministic ? min_items : kMaxItemsPerRound;
  if (deterministic && offsets.size() < min_items) {
    return {{"outcome", "empty"}, {"reason", "fewer than learn.min_items wait"}};
  }
  std::vector<FeedbackItem> items = take_items(offsets, take);
  if (items.empty() || (deterministic && items.size() < min_items)) {
    return {{"outcome", "empty"},
            {"reason", offsets.empty() ? "nothing waits"
                       : items.empty() ? "no waiting item can be trained: see their fates"
                                       : "fewer than learn.min_items can be trained"}};
  }
  epoch_at_start_ = parts_.versions.lineage_epoch();
  const int64_t parent = parts_.versions.current_number();
  Result<Trained> trained = trained_of(parent);
  if (!trained.ok() && passes_by(trained.status()))
    return put_off(std::move(items), parent, trained.status());
  if (!trained.ok()) return failure(trained.status().message());
  Result<Round> round = train_round(parent, std::move(items), lineage_items(parent),
                                    std::move(trained).value(), lineage_round(parent));
  if (!round.ok()) publish_status("idle");
  if (!round.ok()) return failure(round.status().message());
  if (round->outcome.stopped) return drop(*round, parent, {});
  return finish_round(*round, parent, true);
}

}  // namespace ds
