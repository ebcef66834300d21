// SPDX-License-Identifier: Apache-2.0
#include "ctl/http_client.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>

#include "ctl/interrupt.h"
#include "storage/descriptor.h"

namespace ds::ctl {
namespace {

constexpr size_t kMaxHeadBytes = 64u << 10;
constexpr size_t kMaxBodyBytes = 256u << 20;
constexpr size_t kMaxEventBytes = 4u << 20;
constexpr int kConnectTimeoutMs = 5000;

int64_t now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

std::string system_error() { return std::strerror(errno); }

/// Until `fd` is ready, the deadline (kNoTimeout = none) has passed, or Ctrl-C.
Status wait_for(int fd, short events, int64_t deadline_ms) {
  for (;;) {
    int wait = -1;
    if (deadline_ms != kNoTimeout) {
      wait = static_cast<int>(std::clamp<int64_t>(deadline_ms - now_ms(), 0, 1 << 30));
    }
    pollfd watched[2] = {{fd, events, 0}, {interrupt_fd(), POLLIN, 0}};
    const int ready = poll(watched, interrupt_fd() >= 0 ? 2 : 1, wait);
    if (interrupted()) return {Code::kCancelled, "interrupted"};
    if (ready > 0 && watched[0].revents) return {};
    if (ready == 0) return {Code::kDeadline, "no answer in time"};
    if (ready < 0 && errno != EINTR) return io_error("poll: " + system_error());
  }
}

/// Connects a non-blocking socket. The error says what the system said.
Status connect_socket(int fd, const sockaddr* address, socklen_t length, int timeout_ms) {
  if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) != 0) return io_error(system_error());
  if (connect(fd, address, length) == 0) return {};
  if (errno == ENOENT) return not_found(system_error());
  if (errno == EACCES || errno == EPERM) return {Code::kPermission, system_error()};
  if (errno != EINPROGRESS && errno != EAGAIN) return unavailable(system_error());
  DS_TRY(wait_for(fd, POLLOUT, now_ms() + timeout_ms));
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
  return error == 0 ? Status() : unavailable(std::strerror(error));
}

Status connect_unix(int fd, const std::string& path, int timeout_ms) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return invalid(path + ": " + std::to_string(path.size()) +
                   " bytes, a socket path has at most " +
                   std::to_string(sizeof address.sun_path - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return connect_socket(fd, reinterpret_cast<sockaddr*>(&address), sizeof address, timeout_ms)
      .in(path);
}

bool same_name(std::string_view a, std::string_view b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) {
           return std::tolower(static_cast<unsigned char>(x)) ==
                  std::tolower(static_cast<unsigned char>(y));
         });
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

/// One exchange on one connection.
class Exchange {
 public:
  /// `total_ms` bounds everything, `idle_ms` each wait; kNoTimeout = unbounded.
  Exchange(int fd, int64_t total_ms, int64_t idle_ms)
      : fd_(fd),
        idle_ms_(idle_ms),
        end_ms_(total_ms == kNoTimeout ? kNoTimeout : now_ms() + total_ms) {}

  Status send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent > 0) {
        bytes.remove_prefix(static_cast<size_t>(sent));
      } else if (errno == EAGAIN || errno == EINTR) {
        DS_TRY(wait_for(fd_, POLLOUT, deadline()));
      } else {
        return {};  // the peer may have answered early (413) and closed: read what it said
      }
    }
    return {};
  }

  Status read_head(HttpResponse& response) {
    size_t end = std::string::npos;
    while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
      if (buffer_.size() > kMaxHeadBytes) return corrupt("answer's header exceeds 64 KiB");
      DS_ASSIGN(const bool more, fill());
      if (!more) return unavailable("the connection closed before an answer");
    }
    const std::string head = buffer_.substr(0, end + 2);
    buffer_.erase(0, end + 4);
    return parse_head(head, response);
  }

  /// All of the body, in pieces. False from the sink ends early.
  Status read_body(const BodySink& sink) {
    if (chunked_) return read_chunks(sink);
    while (remaining_ != 0) {  // -1: until the peer closes
      if (buffer_.empty()) {
        DS_ASSIGN(const bool more, fill());
        if (!more) {
          return remaining_ < 0 ? Status() : unavailable("the connection closed amid the answer");
        }
      }
      size_t take = buffer_.size();
      if (remaining_ >= 0) take = std::min<size_t>(take, static_cast<size_t>(remaining_));
      if (!sink(std::string_view(buffer_).substr(0, take))) return {};
      buffer_.erase(0, take);
      if (remaining_ >= 0) remaining_ -= static_cast<int64_t>(take);
    }
    return {};
  }

 private:
  int64_t deadline() const {
    if (idle_ms_ == kNoTimeout) return end_ms_;
    const int64_t idle_end = now_ms() + idle_ms_;
    return end_ms_ == kNoTimeout ? idle_end : std::min(idle_end, end_ms_);
  }

  /// Appends what the peer sent; false at its end.
  Result<bool> fill() {
    char bytes[16384];
    for (;;) {
      const ssize_t got = recv(fd_, bytes, sizeof bytes, 0);
      if (got > 0) {
        buffer_.append(bytes, static_cast<size_t>(got));
        return true;
      }
      if (got == 0) return false;
      if (errno != EAGAIN && errno != EINTR) return unavailable("read: " + system_error());
      DS_TRY(wait_for(fd_, POLLIN, deadline()));
    }
  }

  Status parse_head(std::string_view head, HttpResponse& response) {
    const size_t line_end = head.find("\r\n");
    const std::string_view first = head.substr(0, line_end);
    const bool http = first.size() >= 12 && first.starts_with("HTTP/1.") && first[8] == ' ';
    const char* digits = first.data() + 9;
    if (!http || std::from_chars(digits, digits + 3, response.status).ptr != digits + 3) {
      return corrupt("the answer is not HTTP/1.1");
    }
    head.remove_prefix(line_end + 2);
    while (!head.empty()) {
      const size_t end = head.find("\r\n");
      const std::string_view header = head.substr(0, end);
      head.remove_prefix(end + 2);
      const size_t colon = header.find(':');
      if (colon == header.npos) return corrupt("a header without a colon in the answer");
      DS_TRY(take_header(header.substr(0, colon), trimmed(header.substr(colon + 1)), response));
    }
    if (response.status == 204 || response.status == 304) remaining_ = 0;
    return {};
  }

  Status take_header(std::string_view name, std::string_view value, HttpResponse& response) {
    if (same_name(name, "content-type")) response.content_type = value;
    if (same_name(name, "transfer-encoding")) chunked_ = same_name(value, "chunked");
    if (!same_name(name, "content-length")) return {};
    const auto [end, error] =
        std::from_chars(value.data(), value.data() + value.size(), remaining_);
    if (error != std::errc() || end != value.data() + value.size() || remaining_ < 0 ||
        remaining_ > static_cast<int64_t>(kMaxBodyBytes)) {
      return corrupt("content-length " + std::string(value) + ", expected at most 256 MiB");
    }
    return {};
  }

  /// The next CRLF-terminated line of the chunk framing.
  Result<std::string> read_line() {
    size_t end = 0;
    while ((end = buffer_.find("\r\n")) == std::string::npos) {
      if (buffer_.size() > 4096) return corrupt("a chunk header exceeds 4 KiB");
      DS_ASSIGN(const bool more, fill());
      if (!more) return unavailable("the connection closed amid the answer");
    }
    std::string line = buffer_.substr(0, end);
    buffer_.erase(0, end + 2);
    return line;
  }

  Status read_chunks(const BodySink& sink) {
    for (;;) {
      DS_ASSIGN(const std::string line, read_line());
      const std::string_view size_text = trimmed(std::string_view(line).substr(0, line.find(';')));
      size_t size = 0;
      const auto [end, error] =
          std::from_chars(size_text.data(), size_text.data() + size_text.size(), size, 16);
      if (error != std::errc() || end != size_text.data() + size_text.size() ||
          size > kMaxBodyBytes) {
        return corrupt("chunk size \"" + std::string(size_text.substr(0, 32)) + "\"");
      }
      if (size == 0) return {};  // trailers are of no use here
      remaining_ = static_cast<int64_t>(size);
      bool wanted = true;
      chunked_ = false;
      const Status status = read_body([&](std::string_view bytes) { return wanted = sink(bytes); });
      chunked_ = true;
      if (!status.ok() || !wanted) return status;
      DS_ASSIGN(const std::string after, read_line());
      if (!after.empty()) return corrupt("bytes after the end of a chunk");
    }
  }

  const int fd_;
  const int64_t idle_ms_, end_ms_;
  std::string buffer_;
  int64_t remaining_ = -1;
  bool chunked_ = false;
};

std::string request_text(const HttpRequest& request) {
  std::string text = request.method + " " + request.target + " HTTP/1.1\r\nHost: localhost\r\n" +
                     "User-Agent: dsctl\r\nAccept: */*\r\nConnection: close\r\n";
  if (!request.body.empty() || request.method == "POST") {
    text += "Content-Type: " + request.content_type + "\r\n";
    text += "Content-Length: " + std::to_string(request.body.size()) + "\r\n";
  }
  return text + "\r\n" + request.body;
}

}  // namespace

Result<HttpResponse> HttpClient::fetch(const HttpRequest& request, int64_t timeout_ms) const {
  const Descriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.get() < 0) return io_error("socket: " + system_error());
  DS_TRY(connect_unix(socket.get(), socket_path_, kConnectTimeoutMs));
  Exchange exchange(socket.get(), timeout_ms, kNoTimeout);
  DS_TRY(exchange.send(request_text(request)));
  HttpResponse response;
  DS_TRY(exchange.read_head(response));
  bool fits = true;
  DS_TRY(exchange.read_body([&](std::string_view bytes) {
    fits = response.body.size() + bytes.size() <= kMaxBodyBytes;
    if (fits) response.body += bytes;
    return fits;
  }));
  if (!fits) return corrupt("answer exceeds 256 MiB");
  return response;
}

Result<HttpResponse> HttpClient::stream(const HttpRequest& request, int64_t idle_ms,
                                        const BodySink& sink) const {
  const Descriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.get() < 0) return io_error("socket: " + system_error());
  DS_TRY(connect_unix(socket.get(), socket_path_, kConnectTimeoutMs));
  Exchange exchange(socket.get(), kNoTimeout, idle_ms);
  DS_TRY(exchange.send(request_text(request)));
  HttpResponse response;
  DS_TRY(exchange.read_head(response));
  DS_TRY(exchange.read_body([&](std::string_view bytes) {
    if (response.status == 200) return sink(bytes);
    response.body += bytes;
    return response.body.size() < kMaxHeadBytes;
  }));
  return response;
}

bool SseReader::line(std::string_view text,
                     const std::function<bool(std::string_view, std::string_view)>& on_event) {
  if (text.empty()) {  // a blank line ends the event
    const bool go_on = !has_data_ || on_event(event_.empty() ? "message" : event_, data_);
    event_.clear();
    data_.clear();
    has_data_ = false;
    return go_on;
  }
  const size_t colon = text.find(':');
  const std::string_view field = text.substr(0, colon);
  std::string_view value = colon == text.npos ? "" : text.substr(colon + 1);
  if (value.starts_with(' ')) value.remove_prefix(1);
  if (field == "event") event_ = value;
  if (field == "data") {
    if (has_data_) data_ += '\n';
    data_ += value;
    has_data_ = true;
  }
  return data_.size() <= kMaxEventBytes;
}

bool SseReader::feed(std::string_view bytes,
                     const std::function<bool(std::string_view, std::string_view)>& on_event) {
  partial_ += bytes;
  size_t begin = 0;
  for (size_t end; (end = partial_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string_view text = std::string_view(partial_).substr(begin, end - begin);
    if (text.ends_with('\r')) text.remove_suffix(1);
    if (!line(text, on_event)) return false;
  }
  partial_.erase(0, begin);
  return partial_.size() <= kMaxEventBytes;
}

std::string url_encode(std::string_view text) {
  constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) || c == '-' || c == '_' || c == '.' || c == '~') {
      out += c;
    } else {
      out += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out;
}

Status tcp_reachable(const std::string& host_port, int timeout_ms) {
  const size_t colon = host_port.rfind(':');
  int port = 0;
  if (colon != std::string::npos) {
    const char* end = host_port.data() + host_port.size();
    std::from_chars(host_port.data() + colon + 1, end, port);
  }
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (port <= 0 || port > 65535 ||
      inet_pton(AF_INET, host_port.substr(0, colon).c_str(), &address.sin_addr) != 1) {
    return invalid(host_port + ": expected address:port");
  }
  const Descriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.get() < 0) return io_error("socket: " + system_error());
  return connect_socket(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address,
                        timeout_ms)
      .in(host_port);
}

Status unix_reachable(const std::string& path, int timeout_ms) {
  const Descriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.get() < 0) return io_error("socket: " + system_error());
  return connect_unix(socket.get(), path, timeout_ms);
}

}  // namespace ds::ctl
