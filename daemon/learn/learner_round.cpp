// SPDX-License-Identifier: Apache-2.0
// One round of the learner: choose items, train, gate, publish or hold. And its inverse: rebuild
// the lineage without an item.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "engine/delta_file.h"
#include "learn/admission.h"
#include "learn/learner.h"
#include "learn/phrasing.h"
#include "log.h"

namespace ds {
namespace {

constexpr size_t kMaxItemsPerRound = 32;
constexpr size_t kItemsLookedAt = 1024;  // of those that wait, when a round chooses
constexpr size_t kHeldOutTextsPerDomain = 12;
constexpr int64_t kHeldOutTokens = 48;

Json failure(const std::string& message, bool missing = false) {
  return {{"error", message}, {"not_found", missing}};
}

/// The draw key's occurrence number as the lineage counts it: the store counts what it ever got,
/// and an item that was undone must leave no trace in the draws of its later twins.
void count_occurrence(std::string& draw_key, std::map<std::string, int>& seen) {
  const std::string record = draw_key.substr(0, draw_key.find('#'));
  draw_key = record + "#" + std::to_string(seen[record]++);
}

bool by_offset(const FeedbackItem& a, const FeedbackItem& b) { return a.offset < b.offset; }

std::vector<std::string> ids_of(const std::vector<FeedbackItem>& items) {
  std::vector<std::string> out;
  for (const FeedbackItem& item : items) out.push_back(item.id);
  return out;
}

}  // namespace

/// A candidate in the making.
struct Learner::Round {
  uint64_t number = 0;      // in the store
  uint64_t in_lineage = 1;  // rounds from the base to this one: what the draws depend on
  std::vector<FeedbackItem> items;
  std::vector<Lesson> lessons;
  std::unique_ptr<Adapters> adapters;
  RoundOutcome outcome;
  int64_t started_ms = 0;
  bool rebuilds = false;  // an undo's: a failure leaves the items' fates as they were
  Commit with;            // becomes durable with its publication
};

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
  for (const int64_t ancestor : parts_.versions.ancestors(version)) {
    const Result<VersionManifest> manifest = parts_.versions.manifest(ancestor);
    if (!manifest.ok()) continue;
    for (const std::string& id : manifest->items) {
      Result<FeedbackItem> item = parts_.store.get(id);
      if (item.ok()) out.push_back(std::move(item).value());
    }
  }
  std::sort(out.begin(), out.end(), by_offset);
  return out;
}

Result<std::unique_ptr<Adapters>> Learner::adapters_of(int64_t version) const {
  const ModelConfig& config = parts_.base->config();
  const Recipe recipe = group_recipe();
  DS_ASSIGN(const VersionManifest manifest, parts_.versions.manifest(version));
  if (manifest.method == "base") {
    auto fresh = std::make_unique<Adapters>(config, parts_.config.integer("learn.rank"),
                                            recipe.scale, recipe.targets);
    fresh->initialise(static_cast<uint64_t>(parts_.config.integer("learn.seed")));
    return fresh;
  }
  DS_ASSIGN(const int64_t rank, get_int(manifest.details, "rank"));
  DS_ASSIGN(const double scale, get_number(manifest.details, "scale"));
  DS_ASSIGN(const std::vector<StoredTensor> tensors,
            parts_.files.read_checkpoint(manifest.model, version));
  DS_ASSIGN(const auto factors, tensors_to_factors(config, rank, tensors));
  auto adapters =
      std::make_unique<Adapters>(config, rank, static_cast<float>(scale), recipe.targets);
  DS_TRY(adapters->set_factors(factors));
  return adapters;
}

Result<Learner::Round> Learner::train_round(int64_t parent, std::vector<FeedbackItem> items,
                                            const std::vector<FeedbackItem>& earlier,
                                            std::unique_ptr<Adapters> adapters,
                                            uint64_t round_in_lineage) {
  Round round;
  round.started_ms = parts_.clock.unix_ms();
  round.in_lineage = round_in_lineage;
  const auto rounds = parts_.store.rounds(0);
  round.number = rounds.empty() ? 1 : rounds.back().first + 1;
  {
    std::lock_guard lock(mutex_);
    state_ = "training";
    current_round_ = round.number;
    round_started_ms_ = round.started_ms;
    last_step_ = {};
  }
  Commit queued;
  for (FeedbackItem& item : items) {
    Result<Lesson> lesson = lesson_of(item);
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
  std::vector<Lesson> replay;
  std::map<std::string, int> seen;
  for (const FeedbackItem& item : not_superseded(earlier, round.items)) {
    Result<Lesson> lesson = lesson_of(item);
    if (!lesson.ok()) continue;
    replay.push_back(std::move(lesson).value());
    count_occurrence(replay.back().draw_key, seen);
  }
  for (Lesson& lesson : round.lessons) count_occurrence(lesson.draw_key, seen);
  round.adapters = std::move(adapters);
  if (round.lessons.empty()) return round;
  log(LogLevel::kInfo, "learn",
      "round " + std::to_string(round.number) + ": " + std::to_string(round.lessons.size()) +
          " items on v" + std::to_string(parent));
  const Recipe recipe = recipe_for(round.lessons.size(), round.adapters->rank());
  round.outcome = trainer_->train(recipe, *round.adapters, round.lessons, replay,
                                  static_cast<uint64_t>(parts_.config.integer("learn.seed")),
                                  round.in_lineage, [&](const StepReport& step) {
                                    report(step);
                                    return !should_drop();
                                  });
  if (parts_.tamper) parts_.tamper(*round.adapters);
  return round;
}

GateScores Learner::measure(const Round& round, const LoraDelta* parent,
                            const LoraDelta* candidate) {
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
      {"parent", "v" + std::to_string(parent)},
      {"items", ids_of(round.items)},
      {"steps", round.outcome.steps},
      {"reason", reason},
      {"gate", gate},
      {"tokens", round.outcome.tokens},
      {"seconds", static_cast<double>(parts_.clock.unix_ms() - round.started_ms) / 1000.0}};
  Commit commit;
  if (!round.rebuilds)
    set_fates(commit, round.items, outcome == "dropped" ? "reverted" : "held", "",
              round.outcome.steps, reason);
  commit.rounds.emplace_back(round.number, record);
  const Status stored = parts_.store.commit(commit);
  if (!stored.ok()) log(LogLevel::kError, "learn", "round record not stored: " + stored.message());
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
  if (!round.outcome.finite)
    return hold(round, parent, "held", "the loss or its gradient became NaN or infinite", {});
  const auto factors = round.adapters->factors();
  const auto candidate = LoraDelta::pack(*parts_.base, compute_, round.adapters->rank(),
                                         round.adapters->scale(), factors);
  VersionManifest manifest;
  manifest.model = "default";
  manifest.number = parts_.versions.next_number();
  manifest.parent = parent;
  manifest.base_sha256 = parts_.base->sha256();
  manifest.method = "lora";
  manifest.round = round.number;
  manifest.created_ms = parts_.clock.unix_ms();
  manifest.items = ids_of(round.items);
  const std::vector<StoredTensor> delta =
      factors_to_tensors(parts_.base->config(), round.adapters->rank(), factors, "BF16");
  manifest.weight_hash = weight_hash(manifest.base_sha256, delta);

  Json gate_record = Json::object();
  if (gate_it) {
    const Result<std::shared_ptr<const Weights>> before =
        parts_.versions.find("v" + std::to_string(parent));
    if (!before.ok()) return hold(round, parent, "held", before.status().message(), {});
    GateScores scores = measure(round, (*before)->delta.get(), candidate.get());
    scores.changed = manifest.weight_hash != (*before)->weight_hash && round.outcome.steps > 0;
    const GateLimits limits{parts_.config.number("gate.max_drop"),
                            parts_.config.number("gate.max_kl")};
    const GateVerdict verdict = judge(scores, limits);
    gate_record = to_json(scores, verdict);
    if (!verdict.pass)
      return hold(round, parent, "held", verdict.check + ": " + verdict.reason, gate_record);
  }
  if (should_drop()) return drop(round, parent, gate_record);
  return publish_round(round, std::move(manifest), delta, candidate, gate_record);
}

Json Learner::publish_round(Round& round, VersionManifest manifest,
                            const std::vector<StoredTensor>& delta,
                            std::shared_ptr<const LoraDelta> candidate, const Json& gate_record) {
  const std::string version = "v" + std::to_string(manifest.number);
  const double seconds = static_cast<double>(parts_.clock.unix_ms() - round.started_ms) / 1000.0;
  manifest.details = {{"rank", round.adapters->rank()},
                      {"scale", round.adapters->scale()},
                      {"targets", round.adapters->targets()},
                      {"steps", round.outcome.steps},
                      {"tokens", round.outcome.tokens},
                      {"first_loss", round.outcome.first_loss},
                      {"last_loss", round.outcome.last_loss},
                      {"converged", round.outcome.converged},
                      {"seconds", seconds},
                      {"gate", gate_record},
                      {"round_in_lineage", round.in_lineage}};
  Json record = {{"round", round.number},
                 {"outcome", "published"},
                 {"parent", "v" + std::to_string(manifest.parent)},
                 {"version", version},
                 {"items", manifest.items},
                 {"steps", round.outcome.steps},
                 {"tokens", round.outcome.tokens},
                 {"seconds", seconds},
                 {"gate", gate_record},
                 {"seed", parts_.config.integer("learn.seed")},
                 {"weight_hash", manifest.weight_hash}};
  Commit commit = std::move(round.with);
  set_fates(commit, round.items, "trained", version, round.outcome.steps, "");
  set_fates(commit, round.items, "served", version, round.outcome.steps, "");
  for (const FeedbackItem& item : round.items)
    commit.insert.push_back({item.domain, item.draw_key, item.offset});
  commit.rounds.emplace_back(round.number, record);
  const std::vector<StoredTensor> masters = factors_to_tensors(
      parts_.base->config(), round.adapters->rank(), round.adapters->factors(), "F32");
  const auto weights = make_weights(manifest, parts_.base, candidate);
  const Status published =
      parts_.versions.publish(manifest, delta, masters, std::move(commit), weights, true);
  if (!published.ok())  // a conflict: the lineage moved, or was pinned, a moment ago
    return hold(round, manifest.parent, published.code() == Code::kConflict ? "dropped" : "held",
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

/// Retractions in the stream come first: what they name must not be learned.
void Learner::undo_retracted(const std::vector<uint64_t>& offsets) {
  for (const uint64_t offset : offsets) {
    const Result<FeedbackItem> item = parts_.store.get(offset);
    if (!item.ok() || item->kind != "retract") continue;
    const Json undone = run_undo(item->record.value("target", ""));
    Commit commit;
    commit.fates.push_back(
        {offset, {"trained", parts_.clock.unix_ms(), "", 0, undone.value("error", "retracted")}});
    const Status done = parts_.store.commit(commit);
    if (!done.ok()) log(LogLevel::kError, "learn", done.message());
  }
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
    } else if (const Result<Lesson> lesson = lesson_of(*item); !lesson.ok()) {
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
    return {{"outcome", "empty"},
            {"reason", "v" + std::to_string(parts_.versions.pinned()) +
                           " is pinned: promote or unpin first"}};
  }
  undo_retracted(offsets);
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
  Result<std::unique_ptr<Adapters>> adapters = adapters_of(parent);
  if (!adapters.ok()) return failure(adapters.status().message());
  Result<Round> round = train_round(parent, std::move(items), lineage_items(parent),
                                    std::move(adapters).value(), lineage_round(parent));
  if (!round.ok()) return failure(round.status().message());
  if (round->outcome.stopped) return drop(*round, parent, {});
  return finish_round(*round, parent, true);
}

Json Learner::run_undo(const std::string& id) {
  const Result<FeedbackItem> item = parts_.store.get(id);
  if (!item.ok()) return failure(item.status().message(), true);
  const std::string state = item->fate.empty() ? "" : item->fate.back().state;
  if (state == "reverted" || state == "erased")
    return {{"id", id},
            {"state", state},
            {"version", "v" + std::to_string(parts_.versions.current_number())}};
  const bool in_a_round =
      state == "held" && parts_.config.flag("learn.deterministic");  // it filled a place there
  if (state == "served" || state == "trained" || in_a_round) return undo_learned(*item);
  Commit commit;
  set_fates(commit, {*item}, "reverted", "", 0, "retracted before it was learned");
  const Status done = parts_.store.commit(commit);
  if (!done.ok()) return failure(done.message());
  return {{"id", id},
          {"state", "reverted"},
          {"version", "v" + std::to_string(parts_.versions.current_number())}};
}

/// What an undo trains again: the rounds after the one that learned the item, without it.
struct Learner::Rebuild {
  int64_t parent = 0;  // 0: no serving version learned the item
  std::vector<std::vector<FeedbackItem>> rounds;
  std::vector<FeedbackItem> unfinished;  // waiting for a full round
  bool gate_each = false;
};

Result<Learner::Rebuild> Learner::plan_rebuild(const FeedbackItem& item) const {
  Rebuild plan;
  std::vector<int64_t> path = parts_.versions.ancestors(parts_.versions.current_number());
  std::reverse(path.begin(), path.end());  // oldest first
  for (size_t i = 0; i < path.size(); ++i) {
    DS_ASSIGN(const VersionManifest manifest, parts_.versions.manifest(path[i]));
    const auto& ids = manifest.items;
    if (plan.parent == 0 && std::find(ids.begin(), ids.end(), item.id) == ids.end()) continue;
    if (plan.parent == 0) plan.parent = manifest.parent;
    plan.rounds.emplace_back();
    for (const std::string& id : ids) {
      if (id == item.id) continue;
      DS_ASSIGN(FeedbackItem other, parts_.store.get(id));
      plan.rounds.back().push_back(std::move(other));
    }
  }
  std::erase_if(plan.rounds, [](const std::vector<FeedbackItem>& r) { return r.empty(); });
  return plan;
}

/// The same for `learn.deterministic`, where rounds are what the log says: all items that rounds
/// have taken, held ones too, in offset order, min_items each. Formed anew after the newest version
/// that ends before the item, they are the rounds of a store that never had it.
Result<Learner::Rebuild> Learner::plan_from_log(const FeedbackItem& item) const {
  Rebuild plan;
  plan.gate_each = true;
  uint64_t parent_ends = 0;
  for (const int64_t number : parts_.versions.ancestors(parts_.versions.current_number())) {
    const std::vector<FeedbackItem> learned = lineage_items(number);
    parent_ends = learned.empty() ? 0 : learned.back().offset;
    plan.parent = number;
    if (parent_ends < item.offset) break;
  }
  std::set<uint64_t> taken;
  for (const char* state : {"trained", "served", "held"}) {
    const std::vector<uint64_t> offsets = parts_.store.offsets_in_state(state);
    taken.insert(offsets.begin(), offsets.end());
  }
  std::vector<FeedbackItem> later;
  for (auto at = taken.upper_bound(parent_ends); at != taken.end(); ++at) {
    DS_ASSIGN(FeedbackItem other, parts_.store.get(*at));
    if (other.id != item.id && lesson_of(other).ok()) later.push_back(std::move(other));
  }
  const auto size = static_cast<int64_t>(parts_.config.integer("learn.min_items"));
  auto first = later.begin();
  for (; later.end() - first >= size; first += size) plan.rounds.emplace_back(first, first + size);
  plan.unfinished.assign(first, later.end());
  return plan;
}

/// Trains one round of a rebuild on `last`, which becomes it; without effect when its gate says no.
Status Learner::rebuild_round(const Rebuild& plan, const std::vector<FeedbackItem>& items,
                              std::vector<FeedbackItem>& earlier, Round& last) {
  const auto pack = [&](const Adapters& a) {
    return LoraDelta::pack(*parts_.base, compute_, a.rank(), a.scale(), a.factors());
  };
  const std::span<const float> start = std::as_const(*last.adapters).parameters();
  const std::vector<float> before(start.begin(), start.end());
  const bool on_base = plan.parent == 1 && earlier.empty();
  const auto parent = on_base || !plan.gate_each ? nullptr : pack(*last.adapters);
  DS_ASSIGN(Round round, train_round(plan.parent, items, earlier, std::move(last.adapters),
                                     last.in_lineage + 1));
  round.rebuilds = true;
  if (round.outcome.stopped) return unavailable("undo was interrupted; the item is still served");
  if (plan.gate_each) {
    GateScores scores = measure(round, parent.get(), pack(*round.adapters).get());
    scores.finite = scores.finite && round.outcome.finite;
    scores.changed = round.outcome.steps > 0;
    const GateVerdict verdict =
        judge(scores, {parts_.config.number("gate.max_drop"), parts_.config.number("gate.max_kl")});
    if (!verdict.pass) {
      set_fates(last.with, items, "held", "", round.outcome.steps,
                verdict.check + ": " + verdict.reason);
      std::copy(before.begin(), before.end(), round.adapters->parameters().begin());
      last.adapters = std::move(round.adapters);
      return {};
    }
  }
  earlier.insert(earlier.end(), items.begin(), items.end());
  round.with = std::move(last.with);
  round.items.insert(round.items.begin(), last.items.begin(), last.items.end());
  last = std::move(round);
  return {};
}

// The lineage from the round that learned the item on is trained again without it, from that
// round's parent, and published as one new version beside the old ones.
Json Learner::undo_learned(const FeedbackItem& item) {
  Result<Rebuild> plan =
      parts_.config.flag("learn.deterministic") ? plan_from_log(item) : plan_rebuild(item);
  if (!plan.ok()) return failure(plan.status().message());
  Round last;
  last.rebuilds = true;
  set_fates(last.with, {item}, "reverted", "", 0, "retracted");
  set_fates(last.with, plan->unfinished, "queued", "", 0, "its round is formed anew");
  last.with.remove.push_back({item.domain, item.draw_key, item.offset});
  if (!plan->rounds.empty()) {
    if (parts_.versions.pinned() != 0)
      return failure("undo: " + version_name(parts_.versions.pinned()) +
                     " is pinned and would have to change; unpin first");
    epoch_at_start_ = parts_.versions.lineage_epoch();
    Result<std::unique_ptr<Adapters>> adapters = adapters_of(plan->parent);
    if (!adapters.ok()) return failure(adapters.status().message());
    last.adapters = std::move(adapters).value();
    last.in_lineage = lineage_round(plan->parent) - 1;
    std::vector<FeedbackItem> earlier = lineage_items(plan->parent);
    for (const std::vector<FeedbackItem>& items : plan->rounds) {
      const Status trained = rebuild_round(*plan, items, earlier, last);
      publish_status("idle");
      if (!trained.ok()) return failure(trained.message());
    }
  }
  Json answer = {{"id", item.id}, {"state", "reverted"}};
  if (last.items.empty()) {  // the parent, or what serves already, is the answer
    const bool serves = plan->parent == 0 || plan->parent == parts_.versions.current_number();
    const Status done =
        serves ? parts_.store.commit(last.with)
               : parts_.versions.step_back(plan->parent, "undo of " + item.id, last.with);
    if (!done.ok()) return failure(done.message());
    answer["version"] = version_name(parts_.versions.current_number());
    return answer;
  }
  const Json outcome = finish_round(last, plan->parent, false);
  if (outcome.value("outcome", "") != "published")
    return failure("undo: " + outcome.value("reason", ""));
  answer["version"] = outcome["version"];
  answer["round"] = outcome["round"];
  return answer;
}

}  // namespace ds
