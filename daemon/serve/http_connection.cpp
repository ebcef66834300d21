// SPDX-License-Identifier: Apache-2.0
// The state machine of one connection: idle, header, body, answer, and again.
#include "serve/http_connection.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/status.hpp>
#include <chrono>
#include <utility>

namespace ds {
namespace {

namespace http = boost::beast::http;
constexpr size_t kEarlyBytes = 64u << 10;  // of a next request, read before this one is answered
constexpr int64_t kLingerMs = 2'000;
constexpr size_t kLingerBytes = 64u << 20;

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// A % without two hex digits stays as it is.
std::string percent_decoded(std::string_view text, bool plus_is_space) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && hex_digit(text[i + 1]) >= 0 &&
        hex_digit(text[i + 2]) >= 0) {
      out += static_cast<char>(hex_digit(text[i + 1]) * 16 + hex_digit(text[i + 2]));
      i += 2;
    } else {
      out += plus_is_space && text[i] == '+' ? ' ' : text[i];
    }
  }
  return out;
}

Headers parse_query(std::string_view query) {
  Headers pairs;
  while (!query.empty()) {
    const size_t end = std::min(query.find('&'), query.size());
    const std::string_view pair = query.substr(0, end);
    const size_t equal = std::min(pair.find('='), pair.size());
    if (!pair.empty()) {
      pairs.emplace_back(percent_decoded(pair.substr(0, equal), true),
                         percent_decoded(pair.substr(std::min(equal + 1, pair.size())), true));
    }
    query.remove_prefix(std::min(end + 1, query.size()));
  }
  return pairs;
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return out;
}

}  // namespace

HttpConnection::HttpConnection(Socket socket, std::shared_ptr<const Owner> owner)
    : socket_(std::move(socket)),
      owner_(std::move(owner)),
      read_deadline_(socket_.get_executor()),
      write_deadline_(socket_.get_executor()),
      silence_(socket_.get_executor()) {}

void HttpConnection::start() { next_request(); }

void HttpConnection::refuse(const ApiError& error) {
  keep_alive_ = false;
  phase_ = Phase::kAnswer;
  responder_ = make_responder();
  const ResponderPtr responder = responder_;  // the answer may end the connection
  responder->error(error);
}

void HttpConnection::close() {
  if (std::exchange(closed_, true)) return;
  const auto self = shared_from_this();
  Error ignored;
  socket_.close(ignored);
  read_deadline_.cancel();
  write_deadline_.cancel();
  silence_.cancel();
  queue_.clear();
  if (const ResponderPtr responder = std::exchange(responder_, nullptr)) {
    responder->client_gone();
    owner_->answered(request_, responder->status() ? responder->status() : 499);
  }
  owner_->closed(this);
}

void HttpConnection::close_when_answered() {
  closing_ = true;
  keep_alive_ = false;
  if (!answering() && phase_ != Phase::kLinger) close();
}

void HttpConnection::next_request() {
  phase_ = buffer_.size() ? Phase::kHeader : Phase::kIdle;
  keep_alive_ = true;
  streaming_ = chunked_ = head_only_ = false;
  request_ = {};
  parser_.emplace();
  parser_->eager(true);
  parser_->header_limit(static_cast<uint32_t>(owner_->limits.max_header_bytes));
  parser_->body_limit(owner_->limits.max_body_bytes);
  set_deadline(phase_ == Phase::kIdle ? owner_->limits.idle_timeout_ms
                                      : owner_->limits.header_timeout_ms);
  if (buffer_.size()) return parse();
  read_some();
}

void HttpConnection::read_some() {
  if (reading_ || closed_) return;
  reading_ = true;
  socket_.async_read_some(boost::asio::buffer(incoming_),
                          [self = shared_from_this()](Error error, size_t bytes) {
                            self->reading_ = false;
                            self->on_read(error, bytes);
                          });
}

void HttpConnection::on_read(Error error, size_t bytes) {
  if (closed_) return;
  if (error) return close();  // also the half-close of a client that wants no answer any more
  boost::asio::buffer_copy(buffer_.prepare(bytes), boost::asio::buffer(incoming_, bytes));
  buffer_.commit(bytes);
  switch (phase_) {
    case Phase::kIdle:
      phase_ = Phase::kHeader;
      set_deadline(owner_->limits.header_timeout_ms);
      return parse();
    case Phase::kHeader:
    case Phase::kBody:
      return parse();
    case Phase::kAnswer:  // the next request, early: kept, up to a limit
      if (buffer_.size() < kEarlyBytes) read_some();
      return;
    case Phase::kLinger:
      lingered_bytes_ += buffer_.size();
      buffer_.clear();
      if (lingered_bytes_ > kLingerBytes) return close();
      return read_some();
  }
}

void HttpConnection::parse() {
  while (!parser_->is_done()) {
    Error error;
    const size_t used = parser_->put(buffer_.data(), error);
    buffer_.consume(used);
    if (error && error != http::error::need_more) return refuse_bytes(error);
    if (phase_ == Phase::kHeader && parser_->is_header_done()) header_done();
    if (closed_) return;
    if (!parser_->is_done() && (error == http::error::need_more || buffer_.size() == 0)) {
      return read_some();
    }
  }
  request_done();
}

void HttpConnection::header_done() {
  phase_ = Phase::kBody;
  set_deadline(owner_->limits.idle_timeout_ms);
  if (!parser_->is_done() && lower(parser_->get()[http::field::expect]) == "100-continue") {
    send("HTTP/1.1 100 Continue\r\n\r\n");
  }
}

void HttpConnection::refuse_bytes(Error error) {
  if (error == http::error::body_limit) {
    return refuse(
        {413, "the body is larger than " + std::to_string(owner_->limits.max_body_bytes) + " bytes",
         "invalid_request_error", "", "body_too_large"});
  }
  if (error == http::error::header_limit) {
    return refuse(
        {431,
         "the header is larger than " + std::to_string(owner_->limits.max_header_bytes) + " bytes",
         "invalid_request_error", "", "header_too_large"});
  }
  refuse({400, "not HTTP/1.1: " + error.message(), "invalid_request_error", "", "bad_http"});
}

std::optional<ApiError> HttpConnection::fill_request() {
  auto& message = parser_->get();
  old_http_ = message.version() < 11;
  keep_alive_ = message.keep_alive() && !closing_;
  const std::string_view target(message.target().data(), message.target().size());
  request_.method = std::string(message.method_string());
  head_only_ = request_.method == "HEAD";
  if (head_only_) request_.method = "GET";
  for (const auto& field : message) {
    request_.headers.emplace_back(lower(field.name_string()), std::string(field.value()));
  }
  if (target.empty() || target.front() != '/') {
    return ApiError{400, "the request target must be a path, got " + std::string(target)};
  }
  const size_t question = std::min(target.find('?'), target.size());
  request_.path = percent_decoded(target.substr(0, question), false);
  request_.query = parse_query(target.substr(std::min(question + 1, target.size())));
  request_.body = std::move(message.body());
  return std::nullopt;
}

void HttpConnection::request_done() {
  read_deadline_.cancel();
  const std::optional<ApiError> error = fill_request();
  parser_.reset();
  if (error) return refuse(*error);
  phase_ = Phase::kAnswer;
  responder_ = make_responder();
  read_some();  // to notice that the client goes away
  const ResponderPtr responder = responder_;
  owner_->dispatch(request_, responder);
}

// The sink holds the connection weakly: an answer that never comes must not keep it alive.
ResponderPtr HttpConnection::make_responder() {
  const std::weak_ptr<HttpConnection> weak = weak_from_this();
  Responder::Sink sink;
  sink.reply = [weak](HttpReply reply) {
    const auto self = weak.lock();
    if (!self || self->closed_) return;
    self->send_head(reply, false);
    if (!self->head_only_ && !reply.body.empty()) self->send(std::move(reply.body));
    self->answer_done();
  };
  sink.begin = [weak](HttpReply head) {
    const auto self = weak.lock();
    if (!self || self->closed_) return;
    self->send_head(head, true);
    self->watch_stream();
  };
  sink.write = [weak](std::string bytes) {
    const auto self = weak.lock();
    if (!self || self->closed_ || bytes.empty()) return;
    self->quiet_ = false;
    if (!self->chunked_) return self->send(std::move(bytes));
    char size[20];
    std::snprintf(size, sizeof size, "%zx\r\n", bytes.size());
    self->send(size + std::move(bytes) + "\r\n");
  };
  sink.end = [weak] {
    const auto self = weak.lock();
    if (!self || self->closed_) return;
    if (self->chunked_) self->send("0\r\n\r\n");
    self->answer_done();
  };
  return std::make_shared<Responder>(std::move(sink));
}

void HttpConnection::send_head(const HttpReply& reply, bool stream) {
  streaming_ = stream;
  chunked_ = stream && !old_http_;
  if (stream && old_http_)
    keep_alive_ = false;  // the end of the stream is the end of the connection
  std::string head = "HTTP/1.1 " + std::to_string(reply.status) + " ";
  head += http::obsolete_reason(static_cast<http::status>(reply.status));
  head += "\r\ncontent-type: " + reply.type + "\r\n";
  for (const auto& [name, value] : reply.headers) head += name + ": " + value + "\r\n";
  if (chunked_) head += "transfer-encoding: chunked\r\n";
  if (!stream) head += "content-length: " + std::to_string(reply.body.size()) + "\r\n";
  if (!keep_alive_) head += "connection: close\r\n";
  if (keep_alive_ && old_http_) head += "connection: keep-alive\r\n";
  head += "\r\n";
  send(std::move(head));
}

void HttpConnection::send(std::string bytes) {
  if (closed_) return;
  queued_bytes_ += bytes.size();
  if (streaming_ && queued_bytes_ > owner_->limits.max_stream_queue_bytes) {
    owner_->slow_reader();
    return close();
  }
  queue_.push_back(std::move(bytes));
  if (!writing_) write_some();
}

void HttpConnection::write_some() {
  writing_ = true;
  // Progress of any size counts: the deadline is for a client that reads nothing.
  write_deadline_.expires_after(std::chrono::milliseconds(owner_->limits.stalled_reader_ms));
  write_deadline_.async_wait([weak = weak_from_this()](Error error) {
    const auto self = weak.lock();
    if (error || !self || self->closed_ || !self->writing_) return;
    if (self->write_deadline_.expiry() > std::chrono::steady_clock::now()) return;  // set anew
    self->owner_->slow_reader();
    self->close();
  });
  const std::string& front = queue_.front();
  socket_.async_write_some(
      boost::asio::buffer(front.data() + sent_of_front_, front.size() - sent_of_front_),
      [self = shared_from_this()](Error error, size_t bytes) { self->on_written(error, bytes); });
}

void HttpConnection::on_written(Error error, size_t bytes) {
  writing_ = false;
  if (closed_) return;
  if (error) return close();
  sent_of_front_ += bytes;
  queued_bytes_ -= bytes;
  if (sent_of_front_ == queue_.front().size()) {
    queue_.pop_front();
    sent_of_front_ = 0;
  }
  if (!queue_.empty()) return write_some();
  write_deadline_.cancel();
  go_on();
}

// When the answer is complete and out: the next request, or the end.
void HttpConnection::go_on() {
  if (closed_ || phase_ != Phase::kAnswer || responder_ || !queue_.empty()) return;
  if (keep_alive_ && !closing_) return next_request();
  phase_ = Phase::kLinger;
  Error ignored;
  socket_.shutdown(Socket::shutdown_send, ignored);
  set_deadline(kLingerMs);
  buffer_.clear();
  read_some();
}

void HttpConnection::answer_done() {
  silence_.cancel();
  const int status = responder_ ? responder_->status() : 0;
  responder_ = nullptr;
  owner_->answered(request_, status);
  go_on();
}

void HttpConnection::set_deadline(int64_t ms) {
  read_deadline_.expires_after(std::chrono::milliseconds(ms));
  read_deadline_.async_wait([weak = weak_from_this()](Error error) {
    const auto self = weak.lock();
    if (error || !self || self->closed_) return;
    if (self->read_deadline_.expiry() > std::chrono::steady_clock::now()) return;  // set anew
    if (self->phase_ == Phase::kHeader || self->phase_ == Phase::kBody) {
      return self->refuse({408, "the request took too long to arrive", "invalid_request_error", "",
                           "request_timeout"});
    }
    self->close();
  });
}

// Comment lines on a silent stream keep proxies from closing it and find dead clients.
void HttpConnection::watch_stream() {
  quiet_ = true;
  silence_.expires_after(std::chrono::milliseconds(owner_->limits.keep_alive_ms));
  silence_.async_wait([weak = weak_from_this()](Error error) {
    const auto self = weak.lock();
    if (error || !self || self->closed_ || !self->responder_) return;
    if (self->quiet_) self->responder_->write(": keep-alive\n\n");
    if (!self->closed_) self->watch_stream();
  });
}

}  // namespace ds
