// SPDX-License-Identifier: Apache-2.0
#include "serve_fixture.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <mutex>

#if defined(__SANITIZE_THREAD__)
// libzmq hands messages from thread to thread by lock-free queues, and RocksDB's memtable is read
// while it is written; neither library is instrumented, so their own hand-overs look like races.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "race:libzmq.so\nrace:librocksdb.so\n";
}
#endif

namespace ds::test {
namespace {

constexpr int kDeadlineMs = 10'000;
constexpr const char* kTemplate =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' "
    "}}"
    "{% endif %}";

ServerParts parts_of(Served& served) {
  TokenizerData data = served.model.model.file->tokenizer();
  data.chat_template = kTemplate;
  auto chat = ChatTemplate::create(data);
  DS_CHECK(chat.ok());
  ServerParts parts{*served.engine,     *served.model.versions, *served.model.store,
                    served.model.files, served.config,          served.model.metrics,
                    served.events,      system_clock_seam()};
  parts.tokenizer = served.model.model.tokenizer;
  parts.chat_template = *chat;
  parts.model = {"tiny", served.model.model.base->sha256(), "llama", 1000, 0, served.model.path};
  parts.data_dir = served.run.path();
  parts.isa = "test";
  parts.plugins = served.plugins;
  parts.device = &served.device;
  parts.learn.status = [&served] {
    return Json{{"state", served.paused ? "paused" : "idle"}, {"gate", {{"promoted", 3}}}};
  };
  parts.learn.set_paused = [&served](bool paused) {
    served.paused = paused;
    return Status();
  };
  parts.learn.step = [](bool wait, JsonCallback done) {
    done(Json{{"outcome", "empty"}, {"waited", wait}});
  };
  parts.learn.undo = [](const std::string& id, JsonCallback done) {
    done(Json{{"id", id}, {"state", "reverted"}});
  };
  parts.task_models.infer = [](const std::string& name, std::vector<float> input,
                               JsonCallback done) {
    if (name != "digits") return done(not_found("no model '" + name + "'"));
    done(Json{{"label", input.size()}, {"scores", input}, {"version", "digits@v1"}});
  };
  return parts;
}

}  // namespace

Json HttpAnswer::json() const {
  Result<Json> parsed = parse_json(body);
  EXPECT_TRUE(parsed.ok()) << parsed.status().message() << ": " << body.substr(0, 500);
  return parsed.ok() ? *parsed : Json();
}

std::string HttpAnswer::error(const char* field) const {
  const Json parsed = json();
  const Json* error = find(parsed, "error");
  const Json* value = error ? find(*error, field) : nullptr;
  return value && value->is_string() ? value->get<std::string>() : "";
}

HttpClient::HttpClient(const std::string& address) {
  if (address.front() == '/') {
    fd_ = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un to{AF_UNIX, {}};
    std::strncpy(to.sun_path, address.c_str(), sizeof to.sun_path - 1);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to), 0) << address;
    return;
  }
  fd_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to), 0) << address;
}

HttpClient::~HttpClient() { close(); }

void HttpClient::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void HttpClient::send(const std::string& bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    const ssize_t sent = ::send(fd_, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (sent <= 0) return;  // the server has closed; the answer tells why
    at += static_cast<size_t>(sent);
  }
}

bool HttpClient::fill() {
  pollfd wanted{fd_, POLLIN, 0};
  if (poll(&wanted, 1, kDeadlineMs) != 1) {
    ADD_FAILURE() << "nothing to read for 10 s, so far: " << buffer_.substr(0, 300);
    return false;
  }
  char bytes[65536];
  const ssize_t got = recv(fd_, bytes, sizeof bytes, 0);
  if (got <= 0) return false;
  buffer_.append(bytes, static_cast<size_t>(got));
  return true;
}

std::string HttpClient::read_until(const std::string& text) {
  size_t at;
  while ((at = buffer_.find(text)) == std::string::npos) {
    if (!fill()) {
      ADD_FAILURE() << "ended without '" << text << "': " << buffer_.substr(0, 300);
      return std::exchange(buffer_, {});
    }
  }
  std::string out = buffer_.substr(0, at + text.size());
  buffer_.erase(0, at + text.size());
  return out;
}

bool HttpClient::closed_by_server() {
  pollfd wanted{fd_, POLLIN, 0};
  for (;;) {
    if (poll(&wanted, 1, kDeadlineMs) != 1) return false;
    char bytes[4096];
    const ssize_t got = recv(fd_, bytes, sizeof bytes, 0);
    if (got <= 0) return true;
  }
}

HttpAnswer HttpClient::read(bool head_only) {
  HttpAnswer answer;
  while (buffer_.find("\r\n\r\n") == std::string::npos) {
    if (!fill()) return answer;
  }
  const std::string head = read_until("\r\n\r\n");
  answer.status = std::stoi(head.substr(9, 3));
  for (size_t at = head.find("\r\n") + 2; at + 2 < head.size();) {
    const size_t end = head.find("\r\n", at), colon = head.find(": ", at);
    if (colon < end)
      answer.headers[head.substr(at, colon - at)] = head.substr(colon + 2, end - colon - 2);
    at = end + 2;
  }
  if (head_only) return answer;
  if (answer.headers.contains("transfer-encoding")) {
    for (;;) {
      const size_t size = std::stoul(read_until("\r\n"), nullptr, 16);
      while (buffer_.size() < size + 2 && fill()) {
      }
      answer.body += buffer_.substr(0, size);
      buffer_.erase(0, size + 2);
      if (size == 0) return answer;
    }
  }
  const size_t length =
      answer.headers.contains("content-length") ? std::stoul(answer.headers["content-length"]) : 0;
  while (buffer_.size() < length && fill()) {
  }
  answer.body = buffer_.substr(0, length);
  buffer_.erase(0, length);
  return answer;
}

HttpAnswer HttpClient::ask(const std::string& method, const std::string& path,
                           const std::string& body,
                           const std::map<std::string, std::string>& headers) {
  std::string request = method + " " + path + " HTTP/1.1\r\n";
  if (!headers.contains("Host")) request += "Host: localhost\r\n";
  for (const auto& [name, value] : headers) request += name + ": " + value + "\r\n";
  if (!body.empty()) request += "Content-Length: " + std::to_string(body.size()) + "\r\n";
  send(request + "\r\n" + body);
  return read(method == "HEAD");
}

std::vector<std::string> sse_data(const std::string& body) {
  std::vector<std::string> data;
  for (size_t at = 0; at < body.size();) {
    const size_t end = std::min(body.find("\n\n", at), body.size());
    const std::string block = body.substr(at, end - at);
    if (block.starts_with("data: ")) data.push_back(block.substr(6));
    at = end + 2;
  }
  return data;
}

WirePeer::WirePeer(const std::string& endpoint, int type)
    : context_(zmq_ctx_new()), socket_(zmq_socket(context_, type)) {
  const int linger_ms = 0;
  zmq_setsockopt(socket_, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
  EXPECT_EQ(zmq_connect(socket_, endpoint.c_str()), 0) << endpoint;
}

WirePeer::~WirePeer() {
  zmq_close(socket_);
  zmq_ctx_term(context_);
}

void WirePeer::send(const std::vector<std::string>& frames) {
  for (size_t i = 0; i < frames.size(); ++i) {
    const int more = i + 1 < frames.size() ? ZMQ_SNDMORE : 0;
    EXPECT_GE(zmq_send(socket_, frames[i].data(), frames[i].size(), more), 0)
        << zmq_strerror(zmq_errno());
  }
}

std::optional<std::vector<std::string>> WirePeer::receive(int timeout_ms) {
  zmq_pollitem_t item{socket_, 0, ZMQ_POLLIN, 0};
  if (zmq_poll(&item, 1, timeout_ms) != 1) return std::nullopt;
  std::vector<std::string> frames;
  for (bool more = true; more;) {
    zmq_msg_t message;
    zmq_msg_init(&message);
    zmq_msg_recv(&message, socket_, 0);
    frames.emplace_back(static_cast<char*>(zmq_msg_data(&message)), zmq_msg_size(&message));
    more = zmq_msg_more(&message);
    zmq_msg_close(&message);
  }
  return frames;
}

Json WirePeer::read() {
  const auto frames = receive();
  if (!frames) {
    ADD_FAILURE() << "no message for 10 s";
    return Json();
  }
  const Result<Json> json = parse_json(frames->back());
  EXPECT_TRUE(json.ok()) << frames->back();
  return json.ok() ? *json : Json();
}

Json WirePeer::hello(const std::string& client, int64_t epoch) {
  return ask({{"v", 1}, {"op", "hello"}, {"client", client}, {"epoch", epoch}});
}

Json feedback(const std::string& client, int64_t epoch, int64_t seq, const std::string& text) {
  return {{"v", 1},         {"op", "feedback"}, {"client", client},
          {"epoch", epoch}, {"seq", seq},       {"record", {{"kind", "text"}, {"text", text}}}};
}

Served::Served(std::function<void(ServerOptions&, EngineOptions&)> change, Plugins* plugins_in)
    : model("tied", WeightFormat::kBF16), events(system_clock_seam()), plugins(plugins_in) {
  ServerOptions options;
  options.run_dir = run.path();
  options.http_address = "127.0.0.1:0";
  EngineOptions engine_options;
  engine_options.context = 512;
  engine_options.kv_pages = 256;
  if (change) change(options, engine_options);
  engine = model.engine(engine_options);
  auto started = Server::start(parts_of(*this), options);
  if (!started.ok()) std::fprintf(stderr, "%s\n", started.status().message().c_str());
  DS_CHECK(started.ok());
  server = std::move(*started);
}

std::unique_ptr<Served> Served::with_settings(const std::map<std::string, std::string>& settings) {
  return std::make_unique<Served>([&](ServerOptions& options, EngineOptions&) {
    Config config;
    for (const auto& [name, value] : settings) DS_CHECK(config.set(name, value, "flag").ok());
    auto set = server_options(config, options.run_dir);
    DS_CHECK(set.ok());
    options = std::move(*set);
    options.http_address = "127.0.0.1:0";
  });
}

Served::~Served() {
  server->stop(0);
  server.reset();
}

bool Served::engine_empty() {
  return eventually([this] { return engine->ps().empty(); });
}

double Served::metric(const std::string& line_start) {
  const std::string text = model.metrics.render();
  const size_t at = ("\n" + text).find("\n" + line_start);
  if (at == std::string::npos) return 0;
  const size_t end = text.find('\n', at);
  const std::string line = text.substr(at, end - at);
  return std::stod(line.substr(line.rfind(' ') + 1));
}

bool eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(kDeadlineMs);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

HeldEngine::HeldEngine(Engine& engine) {
  GenerateRequest request;
  request.id = "held";
  request.prompt = {Segment{{5, 6, 7}}};
  request.max_tokens = 4;
  request.sampling.temperature = 0;
  request.logprobs = 0;  // a chunk for every token
  const auto standing = std::make_shared<std::promise<void>>();
  const auto once = std::make_shared<std::once_flag>();
  pending_ = submit(engine, request, [standing, once, go = go_.get_future().share()] {
    std::call_once(*once, [&] { standing->set_value(); });
    go.wait();
  });
  EXPECT_TRUE(pending_.refused.ok());
  standing->get_future().wait();
}

void HeldEngine::release() {
  if (std::exchange(released_, true)) return;
  go_.set_value();
  pending_.wait();
}

}  // namespace ds::test
