// SPDX-License-Identifier: Apache-2.0
// HTTP/1.1 over the UNIX control socket and TCP. Boost.Beast parses (in http_connection.cpp only);
// this file knows listeners, who the caller is, and limits. IO thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "metrics.h"
#include "serve/http.h"
#include "serve/router.h"

namespace boost::asio {
class io_context;
}

namespace ds {

struct HttpLimits {
  size_t max_header_bytes = 16u << 10;
  size_t max_body_bytes = 32u << 20;
  size_t max_connections = 256;  ///< per listener
  size_t max_stream_queue_bytes = 1u << 20;
  int64_t idle_timeout_ms = 60'000;
  int64_t header_timeout_ms = 10'000;
  int64_t stalled_reader_ms = 5'000;
  int64_t keep_alive_ms = 15'000;  ///< a comment line on a silent event stream
};

/// Who may talk to a TCP listener, and as what.
struct HttpAccess {
  std::vector<std::string>
      hosts;  ///< accepted in Host and Origin besides localhost, 127.0.0.1, [::1]
  /// Roles of a bearer token beyond those of the listener; 0 for one that is not known.
  std::function<uint8_t(std::string_view token)> bearer;
};

/// Host and Origin as a TCP listener accepts them: null, or why the request is refused. Guards
/// against web pages that reach for the daemon through the visitor's browser (DNS rebinding,
/// cross-site posts).
std::unique_ptr<ApiError> check_host_and_origin(const HttpRequest& request,
                                                const std::vector<std::string>& hosts);

class HttpServer {
 public:
  HttpServer(boost::asio::io_context& io, const Router& router, Metrics& metrics, HttpLimits limits,
             HttpAccess access);
  ~HttpServer();

  /// Mode 0600, an old socket file is replaced. Callers other than root and the daemon's user:
  /// refused.
  Status listen_unix(const std::string& path);
  /// "127.0.0.1:0", "[::1]:8471", "localhost:8471". Returns the address with its real port.
  Result<std::string> listen_tcp(const std::string& address);

  void stop_accepting();
  bool idle() const;  ///< no answer is being computed or sent
  void close_all();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace ds
