// SPDX-License-Identifier: Apache-2.0
// Matching is a linear scan over a few dozen routes, segment by segment.
#include "serve/router.h"

#include <algorithm>
#include <utility>

#include "log.h"

namespace ds {
namespace {

std::vector<std::string> split_path(const std::string& path) {
  std::vector<std::string> segments;
  size_t at = 0;
  while (at < path.size()) {
    const size_t end = std::min(path.find('/', at), path.size());
    if (end > at) segments.push_back(path.substr(at, end - at));
    at = end + 1;
  }
  return segments;
}

const char* role_name(Role role) {
  switch (role) {
    case kInfer:
      return "infer";
    case kFeedback:
      return "feedback";
    case kRead:
      return "read";
    case kAdmin:
      return "admin";
  }
  return "?";
}

}  // namespace

void Router::add(const std::string& method, const std::string& pattern, Role role, BodyKind body,
                 Handler handler) {
  routes_.push_back({method, pattern, split_path(pattern), role, body, std::move(handler), ""});
}

void Router::add_planned(const std::string& pattern, std::string missing) {
  routes_.push_back(
      {"", pattern, split_path(pattern), kRead, BodyKind::kNone, nullptr, std::move(missing)});
}

// All routes of the best matching pattern (one per method).
std::vector<const Router::Route*> Router::matches(const std::vector<std::string>& path) const {
  std::vector<const Route*> found;
  int best = -1;
  for (const Route& route : routes_) {
    const bool open_end = !route.segments.empty() && route.segments.back() == "*";
    const size_t fixed = route.segments.size() - (open_end ? 1 : 0);
    if (open_end ? path.size() < fixed : path.size() != fixed) continue;
    int literals = 0;
    bool fits = true;
    for (size_t i = 0; i < fixed && fits; ++i) {
      const bool equal = route.segments[i] == path[i];
      fits = equal || route.segments[i] == "{}";
      literals += equal;
    }
    if (!fits || literals < best) continue;
    if (literals > best) found.clear();
    best = literals;
    found.push_back(&route);
  }
  return found;
}

void Router::dispatch(HttpRequest& request, const ResponderPtr& responder) const {
  const std::vector<std::string> path = split_path(request.path);
  const std::vector<const Route*> found = matches(path);
  if (found.empty()) {
    return responder->error(
        {404, "no route " + request.path, "invalid_request_error", "", "unknown_url"});
  }
  if (found.front()->handler == nullptr) {
    return responder->error({501, request.path + " is not built yet: " + found.front()->missing,
                             "not_implemented", "", "not_implemented"});
  }
  const auto route = std::find_if(found.begin(), found.end(),
                                  [&](const Route* r) { return r->method == request.method; });
  if (route == found.end()) {
    std::string allowed;
    for (const Route* r : found) allowed += (allowed.empty() ? "" : ", ") + r->method;
    responder->add_header("allow", allowed);
    return responder->error({405, request.method + " " + request.path + ": use " + allowed,
                             "invalid_request_error", "", "method_not_allowed"});
  }
  if (!(request.roles & (*route)->role)) {
    log(LogLevel::kWarn, "serve",
        "refused for want of a role: " + request.method + " " + (*route)->pattern);
    return responder->error({403,
                             request.method + " " + request.path + " needs the role " +
                                 role_name((*route)->role) +
                                 ": use the control socket or a bearer token that has it",
                             "permission_error", "", "forbidden"});
  }
  if ((*route)->role == kAdmin)
    log(LogLevel::kInfo, "serve", "admin: " + request.method + " " + (*route)->pattern);
  RouteCall call{request, {}, {}};
  for (size_t i = 0; i < (*route)->segments.size(); ++i) {
    if ((*route)->segments[i] == "{}") call.params.push_back(path[i]);
  }
  if ((*route)->body == BodyKind::kJson) {
    Result<Json> body =
        request.body.empty() ? Result<Json>(Json::object()) : parse_json(request.body);
    if (body.ok() && !body->is_object()) {
      body = invalid("the body is " + std::string(body->type_name()) + ", expected a JSON object");
    }
    if (!body.ok()) {
      return responder->error(
          {400, body.status().message(), "invalid_request_error", "", "bad_json"});
    }
    call.body = std::move(*body);
    request.body = {};
  }
  (*route)->handler(call, responder);
}

void Router::count(const HttpRequest& request, int status) const {
  const std::vector<const Route*> found = matches(split_path(request.path));
  metrics_
      .counter("ds_http_requests_total", "HTTP requests by route and status code.",
               {{"route", found.empty() ? "none" : found.front()->pattern},
                {"code", std::to_string(status)}})
      .add();
}

}  // namespace ds
