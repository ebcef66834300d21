// SPDX-License-Identifier: Apache-2.0
// The inverse of rounds: the lineage is trained again without an item.
#include <algorithm>
#include <set>

#include "learn/admission.h"
#include "learn/learner_round.h"
#include "log.h"

namespace ds {

/// Retractions in the stream come first: what they name must not be learned.
/// An acknowledged retraction is done before anything else is learned. One that the disk or a stop
/// prevents waits and is tried again; one whose item does not exist is done with.
Status Learner::undo_retracted(const std::vector<uint64_t>& offsets) {
  for (const uint64_t offset : offsets) {
    const Result<FeedbackItem> item = parts_.store.get(offset);
    if (!item.ok() || item->kind != "retract") continue;
    const Json undone = run_undo(item->record.value("target", ""));
    const std::string error = undone.value("error", "");
    const bool again = !error.empty() && !undone.value("not_found", false);
    Commit commit;
    set_fates(commit, {*item}, again ? "queued" : "trained", "", 0,
              error.empty() ? "retracted" : error);
    const Status done = parts_.store.commit(commit);
    if (!done.ok()) log(LogLevel::kError, "learn", done.message());
    if (again) return unavailable(error);
  }
  return {};
}

Json Learner::run_undo(const std::string& id) {
  const Result<FeedbackItem> item = parts_.store.get(id);
  if (!item.ok()) return failure(item.status().message(), true);
  const std::string state = item->fate.empty() ? "" : item->fate.back().state;
  const auto answer = [&](const std::string& now) -> Json {
    return {
        {"id", id}, {"state", now}, {"version", version_name(parts_.versions.current_number())}};
  };
  Commit commit;
  bring_back(*item, commit);
  if (state == "reverted" || state == "erased") {
    const Status done = commit.fates.empty() ? Status() : parts_.store.commit(commit);
    return done.ok() ? answer(state) : failure(done.message());
  }
  const bool in_a_round =
      state == "held" && parts_.config.flag("learn.deterministic");  // it filled a place there
  if (state == "served" || state == "trained" || in_a_round)
    return undo_learned(*item, std::move(commit));
  set_fates(commit, {*item}, "reverted", "", 0, "retracted before it was learned");
  const Status done = parts_.store.commit(commit);
  if (!done.ok()) return failure(done.message());
  return answer("reverted");
}

/// What was left out of a round because of the undone item waits again, unless something newer that
/// is learned or waits has taken its place for good.
void Learner::bring_back(const FeedbackItem& undone, Commit& commit) const {
  std::vector<FeedbackItem> back;
  for (const uint64_t offset : parts_.store.offsets_in_state("quarantined")) {
    Result<FeedbackItem> item = parts_.store.get(offset);
    if (item.ok() && gave_way_to(*item, undone.id)) back.push_back(std::move(item).value());
  }
  if (back.empty()) return;
  std::vector<FeedbackItem> others = lineage_items(parts_.versions.current_number());
  for (const uint64_t offset : waiting()) {
    Result<FeedbackItem> item = parts_.store.get(offset);
    if (item.ok()) others.push_back(std::move(item).value());
  }
  std::erase_if(others, [&](const FeedbackItem& other) { return other.id == undone.id; });
  for (const FeedbackItem& item : back) {
    const std::string by = superseded_by(item, others);
    if (by.empty())
      set_fates(commit, {item}, "queued", "", 0,
                "it had given way to " + undone.id + ", which is retracted");
    else
      set_fates(commit, {item}, "quarantined", "", 0, superseded_reason(by));
  }
}

/// What an undo trains again: the rounds from the one that learned the item on, without it. They
/// start from its parent or, where versions.keep has removed that, from the next older version that
/// is left: v1 at last.
struct Learner::Rebuild {
  int64_t parent = 0;  // 0: no serving version learned the item
  std::vector<std::vector<FeedbackItem>> rounds;
  std::vector<FeedbackItem> unfinished;  // waiting for a full round
  bool gate_each = false;
};

Result<Learner::Rebuild> Learner::plan_rebuild(const FeedbackItem& item) const {
  Rebuild plan;
  std::vector<VersionManifest> path = parts_.versions.lineage(parts_.versions.current_number());
  std::reverse(path.begin(), path.end());  // oldest first
  const auto learned = std::find_if(path.begin(), path.end(), [&](const VersionManifest& m) {
    return std::find(m.items.begin(), m.items.end(), item.id) != m.items.end();
  });
  if (learned == path.end()) return plan;
  auto first = learned;  // of the versions that are trained again
  while (first != path.begin() && plan.parent == 0) {
    const int64_t before = std::prev(first)->number;
    if (parts_.versions.manifest(before).ok()) {
      plan.parent = before;
    } else {
      --first;  // removed: its round is trained again too
    }
  }
  if (plan.parent == 0)
    return corrupt("no ancestor of " + version_name(learned->number) + " is left");
  for (; first != path.end(); ++first) {
    plan.rounds.emplace_back();
    for (const std::string& id : first->items) {
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
    if (!parts_.versions.manifest(number).ok()) continue;  // removed
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
  Trained before;
  std::shared_ptr<const Weights> parent;
  if (plan.gate_each) {
    DS_ASSIGN(before, copy_of(last.trained));
    const bool on_base = plan.parent == 1 && earlier.empty();
    DS_ASSIGN(parent, on_base ? parts_.versions.find(version_name(1)) : servable(last.trained));
  }
  DS_ASSIGN(Round round,
            train_round(plan.parent, items, earlier, std::move(last.trained), last.in_lineage + 1));
  round.rebuilds = true;
  if (round.outcome.stopped) return unavailable("undo was interrupted; the item is still served");
  if (!round.outcome.failure.ok()) return round.outcome.failure;
  if (plan.gate_each) {
    DS_ASSIGN(const auto candidate, servable(round.trained));
    GateScores scores = measure(round, *parent, *candidate);
    scores.finite = scores.finite && round.outcome.finite;
    scores.changed = round.outcome.steps > 0;
    const GateVerdict verdict =
        judge(scores, {parts_.config.number("gate.max_drop"), parts_.config.number("gate.max_kl")});
    if (!verdict.pass) {
      set_fates(last.with, items, "held", "", round.outcome.steps,
                verdict.check + ": " + verdict.reason);
      last.trained = std::move(before);
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
Json Learner::undo_learned(const FeedbackItem& item, Commit with) {
  Result<Rebuild> plan =
      parts_.config.flag("learn.deterministic") ? plan_from_log(item) : plan_rebuild(item);
  if (!plan.ok()) return failure(plan.status().message());
  Round last;
  last.rebuilds = true;
  last.with = std::move(with);
  set_fates(last.with, {item}, "reverted", "", 0, "retracted");
  set_fates(last.with, plan->unfinished, "queued", "", 0, "its round is formed anew");
  last.with.remove.push_back({item.domain, item.draw_key, item.offset});
  if (!plan->rounds.empty()) {
    if (const Status ready = get_ready(); !ready.ok()) return failure("undo: " + ready.message());
    if (parts_.versions.pinned() != 0)
      return failure("undo: " + version_name(parts_.versions.pinned()) +
                     " is pinned and would have to change; unpin first");
    epoch_at_start_ = parts_.versions.lineage_epoch();
    Result<Trained> trained = trained_of(plan->parent);
    if (!trained.ok()) return failure(trained.status().message());
    last.trained = std::move(trained).value();
    last.in_lineage = lineage_round(plan->parent) - 1;
    std::vector<FeedbackItem> earlier = lineage_items(plan->parent);
    for (const std::vector<FeedbackItem>& items : plan->rounds) {
      const Status rebuilt = rebuild_round(*plan, items, earlier, last);
      publish_status("idle");
      if (!rebuilt.ok()) return failure(rebuilt.message());
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
