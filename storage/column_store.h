// SPDX-License-Identifier: Apache-2.0
// Ordered keys and values in named columns, on RocksDB: the only header that column_store.cpp, the
// one file that includes RocksDB, shows to the rest. Knows bytes and durability, nothing of
// feedback. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "ds/status.h"

namespace rocksdb {
class FileSystem;
}

namespace ds {

/// Keys and values of each: FORMAT.md.
enum class Column {
  kLog,
  kOffset,
  kDedup,
  kId,
  kDraw,
  kFate,
  kState,
  kExample,
  kTrace,
  kRound,
  kHold,
  kDrift,
  kMeta,
};
inline constexpr int kColumns = 13;

class ColumnStore;

/// Writes that become durable together, and are visible to the batch's own reads before that.
class Batch {
 public:
  explicit Batch(const ColumnStore& store) : store_(store) {}
  /// What a read would give once this batch is written.
  Result<std::optional<std::string>> get(Column column, const std::string& key) const;
  void put(Column column, std::string key, std::string value);
  void erase(Column column, std::string key);
  bool empty() const { return changes_.empty(); }

 private:
  friend class ColumnStore;
  const ColumnStore& store_;
  std::map<std::pair<Column, std::string>, std::optional<std::string>> changes_;  ///< null: erase
};

class ColumnStore {
 public:
  enum class Order { kAscending, kDescending };
  enum class Durability { kSynced, kUnsynced };
  /// Called per entry; false ends the scan. The views live for the call.
  using Visit = std::function<bool(std::string_view key, std::string_view value)>;

  /// `disk`: what RocksDB reads and writes through; null = the machine's own files.
  static Result<std::unique_ptr<ColumnStore>> open(const std::string& directory,
                                                   std::shared_ptr<rocksdb::FileSystem> disk);
  ~ColumnStore();

  Result<std::optional<std::string>> get(Column column, std::string_view key) const;
  /// Keys in [from, to); an empty `to` has no upper end. Sees one consistent moment.
  Status scan(Column column, std::string_view from, std::string_view to, Order order,
              const Visit& visit) const;

  /// All of the batch or nothing. kSynced returns after the bytes are on the device. A failed write
  /// stops all writes (kIo) until ensure_writable() succeeds.
  Status write(const Batch& batch, Durability durability);

  /// Before reading what the next batch depends on. After a full disk: when there is space again,
  /// opens the database anew, which cuts a torn record off the log (what then proves to be stored,
  /// although its write was reported failed, is whole). After any other failure only a new process
  /// may do that: the kernel forgets failed writes, so reading the log back here would prove
  /// nothing.
  Status ensure_writable();

  Status verify() const;  ///< every block's checksum
  Status checkpoint(
      const std::string& directory) const;  ///< hard links; `directory` must not exist
  uint64_t bytes() const;                   ///< of live data and write-ahead log
  Status health() const;                    ///< ok, or the failure writes stopped at

 private:
  struct Database;
  ColumnStore(std::string directory, std::shared_ptr<rocksdb::FileSystem> disk);
  static Result<std::shared_ptr<Database>> open_database(
      const std::string& directory, const std::shared_ptr<rocksdb::FileSystem>& disk);
  /// Kept by the caller for the length of its work; null while the database cannot be opened.
  std::shared_ptr<Database> current() const;

  const std::string directory_;
  const std::shared_ptr<rocksdb::FileSystem> disk_;
  mutable std::mutex mutex_;  ///< of the members below
  std::shared_ptr<Database> database_;
  Status failure_;         ///< ok, or why writes stopped
  bool was_full_ = false;  ///< the failure is that the disk was full
};

/// The smallest key above every key that starts with `prefix` (which does not end in 0xff bytes
/// only).
std::string prefix_end(std::string prefix);

}  // namespace ds
