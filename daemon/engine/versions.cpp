// SPDX-License-Identifier: Apache-2.0
#include "engine/versions.h"

#include <algorithm>
#include <charconv>

#include "storage/hash.h"

namespace ds {
namespace {

std::string pointer_key(const std::string& model) { return "versions/" + model; }

void read_numbers(const Json& pointer, const char* key, std::set<int64_t>& numbers) {
  const Json* list = find(pointer, key);
  if (list == nullptr || !list->is_array()) return;
  for (const Json& number : *list) {
    if (number.is_number_integer()) numbers.insert(number.get<int64_t>());
  }
}

/// "v12" -> 12; 0 for anything else.
int64_t parse_version(std::string_view text) {
  if (text.size() < 2 || text[0] != 'v') return 0;
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data() + 1, text.data() + text.size(), number);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  return whole && number > 0 ? number : 0;
}

std::string fingerprint_of(const VersionManifest& m) {
  const std::string name = m.model == "default" ? "" : m.model + "@";
  return "ds-" + name + version_name(m.number) + "-" + m.weight_hash.substr(0, 8);
}

}  // namespace

std::string version_name(int64_t number) { return "v" + std::to_string(number); }

std::shared_ptr<const Weights> make_weights(const VersionManifest& manifest,
                                            std::shared_ptr<const BaseWeights> base,
                                            std::shared_ptr<const LoraDelta> delta) {
  auto weights = std::make_shared<Weights>();
  weights->version = version_name(manifest.number);
  weights->fingerprint = fingerprint_of(manifest);
  weights->weight_hash = manifest.weight_hash;
  const std::string format = base ? std::to_string(base->form().key()) : "";
  const Sha256Digest digest =
      sha256(manifest.model + '@' + weights->version + ' ' + manifest.weight_hash + ' ' + format);
  for (int i = 0; i < 8; ++i) weights->execution_id = weights->execution_id << 8 | digest[i];
  weights->base = std::move(base);
  weights->delta = std::move(delta);
  return weights;
}

Versions::Versions(std::string model, ReplayStore& store, VersionStore& files, Clock& clock,
                   LoadWeights load, int64_t keep)
    : model_(std::move(model)),
      store_(store),
      files_(files),
      clock_(clock),
      load_(std::move(load)),
      keep_(keep) {}

Result<std::unique_ptr<Versions>> Versions::open(const std::string& model,
                                                 const std::string& base_sha256, ReplayStore& store,
                                                 VersionStore& files, Clock& clock,
                                                 LoadWeights load, int64_t keep) {
  std::unique_ptr<Versions> opened(new Versions(model, store, files, clock, std::move(load), keep));
  DS_TRY(opened->recover(base_sha256).in("versions of " + model));
  DS_ASSIGN(opened->current_, opened->weights_of(opened->pointer_.current));
  return opened;
}

Status Versions::recover(const std::string& base_sha256) {
  DS_ASSIGN(const auto stored, files_.list(model_));
  const auto meta = store_.meta(pointer_key(model_));
  if (!meta) {
    // A crash during the very first start leaves v1 alone. More than that is another store's
    // history.
    if (!stored.empty() && stored.back().number > 1) {
      return corrupt("the folder holds " + version_name(stored.back().number) +
                     ", but the replay store knows of none: they do not belong together");
    }
    if (!stored.empty()) DS_TRY(files_.remove(model_, 1));
    return write_base(base_sha256);
  }
  DS_ASSIGN(pointer_.current, get_int(*meta, "current"));
  DS_ASSIGN(pointer_.pinned, get_int(*meta, "pinned"));
  DS_ASSIGN(pointer_.next, get_int(*meta, "next"));
  read_numbers(*meta, "held", pointer_.held);
  read_numbers(*meta, "removing", pointer_.removing);
  for (const VersionManifest& manifest : stored) {
    if (pointer_.removing.contains(manifest.number)) continue;
    if (manifest.number < pointer_.next) {
      manifests_[manifest.number] = manifest;
    } else {  // its files were written, its commit never was
      DS_TRY(files_.remove(model_, manifest.number));
    }
  }
  if (!manifests_.contains(1)) return corrupt("v1, the base, is missing");
  if (manifests_[1].base_sha256 != base_sha256) {
    return conflict("they belong to the base " + manifests_[1].base_sha256 +
                    ", the model file is " + base_sha256 + "; use another data folder for it");
  }
  if (!manifests_.contains(pointer_.current)) {
    return corrupt(version_name(pointer_.current) + " should serve, but its files are missing");
  }
  remove_files();  // what a crash has left of them; what cannot be removed now is tried again
  return recover_removed();
}

Status Versions::write_base(const std::string& base_sha256) {
  VersionManifest manifest;
  manifest.model = model_;
  manifest.number = 1;
  manifest.base_sha256 = base_sha256;
  manifest.weight_hash = weight_hash(base_sha256, {});
  manifest.method = "base";
  manifest.created_ms = clock_.unix_ms();
  manifest.details = Json::object();
  DS_TRY(files_.write(manifest, {}, {}));
  Pointer pointer;
  pointer.current = 1;
  DS_TRY(commit_pointer(pointer, {}));
  manifests_[1] = manifest;
  pointer_ = pointer;
  return {};
}

std::shared_ptr<const Weights> Versions::current() const {
  std::lock_guard lock(mutex_);
  return current_;
}

Result<std::shared_ptr<const Weights>> Versions::find(const std::string& ref) {
  if (ref.empty() || ref == "default" || ref == model_) return current();
  const size_t at = ref.rfind('@');
  const std::string model = at == std::string::npos ? model_ : ref.substr(0, at);
  const int64_t number = parse_version(std::string_view(ref).substr(at + 1));  // npos + 1 == 0
  if (number == 0 || (model != model_ && model != "default")) {
    const std::string own = model_ == "default" ? "default" : "default, " + model_;
    return not_found("no model " + ref + ", expected " + own + ", vN or " + model_ + "@vN");
  }
  return weights_of(number);
}

Status Versions::reload() {
  std::lock_guard change(change_mutex_);
  VersionManifest serving;
  {
    std::lock_guard lock(mutex_);
    serving = manifests_.at(pointer_.current);
  }
  DS_ASSIGN(auto weights, load_(serving));
  std::lock_guard lock(mutex_);
  cache_.clear();
  cache_[serving.number] = weights;
  current_ = std::move(weights);
  return {};
}

Result<std::shared_ptr<const Weights>> Versions::weights_of(int64_t number) {
  DS_ASSIGN(const VersionManifest wanted, manifest(number));
  {
    std::lock_guard lock(mutex_);
    if (current_ && pointer_.current == number) return current_;
    if (auto live = cache_[number].lock()) return live;
  }
  const Result<std::shared_ptr<const Weights>> loaded = load_(wanted);
  std::lock_guard lock(mutex_);
  DS_TRY(check_kept(number));  // its files may have gone while they were read
  if (!loaded.ok()) return loaded.status();
  if (auto live = cache_[number].lock()) return live;  // another thread was faster
  cache_[number] = *loaded;
  return *loaded;
}

Status Versions::commit_pointer(const Pointer& pointer, Commit commit) {
  commit.meta.emplace_back(pointer_key(model_), Json{{"current", pointer.current},
                                                     {"pinned", pointer.pinned},
                                                     {"next", pointer.next},
                                                     {"held", pointer.held},
                                                     {"removing", pointer.removing}});
  return store_.commit(commit);
}

Status Versions::check_publish(const VersionManifest& manifest, bool serve) const {
  std::lock_guard lock(mutex_);
  const std::string name = version_name(manifest.number);
  if (manifest.model != model_)
    return invalid("publish: model " + manifest.model + ", expected " + model_);
  if (manifest.number != pointer_.next) {
    return conflict("publish: " + name + ", expected " + version_name(pointer_.next));
  }
  const std::vector<int64_t> lineage = path(pointer_.current);
  if (std::ranges::find(lineage, manifest.parent) == lineage.end()) {
    return conflict("publish: the parent of " + name + ", " + version_name(manifest.parent) +
                    ", is not in the lineage of " + version_name(pointer_.current));
  }
  if (serve && pointer_.pinned != 0) {
    return conflict("publish: " + version_name(pointer_.pinned) + " is pinned, " + name +
                    " cannot serve");
  }
  return {};
}

Status Versions::publish(const VersionManifest& manifest, const std::vector<StoredTensor>& delta,
                         const std::vector<StoredTensor>& checkpoint, Commit commit,
                         std::shared_ptr<const Weights> weights, bool serve) {
  int64_t from = 0;
  std::vector<int64_t> gone;
  std::map<int64_t, Status> left_behind;
  {
    std::lock_guard change(change_mutex_);
    DS_TRY(check_publish(manifest, serve));
    DS_TRY(files_.write(manifest, delta, checkpoint));
    Pointer next;
    {
      std::lock_guard lock(mutex_);
      next = pointer_;
      from = next.current;
      next.next = manifest.number + 1;
      if (serve) {
        next.current = manifest.number;
      } else {
        next.held.insert(manifest.number);
      }
      if (files_kept_.expired()) gone = too_old(manifest, next);
      commit_removal(gone, manifest, next, commit);
    }
    if (Status status = commit_pointer(next, std::move(commit)); !status.ok()) {
      // The files would go at the next start anyway: the pointer never reached them.
      if (Status removed = files_.remove(model_, manifest.number); !removed.ok()) {
        return status.in("publish, leaving files behind (" + removed.message() + ")");
      }
      return status.in("publish");
    }
    {
      std::lock_guard lock(mutex_);
      pointer_ = next;
      manifests_[manifest.number] = manifest;
      cache_[manifest.number] = weights;
      forget(gone);
      if (serve) {
        current_ = std::move(weights);
        ++epoch_;
      }
    }
    left_behind = remove_files();
  }
  announce(serve ? "published" : "held", manifest.number, from, "");
  for (const int64_t number : gone) {
    std::string reason = "versions.keep is " + std::to_string(keep_);
    if (left_behind.contains(number))
      reason += "; its files are still there: " + left_behind.at(number).message();
    announce("pruned", number, serve ? manifest.number : from, reason);
  }
  return {};
}

std::vector<FateChange> Versions::fates_of_move(int64_t from, int64_t to,
                                                const std::string& reason) const {
  std::map<std::string, int64_t> kept, gained, left;  // item id -> version that learned it
  {
    std::lock_guard lock(mutex_);
    const std::vector<int64_t> before = path(from), after = path(to);
    const auto holds = [](const std::vector<int64_t>& line, int64_t n) {
      return std::ranges::find(line, n) != line.end();
    };
    for (const int64_t n : after) {
      auto& items = holds(before, n) ? kept : gained;
      for (const std::string& id : known(n)->items) items.emplace(id, n);
    }
    for (const int64_t n : before) {
      if (holds(after, n)) continue;
      for (const std::string& id : known(n)->items) left.emplace(id, n);
    }
  }
  std::vector<FateChange> changes;
  const auto change = [&](const std::string& id, int64_t version, const char* state) {
    const auto item = store_.get(id);
    if (!item.ok() || item->fate.empty()) return;  // expired or erased with its source
    const std::string& now = item->fate.back().state;
    if (now == state || now == "erased") return;
    changes.push_back({item->offset, {state, clock_.unix_ms(), version_name(version), 0, reason}});
  };
  for (const auto& [id, version] : left) {
    if (!kept.contains(id) && !gained.contains(id)) change(id, version, "reverted");
  }
  for (const auto& [id, version] : gained) {
    if (!kept.contains(id)) change(id, version, "served");
  }
  return changes;
}

Status Versions::move(int64_t to, bool pin, const std::string& event, const std::string& reason,
                      Commit with) {
  DS_ASSIGN(auto weights, weights_of(to));
  int64_t from = 0;
  {
    std::lock_guard change(change_mutex_);
    Pointer next;
    {
      std::lock_guard lock(mutex_);
      DS_TRY(check_kept(to));  // a publication may have removed it meanwhile
      next = pointer_;
    }
    from = next.current;
    const int64_t pinned = pin ? to : 0;
    if (from == to && next.pinned == pinned) return {};
    next.current = to;
    next.pinned = pinned;
    for (const int64_t n : ancestors(to)) next.held.erase(n);
    std::vector<FateChange> fates = fates_of_move(from, to, reason);
    with.fates.insert(with.fates.begin(), fates.begin(), fates.end());
    DS_TRY(commit_pointer(next, std::move(with)).in(event));
    std::lock_guard lock(mutex_);
    pointer_ = next;
    if (from != to) {
      current_ = std::move(weights);
      ++epoch_;
    }
  }
  announce(event, to, from, reason);
  return {};
}

Status Versions::rollback(int64_t to, const std::string& reason) {
  return move(to, true, "rolled_back", reason);
}

Status Versions::step_back(int64_t to, const std::string& reason, Commit with) {
  return move(to, pinned() != 0, "rolled_back", reason, std::move(with));
}

Status Versions::promote(int64_t to) { return move(to, false, "promoted", "promoted"); }

Status Versions::set_pin(int64_t number, const std::string& event) {
  int64_t current = 0;
  {
    std::lock_guard change(change_mutex_);
    Pointer next;
    {
      std::lock_guard lock(mutex_);
      next = pointer_;
    }
    current = next.current;
    if (number != 0 && number != current) {
      return conflict("pin: " + version_name(number) + " does not serve, " + version_name(current) +
                      " does; roll back or promote first");
    }
    if (next.pinned == number) return {};
    next.pinned = number;
    DS_TRY(commit_pointer(next, {}).in(event));
    std::lock_guard lock(mutex_);
    pointer_ = next;
  }
  announce(event, current, current, "");
  return {};
}

Status Versions::pin(int64_t number) {
  if (Result<VersionManifest> known = manifest(number); !known.ok()) return known.status();
  return set_pin(number, "pinned");
}

Status Versions::unpin() { return set_pin(0, "unpinned"); }

int64_t Versions::current_number() const {
  std::lock_guard lock(mutex_);
  return pointer_.current;
}

int64_t Versions::pinned() const {
  std::lock_guard lock(mutex_);
  return pointer_.pinned;
}

int64_t Versions::next_number() const {
  std::lock_guard lock(mutex_);
  return pointer_.next;
}

uint64_t Versions::lineage_epoch() const {
  std::lock_guard lock(mutex_);
  return epoch_;
}

std::set<std::string> Versions::bases() const {
  std::lock_guard lock(mutex_);
  std::set<std::string> out;
  for (const auto& [number, manifest] : manifests_) out.insert(manifest.base_sha256);
  return out;
}

const VersionManifest* Versions::known(int64_t number) const {
  if (const auto it = manifests_.find(number); it != manifests_.end()) return &it->second;
  const auto it = removed_.find(number);
  return it != removed_.end() ? &it->second : nullptr;
}

std::vector<int64_t> Versions::path(int64_t number) const {
  std::vector<int64_t> out;
  // Parents are older than their children, so a damaged manifest cannot make a cycle.
  for (const VersionManifest* m = known(number); m != nullptr;) {
    out.push_back(m->number);
    m = m->parent < m->number ? known(m->parent) : nullptr;
  }
  return out;
}

std::vector<int64_t> Versions::ancestors(int64_t number) const {
  std::lock_guard lock(mutex_);
  return path(number);
}

std::vector<VersionManifest> Versions::lineage(int64_t number) const {
  std::lock_guard lock(mutex_);
  std::vector<VersionManifest> out;
  for (const int64_t n : path(number)) out.push_back(*known(n));
  return out;
}

Result<VersionManifest> Versions::manifest(int64_t number) const {
  std::lock_guard lock(mutex_);
  DS_TRY(check_kept(number));
  return manifests_.at(number);
}

Json Versions::describe(const VersionManifest& m) const {
  const bool held = pointer_.held.contains(m.number);
  const char* state = m.number == pointer_.current ? "current" : held ? "held" : "retired";
  return {{"version", version_name(m.number)},
          {"number", m.number},
          {"parent", m.parent == 0 ? Json() : Json(version_name(m.parent))},
          {"state", state},
          {"pinned", m.number == pointer_.pinned},
          {"method", m.method},
          {"round", m.round},
          {"items_count", m.items.size()},
          {"created_ms", m.created_ms},
          {"weight_hash", m.weight_hash},
          {"base_sha256", m.base_sha256},
          {"fingerprint", fingerprint_of(m)},
          {"details", m.details}};
}

Json Versions::list() const {
  std::lock_guard lock(mutex_);
  Json items = Json::array();
  for (const auto& [number, manifest] : manifests_) items.push_back(describe(manifest));
  return items;
}

Result<Json> Versions::show(int64_t number) const {
  DS_ASSIGN(const VersionManifest wanted, manifest(number));
  std::lock_guard lock(mutex_);
  Json out = describe(wanted);
  out["items"] = wanted.items;
  return out;
}

void Versions::on_change(std::function<void(const Json&)> listener) {
  std::lock_guard lock(mutex_);
  listeners_.push_back(std::move(listener));
}

void Versions::announce(const std::string& event, int64_t version, int64_t from,
                        const std::string& reason) {
  std::vector<std::function<void(const Json&)>> listeners;
  {
    std::lock_guard lock(mutex_);
    listeners = listeners_;
  }
  const Json body = {{"event", event},
                     {"model", model_},
                     {"version", version_name(version)},
                     {"from", version_name(from)},
                     {"reason", reason}};
  for (const auto& listener : listeners) listener(body);
}

}  // namespace ds
