// SPDX-License-Identifier: Apache-2.0
// How far long work is, on stderr: a bar on a terminal, a plain line every 5 s elsewhere.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "ds/status.h"
#include "storage/json.h"

namespace ds::ctl {

class Progress {
 public:
  /// `total` 0 = unknown: a count and the time instead of a bar.
  Progress(std::string label, int64_t total);
  ~Progress() { clear(); }
  void update(int64_t done, const std::string& note = "");
  void set_total(int64_t total) { total_ = total; }
  void clear();  ///< takes the bar off the terminal

 private:
  std::string bar(int64_t done, const std::string& note, int columns) const;
  std::string label_;
  int64_t total_, started_ms_, drawn_ms_ = 0;
  bool terminal_, drawn_ = false;
};

/// Runs `work` on a thread of its own and calls `tick` about twice a second until it ends, so that
/// a blocking call can be watched. Ctrl-C reaches both through their waits.
Result<Json> watched(const std::function<Result<Json>()>& work, const std::function<void()>& tick);

}  // namespace ds::ctl
