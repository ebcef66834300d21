// SPDX-License-Identifier: Apache-2.0
// The process executes itself anew: the only way to get a GPU back that has failed under it.
// Process id and arguments stay; the failures so far travel in the environment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ds/status.h"

namespace ds {

/// The failures of the last hour that this process was executed anew for.
class Restarts {
 public:
  /// Where the process before this one leaves them. No setting has this name: config.cpp takes
  /// DS_SECTION_NAME of the sections it knows.
  static constexpr const char* kVariable = "DS_GPU_FAILURES";
  /// As they are written there: unix seconds, with commas.
  static Restarts parse(const std::string& text);
  std::string text() const;

  /// Whether this process took the place of one that served: then it serves, too, whatever there
  /// is to compute on.
  bool any() const { return !failed_s_.empty(); }
  /// Whether one more within an hour of `now_s` keeps to `most`: a GPU that fails again and again
  /// must not keep the daemon restarting.
  bool allowed(int64_t now_s, int64_t most) const;
  int64_t within_hour(int64_t now_s) const;
  void add(int64_t now_s);

  /// Returns only if it fails. Whatever the process has open but its standard streams is closed.
  Status execute(const std::string& program, char** arguments) const;

 private:
  std::vector<int64_t> failed_s_;  ///< unix, oldest first
};

}  // namespace ds
