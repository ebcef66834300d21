// SPDX-License-Identifier: Apache-2.0
// The kit's own malloc: counts what lives, and can refuse one chosen allocation of a plugin's call.
// Linked into ds-plugin-check only, where it comes before the C library's for every loaded file.
#pragma once

#include <cstdint>

namespace ds::check {

/// Whether allocations can be counted and refused here: not under a sanitizer, which has its own.
bool allocations_are_ours();

/// Bytes that the whole process has allocated and not freed.
int64_t live_bytes();

/// While it lives, allocations of this thread are counted, and number `fail_at` (from 1) is
/// refused.
class AllocationWatch {
 public:
  explicit AllocationWatch(uint64_t fail_at);
  ~AllocationWatch();
  AllocationWatch(const AllocationWatch&) = delete;
  static uint64_t counted();  ///< since the outermost watch began
  static bool refused();
};

/// Inside a callback of the kit's: its allocations are not the plugin's.
class AllocationPause {
 public:
  AllocationPause();
  ~AllocationPause();
  AllocationPause(const AllocationPause&) = delete;

 private:
  bool was_;
};

}  // namespace ds::check
