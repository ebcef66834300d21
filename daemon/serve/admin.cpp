// SPDX-License-Identifier: Apache-2.0
// Steering: learning, replay, backup, configuration, tokens, tokenizer.
#include "serve/admin.h"

#include <utility>

namespace ds {
namespace {

constexpr int64_t kDefaultTokenSeconds = 15 * 60, kMaxTokenSeconds = 24 * 3600;

Status no_learner() { return unsupported("this daemon runs without a learner"); }

void learn_step(Service& service, RouteCall& call, const ResponderPtr& to) {
  if (!service.parts.learn.step) return to->result(no_learner());
  const Result<bool> wait = get_bool(call.body, "wait", true);
  if (!wait.ok()) return to->result(wait.status());
  service.parts.learn.step(*wait, service.answer_later(to));
}

void set_paused(Service& service, bool paused, const ResponderPtr& to) {
  if (!service.parts.learn.set_paused) return to->result(no_learner());
  service.answer_from(service.slow, to, [&service, paused]() -> Result<Json> {
    DS_TRY(service.parts.learn.set_paused(paused));
    return service.parts.learn.status ? service.parts.learn.status() : Json{{"paused", paused}};
  });
}

Result<Json> replay_summary(const ReplayStore& store) {
  Json domains = Json::object();
  for (const std::string& domain : store.domains()) {
    domains[domain] = {{"examples", store.examples(domain).size()}};
  }
  return Json{{"domains", std::move(domains)},
              {"offset", store.last_offset()},
              {"store_id", store.store_id()}};
}

// Records by state add up to all of them.
int64_t count_items(const Json& stats) {
  int64_t total = 0;
  if (const Json* states = find(stats, "state")) {
    for (const Json& count : *states) total += count.is_number_integer() ? count.get<int64_t>() : 0;
  }
  return total;
}

Result<Json> verify_replay(const ReplayStore& store) {
  DS_TRY(store.verify());
  return Json{{"ok", true}, {"records", count_items(store.stats())}};
}

Result<Json> set_config(Config& config, const Json& body) {
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  const Json* value = find(body, "value");
  if (!value || value->is_structured())
    return invalid("value: missing, expected text, a number or a flag");
  const std::string text = value->is_string() ? value->get<std::string>() : dump_json(*value);
  DS_TRY(config.set_live(name, text));
  for (const Json& setting : config.show()) {
    if (const Json* known = find(setting, "name"); known && *known == name) return setting;
  }
  return not_found("no setting " + name);
}

void issue_token(Service& service, RouteCall& call, const ResponderPtr& to) {
  const Result<int64_t> seconds = get_int(call.body, "ttl_s", kDefaultTokenSeconds);
  if (!seconds.ok()) return to->result(seconds.status());
  if (*seconds < 1 || *seconds > kMaxTokenSeconds) {
    return to->result(invalid("ttl_s: " + std::to_string(*seconds) + ", expected 1 to 86400"));
  }
  to->json(
      {{"token", service.tokens.issue(kAllRoles, *seconds * 1000)}, {"expires_in_s", *seconds}});
}

Result<Json> tokenize(const Tokenizer& tokenizer, const Json& body) {
  DS_ASSIGN(const std::string text, get_string(body, "text"));
  return Json{{"ids", tokenizer.encode(text, true)}};
}

Result<Json> detokenize(const Tokenizer& tokenizer, const Json& body) {
  const Json* list = find(body, "ids");
  if (!list || !list->is_array()) return invalid("ids: missing or not a list");
  std::vector<TokenId> ids;
  for (const Json& item : *list) {
    const int64_t id = item.is_number_integer() ? item.get<int64_t>() : -1;
    if (id < 0 || id >= tokenizer.vocab_size()) {
      return invalid("ids: " + dump_json(item) + " is not a token id below " +
                     std::to_string(tokenizer.vocab_size()));
    }
    ids.push_back(static_cast<TokenId>(id));
  }
  return Json{{"text", tokenizer.decode(ids)}};
}

void add_text_routes(Router& router, Service& service) {
  using Work = Result<Json> (*)(const Tokenizer&, const Json&);
  const auto add = [&](const char* path, Work work) {
    router.add("POST", path, kInfer, BodyKind::kJson,
               [&service, work](RouteCall& call, const ResponderPtr& to) {
                 service.answer_from(service.quick, to,
                                     [&service, work, body = std::move(call.body)] {
                                       return work(*service.parts.tokenizer, body);
                                     });
               });
  };
  add("/ds/v1/tokenize", tokenize);
  add("/ds/v1/detokenize", detokenize);
}

void add_replay_routes(Router& router, Service& service) {
  router.add("GET", "/ds/v1/replay", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) {
               service.answer_from(service.slow, to,
                                   [&service] { return replay_summary(service.parts.store); });
             });
  router.add("POST", "/ds/v1/replay/verify", kAdmin, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) {
               service.answer_from(service.slow, to,
                                   [&service] { return verify_replay(service.parts.store); });
             });
  router.add("POST", "/ds/v1/backup", kAdmin, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) {
               const Result<std::string> path = get_string(call.body, "path");
               if (!path.ok()) return to->result(path.status());
               if (!service.parts.backup)
                 return to->result(unsupported("this daemon makes no backups"));
               service.answer_from(service.slow, to,
                                   [&service, path = *path] { return service.parts.backup(path); });
             });
}

}  // namespace

void add_learn_routes(Router& router, Service& service) {
  router.add(
      "GET", "/ds/v1/learn", kRead, BodyKind::kNone, [&](RouteCall&, const ResponderPtr& to) {
        if (!service.parts.learn.status) return to->result(no_learner());
        service.answer_from(service.quick, to,
                            [&service]() -> Result<Json> { return service.parts.learn.status(); });
      });
  router.add("POST", "/ds/v1/learn/step", kAdmin, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) { learn_step(service, call, to); });
  router.add("POST", "/ds/v1/learn/pause", kAdmin, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) { set_paused(service, true, to); });
  router.add("POST", "/ds/v1/learn/resume", kAdmin, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) { set_paused(service, false, to); });
  add_replay_routes(router, service);

  router.add("GET", "/ds/v1/config", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) {
               to->json({{"items", service.parts.config.show()}});
             });
  router.add("POST", "/ds/v1/config", kAdmin, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) {
               // Listeners of a setting may take their time.
               service.answer_from(service.slow, to, [&service, body = std::move(call.body)] {
                 return set_config(service.parts.config, body);
               });
             });
  router.add("POST", "/ds/v1/tokens", kAdmin, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) { issue_token(service, call, to); });
  add_text_routes(router, service);
  router.add_planned("/ds/v1/drift", "drift detection");
}

}  // namespace ds
