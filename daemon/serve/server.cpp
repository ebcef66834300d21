// SPDX-License-Identifier: Apache-2.0
// Puts the parts together and takes them apart in order: listeners, engine, answers, sockets,
// threads.
#include "serve/server.h"

#include <pthread.h>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <future>
#include <thread>
#include <utility>

#include "log.h"
#include "serve/admin.h"
#include "serve/data_socket.h"
#include "serve/event_socket.h"
#include "serve/http_server.h"
#include "serve/openai.h"
#include "serve/service.h"
#include "storage/directory_lock.h"

namespace ds {
namespace {

constexpr int64_t kFlushMs = 1'000;  // for answers that are computed but not yet read
constexpr auto kLookAgain = std::chrono::milliseconds(5);

HttpLimits http_limits(const ServerOptions& options) {
  HttpLimits limits;
  limits.max_header_bytes = options.max_header_bytes;
  limits.max_body_bytes = options.max_body_bytes;
  limits.max_connections = options.max_connections;
  limits.max_stream_queue_bytes = options.max_stream_queue_bytes;
  limits.idle_timeout_ms = options.idle_timeout_ms;
  limits.header_timeout_ms = options.header_timeout_ms;
  limits.stalled_reader_ms = options.stalled_reader_ms;
  return limits;
}

}  // namespace

struct Server::State {
  State(ServerParts parts, ServerOptions options)
      : mailbox(std::make_shared<Mailbox>(io)),
        service(std::make_shared<Service>(std::move(parts), std::move(options), mailbox)),
        router(service->parts.metrics),
        flush_timer(io) {}

  Status open();
  void on_io(const Task& task);  // runs it there and waits
  void wait_until_flushed(std::promise<void>& flushed,
                          std::chrono::steady_clock::time_point deadline);
  void stop(int64_t drain_ms);

  // Destroyed in reverse: sockets before the context and the service they use.
  std::unique_ptr<DirectoryLock> lock;
  boost::asio::io_context io;
  std::shared_ptr<Mailbox> mailbox;
  std::shared_ptr<Service> service;
  Router router;
  ZmqContext zmq;
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<DataSocket> data;
  std::unique_ptr<EventSocket> events;
  boost::asio::steady_timer flush_timer;
  std::thread thread;
  Endpoints endpoints;
  bool stopped = false;
};

Status Server::State::open() {
  const ServerOptions& options = service->options;
  // libzmq and our own unlink() take over a socket file without asking, so the folder has one
  // owner.
  DS_ASSIGN(lock, DirectoryLock::take(options.run_dir));
  add_openai_routes(router, *service);
  add_version_routes(router, *service);
  add_learn_routes(router, *service);
  add_plugin_routes(router, *service);
  add_feedback_routes(router, *service);
  add_status_routes(router, *service);
  register_collectors(service);
  service->parts.versions.on_change([weak = std::weak_ptr(service)](const Json&) {
    const auto service = weak.lock();
    if (service) service->serving_since_ms = service->parts.clock.unix_ms();
  });

  HttpAccess access{options.http_hosts, [raw = service.get()](std::string_view token) {
                      return raw->tokens.roles(token);
                    }};
  http = std::make_unique<HttpServer>(io, router, service->parts.metrics, http_limits(options),
                                      std::move(access));
  endpoints.control = options.run_dir + "/control.sock";
  DS_TRY(http->listen_unix(endpoints.control));
  if (!options.http_address.empty()) {
    DS_ASSIGN(endpoints.http, http->listen_tcp(options.http_address));
  }
  std::vector<std::string> data_endpoints = options.data_endpoints;
  if (data_endpoints.empty()) data_endpoints = {"ipc://" + options.run_dir + "/data.sock"};
  DS_ASSIGN(data, DataSocket::open(io, zmq.get(), *service, data_endpoints));
  endpoints.all_data = data->endpoints();
  endpoints.data = endpoints.all_data.front();
  endpoints.events = "ipc://" + options.run_dir + "/events.sock";
  DS_ASSIGN(events, EventSocket::open(zmq.get(), endpoints.events, service->parts.events, mailbox));
  thread = std::thread([this] {
    pthread_setname_np(pthread_self(), "ds-io");
    const auto work = boost::asio::make_work_guard(io);
    io.run();
  });
  return {};
}

void Server::State::on_io(const Task& task) {
  std::promise<void> done;
  boost::asio::post(io, [&] {
    task();
    done.set_value();
  });
  done.get_future().wait();
}

void Server::State::wait_until_flushed(std::promise<void>& flushed,
                                       std::chrono::steady_clock::time_point deadline) {
  if ((http->idle() && data->idle()) || std::chrono::steady_clock::now() >= deadline) {
    return flushed.set_value();
  }
  flush_timer.expires_after(kLookAgain);
  flush_timer.async_wait([this, &flushed, deadline](const boost::system::error_code&) {
    wait_until_flushed(flushed, deadline);
  });
}

void Server::State::stop(int64_t drain_ms) {
  if (std::exchange(stopped, true)) return;
  service->draining = true;
  __atomic_store_n(&service->end_tools, 1, __ATOMIC_RELAXED);
  if (thread.joinable()) {
    on_io([this] { http->stop_accepting(); });
    service->parts.engine.drain(drain_ms);
    on_io([this] { service->end_followers(); });
    std::promise<void> flushed;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(kFlushMs);
    boost::asio::post(io, [&] { wait_until_flushed(flushed, deadline); });
    flushed.get_future().wait();
    on_io([this] { http->close_all(); });
    io.stop();
    thread.join();
  }
  service->quick.finish();
  service->slow.finish();
  mailbox->close();
  events.reset();
  data.reset();
  http.reset();
}

Server::Server() = default;

Server::~Server() {
  if (state_) state_->stop(0);
}

Result<std::unique_ptr<Server>> Server::start(ServerParts parts, ServerOptions options) {
  std::unique_ptr<Server> server(new Server());
  server->state_ = std::make_unique<State>(std::move(parts), std::move(options));
  DS_TRY(server->state_->open());
  log(LogLevel::kInfo, "serve",
      "http " + server->state_->endpoints.http + ", data " + server->state_->endpoints.data);
  return server;
}

const Endpoints& Server::endpoints() const { return state_->endpoints; }

void Server::stop(int64_t drain_ms) { state_->stop(drain_ms); }

}  // namespace ds
