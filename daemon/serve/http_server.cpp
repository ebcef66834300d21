// SPDX-License-Identifier: Apache-2.0
// Listeners, callers and their roles.
#include "serve/http_server.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <set>
#include <utility>

#include "serve/http_connection.h"

namespace ds {
namespace {

namespace asio = boost::asio;
using Error = boost::system::error_code;
using Acceptor = asio::basic_socket_acceptor<asio::generic::stream_protocol>;

// "host:port", "[::1]:port" or a bare host, without the port, in lower case.
std::string host_without_port(std::string_view authority) {
  std::string host(authority);
  for (char& c : host) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (!host.empty() && host.front() == '[') return host.substr(0, host.find(']') + 1);
  return host.substr(0, host.find(':'));
}

bool known_host(const std::string& host, const std::vector<std::string>& more) {
  if (host == "localhost" || host == "127.0.0.1" || host == "[::1]") return true;
  return std::find(more.begin(), more.end(), host) != more.end();
}

ApiError forbidden(std::string message, std::string code) {
  return {403, std::move(message), "permission_error", "", std::move(code)};
}

// Root and the daemon's own user.
bool trusted_peer(int fd) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  return peer.uid == 0 || peer.uid == geteuid();
}

struct Listener {
  explicit Listener(asio::io_context& io) : acceptor(io), pause(io) {}
  Acceptor acceptor;
  asio::steady_timer pause;  ///< after running out of descriptors
  bool local = false;
  std::string path;  ///< of the UNIX socket
  std::shared_ptr<const HttpConnection::Owner> owner;
  std::set<std::shared_ptr<HttpConnection>> connections;
};

}  // namespace

std::unique_ptr<ApiError> check_host_and_origin(const HttpRequest& request,
                                                const std::vector<std::string>& hosts) {
  const std::string* host = request.header("host");
  if (!host || !known_host(host_without_port(*host), hosts)) {
    return std::make_unique<ApiError>(
        forbidden("Host is '" + (host ? *host : std::string()) +
                      "', expected localhost, 127.0.0.1, [::1] or a configured name",
                  "foreign_host"));
  }
  const std::string* origin = request.header("origin");
  if (!origin) return nullptr;
  const size_t scheme = origin->find("://");
  const std::string name = scheme == std::string::npos ? *origin : origin->substr(scheme + 3);
  if (scheme != std::string::npos && known_host(host_without_port(name), hosts)) return nullptr;
  return std::make_unique<ApiError>(
      forbidden("requests from the web page " + *origin + " are not accepted", "foreign_origin"));
}

struct HttpServer::State : std::enable_shared_from_this<HttpServer::State> {
  State(asio::io_context& io, const Router& router, Metrics& metrics, HttpLimits limits,
        HttpAccess access)
      : io(io), router(router), metrics(metrics), limits(limits), access(std::move(access)) {}

  void accept(Listener& listener);
  void accepted(Listener& listener, HttpConnection::Socket socket);
  Listener& add(bool local);
  void dispatch(bool local, HttpRequest& request, const ResponderPtr& responder);

  asio::io_context& io;
  const Router& router;
  Metrics& metrics;
  HttpLimits limits;
  HttpAccess access;
  bool stopped = false;
  std::vector<std::unique_ptr<Listener>> listeners;
};

Listener& HttpServer::State::add(bool local) {
  listeners.push_back(std::make_unique<Listener>(io));
  Listener* listener = listeners.back().get();
  listener->local = local;
  auto owner = std::make_shared<HttpConnection::Owner>();
  owner->limits = limits;
  owner->dispatch = [this, local](HttpRequest& request, const ResponderPtr& responder) {
    dispatch(local, request, responder);
  };
  owner->answered = [this](const HttpRequest& request, int status) {
    router.count(request, status);
  };
  owner->slow_reader = [this] {
    metrics.counter("ds_http_slow_readers_total", "HTTP clients dropped for not reading.").add();
  };
  owner->closed = [listener](HttpConnection* connection) {
    listener->connections.erase(connection->shared_from_this());
  };
  listener->owner = std::move(owner);
  return *listener;
}

void HttpServer::State::dispatch(bool local, HttpRequest& request, const ResponderPtr& responder) {
  if (local) {
    request.roles = kAllRoles;
    return router.dispatch(request, responder);
  }
  if (const auto refused = check_host_and_origin(request, access.hosts)) {
    return responder->error(*refused);
  }
  request.roles = kInfer | kFeedback | kRead;
  const std::string* authorization = request.header("authorization");
  if (authorization && authorization->starts_with("Bearer ") && access.bearer) {
    request.roles |= access.bearer(std::string_view(*authorization).substr(7));
  }
  router.dispatch(request, responder);
}

void HttpServer::State::accept(Listener& listener) {
  listener.acceptor.async_accept(
      [self = shared_from_this(), &listener](Error error, HttpConnection::Socket socket) {
        if (self->stopped || error == asio::error::operation_aborted) return;
        if (!error) {
          self->accepted(listener, std::move(socket));
          return self->accept(listener);
        }
        // Out of descriptors or memory: trying again at once would spin.
        listener.pause.expires_after(std::chrono::milliseconds(100));
        listener.pause.async_wait([self, &listener](Error stopped) {
          if (!stopped && !self->stopped) self->accept(listener);
        });
      });
}

void HttpServer::State::accepted(Listener& listener, HttpConnection::Socket socket) {
  const bool trusted = !listener.local || trusted_peer(socket.native_handle());
  const auto connection = std::make_shared<HttpConnection>(std::move(socket), listener.owner);
  const bool full = listener.connections.size() >= limits.max_connections;
  // A refused one is held alive by its own reads and writes until it has lingered out.
  if (!trusted) {
    return connection->refuse(
        forbidden("only root and the daemon's user may connect here", "foreign_user"));
  }
  if (full) {
    return connection->refuse(
        {503, "more than " + std::to_string(limits.max_connections) + " connections",
         "server_error", "", "too_many_connections", 1});
  }
  listener.connections.insert(connection);
  connection->start();
}

HttpServer::HttpServer(asio::io_context& io, const Router& router, Metrics& metrics,
                       HttpLimits limits, HttpAccess access)
    : state_(std::make_shared<State>(io, router, metrics, limits, std::move(access))) {}

HttpServer::~HttpServer() = default;

Status HttpServer::listen_unix(const std::string& path) {
  if (path.size() >= sizeof(sockaddr_un::sun_path)) {
    return invalid("control socket " + path + ": path is " + std::to_string(path.size()) +
                   " bytes, a UNIX socket's path has at most 107");
  }
  unlink(path.c_str());  // left by a process that was killed; a live one holds the folder's lock
  Listener& listener = state_->add(true);
  listener.path = path;
  Error error;
  const asio::local::stream_protocol::endpoint endpoint(path);
  listener.acceptor.open(endpoint.protocol(), error);
  if (!error) listener.acceptor.bind(endpoint, error);
  // Between bind and listen nobody can connect, so the mode is right before the first one does.
  if (!error && chmod(path.c_str(), 0600) != 0)
    error = Error(errno, boost::system::system_category());
  if (!error) listener.acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (error) return io_error("control socket " + path + ": " + error.message());
  state_->accept(listener);
  return {};
}

Result<std::string> HttpServer::listen_tcp(const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = -1;
  if (colon != std::string::npos) {
    const char* end = address.data() + address.size();
    const auto parsed = std::from_chars(address.data() + colon + 1, end, port);
    if (parsed.ec != std::errc() || parsed.ptr != end) port = -1;
  }
  if (port < 0 || port > 65535)
    return invalid("http address '" + address + "': expected HOST:PORT");
  std::string host = address.substr(0, colon);
  if (host == "localhost") host = "127.0.0.1";
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  Error error;
  const asio::ip::address ip = asio::ip::make_address(host, error);
  if (error) return invalid("http address '" + address + "': expected an IP address or localhost");
  if (!ip.is_loopback()) {
    return Status(Code::kPermission,
                  "http address '" + address +
                      "' is reachable from other machines: "
                      "that needs TLS and keys, which are not built yet; use 127.0.0.1");
  }
  Listener& listener = state_->add(false);
  const asio::ip::tcp::endpoint endpoint(ip, static_cast<uint16_t>(port));
  listener.acceptor.open(endpoint.protocol(), error);
  if (!error) listener.acceptor.set_option(asio::socket_base::reuse_address(true), error);
  if (!error) listener.acceptor.bind(endpoint, error);
  if (!error) listener.acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (error) return io_error("http address " + address + ": " + error.message());
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  getsockname(listener.acceptor.native_handle(), reinterpret_cast<sockaddr*>(&bound), &size);
  const int real_port =
      ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                        : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
  state_->accept(listener);
  return (ip.is_v6() ? "[" + host + "]" : host) + ":" + std::to_string(real_port);
}

void HttpServer::stop_accepting() {
  state_->stopped = true;
  for (const auto& listener : state_->listeners) {
    Error ignored;
    listener->acceptor.close(ignored);
    listener->pause.cancel();
    if (!listener->path.empty()) unlink(listener->path.c_str());
    const auto connections = listener->connections;  // closing erases from the set
    for (const auto& connection : connections) connection->close_when_answered();
  }
}

bool HttpServer::idle() const {
  return std::all_of(state_->listeners.begin(), state_->listeners.end(), [](const auto& listener) {
    return std::none_of(listener->connections.begin(), listener->connections.end(),
                        [](const auto& connection) { return connection->answering(); });
  });
}

void HttpServer::close_all() {
  for (const auto& listener : state_->listeners) {
    const auto connections = listener->connections;
    for (const auto& connection : connections) connection->close();
  }
}

}  // namespace ds
