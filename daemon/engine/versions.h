// SPDX-License-Identifier: Apache-2.0
// Which weights serve. Readers take one pointer (`current`); the learner publishes; people promote,
// roll back and pin. The lineage and the pointer are durable in the replay store before they are
// visible here. serve/ and learn/ meet in this file.
//
// A publication removes the versions that are too old for `versions.keep`: they are no longer
// listed and cannot be asked for, their files go; sequences that decode with one end on it. What it
// learned stays known for as long as a kept version descends from it (lineage()), so that an undo
// can train it again from an older version.
//
// Thread-safe.
#pragma once

#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "engine/model.h"
#include "storage/replay_store.h"
#include "storage/version_store.h"

namespace ds {

/// "v3"
std::string version_name(int64_t number);
/// Weights with the names and the execution id that follow from their manifest. Numbers of the
/// default model stand alone in the fingerprint; another model's carry its name:
/// "ds-digits@v3-9f3c2a1b".
std::shared_ptr<const Weights> make_weights(const VersionManifest& manifest,
                                            std::shared_ptr<const BaseWeights> base,
                                            std::shared_ptr<const LoraDelta> delta);

/// Turns a stored version back into weights (reads base and delta). Slow; called without locks held
/// and on whatever thread asks, beside running engine steps: it computes with serial_parallel(),
/// not the pool.
using LoadWeights = std::function<Result<std::shared_ptr<const Weights>>(const VersionManifest&)>;

class Versions {
 public:
  static constexpr int64_t kKeepAll = std::numeric_limits<int64_t>::max();

  /// Reads the lineage of `model`; writes v1 (the base, no delta) when there is none. Another base
  /// than the one the stored versions belong to is refused, naming both hashes. `keep`, from 1 =
  /// versions.keep: a publication leaves that many newest versions, besides v1, the one that
  /// serves, its parent and the pinned one.
  static Result<std::unique_ptr<Versions>> open(const std::string& model,
                                                const std::string& base_sha256, ReplayStore& store,
                                                VersionStore& files, Clock& clock, LoadWeights load,
                                                int64_t keep = kKeepAll);

  std::shared_ptr<const Weights> current() const;
  /// "", "default" or the model's name: current; "vN" or "model@vN": that version.
  Result<std::shared_ptr<const Weights>> find(const std::string& ref);

  /// Writes the version's files, then commits `commit` together with the new pointer, then swaps,
  /// then removes what `keep` leaves no room for. `serve` false keeps the pointer (held or pinned
  /// lineage). kConflict, with nothing kept, when the lineage is pinned or no longer holds the
  /// parent, or the number is not next_number(). Called by the learner only.
  Status publish(const VersionManifest& manifest, const std::vector<StoredTensor>& delta,
                 const std::vector<StoredTensor>& checkpoint, Commit commit,
                 std::shared_ptr<const Weights> weights, bool serve);

  /// Returns once every new sequence uses `to`; pins it. Items learned only in versions left behind
  /// become `reverted`. Already current: OK, pinned.
  Status rollback(int64_t to, const std::string& reason);
  /// Makes an older version current without touching the pin; what `with` says becomes durable with
  /// it, and its fates win over those of the move.
  Status step_back(int64_t to, const std::string& reason, Commit with);
  Status promote(int64_t to);  ///< makes it current and removes the pin
  Status pin(int64_t number);
  Status unpin();

  /// Loads the serving version anew, after what it is kept in has changed, and lets new sequences
  /// use it. Other versions are loaded when they are asked for. Weights in use stay as they are.
  Status reload();

  int64_t current_number() const;
  int64_t pinned() const;       ///< 0 = none
  int64_t next_number() const;  ///< number for the next candidate; never reused
  /// Grows with each change of pointer: a running candidate compares it to see its parent left.
  uint64_t lineage_epoch() const;
  std::set<std::string> bases() const;  ///< SHA-256 of the bases that versions belong to
  std::vector<int64_t> ancestors(
      int64_t number) const;  ///< itself first, v1 last; removed ones too
  /// The same with what each is. Of removed ones no more than number, parent, round and items.
  std::vector<VersionManifest> lineage(int64_t number) const;
  Result<VersionManifest> manifest(int64_t number) const;  ///< kNotFound for a removed one too
  Json list() const;                                       ///< items of GET /ds/v1/versions
  Result<Json> show(int64_t number) const;
  /// Nothing is removed while the answer lives: a backup copies the files that its copy of the
  /// store names. May wait for a publication.
  std::shared_ptr<const void> keep_files();
  /// Topic "version": {event: published|held|rolled_back|promoted|pinned|unpinned|pruned, version,
  /// from, reason}. Called on the thread that made the change, after it, with no lock held.
  /// Register before any change.
  void on_change(std::function<void(const Json& event)> listener);

 private:
  Versions(std::string model, ReplayStore& store, VersionStore& files, Clock& clock,
           LoadWeights load, int64_t keep);
  struct Pointer {
    int64_t current = 0, pinned = 0, next = 2;
    std::set<int64_t> held;      ///< published without serving, not promoted yet
    std::set<int64_t> removing;  ///< no versions any more, though their files may be there
  };
  Status recover(const std::string& base_sha256);
  Status write_base(const std::string& base_sha256);
  Result<std::shared_ptr<const Weights>> weights_of(int64_t number);
  Status move(int64_t to, bool pin, const std::string& event, const std::string& reason,
              Commit with = {});
  Status set_pin(int64_t number, const std::string& event);
  Status commit_pointer(const Pointer& pointer, Commit commit);
  std::vector<FateChange> fates_of_move(int64_t from, int64_t to, const std::string& reason) const;
  Status check_publish(const VersionManifest& manifest, bool serve) const;
  // versions_removal.cpp
  Status recover_removed();
  std::map<int64_t, Status> remove_files();  ///< change_mutex_ held
  // With mutex_ held; versions_removal.cpp down to lineages().
  std::vector<int64_t> too_old(const VersionManifest& added, const Pointer& next) const;
  void commit_removal(const std::vector<int64_t>& gone, const VersionManifest& added, Pointer& next,
                      Commit& commit) const;
  void forget(const std::vector<int64_t>& gone);
  Status check_kept(int64_t number) const;
  /// Every version in the lineage of one that is there and not in `without`.
  std::set<int64_t> lineages(const std::set<int64_t>& without) const;
  const VersionManifest* known(int64_t number) const;  ///< removed ones too; null = none
  std::vector<int64_t> path(int64_t number) const;     ///< ancestors()
  Json describe(const VersionManifest& manifest) const;
  void announce(const std::string& event, int64_t version, int64_t from, const std::string& reason);

  const std::string model_;
  ReplayStore& store_;
  VersionStore& files_;
  Clock& clock_;
  LoadWeights load_;
  const int64_t keep_;
  std::weak_ptr<const void> files_kept_;  ///< what keep_files() gave; change_mutex_
  std::mutex change_mutex_;               ///< one change at a time; held over the store's commit
  mutable std::mutex mutex_;              ///< what readers see; never held over disk or loading
  std::map<int64_t, VersionManifest> manifests_;
  std::map<int64_t, VersionManifest> removed_;  ///< ancestors of kept versions, see lineage()
  std::map<int64_t, std::weak_ptr<const Weights>> cache_;
  std::shared_ptr<const Weights> current_;
  Pointer pointer_;
  uint64_t epoch_ = 0;
  std::vector<std::function<void(const Json&)>> listeners_;
};

}  // namespace ds
