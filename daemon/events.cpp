// SPDX-License-Identifier: Apache-2.0
// Two locks: one over ring and subscribers, one that a publisher holds while it calls them. The
// second gives events to subscribers in order and lets unsubscribe() wait for a call under way.
#include "events.h"

#include <deque>
#include <map>
#include <mutex>
#include <utility>

namespace ds {

struct EventBus::State {
  State(Clock& clock, size_t keep) : clock(clock), keep(keep) {}
  Clock& clock;
  const size_t keep;
  // Recursive: a subscriber may log, and the log publishes.
  std::recursive_mutex calling;
  mutable std::mutex mutex;
  std::deque<Event> ring;
  uint64_t last_number = 0, last_token = 0;
  std::map<uint64_t, std::function<void(const Event&)>> subscribers;
};

EventBus::EventBus(Clock& clock, size_t keep) : state_(std::make_unique<State>(clock, keep)) {}
EventBus::~EventBus() = default;

void EventBus::publish(const std::string& topic, Json body) {
  const std::lock_guard calling(state_->calling);
  Event event;
  std::map<uint64_t, std::function<void(const Event&)>> subscribers;
  {
    const std::lock_guard lock(state_->mutex);
    event = {++state_->last_number, state_->clock.unix_ms(), topic, std::move(body)};
    state_->ring.push_back(event);
    if (state_->ring.size() > state_->keep) state_->ring.pop_front();
    subscribers = state_->subscribers;
  }
  for (const auto& [token, subscriber] : subscribers) subscriber(event);
}

uint64_t EventBus::subscribe(std::function<void(const Event&)> subscriber) {
  const std::lock_guard lock(state_->mutex);
  state_->subscribers.emplace(++state_->last_token, std::move(subscriber));
  return state_->last_token;
}

void EventBus::unsubscribe(uint64_t token) {
  const std::lock_guard calling(state_->calling);
  const std::lock_guard lock(state_->mutex);
  state_->subscribers.erase(token);
}

std::vector<Event> EventBus::since(uint64_t number) const {
  const std::lock_guard lock(state_->mutex);
  std::vector<Event> events;
  for (const Event& event : state_->ring) {
    if (event.number > number) events.push_back(event);
  }
  return events;
}

}  // namespace ds
