// SPDX-License-Identifier: Apache-2.0
// Whether the GPU that the model computes on still does. Whoever sees a call on it fail says so;
// the engine then goes on on the CPU; health, learner and main ask.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "storage/seams.h"

namespace ds {

/// Thread-safe.
class DeviceState {
 public:
  enum class Phase {
    kComputes,
    kLost,    ///< nothing is served until the engine has moved
    kOnHost,  ///< the CPU serves in its place
  };
  struct View {
    Phase phase = Phase::kComputes;
    std::string reason;    ///< why it was lost
    int64_t since_ms = 0;  ///< when; unix
    int64_t since_ns = 0;  ///< the same, monotonic
  };

  /// `listener` hears of every change, on the thread that made it: it must not block.
  explicit DeviceState(Clock& clock, std::function<void(const View&)> listener = nullptr)
      : clock_(clock), listener_(std::move(listener)) {}
  /// Nothing is computed there any more. Only the first call counts.
  void lose(const std::string& reason);
  /// The CPU serves, if the device is lost.
  void serve_on_host();

  bool lost() const { return phase_.load(std::memory_order_acquire) != Phase::kComputes; }
  View view() const;

 private:
  Clock& clock_;
  const std::function<void(const View&)> listener_;
  std::atomic<Phase> phase_{Phase::kComputes};  ///< that of view_, to be asked often
  mutable std::mutex mutex_;
  View view_;
};

}  // namespace ds
