// SPDX-License-Identifier: Apache-2.0
// A small HTTP/1.1 client over the daemon's UNIX socket: one request per connection,
// Content-Length, chunked and read-to-end bodies, server-sent events. What the peer sends is
// bounded in size and time before it is believed; Ctrl-C ends every wait (kCancelled).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "ds/status.h"

namespace ds::ctl {

struct HttpRequest {
  std::string method = "GET";
  std::string target;  ///< path and query, already percent-encoded
  std::string body;
  std::string content_type = "application/json";
};

struct HttpResponse {
  int status = 0;
  std::string content_type;
  std::string body;
};

/// Pieces of a streamed body; false ends the stream.
using BodySink = std::function<bool(std::string_view bytes)>;

inline constexpr int64_t kNoTimeout = -1;

class HttpClient {
 public:
  explicit HttpClient(std::string socket_path) : socket_path_(std::move(socket_path)) {}

  /// kUnavailable: nobody listens (or the connection broke before an answer). kDeadline:
  /// `timeout_ms` over everything. kCorrupt: not HTTP, or larger than the limits.
  Result<HttpResponse> fetch(const HttpRequest& request, int64_t timeout_ms) const;

  /// A 200 answer's body goes to `sink` as it comes; any other is collected in the response.
  /// `idle_ms` bounds each wait for the next bytes. The end of the body is success.
  Result<HttpResponse> stream(const HttpRequest& request, int64_t idle_ms,
                              const BodySink& sink) const;

 private:
  std::string socket_path_;
};

/// Splits an SSE body into events. Bytes may come in any pieces.
class SseReader {
 public:
  /// `on_event(event name or "message", data)`; false stops. Returns false once stopped, or when
  /// one event exceeds 4 MiB.
  bool feed(std::string_view bytes,
            const std::function<bool(std::string_view event, std::string_view data)>& on_event);

 private:
  bool line(std::string_view text,
            const std::function<bool(std::string_view event, std::string_view data)>& on_event);
  std::string partial_, event_, data_;
  bool has_data_ = false;
};

/// Percent-encodes everything but unreserved characters.
std::string url_encode(std::string_view text);

/// Whether something accepts connections there; "127.0.0.1:8471".
Status tcp_reachable(const std::string& host_port, int timeout_ms);
/// The same for a UNIX socket. kNotFound: no such file; kUnavailable: a file without a listener.
Status unix_reachable(const std::string& path, int timeout_ms);

}  // namespace ds::ctl
