// SPDX-License-Identifier: Apache-2.0
// PUB side of ZeroMQ, and its context.
#include "serve/event_socket.h"

#include <sys/stat.h>
#include <zmq.h>

#include <utility>

namespace ds {

Json event_json(const Event& event) {
  Json json = event.body.is_object() ? event.body : Json{{"value", event.body}};
  json["number"] = event.number;
  json["at_ms"] = event.at_ms;
  json["topic"] = event.topic;
  return json;
}

ZmqContext::ZmqContext() : context_(zmq_ctx_new()) { DS_CHECK(context_); }
ZmqContext::~ZmqContext() { zmq_ctx_term(context_); }

Result<std::unique_ptr<EventSocket>> EventSocket::open(void* zmq_context,
                                                       const std::string& endpoint, EventBus& bus,
                                                       std::shared_ptr<Mailbox> mailbox) {
  void* socket = zmq_socket(zmq_context, ZMQ_PUB);
  if (!socket) return io_error(std::string("event socket: ") + zmq_strerror(zmq_errno()));
  const int linger_ms = 0, high_water = 1000;
  zmq_setsockopt(socket, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
  zmq_setsockopt(socket, ZMQ_SNDHWM, &high_water, sizeof high_water);
  const int64_t largest_bytes = 1024;  // subscribers send nothing but topics
  zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest_bytes, sizeof largest_bytes);
  // The socket file is born without access for others; afterwards is too late.
  const mode_t before = umask(0177);
  const int bound = zmq_bind(socket, endpoint.c_str());
  const int why = zmq_errno();
  umask(before);
  std::unique_ptr<EventSocket> events(new EventSocket(socket, endpoint, bus));
  if (bound != 0) return io_error("event socket " + endpoint + ": " + zmq_strerror(why));
  EventSocket* raw = events.get();  // the mailbox is closed before the socket goes
  events->subscription_ = bus.subscribe([raw, mailbox = std::move(mailbox)](const Event& event) {
    mailbox->post([raw, event] { raw->send(event); });
  });
  return events;
}

EventSocket::EventSocket(void* socket, std::string endpoint, EventBus& bus)
    : socket_(socket), endpoint_(std::move(endpoint)), bus_(bus) {}

EventSocket::~EventSocket() {
  if (subscription_) bus_.unsubscribe(subscription_);
  zmq_close(socket_);
}

void EventSocket::send(const Event& event) {
  const std::string body = dump_json(event_json(event));
  if (zmq_send(socket_, event.topic.data(), event.topic.size(), ZMQ_SNDMORE | ZMQ_DONTWAIT) < 0)
    return;
  zmq_send(socket_, body.data(), body.size(), ZMQ_DONTWAIT);
}

}  // namespace ds
