// SPDX-License-Identifier: Apache-2.0
// How Driftstone reports what went wrong: Status for "done or why not", Result<T> for "a value or
// why not". Environment and input failures travel as values; broken invariants abort (DS_CHECK).
// A message says what, which, got and expected: `blk.3.ffn_up: 1536 rows, the model wants 576`.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace ds {

enum class Code {
  kOk,
  kInvalid,      // the caller's input is wrong; the same call can never succeed
  kNotFound,     // no such model, version, item, file
  kConflict,     // contradicts what is already there
  kCorrupt,      // stored bytes fail their checks
  kIo,           // the operating system refused
  kBusy,         // a limit is reached; try again later
  kUnavailable,  // not ready, shutting down, or a part is missing on this machine
  kUnsupported,  // well-formed but not implemented; the message names what
  kPermission,   // not allowed for this caller
  kCancelled,
  kDeadline,
  kPlugin,      // a plugin broke its contract
  kResource,    // not enough memory; less at once, or less beside it, may fit
  kDeviceLost,  // what computes has failed for good, and its memory with it
};

/// Stable lower-case name used in wire errors and logs, e.g. "not_found".
constexpr std::string_view code_name(Code code) {
  switch (code) {
    case Code::kOk: return "ok";
    case Code::kInvalid: return "invalid";
    case Code::kNotFound: return "not_found";
    case Code::kConflict: return "conflict";
    case Code::kCorrupt: return "corrupt";
    case Code::kIo: return "io";
    case Code::kBusy: return "busy";
    case Code::kUnavailable: return "unavailable";
    case Code::kUnsupported: return "unsupported";
    case Code::kPermission: return "permission";
    case Code::kCancelled: return "cancelled";
    case Code::kDeadline: return "deadline";
    case Code::kPlugin: return "plugin";
    case Code::kResource:
      return "resource";
    case Code::kDeviceLost:
      return "device_lost";
  }
  return "unknown";
}

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

  /// The same failure seen from one level up: `context: message`.
  Status in(std::string_view context) const {
    if (ok()) return *this;
    return {code_, std::string(context) + ": " + message_};
  }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

inline Status invalid(std::string m) { return {Code::kInvalid, std::move(m)}; }
inline Status not_found(std::string m) { return {Code::kNotFound, std::move(m)}; }
inline Status conflict(std::string m) { return {Code::kConflict, std::move(m)}; }
inline Status corrupt(std::string m) { return {Code::kCorrupt, std::move(m)}; }
inline Status io_error(std::string m) { return {Code::kIo, std::move(m)}; }
inline Status busy(std::string m) { return {Code::kBusy, std::move(m)}; }
inline Status unavailable(std::string m) { return {Code::kUnavailable, std::move(m)}; }
inline Status no_memory(std::string m) { return {Code::kResource, std::move(m)}; }
inline Status unsupported(std::string m) { return {Code::kUnsupported, std::move(m)}; }

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Status status) : state_(std::in_place_index<1>, std::move(status)) {
    if (std::get<1>(state_).ok()) std::abort();  // an OK status carries no value: caller's bug
  }

  bool ok() const { return state_.index() == 0; }
  Status status() const { return ok() ? Status() : std::get<1>(state_); }
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<T, Status> state_;
};

[[noreturn]] inline void check_failed(const char* what, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, what);
  std::abort();
}

}  // namespace ds

#define DS_CONCAT_(a, b) a##b
#define DS_CONCAT(a, b) DS_CONCAT_(a, b)

/// Return early with the failure of an expression that yields a Status.
#define DS_TRY(expr)                                      \
  do {                                                    \
    if (::ds::Status ds_try_ = (expr); !ds_try_.ok()) return ds_try_; \
  } while (0)

/// `DS_ASSIGN(auto x, call());` binds the value or returns the failure.
#define DS_ASSIGN(decl, expr) DS_ASSIGN_(decl, expr, DS_CONCAT(ds_result_, __LINE__))
#define DS_ASSIGN_(decl, expr, tmp)         \
  auto tmp = (expr);                        \
  if (!tmp.ok()) return tmp.status();       \
  decl = std::move(tmp).value()

/// Abort on a broken invariant, in every build.
#define DS_CHECK(cond) \
  do {                 \
    if (!(cond)) ::ds::check_failed(#cond, __FILE__, __LINE__); \
  } while (0)
