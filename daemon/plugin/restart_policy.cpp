// SPDX-License-Identifier: Apache-2.0
#include "plugin/restart_policy.h"

#include <algorithm>

namespace ds {

void RestartPolicy::died(int64_t now) {
  ++total_;
  while (!recent_.empty() && recent_.front() <= now - limits_.window_ns) recent_.pop_front();
  recent_.push_back(now);
  const bool half_open = open_until_ != 0;
  if (half_open || recent_.size() >= limits_.deaths) {
    open_until_ = now + limits_.open_ns;
    recent_.clear();
  }
  int64_t wait = recent_.size() < 2 ? 0 : limits_.first_wait_ns;
  for (size_t i = 2; i < recent_.size() && wait < limits_.longest_wait_ns; ++i) wait *= 2;
  next_start_ = now + std::min(wait, limits_.longest_wait_ns);
}

void RestartPolicy::served() {
  if (open_until_ != 0) recent_.clear();
  open_until_ = 0;
}

int64_t RestartPolicy::wait_ns(int64_t now) const {
  return std::max<int64_t>(0, std::max(open_until_, next_start_) - now);
}

const char* RestartPolicy::breaker(int64_t now) const {
  return open_until_ == 0 ? "closed" : open(now) ? "open" : "half-open";
}

}  // namespace ds
