// SPDX-License-Identifier: Apache-2.0
// A whole server over a tiny model, and the two kinds of clients that talk to it as strangers do:
// raw sockets for HTTP, libzmq for the data socket. Every wait has a deadline.
#pragma once

#include <zmq.h>

#include <atomic>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "serve/server.h"
#include "served_model.h"

namespace ds::test {

struct HttpAnswer {
  int status = 0;  ///< 0: the connection ended before an answer
  std::map<std::string, std::string> headers;
  std::string body;  ///< chunks joined
  Json json() const;
  /// "invalid_request_error" and the like, of an error body.
  std::string error(const char* field) const;
};

/// One raw connection.
class HttpClient {
 public:
  explicit HttpClient(const std::string& address);  ///< "127.0.0.1:1234" or a socket path
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  void send(const std::string& bytes);
  HttpAnswer read(bool head_only = false);          ///< one answer
  std::string read_until(const std::string& text);  ///< raw bytes; fails the test after 10 s
  bool closed_by_server();                          ///< waits for the end
  void close();
  HttpAnswer ask(const std::string& method, const std::string& path, const std::string& body = "",
                 const std::map<std::string, std::string>& headers = {});
  HttpAnswer post(const std::string& path, const Json& body) {
    return ask("POST", path, dump_json(body));
  }
  HttpAnswer get(const std::string& path) { return ask("GET", path); }
  int fd() const { return fd_; }

 private:
  bool fill();  // reads more; false at the end
  int fd_ = -1;
  std::string buffer_;
};

/// `data:` payloads of an event stream.
std::vector<std::string> sse_data(const std::string& body);

/// A ZeroMQ peer of the data socket.
class WirePeer {
 public:
  WirePeer(const std::string& endpoint, int type);
  ~WirePeer();
  void send(const std::vector<std::string>& frames);
  void send(const Json& header) { send(std::vector<std::string>{dump_json(header)}); }
  std::optional<std::vector<std::string>> receive(int timeout_ms = 10'000);
  Json read();  ///< next message's JSON; null after 10 s
  Json ask(const Json& header) {
    send(header);
    return read();
  }
  Json hello(const std::string& client, int64_t epoch = 1);
  void* socket() { return socket_; }

 private:
  void *context_, *socket_;
};

Json feedback(const std::string& client, int64_t epoch, int64_t seq,
              const std::string& text = "a b c");

/// Model, engine, server; options as the test wants them.
class Served {
 public:
  explicit Served(std::function<void(ServerOptions&, EngineOptions&)> change = nullptr,
                  Plugins* plugins = nullptr);
  /// As dsd does it: the server follows the settings, on a free port.
  static std::unique_ptr<Served> with_settings(const std::map<std::string, std::string>& settings);
  ~Served();
  HttpClient tcp() { return HttpClient(server->endpoints().http); }
  HttpClient unix_socket() { return HttpClient(server->endpoints().control); }
  /// Waits until the engine has nothing live; false after 10 s.
  bool engine_empty();
  double metric(
      const std::string& line_start);  ///< value of the first line that starts so; 0 without

  ServedModel model;
  ScratchFolder run;
  Config config;
  EventBus events;
  Plugins* const plugins;  ///< or null
  std::unique_ptr<Engine> engine;
  std::atomic<bool> paused{false};
  DeviceState device{system_clock_seam()};
  std::unique_ptr<Server> server;
};

/// True as soon as `condition` is; false after 10 s.
bool eventually(const std::function<bool()>& condition);

/// Holds the engine thread still, inside a callback of a request of its own, until release().
class HeldEngine {
 public:
  explicit HeldEngine(Engine& engine);  ///< returns once it stands still
  ~HeldEngine() { release(); }
  void release();

 private:
  std::promise<void> go_;
  bool released_ = false;
  Pending pending_;
};

}  // namespace ds::test
