// SPDX-License-Identifier: Apache-2.0
// Insides of the data socket: what is known of each peer, and the steps from a message to its
// answers. Transport is in data_socket.cpp, the operations are in data_operations.cpp. IO thread
// only.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "serve/data_socket.h"
#include "serve/wire.h"

namespace ds {

class Frame;  // a received zmq message part

struct Outgoing {
  bool envelope = false;  // a leading empty frame goes back
  std::string body;
};

// A live `infer`.
struct Request {
  std::string engine_id;  // also the response id
  bool cancelled = false;
};

struct Peer {
  uint64_t generation = 0;  // callbacks of a dropped peer must not reach its successor
  bool greeted = false;
  std::string client;
  // Answers of hello, feedback and cancel in the order of the questions; empty = not yet known.
  std::deque<std::optional<Outgoing>> ordered;
  uint64_t first_ordered = 0;  // number of ordered.front()
  std::deque<Outgoing> out;
  size_t out_bytes = 0, inflight_items = 0, inflight_bytes = 0;
  int64_t blocked_since_ns = 0;  // 0 = sending works
  int64_t last_heard_ns = 0;
  std::map<std::string, Request> requests;
};

// Where an answer goes: a peer in one of its lives.
struct Address {
  std::string routing_id;
  uint64_t generation = 0;
  bool envelope = false;
};

struct DataSocket::State : std::enable_shared_from_this<DataSocket::State> {
  State(boost::asio::io_context& io, Service& service, void* socket)
      : io(io), service(service), socket(socket), readable(io), retry(io) {}
  ~State() { close(); }

  Status bind(const std::string& endpoint);
  void wait();
  void drain();
  void schedule_drain();
  void after_send();
  bool receive(std::vector<Frame>& frames);
  void handle(std::vector<Frame>& frames);
  Peer* peer_for(const std::string& routing_id);
  Peer* find_peer(const Address& to);

  void on(const Address& from, Peer& peer, size_t cost, wire::Hello& hello);
  void on(const Address& from, Peer& peer, size_t cost, wire::Feedback& feedback);
  void on(const Address& from, Peer& peer, size_t cost, wire::Infer& infer);
  void on(const Address& from, Peer& peer, size_t cost, wire::Cancel& cancel);
  void on(const Address& from, Peer& peer, size_t cost, wire::Error& error);
  bool admit(Peer& peer, size_t cost);
  void release(Peer& peer, size_t cost);
  void infer_language(const Address& from, size_t cost, wire::Infer infer,
                      const std::string& engine_id);
  void submit_language(const Address& from, size_t cost, const std::string& id,
                       GenerateRequest request, TraceSeed trace, bool stream);
  void infer_task(const Address& from, size_t cost, wire::Infer infer);
  void finish_request(const Address& to, const std::string& id, size_t cost, Json last);

  uint64_t reserve(Peer& peer);
  void fill(const Address& to, uint64_t number, const Json& answer);
  void answer(const Address& to, const Json& json);
  void enqueue(const std::string& routing_id, Peer& peer, Outgoing outgoing);
  void flush(const std::string& routing_id, Peer& peer);
  int send(const std::string& routing_id, const Outgoing& outgoing);
  void retry_later();
  void retry_blocked();
  void drop(const std::string& routing_id, const char* reason);
  void close();
  int64_t now_ns() const { return service.parts.clock.monotonic_ns(); }

  boost::asio::io_context& io;
  Service& service;
  void* socket;
  boost::asio::posix::stream_descriptor readable;
  boost::asio::steady_timer retry;
  wire::Limits limits;
  std::vector<std::string> endpoints;
  std::map<std::string, Peer> peers;  // by routing id
  std::set<std::string> blocked;
  uint64_t generations = 0;
  bool drain_scheduled = false, retry_scheduled = false;
};

}  // namespace ds
