// SPDX-License-Identifier: Apache-2.0
// Path table: which handler answers which method and path, who may call it, and what is said to
// those who ask for something else (404, 405, 403, 501), always as JSON.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "metrics.h"
#include "serve/http.h"

namespace ds {

/// A request that found its route.
struct RouteCall {
  HttpRequest& request;
  std::vector<std::string> params;  ///< the path's {} segments in order
  Json body;  ///< parsed body, null when there is none or the route takes it raw
};

enum class BodyKind { kNone, kJson, kRaw };

class Router {
 public:
  /// May move the body out of the request. Must answer through the responder, now or later.
  using Handler = std::function<void(RouteCall& call, const ResponderPtr& responder)>;

  explicit Router(Metrics& metrics) : metrics_(metrics) {}

  /// `pattern`: "/ds/v1/versions/{}"; a literal segment wins over {}.
  void add(const std::string& method, const std::string& pattern, Role role, BodyKind body,
           Handler handler);
  /// Any method answers 501 with `missing`. A pattern ending in "/*" covers everything below.
  void add_planned(const std::string& pattern, std::string missing);

  void dispatch(HttpRequest& request, const ResponderPtr& responder) const;
  /// For the request counter, once the answer is over: the route's pattern, never the raw path.
  void count(const HttpRequest& request, int status) const;

 private:
  struct Route {
    std::string method, pattern;
    std::vector<std::string> segments;
    Role role;
    BodyKind body;
    Handler handler;
    std::string missing;  ///< planned
  };
  std::vector<const Route*> matches(const std::vector<std::string>& path) const;
  Metrics& metrics_;
  std::vector<Route> routes_;
};

}  // namespace ds
