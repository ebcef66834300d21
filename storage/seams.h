// SPDX-License-Identifier: Apache-2.0
// The seams for time, chance and disk. Production binds system_clock_seam() and
// posix_file_system(); tests pass virtual time, seeded chance, and file systems that lose unsynced
// bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ds/rng.h"
#include "ds/status.h"

namespace ds {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t unix_ms() const = 0;       ///< wall time; stamps only, never used for deadlines
  virtual int64_t monotonic_ns() const = 0;  ///< for durations, deadlines and schedules
};
Clock& system_clock_seam();

/// A file opened for appending. Bytes are durable only after sync().
class WritableFile {
 public:
  virtual ~WritableFile() = default;
  virtual Status append(std::span<const std::byte> bytes) = 0;
  virtual Status sync() = 0;
  virtual Status close() = 0;
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual Result<std::unique_ptr<WritableFile>> create(const std::string& path) = 0;  ///< truncates
  virtual Result<std::string> read(const std::string& path) = 0;
  virtual Result<std::vector<std::string>> list(
      const std::string& directory) = 0;  ///< names, sorted
  virtual bool exists(const std::string& path) = 0;
  virtual Status make_directories(const std::string& path) = 0;
  virtual Status rename(const std::string& from, const std::string& to) = 0;
  virtual Status remove_all(const std::string& path) = 0;
  virtual Status sync_directory(
      const std::string& path) = 0;  ///< makes creates and renames durable
};
FileSystem& posix_file_system();

/// Ends the name of what is not complete yet; what a crash left under such a name is removed.
constexpr const char* kTemporarySuffix = ".tmp";

/// Creates the file with `bytes` and syncs it. Its name is durable after sync_directory().
Status write_file_synced(FileSystem& fs, const std::string& path, std::string_view bytes);

/// Writes `bytes` so that after a crash the path holds either the old or the new content:
/// temporary file, sync, rename, directory sync.
Status write_file_atomically(FileSystem& fs, const std::string& path, std::string_view bytes);

}  // namespace ds
