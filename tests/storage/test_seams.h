// SPDX-License-Identifier: Apache-2.0
// A clock that stands until a test moves it, and a disk that can be full.
#pragma once

#include <atomic>

#include "storage/seams.h"

namespace ds {

class HandClock final : public Clock {
 public:
  int64_t unix_ms() const override { return 1'700'000'000'000 + now_ms; }
  int64_t monotonic_ns() const override { return now_ms * 1'000'000; }
  std::atomic<int64_t> now_ms = 0;
};

/// The machine's disk, which can be full.
class FillingDisk final : public FileSystem {
 public:
  std::atomic<bool> full = false;
  Result<std::unique_ptr<WritableFile>> create(const std::string& path) override {
    if (full) return io_error(path + ": the disk is full");
    return disk_.create(path);
  }
  Result<std::string> read(const std::string& path) override { return disk_.read(path); }
  Result<std::vector<std::string>> list(const std::string& directory) override {
    return disk_.list(directory);
  }
  bool exists(const std::string& path) override { return disk_.exists(path); }
  Status make_directories(const std::string& path) override { return disk_.make_directories(path); }
  Status rename(const std::string& from, const std::string& to) override {
    return disk_.rename(from, to);
  }
  Status remove_all(const std::string& path) override { return disk_.remove_all(path); }
  Status sync_directory(const std::string& path) override { return disk_.sync_directory(path); }

 private:
  FileSystem& disk_ = posix_file_system();
};

}  // namespace ds
