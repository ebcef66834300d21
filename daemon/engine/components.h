// SPDX-License-Identifier: Apache-2.0
// The plugins that a pass through a model computes with besides its weights, and the slot that says
// which generations new work takes.
#pragma once

#include <memory>
#include <mutex>
#include <utility>

#include "engine/attention.h"
#include "engine/text_encoder.h"
#include "storage/seams.h"

namespace ds {

/// One generation of each. A sequence, and a training round, ends with those it began with.
struct Components {
  std::shared_ptr<const TextEncoder> encoder;
  std::shared_ptr<const Attention> attention;

  /// Part of the key of KV pages: equal keys compute equal bits.
  uint64_t key() const { return Rng::mix(encoder->key(), attention->key()); }
};

/// Thread-safe.
class ComponentsSlot {
 public:
  ComponentsSlot() = default;
  explicit ComponentsSlot(Components first)
      : current_(std::make_shared<const Components>(std::move(first))) {}
  std::shared_ptr<const Components> current() const {
    std::lock_guard lock(mutex_);
    return current_;
  }
  void set(std::shared_ptr<const Components> next) {
    std::lock_guard lock(mutex_);
    current_.swap(next);  // the old one may end here, outside the lock
  }
  /// change(Components&) on a copy of the current ones, which then takes their place.
  template <class Change>
  void update(Change&& change) {
    std::lock_guard updating(update_mutex_);
    const std::shared_ptr<const Components> now = current();
    auto next = std::make_shared<Components>(now != nullptr ? *now : Components());
    change(*next);
    set(std::move(next));
  }

 private:
  mutable std::mutex mutex_;
  std::mutex update_mutex_;
  std::shared_ptr<const Components> current_;
};

}  // namespace ds
