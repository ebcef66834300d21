// SPDX-License-Identifier: Apache-2.0
// ROUTER socket in an Asio loop. ZMQ_FD is edge-triggered and speaks of *any* state change, so
// every wake-up drains until EAGAIN and every send is followed by a look at ZMQ_EVENTS.
#include "serve/data_socket.h"

#include <sys/stat.h>
#include <zmq.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <utility>

#include "serve/data_socket_state.h"

namespace ds {

class Frame {
 public:
  Frame() { zmq_msg_init(&message_); }
  Frame(Frame&& other) noexcept : Frame() { zmq_msg_move(&message_, &other.message_); }
  ~Frame() { zmq_msg_close(&message_); }
  zmq_msg_t* get() { return &message_; }
  std::string_view bytes() {
    return {static_cast<const char*>(zmq_msg_data(&message_)), zmq_msg_size(&message_)};
  }

 private:
  zmq_msg_t message_;
};

namespace {

using Error = boost::system::error_code;
constexpr int kMessagesPerTurn = 64;     // then HTTP gets its turn
constexpr int kHighWaterMessages = 256;  // per peer and direction, in libzmq's own queues
constexpr size_t kMaxFrames = 80;        // kept of a message; wire::Limits refuses earlier
constexpr int64_t kRetrySendMs = 10;

bool loopback_tcp(const std::string& endpoint) {
  const std::string host = endpoint.substr(6, endpoint.rfind(':') - 6);
  return host == "localhost" || host == "[::1]" || host.starts_with("127.");
}

}  // namespace

Result<std::unique_ptr<DataSocket>> DataSocket::open(boost::asio::io_context& io, void* zmq_context,
                                                     Service& service,
                                                     const std::vector<std::string>& endpoints) {
  void* socket = zmq_socket(zmq_context, ZMQ_ROUTER);
  if (!socket) return io_error(std::string("data socket: ") + zmq_strerror(zmq_errno()));
  const auto state = std::make_shared<State>(io, service, socket);
  const int yes = 1, linger_ms = 0, high_water = kHighWaterMessages;
  const int64_t largest_bytes = static_cast<int64_t>(service.options.max_frame_bytes);
  zmq_setsockopt(socket, ZMQ_ROUTER_MANDATORY, &yes, sizeof yes);
  zmq_setsockopt(socket, ZMQ_IPV6, &yes, sizeof yes);
  zmq_setsockopt(socket, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
  zmq_setsockopt(socket, ZMQ_SNDHWM, &high_water, sizeof high_water);
  zmq_setsockopt(socket, ZMQ_RCVHWM, &high_water, sizeof high_water);
  zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest_bytes, sizeof largest_bytes);
  state->limits.max_header_bytes = service.options.max_wire_header_bytes;
  state->limits.max_attachment_bytes = service.options.max_attachment_bytes;
  state->limits.vocab_size = service.parts.tokenizer->vocab_size();
  for (const std::string& endpoint : endpoints) DS_TRY(state->bind(endpoint));
  int fd = -1;
  size_t size = sizeof fd;
  if (zmq_getsockopt(socket, ZMQ_FD, &fd, &size) != 0) {
    return io_error(std::string("data socket: ") + zmq_strerror(zmq_errno()));
  }
  Error error;
  state->readable.assign(fd, error);
  if (error) return io_error("data socket: " + error.message());
  state->wait();
  state->schedule_drain();  // what came between bind and now has used up its edge
  return std::unique_ptr<DataSocket>(new DataSocket(state));
}

Status DataSocket::State::bind(const std::string& endpoint) {
  const bool tcp = endpoint.starts_with("tcp://");
  if (!tcp && !endpoint.starts_with("ipc://")) {
    return invalid("data endpoint '" + endpoint + "': expected ipc://PATH or tcp://127.0.0.1:PORT");
  }
  if (tcp && !loopback_tcp(endpoint)) {
    return {Code::kPermission,
            "data endpoint '" + endpoint +
                "' is reachable from other machines: that "
                "needs CURVE keys, which are not built yet; use ipc:// or tcp://127.0.0.1"};
  }
  // The socket file is born without access for others; afterwards is too late.
  const mode_t before = umask(0177);
  const int bound = zmq_bind(socket, endpoint.c_str());
  const int why = zmq_errno();
  umask(before);
  if (bound != 0) return io_error("data endpoint " + endpoint + ": " + zmq_strerror(why));
  char real[256];
  size_t size = sizeof real;
  const bool known = zmq_getsockopt(socket, ZMQ_LAST_ENDPOINT, real, &size) == 0;
  endpoints.push_back(known ? std::string(real) : endpoint);
  return {};
}

DataSocket::~DataSocket() { state_->close(); }
const std::vector<std::string>& DataSocket::endpoints() const { return state_->endpoints; }
void DataSocket::close() { state_->close(); }

bool DataSocket::idle() const {
  return std::all_of(state_->peers.begin(), state_->peers.end(), [](const auto& entry) {
    return entry.second.inflight_items == 0 && entry.second.out.empty();
  });
}

void DataSocket::State::close() {
  if (!socket) return;
  if (readable.is_open()) readable.release();  // the descriptor belongs to the socket
  retry.cancel();
  zmq_close(socket);
  socket = nullptr;
}

// ---- receiving ----

void DataSocket::State::wait() {
  readable.async_wait(boost::asio::posix::stream_descriptor::wait_read,
                      [weak = weak_from_this()](Error error) {
                        const auto self = weak.lock();
                        if (error || !self || !self->socket) return;
                        self->drain();
                        if (self->socket) self->wait();
                      });
}

void DataSocket::State::schedule_drain() {
  if (std::exchange(drain_scheduled, true)) return;
  boost::asio::post(io, [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    self->drain_scheduled = false;
    self->drain();
  });
}

void DataSocket::State::after_send() {
  int events = 0;
  size_t size = sizeof events;
  if (zmq_getsockopt(socket, ZMQ_EVENTS, &events, &size) == 0 && (events & ZMQ_POLLIN))
    schedule_drain();
}

void DataSocket::State::drain() {
  for (int n = 0; n < kMessagesPerTurn; ++n) {
    std::vector<Frame> frames;
    if (!socket || !receive(frames)) return;
    handle(frames);
  }
  schedule_drain();
}

bool DataSocket::State::receive(std::vector<Frame>& frames) {
  for (bool more = true; more;) {
    Frame frame;
    if (zmq_msg_recv(frame.get(), socket, ZMQ_DONTWAIT) < 0) {
      if (zmq_errno() == EINTR) continue;
      return false;
    }
    more = zmq_msg_more(frame.get());
    if (frames.size() < kMaxFrames) frames.push_back(std::move(frame));
  }
  return true;
}

void DataSocket::State::handle(std::vector<Frame>& frames) {
  Address from{std::string(frames[0].bytes())};
  from.envelope = frames.size() > 1 && frames[1].bytes().empty();
  std::vector<std::string_view> content;
  for (size_t i = from.envelope ? 2 : 1; i < frames.size(); ++i)
    content.push_back(frames[i].bytes());
  Peer* peer = peer_for(from.routing_id);
  if (!peer) return;
  from.generation = peer->generation;
  peer->last_heard_ns = now_ns();
  wire::Message message = wire::parse(content, limits);
  if (!peer->greeted && !std::holds_alternative<wire::Hello>(message) &&
      !std::holds_alternative<wire::Error>(message)) {
    wire::Error refusal{"no_hello", "say hello first"};
    if (const auto* feedback = std::get_if<wire::Feedback>(&message))
      refusal.seq = feedback->submission.seq;
    if (const auto* infer = std::get_if<wire::Infer>(&message)) refusal.id = infer->id;
    if (const auto* cancel = std::get_if<wire::Cancel>(&message)) refusal.id = cancel->id;
    message = refusal;
  }
  std::visit([&](auto& body) { on(from, *peer, wire::cost_bytes(content), body); }, message);
}

Peer* DataSocket::State::peer_for(const std::string& routing_id) {
  const auto found = peers.find(routing_id);
  if (found != peers.end()) return &found->second;
  if (peers.size() >= service.options.max_peers) {
    // Most peers that left did so without a word; the one silent for longest makes room.
    auto oldest = peers.end();
    for (auto it = peers.begin(); it != peers.end(); ++it) {
      if (it->second.inflight_items || !it->second.out.empty()) continue;
      if (oldest == peers.end() || it->second.last_heard_ns < oldest->second.last_heard_ns)
        oldest = it;
    }
    if (oldest == peers.end()) return nullptr;
    peers.erase(oldest);
  }
  Peer& peer = peers[routing_id];
  peer.generation = ++generations;
  return &peer;
}

Peer* DataSocket::State::find_peer(const Address& to) {
  const auto found = peers.find(to.routing_id);
  if (found == peers.end() || found->second.generation != to.generation) return nullptr;
  return &found->second;
}

// ---- sending ----

void DataSocket::State::enqueue(const std::string& routing_id, Peer& peer, Outgoing outgoing) {
  if (peer.out_bytes + outgoing.body.size() > service.options.peer_queue_bytes) {
    return drop(routing_id, "queue_full");
  }
  peer.out_bytes += outgoing.body.size();
  peer.out.push_back(std::move(outgoing));
  if (peer.blocked_since_ns == 0) flush(routing_id, peer);
}

void DataSocket::State::flush(const std::string& routing_id, Peer& peer) {
  while (!peer.out.empty()) {
    const int error = send(routing_id, peer.out.front());
    if (error == EAGAIN) {
      if (peer.blocked_since_ns == 0) peer.blocked_since_ns = now_ns();
      blocked.insert(routing_id);
      retry_later();
      break;
    }
    if (error != 0) {
      drop(routing_id, "gone");
      break;
    }
    peer.blocked_since_ns = 0;
    peer.out_bytes -= peer.out.front().body.size();
    peer.out.pop_front();
  }
  after_send();
}

// 0, or the error of the first frame: what follows it cannot fail any more.
int DataSocket::State::send(const std::string& routing_id, const Outgoing& outgoing) {
  const int more = ZMQ_SNDMORE | ZMQ_DONTWAIT;
  if (zmq_send(socket, routing_id.data(), routing_id.size(), more) < 0) return zmq_errno();
  if (outgoing.envelope) zmq_send(socket, "", 0, more);
  zmq_send(socket, outgoing.body.data(), outgoing.body.size(), ZMQ_DONTWAIT);
  return 0;
}

void DataSocket::State::retry_later() {
  if (std::exchange(retry_scheduled, true)) return;
  retry.expires_after(std::chrono::milliseconds(kRetrySendMs));
  retry.async_wait([weak = weak_from_this()](Error error) {
    const auto self = weak.lock();
    if (error || !self || !self->socket) return;
    self->retry_scheduled = false;
    self->retry_blocked();
  });
}

// A ROUTER does not tell when a peer has room again.
void DataSocket::State::retry_blocked() {
  const std::set<std::string> candidates = std::exchange(blocked, {});
  const int64_t limit_ns = service.options.stalled_reader_ms * 1'000'000;
  for (const std::string& routing_id : candidates) {
    const auto found = peers.find(routing_id);
    if (found == peers.end()) continue;
    if (now_ns() - found->second.blocked_since_ns > limit_ns) {
      drop(routing_id, "stalled");
    } else {
      flush(routing_id, found->second);
    }
  }
}

// Its next message starts anew with no_hello, and its hello tells what was stored.
void DataSocket::State::drop(const std::string& routing_id, const char* reason) {
  service.parts.metrics
      .counter("ds_wire_peers_dropped_total", "Data socket peers that lost their queue, by reason.",
               {{"reason", reason}})
      .add();
  const auto found = peers.find(routing_id);
  if (found == peers.end()) return;
  const std::map<std::string, Request> requests = std::move(found->second.requests);
  peers.erase(found);
  blocked.erase(routing_id);
  for (const auto& [id, request] : requests) service.parts.engine.cancel(request.engine_id);
}

}  // namespace ds
