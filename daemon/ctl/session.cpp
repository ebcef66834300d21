// SPDX-License-Identifier: Apache-2.0
#include "ctl/session.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "ctl/interrupt.h"
#include "ctl/output.h"

namespace ds::ctl {
namespace {

constexpr int64_t kShortTimeoutMs = 10'000;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

bool is_folder(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

Code code_of_http(int status) {
  switch (status) {
    case 401:
    case 403:
      return Code::kPermission;
    case 404:
      return Code::kNotFound;
    case 409:
      return Code::kConflict;
    case 429:
      return Code::kBusy;
    case 501:
      return Code::kUnsupported;
    case 503:
      return Code::kUnavailable;
    case 504:
      return Code::kDeadline;
    default:
      return status >= 500 ? Code::kIo : Code::kInvalid;
  }
}

const char* default_hint(Code code) {
  switch (code) {
    case Code::kPermission:
      return "run dsctl as root or as the daemon's user";
    case Code::kDeadline:
      return "allow more time with --timeout SECONDS";
    case Code::kBusy:
      return "try again in a moment; dsctl top shows what is running";
    case Code::kUnavailable:
      return "the daemon is starting or stopping; dsctl doctor says more";
    case Code::kNotFound:
      return "check the name with the noun's ls command";
    case Code::kUnsupported:
      return "this daemon does not have that part yet";
    case Code::kCancelled:
      return "nothing was undone; what the daemon had begun may go on";
    default:
      return "dsctl doctor looks for common causes";
  }
}

}  // namespace

int exit_code(Code code) {
  switch (code) {
    case Code::kOk:
      return kDone;
    case Code::kNotFound:
      return kNoSuch;
    case Code::kConflict:
    case Code::kBusy:
      return kInTheWay;
    case Code::kUnavailable:
      return kUnreachable;
    case Code::kPermission:
      return kForbidden;
    case Code::kDeadline:
      return kTimedOut;
    case Code::kCorrupt:
      return kNotGood;
    case Code::kCancelled:
      return kInterrupted;
    default:
      return kFailed;
  }
}

std::string find_run_dir(const std::string& named) {
  if (!named.empty()) return named;
  if (const std::string set = environment("DS_RUN_DIR"); !set.empty()) return set;
  const std::string runtime = environment("XDG_RUNTIME_DIR");
  const std::string own =
      runtime.empty() ? "/tmp/driftstone-" + std::to_string(getuid()) : runtime + "/driftstone";
  return is_folder(own) ? own : "/run/driftstone";
}

Session::Session(const GlobalOptions& options)
    : options_(options), run_dir_(find_run_dir(options.run_dir)) {
  colour_ =
      isatty(STDOUT_FILENO) && environment("NO_COLOR").empty() && environment("TERM") != "dumb";
  interactive_ = isatty(STDIN_FILENO) && isatty(STDERR_FILENO);
}

int64_t Session::timeout_ms(Patience patience) const {
  if (options_.timeout_s > 0) return static_cast<int64_t>(options_.timeout_s * 1000);
  return patience == Patience::kShort ? kShortTimeoutMs : kNoTimeout;
}

Status Session::remember(const Status& status) {
  last_code_.clear();
  last_hint_.clear();
  if (status.code() == Code::kNotFound || status.code() == Code::kUnavailable) {
    last_hint_ =
        "start it with dsd --model FILE --data DIR --run DIR, or name its folder with --run DIR";
    return unavailable("no daemon answers: " + status.message());
  }
  return status;
}

Status Session::error_of(const HttpResponse& response) {
  last_hint_.clear();
  last_code_.clear();
  const Code code = code_of_http(response.status);
  const auto body = parse_json(response.body);
  if (!body.ok()) return {code, "HTTP " + std::to_string(response.status)};
  last_code_ = text_at(*body, "error.code", "");
  return {code, text_at(*body, "error.message", "HTTP " + std::to_string(response.status))};
}

Result<Json> Session::call(const HttpRequest& request, Patience patience) {
  const auto response = HttpClient(socket_path()).fetch(request, timeout_ms(patience));
  if (!response.ok()) return remember(response.status());
  if (response->status < 200 || response->status > 299) return error_of(*response);
  const auto body = parse_json(response->body);
  if (!body.ok()) {
    return corrupt(request.method + " " + request.target + ": " + body.status().message());
  }
  return body;
}

Result<Json> Session::get(const std::string& target) {
  return call({"GET", target, ""}, Patience::kShort);
}

Result<Json> Session::post(const std::string& target, const Json& body, Patience patience) {
  return call({"POST", target, dump_json(body)}, patience);
}

Result<Json> Session::remove(const std::string& target, Patience patience) {
  return call({"DELETE", target, ""}, patience);
}

Result<std::string> Session::get_text(const std::string& target) {
  const auto response =
      HttpClient(socket_path()).fetch({"GET", target, ""}, timeout_ms(Patience::kShort));
  if (!response.ok()) return remember(response.status());
  if (response->status != 200) return error_of(*response);
  return response->body;
}

Status Session::follow(const HttpRequest& request, int64_t idle_ms,
                       const std::function<bool(std::string_view, const Json&)>& on_event) {
  SseReader reader;
  Status bad;
  const auto response =
      HttpClient(socket_path()).stream(request, idle_ms, [&](std::string_view bytes) {
        return reader.feed(bytes, [&](std::string_view name, std::string_view data) {
          if (data == "[DONE]") return true;
          const auto body = parse_json(data);
          if (!body.ok()) bad = corrupt("an event that is not JSON: " + body.status().message());
          return body.ok() && on_event(name, *body);
        });
      });
  if (!response.ok()) return remember(response.status());
  if (response->status != 200) return error_of(*response);
  return bad;
}

void Session::print(std::string_view text) const {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void Session::document(std::string_view schema, const Json& body) const {
  const Json wrapped = body.is_object() ? body : Json{{"items", body}};
  const std::string text = dump_json(wrapped, 2);
  const std::string head = "{\n  \"schema\": \"" + std::string(schema) + "\"";
  print(head + (wrapped.empty() ? "\n}" : "," + text.substr(1)) + "\n");
}

void Session::json_line(const Json& body) const { print(dump_json(body) + "\n"); }

int Session::fail(const Status& status, std::string_view hint) {
  const std::string code = last_code_.empty() ? std::string(code_name(status.code())) : last_code_;
  std::string said = last_hint_.empty() ? std::string(hint) : last_hint_;
  if (said.empty()) said = default_hint(status.code());
  return fail_as(exit_code(status.code()), code, status.message(), said);
}

int Session::fail_as(int exit, std::string_view code, const std::string& message,
                     std::string_view hint) {
  if (json()) {
    const Json error = {{"code", code}, {"message", message}, {"hint", hint}};
    print(dump_json(Json{{"error", error}}) + "\n");
  } else {
    std::fprintf(stderr, "dsctl: %s\nhint: %s\n", printable(message).c_str(),
                 printable(hint).c_str());
  }
  return exit;
}

bool Session::confirmed(const std::string& question, int& exit) {
  if (options_.yes) return true;
  if (!interactive_) {
    exit = fail_as(kUsage, "confirmation_needed", question + " needs a confirmation",
                   "repeat the command with --yes");
    return false;
  }
  std::fprintf(stderr, "%s? [y/N] ", printable(question).c_str());
  char line[16] = "";
  const bool yes = std::fgets(line, sizeof line, stdin) && (line[0] == 'y' || line[0] == 'Y');
  exit = interrupted() ? kInterrupted : kFailed;
  if (!yes) std::fprintf(stderr, "nothing changed\n");
  return yes;
}

}  // namespace ds::ctl
