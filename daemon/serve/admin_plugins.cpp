// SPDX-License-Identifier: Apache-2.0
// Plugins over HTTP: what is loaded, why a file is not, load, reload, roll back, retire, configure,
// compare, time; and what a loaded tool finds in a text.
#include <optional>
#include <utility>

#include "plugin/plugins.h"
#include "plugin/tool_run.h"
#include "serve/admin.h"

namespace ds {
namespace {

using Work = Result<Json> (*)(Plugins&, const Json&);

Json config_in(const Json& body) {
  const Json* config = find(body, "config");
  return config != nullptr ? *config : Json();
}

/// Absent: as plugins.shadow says.
Result<std::optional<Shadow>> shadow_in(const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "shadow", ""));
  if (name.empty()) return std::optional<Shadow>();
  DS_ASSIGN(const Shadow shadow, shadow_of(name));
  return std::optional<Shadow>(shadow);
}

Result<Json> load(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string path, get_string(body, "path"));
  DS_ASSIGN(const bool trust, get_bool(body, "trust", false));
  DS_ASSIGN(const bool isolated, get_bool(body, "isolated", false));
  DS_ASSIGN(const auto shadow, shadow_in(body));
  if (trust && isolated)
    return invalid("trust and isolated: expected one of them, what runs isolated needs no trust");
  if (isolated) return plugins.load_isolated(path, config_in(body), shadow);
  return plugins.load(path, trust, config_in(body), shadow);
}

Result<Json> reload(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  DS_ASSIGN(const std::string path, get_string(body, "path", ""));
  DS_ASSIGN(const auto shadow, shadow_in(body));
  return plugins.reload(name, path, config_in(body), shadow);
}

Result<Json> rollback(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  return plugins.rollback(name);
}

Result<Json> retire(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  return plugins.retire(name);
}

Result<Json> configure(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  const Json changes = config_in(body);
  if (changes.is_null()) return invalid("config: missing, expected an object of keys");
  return plugins.configure(name, changes);
}

Result<Json> explain(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string path, get_string(body, "path"));
  return plugins.explain(path);
}

Result<Json> diff(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string a, get_string(body, "a"));
  DS_ASSIGN(const std::string b, get_string(body, "b", ""));
  return plugins.diff(a, b);
}

Result<Json> bench(Plugins& plugins, const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  DS_ASSIGN(const double seconds, get_number(body, "seconds", 2));
  return plugins.bench(name, seconds);
}

constexpr int64_t kToolNs = 120'000'000'000;  // a tool's own limit is mostly shorter

Result<Json> find_faults(Service& service, const std::string& name, const Json& body) {
  ToolRequest request;
  DS_ASSIGN(request.language, get_string(body, "language"));
  DS_ASSIGN(request.path, get_string(body, "path", ""));
  DS_ASSIGN(request.text, get_string(body, "text"));
  request.deadline_ns = service.parts.clock.monotonic_ns() + kToolNs;
  request.stop = &service.end_tools;
  DS_ASSIGN(const Plugins::Serving tool, service.parts.plugins->find(DS_KIND_TOOL, name));
  Result<Json> answer = run_tool(*tool.instance, request);
  if (answer.ok() && tool.instance->recorded().due(CallSort::kAnalyse))
    record_tool(*tool.instance, request, *answer);
  return answer;
}

}  // namespace

void add_plugin_routes(Router& router, Service& service) {
  if (service.parts.plugins == nullptr) {
    router.add_planned("/ds/v1/plugins", "this daemon runs without plugins");
    router.add_planned("/ds/v1/plugins/*", "this daemon runs without plugins");
    router.add_planned("/ds/v1/tools/*", "this daemon runs without plugins");
    return;
  }
  router.add(
      "GET", "/ds/v1/plugins", kRead, BodyKind::kNone, [&](RouteCall&, const ResponderPtr& to) {
        service.answer_from(service.quick, to,
                            [&service]() -> Result<Json> { return service.parts.plugins->list(); });
      });
  router.add("GET", "/ds/v1/plugins/{}", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(service.quick, to, [&service, name = call.params[0]] {
                 return service.parts.plugins->show(name);
               });
             });
  router.add("POST", "/ds/v1/tools/{}", kInfer, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(service.slow, to,
                                   [&service, name = call.params[0], body = std::move(call.body)] {
                                     return find_faults(service, name, body);
                                   });
             });
  const auto add = [&](const char* path, Work work) {
    router.add("POST", path, kAdmin, BodyKind::kJson,
               [&service, work](RouteCall& call, const ResponderPtr& to) {
                 service.answer_from(service.slow, to,
                                     [&service, work, body = std::move(call.body)] {
                                       return work(*service.parts.plugins, body);
                                     });
               });
  };
  add("/ds/v1/plugins/load", load);
  add("/ds/v1/plugins/reload", reload);
  add("/ds/v1/plugins/rollback", rollback);
  add("/ds/v1/plugins/retire", retire);
  add("/ds/v1/plugins/configure", configure);
  add("/ds/v1/plugins/explain", explain);
  add("/ds/v1/plugins/diff", diff);
  add("/ds/v1/plugins/bench", bench);
}

}  // namespace ds
