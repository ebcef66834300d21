// SPDX-License-Identifier: Apache-2.0
// The ZeroMQ PUB socket: every event of the bus as [topic, JSON]. Never blocks: a subscriber that
// is behind by the high-water mark misses events (their numbers show it) and can ask GET
// /ds/v1/events.
#pragma once

#include <memory>
#include <string>

#include "events.h"
#include "serve/handoff.h"

namespace ds {

/// The one form of an event in JSON: {"number", "at_ms", "topic", ...body}.
Json event_json(const Event& event);

class EventSocket {
 public:
  static Result<std::unique_ptr<EventSocket>> open(void* zmq_context, const std::string& endpoint,
                                                   EventBus& bus, std::shared_ptr<Mailbox> mailbox);
  ~EventSocket();  ///< IO thread stopped, or on it
  const std::string& endpoint() const { return endpoint_; }

 private:
  EventSocket(void* socket, std::string endpoint, EventBus& bus);
  void send(const Event& event);  // IO thread
  void* socket_;
  std::string endpoint_;
  EventBus& bus_;
  uint64_t subscription_ = 0;
};

/// The ZeroMQ context, so that its header stays in the socket files. Ends when its sockets are
/// closed.
class ZmqContext {
 public:
  ZmqContext();
  ~ZmqContext();
  ZmqContext(const ZmqContext&) = delete;
  void* get() const { return context_; }

 private:
  void* context_;
};

}  // namespace ds
