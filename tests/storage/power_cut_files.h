// SPDX-License-Identifier: Apache-2.0
// A file system in memory that loses what was not synced: bytes without sync(), names without
// sync_directory(). It can stop before its k-th change, as a crash there would.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "storage/seams.h"

namespace ds {

class PowerCutFiles final : public FileSystem {
 public:
  enum class Loss {
    kAllUnsynced,    ///< the disk holds exactly what was synced
    kUnsyncedBytes,  ///< names went out early, their bytes did not
    kAtRandom,       ///< any part of any unsynced change
  };

  /// Before its change number `k` (from 0) everything stops and fails until cut_power().
  void stop_before(int k) { stop_before_ = changes_ + k; }
  int changes() const { return changes_; }

  /// The power goes and comes back.
  void cut_power(Loss loss, uint64_t seed) {
    std::mt19937_64 random(seed);
    settle(*root_, loss, random);
    stop_before_ = -1;
  }

  Result<std::unique_ptr<WritableFile>> create(const std::string& path) override {
    if (!may_change()) return off();
    const auto folder = find(parent(path));
    if (!folder) return not_found("no folder of " + path);
    auto node = std::make_shared<Node>();
    folder->entries[name(path)] = node;
    return std::unique_ptr<WritableFile>(std::make_unique<File>(*this, node));
  }
  Result<std::string> read(const std::string& path) override {
    const auto node = find(path);
    if (!node || node->folder) return not_found("no file " + path);
    return node->bytes;
  }
  Result<std::vector<std::string>> list(const std::string& directory) override {
    const auto node = find(directory);
    if (!node || !node->folder) return not_found("no folder " + directory);
    std::vector<std::string> names;
    for (const auto& [entry, child] : node->entries) names.push_back(entry);
    return names;
  }
  bool exists(const std::string& path) override { return find(path) != nullptr; }
  Status make_directories(const std::string& path) override {
    if (!may_change()) return off();
    std::shared_ptr<Node> at = root_;
    for (const std::string& part : parts(path)) {
      auto& child = at->entries[part];
      if (!child) child = std::make_shared<Node>(Node{true, {}, {}, {}, {}});
      at = child;
    }
    return {};
  }
  Status rename(const std::string& from, const std::string& to) override {
    if (!may_change()) return off();
    const auto source = find(parent(from)), target = find(parent(to));
    if (!source || !target || !source->entries.contains(name(from))) {
      return not_found("no " + from);
    }
    target->entries[name(to)] = source->entries[name(from)];
    source->entries.erase(name(from));
    return {};
  }
  Status remove_all(const std::string& path) override {
    if (!may_change()) return off();
    if (const auto folder = find(parent(path))) folder->entries.erase(name(path));
    return {};
  }
  Status sync_directory(const std::string& path) override {
    if (!may_change()) return off();
    const auto node = find(path);
    if (!node || !node->folder) return not_found("no folder " + path);
    node->synced_entries = node->entries;
    return {};
  }

 private:
  struct Node {
    bool folder = false;
    std::string bytes, synced_bytes;
    std::map<std::string, std::shared_ptr<Node>> entries, synced_entries;
  };

  class File final : public WritableFile {
   public:
    File(PowerCutFiles& disk, std::shared_ptr<Node> node) : disk_(disk), node_(std::move(node)) {}
    Status append(std::span<const std::byte> bytes) override {
      if (!disk_.may_change()) return off();
      node_->bytes.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      return {};
    }
    Status sync() override {
      if (!disk_.may_change()) return off();
      node_->synced_bytes = node_->bytes;
      return {};
    }
    Status close() override { return disk_.may_change() ? Status() : off(); }

   private:
    PowerCutFiles& disk_;
    std::shared_ptr<Node> node_;
  };

  static Status off() { return io_error("the power is off"); }
  bool may_change() {
    if (stop_before_ >= 0 && changes_ >= stop_before_) return false;
    changes_ += 1;
    return true;
  }
  static std::vector<std::string> parts(const std::string& path) {
    std::vector<std::string> found;
    for (size_t begin = 0; begin < path.size();) {
      const size_t end = std::min(path.find('/', begin), path.size());
      if (end > begin) found.push_back(path.substr(begin, end - begin));
      begin = end + 1;
    }
    return found;
  }
  static std::string parent(const std::string& path) { return path.substr(0, path.rfind('/')); }
  static std::string name(const std::string& path) { return path.substr(path.rfind('/') + 1); }
  std::shared_ptr<Node> find(const std::string& path) const {
    std::shared_ptr<Node> at = root_;
    for (const std::string& part : parts(path)) {
      const auto it = at->entries.find(part);
      if (it == at->entries.end()) return nullptr;
      at = it->second;
    }
    return at;
  }
  static void settle(Node& node, Loss loss, std::mt19937_64& random) {
    if (!node.folder) {
      const size_t unsynced =
          node.bytes.size() - std::min(node.bytes.size(), node.synced_bytes.size());
      const size_t kept = loss == Loss::kAtRandom ? random() % (unsynced + 1) : 0;
      node.bytes.resize(node.bytes.size() - unsynced + kept);
      node.synced_bytes = node.bytes;
      return;
    }
    if (loss == Loss::kAllUnsynced) node.entries = node.synced_entries;
    if (loss == Loss::kAtRandom) {  // each changed name keeps its old or its new meaning
      auto both = node.entries;
      both.insert(node.synced_entries.begin(), node.synced_entries.end());
      for (const auto& [name, child] : both) {
        if (random() % 2) continue;
        node.entries.erase(name);
        const auto old = node.synced_entries.find(name);
        if (old != node.synced_entries.end()) node.entries[name] = old->second;
      }
    }
    node.synced_entries = node.entries;
    for (const auto& [name, child] : node.entries) settle(*child, loss, random);
  }

  std::shared_ptr<Node> root_ = std::make_shared<Node>(Node{true, {}, {}, {}, {}});
  int changes_ = 0, stop_before_ = -1;
};

}  // namespace ds
