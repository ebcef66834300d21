// SPDX-License-Identifier: Apache-2.0
// When a helper process that died may start again: at once after the first death, then after waits
// that double; after too many deaths in a while not at all for some time, then one try.
#pragma once

#include <cstdint>
#include <deque>

namespace ds {

struct RestartLimits {
  uint64_t deaths = 3;  ///< this many within the window open the breaker
  int64_t window_ns = 60'000'000'000;
  int64_t open_ns = 30'000'000'000;
  int64_t first_wait_ns = 100'000'000;  ///< after the second death in the window
  int64_t longest_wait_ns = 5'000'000'000;
};

/// Times are of one monotonic clock, in nanoseconds. Not thread-safe.
class RestartPolicy {
 public:
  explicit RestartPolicy(const RestartLimits& limits) : limits_(limits) {}

  void died(int64_t now);
  /// A call was answered: closes the breaker.
  void served();
  /// Until a start is allowed; 0 = now.
  int64_t wait_ns(int64_t now) const;
  /// "closed", "open", "half-open"
  const char* breaker(int64_t now) const;
  bool open(int64_t now) const { return open_until_ > now; }
  uint64_t deaths() const { return total_; }

 private:
  const RestartLimits limits_;
  std::deque<int64_t> recent_;
  int64_t next_start_ = 0;
  int64_t open_until_ = 0;  ///< 0 = closed; in the past = half-open
  uint64_t total_ = 0;
};

}  // namespace ds
