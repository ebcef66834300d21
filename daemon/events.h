// SPDX-License-Identifier: Apache-2.0
// What happens in the daemon, as JSON by topic (version, gate, step, drift, plugin, store, device,
// log): kept in a ring, handed to subscribers (PUB socket, SSE). Thread-safe; subscribers run on
// the publishing thread and must only hand over.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "storage/json.h"
#include "storage/seams.h"

namespace ds {

struct Event {
  uint64_t number = 0;  ///< from 1, without gaps
  int64_t at_ms = 0;
  std::string topic;
  Json body;
};

class EventBus {
 public:
  explicit EventBus(Clock& clock, size_t keep = 2000);
  ~EventBus();
  void publish(const std::string& topic, Json body);
  /// Returns a token for unsubscribe(). After unsubscribe() returns, the function is not running.
  uint64_t subscribe(std::function<void(const Event&)> subscriber);
  void unsubscribe(uint64_t token);
  std::vector<Event> since(uint64_t number) const;  ///< kept events with a larger number

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ds
