// SPDX-License-Identifier: Apache-2.0
// A piece of work in a process of its own: whatever a plugin does there ends there.
#pragma once

#include <functional>
#include <string>

namespace ds::check {

struct ChildResult {
  enum class End { kDone, kSignal, kTimeout, kException, kExit };
  End end = End::kDone;
  int detail = 0;      ///< signal number or exit status
  std::string answer;  ///< what the work returned; when it did not end well, what it said before

  bool done() const { return end == End::kDone; }
  /// "ended by signal 11 (Segmentation fault)", "gave no answer within 20 s" ...
  std::string how_it_ended() const;
};

/// Forks, runs `work` there and hands back what it returns. The child is killed after `timeout_ms`.
ChildResult run_in_child(const std::function<std::string()>& work, int timeout_ms);

/// Inside a child: what is being done, for the message if it dies now. Kept in shared memory.
void now_doing(const std::string& what);
/// Comes before it until it is set anew.
void now_within(const std::string& context);

}  // namespace ds::check
