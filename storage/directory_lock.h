// SPDX-License-Identifier: Apache-2.0
// One process per store directory. The lock is flock(2) on <directory>/LOCK and goes with the
// process, however that ends; the pid in the file is only for the message.
#pragma once

#include <memory>
#include <string>

#include "ds/status.h"

namespace ds {

class DirectoryLock {
 public:
  /// kConflict when another process (or another lock of this one) holds it: names the directory and
  /// the holder's pid.
  static Result<std::unique_ptr<DirectoryLock>> take(const std::string& directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;

 private:
  explicit DirectoryLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace ds
