// SPDX-License-Identifier: Apache-2.0
// RocksDB 7.8, set up so that an acknowledged write survives (FORMAT.md, "Settings of RocksDB").
#include "storage/column_store.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/listener.h>
#include <rocksdb/table.h>
#include <rocksdb/utilities/checkpoint.h>
#include <rocksdb/write_batch.h>

#include <array>
#include <chrono>
#include <thread>
#include <vector>

namespace ds {
namespace {

constexpr std::array<const char*, kColumns> kNames = {"log",  "offset", "dedup", "id",    "draw",
                                                      "fate", "state",  "ex",    "trace", "round",
                                                      "hold", "drift",  "meta"};

constexpr size_t kBlockCacheBytes = 32u << 20;
constexpr size_t kMemtableBytes = 8u << 20;       // per column
constexpr size_t kAllMemtablesBytes = 24u << 20;  // together
constexpr size_t kProbeBytes = 256u << 10;
constexpr uint64_t kWalBytes = 32u << 20;  // bounds the replay at start

rocksdb::Slice slice(std::string_view text) { return {text.data(), text.size()}; }
std::string_view view(const rocksdb::Slice& text) { return {text.data(), text.size()}; }

Status from_rocksdb(const rocksdb::Status& status, std::string_view action) {
  if (status.ok()) return {};
  const std::string what = std::string(action) + ": " + status.ToString();
  if (status.IsCorruption()) return corrupt(what);
  if (status.IsNotFound()) return not_found(what);
  if (status.IsInvalidArgument()) return invalid(what);
  if (status.IsBusy() || status.IsTimedOut()) return busy(what);
  return io_error(what);
}

/// Going on after a failure is ours (ensure_writable): RocksDB would go on in the same log, behind
/// a torn record, which recovery forgives only at a log's end. It has two ways of resuming by
/// itself; this stops the one that polls for free space.
class NoResumeByItself final : public rocksdb::EventListener {
 public:
  void OnErrorRecoveryBegin(rocksdb::BackgroundErrorReason, rocksdb::Status,
                            bool* auto_recovery) override {
    *auto_recovery = false;
  }
};

/// RocksDB's own diary would stand on the same disk, and RocksDB 7.8 as Debian builds it (with its
/// assertions) aborts at the second line that a full disk refuses. What matters comes as a Status.
class NoDiary final : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
};

rocksdb::DBOptions database_options(rocksdb::Env* env) {
  rocksdb::DBOptions options;
  if (env) options.env = env;
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  options.paranoid_checks = true;
  // The default, kPointInTimeRecovery, opens happily with acknowledged writes missing. This mode
  // forgives only a torn end of the log, which no acknowledgement ever spoke of.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.track_and_verify_wals_in_manifest = true;
  options.max_total_wal_size = kWalBytes;
  options.db_write_buffer_size = kAllMemtablesBytes;
  options.max_background_jobs = 2;
  options.max_open_files = 512;
  options.info_log = std::make_shared<NoDiary>();
  options.max_bgerror_resume_count = 0;  // and this the one that retries
  options.listeners.push_back(std::make_shared<NoResumeByItself>());
  return options;
}

rocksdb::ColumnFamilyOptions column_options() {
  rocksdb::ColumnFamilyOptions options;
  options.write_buffer_size = kMemtableBytes;
  options.force_consistency_checks = true;
  return options;
}

}  // namespace

struct ColumnStore::Database {
  std::unique_ptr<rocksdb::Env> env;  // outlives db
  std::unique_ptr<rocksdb::DB> db;
  std::vector<rocksdb::ColumnFamilyHandle*> columns;  // by Column

  ~Database() {
    for (rocksdb::ColumnFamilyHandle* handle : columns) {
      (void)db->DestroyColumnFamilyHandle(handle);  // fails only for the default family
    }
  }
  rocksdb::ColumnFamilyHandle* column(Column which) const {
    return columns[static_cast<size_t>(which)];
  }
  uint64_t sum(const std::string& property) const {
    uint64_t total = 0, value = 0;
    for (rocksdb::ColumnFamilyHandle* handle : columns) {
      if (db->GetIntProperty(handle, property, &value)) total += value;
    }
    return total;
  }
  /// Whether what opening would write (the memtables, and as much again) fits. Tried, not asked:
  /// quotas and reserved blocks count too.
  bool has_space(const std::string& directory) const {
    const std::string path = directory + "/space.dbtmp";
    rocksdb::Env* disk = db->GetEnv();
    std::unique_ptr<rocksdb::WritableFile> file;
    rocksdb::Status status = disk->NewWritableFile(path, &file, rocksdb::EnvOptions());
    const uint64_t wanted = 2 * sum(rocksdb::DB::Properties::kCurSizeAllMemTables) + kProbeBytes;
    const std::string zeros(kProbeBytes, '\0');
    for (uint64_t put = 0; status.ok() && put < wanted; put += zeros.size()) {
      status = file->Append(zeros);
    }
    if (status.ok()) status = file->Sync();
    if (file) (void)file->Close();  // the file goes either way
    return disk->DeleteFile(path).ok() && status.ok();
  }
};

Result<std::optional<std::string>> Batch::get(Column column, const std::string& key) const {
  const auto it = changes_.find({column, key});
  if (it != changes_.end()) return it->second;
  return store_.get(column, key);
}

void Batch::put(Column column, std::string key, std::string value) {
  changes_[{column, std::move(key)}] = std::move(value);
}

void Batch::erase(Column column, std::string key) {
  changes_[{column, std::move(key)}] = std::nullopt;
}

ColumnStore::ColumnStore(std::string directory, std::shared_ptr<rocksdb::FileSystem> disk)
    : directory_(std::move(directory)), disk_(std::move(disk)) {}
ColumnStore::~ColumnStore() = default;

Result<std::shared_ptr<ColumnStore::Database>> ColumnStore::open_database(
    const std::string& directory, const std::shared_ptr<rocksdb::FileSystem>& disk) {
  auto database = std::make_shared<Database>();
  if (disk) database->env = rocksdb::NewCompositeEnv(disk);
  rocksdb::ColumnFamilyOptions column = column_options();
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(kBlockCacheBytes);
  column.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  std::vector<rocksdb::ColumnFamilyDescriptor> families;
  for (const char* name : kNames) families.emplace_back(name, column);
  families.emplace_back(rocksdb::kDefaultColumnFamilyName, column);  // RocksDB insists on it
  rocksdb::DB* db = nullptr;
  const rocksdb::Status opened = rocksdb::DB::Open(database_options(database->env.get()), directory,
                                                   families, &database->columns, &db);
  if (!opened.ok()) return from_rocksdb(opened, "cannot open the store in " + directory);
  database->db.reset(db);
  return database;
}

Result<std::unique_ptr<ColumnStore>> ColumnStore::open(const std::string& directory,
                                                       std::shared_ptr<rocksdb::FileSystem> disk) {
  std::unique_ptr<ColumnStore> store(new ColumnStore(directory, std::move(disk)));
  DS_ASSIGN(store->database_, open_database(directory, store->disk_));
  return store;
}

std::shared_ptr<ColumnStore::Database> ColumnStore::current() const {
  std::lock_guard lock(mutex_);
  return database_;
}

Result<std::optional<std::string>> ColumnStore::get(Column column, std::string_view key) const {
  const std::shared_ptr<Database> database = current();
  if (!database) return health();
  std::string value;
  const rocksdb::Status status =
      database->db->Get(rocksdb::ReadOptions(), database->column(column), slice(key), &value);
  if (status.IsNotFound()) return std::optional<std::string>();
  if (!status.ok()) {
    return from_rocksdb(status, std::string("reading ") + kNames[static_cast<size_t>(column)]);
  }
  return std::optional<std::string>(std::move(value));
}

Status ColumnStore::scan(Column column, std::string_view from, std::string_view to, Order order,
                         const Visit& visit) const {
  const std::shared_ptr<Database> database = current();
  if (!database) return health();
  const rocksdb::Slice lower = slice(from), upper = slice(to);
  rocksdb::ReadOptions options;
  options.iterate_lower_bound = &lower;
  if (!to.empty()) options.iterate_upper_bound = &upper;
  const std::unique_ptr<rocksdb::Iterator> it(
      database->db->NewIterator(options, database->column(column)));
  const bool ascending = order == Order::kAscending;
  ascending ? it->SeekToFirst() : it->SeekToLast();
  while (it->Valid() && visit(view(it->key()), view(it->value()))) {
    ascending ? it->Next() : it->Prev();
  }
  return from_rocksdb(it->status(), std::string("scanning ") + kNames[static_cast<size_t>(column)]);
}

Status ColumnStore::write(const Batch& batch, Durability durability) {
  DS_TRY(health());
  const std::shared_ptr<Database> database = current();
  rocksdb::WriteBatch changes;
  for (const auto& [where, value] : batch.changes_) {
    rocksdb::ColumnFamilyHandle* column = database->column(where.first);
    const rocksdb::Status added =
        value ? changes.Put(column, where.second, *value) : changes.Delete(column, where.second);
    DS_TRY(from_rocksdb(added, "building a batch"));
  }
  rocksdb::WriteOptions options;
  options.sync = durability == Durability::kSynced;
  const rocksdb::Status written = database->db->Write(options, &changes);
  if (written.ok()) return {};
  std::lock_guard lock(mutex_);
  failure_ = io_error("cannot write to the store in " + directory_ + ": " + written.ToString());
  was_full_ = written.IsNoSpace();
  return failure_;
}

Status ColumnStore::ensure_writable() {
  const Status failure = health();
  if (failure.ok()) return {};
  std::shared_ptr<Database> database;
  {
    std::lock_guard lock(mutex_);
    if (!was_full_) return failure;
    if (database_ && !database_->has_space(directory_)) return failure;
    database = std::move(database_);
  }
  // Readers that came before finish in their own time; those that come now are told the failure.
  while (database.use_count() > 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  database.reset();
  auto opened = open_database(directory_, disk_);
  std::lock_guard lock(mutex_);
  if (!opened.ok()) return failure_.in(opened.status().message());
  database_ = std::move(*opened);
  failure_ = {};
  return {};
}

Status ColumnStore::health() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

Status ColumnStore::verify() const {
  const std::shared_ptr<Database> database = current();
  if (!database) return health();
  return from_rocksdb(database->db->VerifyChecksum(), "verifying block checksums");
}

Status ColumnStore::checkpoint(const std::string& directory) const {
  const std::shared_ptr<Database> database = current();
  if (!database) return health();
  rocksdb::Checkpoint* raw = nullptr;
  DS_TRY(from_rocksdb(rocksdb::Checkpoint::Create(database->db.get(), &raw), "checkpoint"));
  const std::unique_ptr<rocksdb::Checkpoint> checkpoint(raw);
  return from_rocksdb(checkpoint->CreateCheckpoint(directory), "checkpoint in " + directory);
}

uint64_t ColumnStore::bytes() const {
  const std::shared_ptr<Database> database = current();
  if (!database) return 0;
  return database->sum(rocksdb::DB::Properties::kLiveSstFilesSize) +
         database->sum(rocksdb::DB::Properties::kCurSizeAllMemTables);
}

std::string prefix_end(std::string prefix) {
  while (!prefix.empty() && static_cast<unsigned char>(prefix.back()) == 0xff) prefix.pop_back();
  if (!prefix.empty()) prefix.back() = static_cast<char>(prefix.back() + 1);
  return prefix;
}

}  // namespace ds
