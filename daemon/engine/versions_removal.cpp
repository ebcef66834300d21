// SPDX-License-Identifier: Apache-2.0
// versions.keep: which versions a publication removes, how that outlives a crash, and what stays
// known of them.
#include <algorithm>

#include "engine/versions.h"

namespace ds {
namespace {

/// What stays known of a removed version.
std::string removed_key(const std::string& model, int64_t number) {
  return "versions/" + model + "/" + version_name(number);
}

}  // namespace

/// What `keep_` leaves no room for once `added` is there and `next` the pointer; mutex_ held.
std::vector<int64_t> Versions::too_old(const VersionManifest& added, const Pointer& next) const {
  const int64_t serving = next.current;
  const int64_t before = serving == added.number ? added.parent : manifests_.at(serving).parent;
  const std::set<int64_t> needed = {1, serving, before, next.pinned};
  std::vector<int64_t> gone;
  int64_t newer = 1;  // `added` is
  for (auto it = manifests_.rbegin(); it != manifests_.rend(); ++it, ++newer) {
    if (newer >= keep_ && !needed.contains(it->first)) gone.push_back(it->first);
  }
  std::ranges::reverse(gone);
  return gone;
}

/// The removal becomes durable with the publication: from then on a crash leaves no more than files
/// that the next start removes. What the ancestors of kept versions learned is noted.
void Versions::commit_removal(const std::vector<int64_t>& gone, const VersionManifest& added,
                              Pointer& next, Commit& commit) const {
  if (gone.empty()) return;
  next.removing.insert(gone.begin(), gone.end());
  for (const int64_t number : gone) next.held.erase(number);
  std::set<int64_t> needed = lineages(next.removing);
  for (const int64_t number : path(added.parent)) needed.insert(number);
  for (const int64_t number : gone) {
    if (!needed.contains(number)) continue;
    const VersionManifest& m = manifests_.at(number);
    commit.meta.emplace_back(removed_key(model_, number),
                             Json{{"parent", m.parent}, {"round", m.round}, {"items", m.items}});
  }
  for (const auto& [number, manifest] : removed_) {
    if (!needed.contains(number)) commit.meta.emplace_back(removed_key(model_, number), Json());
  }
}

/// The same in memory, once it is durable.
void Versions::forget(const std::vector<int64_t>& gone) {
  if (gone.empty()) return;
  for (const int64_t number : gone) {
    auto removed = manifests_.extract(number);
    removed.mapped().details = {};  // as after a restart
    removed_.insert(std::move(removed));
    cache_.erase(number);
  }
  const std::set<int64_t> needed = lineages({});
  std::erase_if(removed_, [&](const auto& entry) { return !needed.contains(entry.first); });
}

/// Those of pointer_.removing; what could not be removed, and why, is tried again after the next
/// publication and at the next start.
std::map<int64_t, Status> Versions::remove_files() {
  std::set<int64_t> removing;
  {
    std::lock_guard lock(mutex_);
    removing = pointer_.removing;
  }
  std::map<int64_t, Status> failed;
  for (const int64_t number : removing) {
    Status removed = files_.remove(model_, number);
    if (!removed.ok() && removed.code() != Code::kNotFound)
      failed.emplace(number, std::move(removed));
  }
  std::lock_guard lock(mutex_);
  std::erase_if(pointer_.removing, [&](int64_t number) { return !failed.contains(number); });
  return failed;
}

std::shared_ptr<const void> Versions::keep_files() {
  std::lock_guard change(change_mutex_);
  std::shared_ptr<const void> kept = files_kept_.lock();
  if (kept == nullptr) {
    kept = std::make_shared<int>();
    files_kept_ = kept;
  }
  return kept;
}

/// The ancestors of the versions that are there, as far as they were removed.
Status Versions::recover_removed() {
  for (const auto& [number, manifest] : manifests_) {
    int64_t child = number, at = manifest.parent;
    while (at > 0 && at < child && known(at) == nullptr) {
      const auto record = store_.meta(removed_key(model_, at));
      if (!record) break;
      VersionManifest& removed = removed_[at];
      removed.model = model_;
      removed.number = at;
      DS_ASSIGN(removed.parent, get_int(*record, "parent"));
      DS_ASSIGN(const int64_t round, get_int(*record, "round"));
      removed.round = static_cast<uint64_t>(round);
      if (const Json* items = ds::find(*record, "items"); items != nullptr && items->is_array()) {
        for (const Json& id : *items) {
          if (id.is_string()) removed.items.push_back(id.get<std::string>());
        }
      }
      child = at;
      at = removed.parent;
    }
  }
  return {};
}

Status Versions::check_kept(int64_t number) const {
  if (manifests_.contains(number)) return {};
  const std::string name = version_name(number);
  if (number > 0 && number < pointer_.next) {  // numbers are not reused
    return not_found("model " + model_ + " no longer has version " + name +
                     ": the setting versions.keep has removed it");
  }
  return not_found("model " + model_ + " has no version " + name + ", the newest is " +
                   version_name(manifests_.rbegin()->first));
}

std::set<int64_t> Versions::lineages(const std::set<int64_t>& without) const {
  std::set<int64_t> out;
  for (const auto& [number, manifest] : manifests_) {
    if (without.contains(number)) continue;
    for (const int64_t n : path(number)) out.insert(n);
  }
  return out;
}

}  // namespace ds
