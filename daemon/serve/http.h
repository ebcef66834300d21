// SPDX-License-Identifier: Apache-2.0
// A request and its answer as the routes see them, without a word about sockets. IO thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ds/status.h"
#include "storage/json.h"

namespace ds {

/// What a caller may do; a set of bits.
enum Role : uint8_t { kInfer = 1, kFeedback = 2, kRead = 4, kAdmin = 8 };
inline constexpr uint8_t kAllRoles = kInfer | kFeedback | kRead | kAdmin;

using Headers = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;  ///< "GET"; HEAD arrives as GET
  std::string path;    ///< percent-decoded, without the query
  Headers query;       ///< decoded name-value pairs in order
  Headers headers;     ///< names in lower case
  std::string body;
  uint8_t roles = 0;

  const std::string* header(std::string_view name) const;
  std::string query_value(std::string_view name, std::string_view fallback = "") const;
};

struct HttpReply {
  int status = 200;
  std::string type = "application/json";
  std::string body;
  Headers headers;
};

/// Why a request is refused, in OpenAI's form: {"error":{message,type,param,code}}.
struct ApiError {
  int status = 400;
  std::string message;
  std::string type = "invalid_request_error";
  std::string param = {}, code = {};  ///< "" = null
  int64_t retry_after_s = 0;          ///< with 429 and 503
};
Json error_json(const ApiError& error);
/// A message may quote what was sent, which may be megabytes: of a long one only beginning and end.
std::string shortened(const std::string& message);
/// HTTP status and type by Code: invalid 400, not_found 404, permission 403, conflict 409 (not to
/// be retried), busy 429, unavailable, resource and device_lost 503, unsupported 501, deadline 504,
/// others 500.
ApiError api_error(const Status& status);

/// The one answer to one request. Shared by the connection and whoever is to answer; methods do
/// nothing once the client is gone.
class Responder {
 public:
  /// The connection's side.
  struct Sink {
    std::function<void(HttpReply)> reply;
    std::function<void(HttpReply head)> begin;
    std::function<void(std::string bytes)> write;
    std::function<void()> end;
  };
  explicit Responder(Sink sink) : sink_(std::move(sink)) {}

  void add_header(std::string name,
                  std::string value);  ///< before the answer; control bytes dropped
  void reply(HttpReply reply);
  void json(const Json& body, int status = 200);
  void error(const ApiError& error);
  void result(const Result<Json>& result);  ///< 200 with the value, or the error

  /// Server-sent events: begin, any number of write(), end.
  void begin_stream();
  void event(const Json& data);  ///< `data: {...}`
  void write(std::string bytes);
  void end();

  bool open() const { return open_; }  ///< the client is there and not yet fully answered
  bool started() const { return started_; }
  /// Called once if the client goes away before the end. At once if it already has.
  void on_close(std::function<void()> closed);

  // Called by the connection.
  void client_gone();
  int status() const { return status_; }  ///< of the answer; 0 before it

 private:
  void finish();
  Sink sink_;
  Headers headers_;
  std::function<void()> on_close_;
  bool open_ = true, started_ = false, gone_ = false;
  int status_ = 0;
};
using ResponderPtr = std::shared_ptr<Responder>;

}  // namespace ds
