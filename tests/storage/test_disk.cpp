// SPDX-License-Identifier: Apache-2.0
#include "tests/storage/test_disk.h"

#include <fcntl.h>
#include <rocksdb/file_system.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <vector>

namespace ds {
namespace {

using rocksdb::FileOptions;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;

std::string folder_of(const std::string& path) {
  return std::filesystem::path(path).parent_path().lexically_normal().string();
}

/// One line per change of a name, written with write(2): it outlives a kill.
class NameJournal {
 public:
  explicit NameJournal(std::string folder) : folder_(std::move(folder)) {
    if (folder_.empty()) return;
    std::filesystem::create_directories(folder_);
    fd_ = ::open((folder_ + "/names").c_str(), O_CREAT | O_APPEND | O_WRONLY | O_CLOEXEC, 0644);
  }
  ~NameJournal() {
    if (fd_ >= 0) ::close(fd_);
  }
  void created(const std::string& path) { note("C " + path); }
  /// A new file of an old name: notes on the old one's bytes do not concern it.
  void begun(const std::string& path) { note("N " + path); }
  /// The file has bytes behind `synced_bytes` that no sync will ever reach.
  void abandoned(const std::string& path, uint64_t synced_bytes) {
    note("U " + std::to_string(synced_bytes) + " " + path);
  }
  void synced(const std::string& folder) {
    note("S " + std::filesystem::path(folder).lexically_normal().string());
  }
  /// Before the rename: keeps what `to` was.
  void renaming(const std::string& to) {
    if (fd_ < 0) return;
    if (!std::filesystem::exists(to)) return created(to);
    const std::string kept =
        folder_ + "/kept" + std::to_string(kept_++) + "-" + std::to_string(::getpid());
    std::filesystem::create_hard_link(to, kept);
    note("R " + kept + " " + to);
  }

 private:
  void note(const std::string& line) {
    if (fd_ < 0) return;
    const std::string text = line + "\n";
    if (::write(fd_, text.data(), text.size()) < 0) std::abort();
  }
  std::string folder_;
  int fd_ = -1;
  std::atomic<int> kept_{0};
};

class TestFile final : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  TestFile(std::unique_ptr<rocksdb::FSWritableFile> file, std::string path,
           std::shared_ptr<DiskFaults> faults, std::shared_ptr<NameJournal> journal)
      : FSWritableFileOwnerWrapper(std::move(file)),
        path_(std::move(path)),
        faults_(std::move(faults)),
        journal_(std::move(journal)) {}
  ~TestFile() override { abandon({}, nullptr); }

  IOStatus Close(const IOOptions& options, IODebugContext* context) override {
    abandon(options, context);
    return target()->Close(options, context);
  }

  IOStatus Append(const rocksdb::Slice& data, const IOOptions& options,
                  IODebugContext* context) override {
    const auto wanted = static_cast<int64_t>(data.size());
    const int64_t free = faults_->free_bytes.load();
    if (wanted > free) {
      faults_->free_bytes = 0;
      if (free > 0) {
        (void)put({data.data(), static_cast<size_t>(free)}, options, context);
      }
      IOStatus full = IOStatus::NoSpace("no space left on the test disk");
      full.SetRetryable(true);  // as RocksDB's own file system marks ENOSPC
      return full;
    }
    if (free != INT64_MAX) faults_->free_bytes -= wanted;
    return put(data, options, context);
  }
  IOStatus Append(const rocksdb::Slice& data, const IOOptions& options,
                  const rocksdb::DataVerificationInfo&, IODebugContext* context) override {
    return Append(data, options, context);
  }
  IOStatus Sync(const IOOptions& options, IODebugContext* context) override {
    return settle(options, context, [&] { return target()->Sync(options, context); });
  }
  IOStatus Fsync(const IOOptions& options, IODebugContext* context) override {
    return settle(options, context, [&] { return target()->Fsync(options, context); });
  }
  IOStatus RangeSync(uint64_t, uint64_t, const IOOptions&, IODebugContext*) override {
    return IOStatus::OK();  // a hint, no promise
  }
  uint64_t GetFileSize(const IOOptions& options, IODebugContext* context) override {
    return target()->GetFileSize(options, context) + unsynced_.size();
  }
  IOStatus Truncate(uint64_t size, const IOOptions& options, IODebugContext* context) override {
    const uint64_t settled = target()->GetFileSize(options, context);
    if (size >= settled) {
      unsynced_.resize(size - settled);
      return IOStatus::OK();
    }
    unsynced_.clear();
    return target()->Truncate(size, options, context);
  }

 private:
  IOStatus put(const rocksdb::Slice& data, const IOOptions& options, IODebugContext* context) {
    if (!faults_->lose_unsynced) return target()->Append(data, options, context);
    unsynced_.append(data.data(), data.size());
    return IOStatus::OK();
  }
  template <typename TargetSync>
  IOStatus settle(const IOOptions& options, IODebugContext* context, TargetSync&& sync) {
    if (faults_->syncs_fail) return IOStatus::IOError("the test disk failed to sync");
    if (!unsynced_.empty()) {
      const IOStatus written = target()->Append(unsynced_, options, context);
      if (!written.ok()) return written;
      unsynced_.clear();
    }
    // With a kill for a power cut, what reached the kernel is safe: the real sync costs only time.
    return faults_->lose_unsynced ? target()->Flush(options, context) : sync();
  }
  /// Closed files keep their unsynced bytes as long as the power is on.
  void abandon(const IOOptions& options, IODebugContext* context) {
    if (unsynced_.empty()) return;
    journal_->abandoned(path_, target()->GetFileSize(options, context));
    (void)target()->Append(unsynced_, options, context);
    (void)target()->Flush(options, context);
    unsynced_.clear();
  }
  std::string path_;
  std::shared_ptr<DiskFaults> faults_;
  std::shared_ptr<NameJournal> journal_;
  std::string unsynced_;
};

class TestFolder final : public rocksdb::FSDirectoryWrapper {
 public:
  TestFolder(std::unique_ptr<rocksdb::FSDirectory> folder, std::string path,
             std::shared_ptr<NameJournal> journal)
      : FSDirectoryWrapper(std::move(folder)),
        path_(std::move(path)),
        journal_(std::move(journal)) {}
  IOStatus Fsync(const IOOptions&, IODebugContext*) override {
    journal_->synced(path_);
    return IOStatus::OK();
  }
  IOStatus FsyncWithDirOptions(const IOOptions&, IODebugContext*,
                               const rocksdb::DirFsyncOptions&) override {
    journal_->synced(path_);
    return IOStatus::OK();
  }

 private:
  std::string path_;
  std::shared_ptr<NameJournal> journal_;
};

class TestDisk final : public rocksdb::FileSystemWrapper {
 public:
  explicit TestDisk(std::shared_ptr<DiskFaults> faults)
      : FileSystemWrapper(rocksdb::FileSystem::Default()),
        faults_(std::move(faults)),
        journal_(std::make_shared<NameJournal>(faults_->journal_folder)) {}
  const char* Name() const override { return "TestDisk"; }

  IOStatus NewWritableFile(const std::string& path, const FileOptions& options,
                           std::unique_ptr<rocksdb::FSWritableFile>* result,
                           IODebugContext* context) override {
    if (!std::filesystem::exists(path)) journal_->created(path);
    journal_->begun(path);
    std::unique_ptr<rocksdb::FSWritableFile> file;
    const IOStatus opened = target()->NewWritableFile(path, options, &file, context);
    if (opened.ok()) {
      *result = std::make_unique<TestFile>(std::move(file), path, faults_, journal_);
    }
    return opened;
  }
  IOStatus NewDirectory(const std::string& path, const IOOptions& options,
                        std::unique_ptr<rocksdb::FSDirectory>* result,
                        IODebugContext* context) override {
    std::unique_ptr<rocksdb::FSDirectory> folder;
    const IOStatus opened = target()->NewDirectory(path, options, &folder, context);
    if (opened.ok() && faults_->lose_unsynced) {
      *result = std::make_unique<TestFolder>(std::move(folder), path, journal_);
    } else {
      *result = std::move(folder);
    }
    return opened;
  }
  IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions& options,
                      IODebugContext* context) override {
    journal_->renaming(to);
    return target()->RenameFile(from, to, options, context);
  }

 private:
  std::shared_ptr<DiskFaults> faults_;
  std::shared_ptr<NameJournal> journal_;
};

}  // namespace

std::shared_ptr<rocksdb::FileSystem> make_test_disk(std::shared_ptr<DiskFaults> faults) {
  return std::make_shared<TestDisk>(std::move(faults));
}

void lose_unsynced_names(const std::string& journal_folder) {
  struct Change {
    char kind;
    std::string kept, path;
  };
  std::vector<Change> unsynced;  // oldest first
  std::ifstream names(journal_folder + "/names");
  std::string kind, path, kept;
  while (names >> kind) {
    if (kind == "R" || kind == "U") names >> kept;
    names >> path;
    if (kind == "S") {
      std::erase_if(unsynced, [&](const Change& change) {
        return change.kind != 'U' && folder_of(change.path) == path;
      });
    } else if (kind == "N") {
      std::erase_if(unsynced, [&](const Change& change) {
        return change.kind == 'U' && change.path == path;
      });
    } else {
      unsynced.push_back({kind[0], kept, path});
    }
  }
  std::reverse(unsynced.begin(), unsynced.end());
  for (const Change& change : unsynced) {
    std::error_code ignored;
    if (change.kind == 'U') {
      if (std::filesystem::exists(change.path)) {
        std::filesystem::resize_file(change.path, std::stoull(change.kept), ignored);
      }
      continue;
    }
    std::filesystem::remove(change.path, ignored);
    if (change.kind == 'R') std::filesystem::rename(change.kept, change.path, ignored);
  }
  std::filesystem::remove_all(journal_folder);
}

}  // namespace ds
