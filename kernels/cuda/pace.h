// SPDX-License-Identifier: Apache-2.0
// How often a stream that gives way is marked with an event: so that two stretches between marks,
// which is what may be enqueued ahead of the GPU, are about 200 us of work.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ds::cuda {

class Pace {
 public:
  static constexpr double kStretchUs = 100;
  /// Ops between marks at most: with a queue that runs dry, as many as a host enqueues in 100 us.
  static constexpr int64_t kMostOps = 32;

  /// One op is about to be enqueued. Whether a mark is due before it.
  bool mark_due() {
    if (since_mark_++ < ops_) return false;
    since_mark_ = 1;
    return true;
  }

  /// The GPU reached the mark before the last one. `waited`: only after the host had waited for it,
  /// so the stretch took the GPU `stretch_us`; else the host is the slower one and the queue short.
  void reached(bool waited, double stretch_us) {
    if (!waited) {
      ops_ = std::min(2 * ops_, kMostOps);
      return;
    }
    const double fitting = static_cast<double>(ops_) * kStretchUs / std::max(stretch_us, 1.0);
    // Ops differ: one long stretch does not make all the others short.
    const double lowest = static_cast<double>(ops_) / 2, highest = static_cast<double>(ops_) * 2;
    ops_ = std::clamp(static_cast<int64_t>(std::clamp(fitting, lowest, highest)), int64_t{1},
                      kMostOps);
  }

  int64_t ops() const { return ops_; }

 private:
  int64_t ops_ = 4;
  int64_t since_mark_ = 0;
};

}  // namespace ds::cuda
