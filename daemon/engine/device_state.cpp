// SPDX-License-Identifier: Apache-2.0
#include "engine/device_state.h"

namespace ds {

void DeviceState::lose(const std::string& reason) {
  View now;
  {
    std::lock_guard lock(mutex_);
    if (view_.phase != Phase::kComputes) return;
    view_ = {Phase::kLost, reason, clock_.unix_ms(), clock_.monotonic_ns()};
    phase_.store(view_.phase, std::memory_order_release);
    now = view_;
  }
  if (listener_) listener_(now);
}

void DeviceState::serve_on_host() {
  View now;
  {
    std::lock_guard lock(mutex_);
    if (view_.phase != Phase::kLost) return;
    view_.phase = Phase::kOnHost;
    phase_.store(view_.phase, std::memory_order_release);
    now = view_;
  }
  if (listener_) listener_(now);
}

DeviceState::View DeviceState::view() const {
  std::lock_guard lock(mutex_);
  return view_;
}

}  // namespace ds
