// SPDX-License-Identifier: Apache-2.0
// One HTTP connection: reads a request, hands it over, writes the answer, and goes on to the next.
// While an answer is computed it keeps reading, so that a client that goes away is noticed at once.
//
// Beast parses requests; answers are written as bytes. IO thread only; kept alive by its own
// handlers.
#pragma once

#include <array>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "serve/http.h"
#include "serve/http_server.h"

namespace ds {

class HttpConnection : public std::enable_shared_from_this<HttpConnection> {
 public:
  using Socket = boost::asio::generic::stream_protocol::socket;
  /// What the connection needs from its server; lives as long as the connection does.
  struct Owner {
    HttpLimits limits;
    std::function<void(HttpRequest&, const ResponderPtr&)> dispatch;
    std::function<void(const HttpRequest&, int status)> answered;
    std::function<void()> slow_reader;  ///< this client was dropped for not reading
    std::function<void(HttpConnection*)> closed;
  };

  HttpConnection(Socket socket, std::shared_ptr<const Owner> owner);
  void start();
  void refuse(const ApiError& error);  ///< answers without a request, then closes
  void close();
  void close_when_answered();
  bool answering() const { return responder_ != nullptr || !queue_.empty(); }

 private:
  using Error = boost::system::error_code;
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
  // kLinger: the last answer is out; what the client still sends is discarded, so that the kernel
  // does not reset the connection before the client has read it.
  enum class Phase { kIdle, kHeader, kBody, kAnswer, kLinger };

  void next_request();
  void read_some();
  void on_read(Error error, size_t bytes);
  void parse();
  void header_done();
  void request_done();
  void refuse_bytes(Error error);
  std::optional<ApiError> fill_request();
  ResponderPtr make_responder();
  void send_head(const HttpReply& reply, bool stream);
  void send(std::string bytes);
  void write_some();
  void on_written(Error error, size_t bytes);
  void answer_done();
  void go_on();
  void set_deadline(int64_t ms);
  void watch_stream();

  Socket socket_;
  std::shared_ptr<const Owner> owner_;
  boost::asio::steady_timer read_deadline_, write_deadline_, silence_;
  std::array<char, 16384> incoming_;  // of the read in flight: buffer_ may move meanwhile
  boost::beast::flat_buffer buffer_;
  std::optional<Parser> parser_;
  HttpRequest request_;
  ResponderPtr responder_;         ///< of the request being answered
  std::deque<std::string> queue_;  ///< bytes to send
  size_t queued_bytes_ = 0, sent_of_front_ = 0, lingered_bytes_ = 0;
  Phase phase_ = Phase::kIdle;
  bool reading_ = false, writing_ = false, closed_ = false, closing_ = false;
  bool keep_alive_ = true, old_http_ = false, head_only_ = false;
  bool streaming_ = false, chunked_ = false, quiet_ = false;
};

}  // namespace ds
