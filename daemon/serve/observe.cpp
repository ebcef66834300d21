// SPDX-License-Identifier: Apache-2.0
// What is going on: health, status, live requests, metrics, events.
#include <sys/utsname.h>
#include <unistd.h>

#include <charconv>
#include <utility>

#include "serve/admin.h"
#include "serve/event_socket.h"

namespace ds {
namespace {

constexpr double kSecondsPerNs = 1e-9;

Json store_summary(const ReplayStore& store) {
  const Json stats = store.stats();
  int64_t items = 0;
  if (const Json* states = find(stats, "state")) {
    for (const Json& count : *states) items += count.is_number_integer() ? count.get<int64_t>() : 0;
  }
  const Json* bytes = find(stats, "bytes");
  return {
      {"items", items}, {"bytes", bytes ? *bytes : Json(0)}, {"last_offset", store.last_offset()}};
}

Json gate_summary(const Json& learning) {
  if (const Json* gate = find(learning, "gate"); gate && gate->is_object()) return *gate;
  return {{"promoted", 0}, {"held", 0}, {"rolled_back", 0}};
}

DeviceState::View device_view(const ServerParts& parts) {
  return parts.device != nullptr ? parts.device->view() : DeviceState::View();
}

/// {name, state, reason, since_ms}: what it is meant to compute on, and whether it does.
Json device_summary(const ServerParts& parts) {
  using Phase = DeviceState::Phase;
  const DeviceState::View now = device_view(parts);
  Json out = {{"name", parts.isa},
              {"state", now.phase == Phase::kComputes ? "ok"
                        : now.phase == Phase::kLost   ? "lost"
                                                      : "cpu_serves"}};
  if (now.phase == Phase::kComputes) return out;
  out["reason"] = now.reason;
  out["since_ms"] = now.since_ms;
  return out;
}

Json health(const ServerParts& parts) {
  if (device_view(parts).phase == DeviceState::Phase::kComputes) return {{"status", "ok"}};
  return {{"status", "degraded"}, {"device", device_summary(parts)}};
}

Result<Json> status(Service& service) {
  ServerParts& parts = service.parts;
  const auto current = parts.versions.current();
  Json serving = parts.engine.stats();
  serving["version"] = current->version;
  serving["fingerprint"] = current->fingerprint;
  serving["since_ms"] = service.serving_since_ms.load();
  const Json learning = parts.learn.status ? parts.learn.status() : Json{{"enabled", false}};
  utsname host{};
  uname(&host);
  return Json{{"version", DS_VERSION},
              {"now_ms", parts.clock.unix_ms()},
              {"uptime_s", (parts.clock.monotonic_ns() - service.started_ns) * kSecondsPerNs},
              {"host", host.nodename},
              {"isa", parts.isa},
              {"device", device_summary(parts)},
              {"pid", getpid()},
              {"data_dir", parts.data_dir},
              {"model",
               {{"name", parts.model.name},
                {"path", parts.model.path},
                {"sha256", parts.model.sha256},
                {"parameters", parts.model.parameters}}},
              {"serving", std::move(serving)},
              {"learning", learning},
              {"store", store_summary(parts.store)},
              {"gate", gate_summary(learning)}};
}

void metrics_page(Service& service, const ResponderPtr& to) {
  service.quick.post([&service, to, mailbox = service.mailbox] {
    HttpReply reply;
    reply.type = "text/plain; version=0.0.4; charset=utf-8";
    reply.body = service.parts.metrics.render();
    mailbox->post([to, reply] { to->reply(reply); });
  });
}

bool wanted(const std::string& topics, const std::string& topic) {
  if (topics.empty()) return true;
  return ("," + topics + ",").find("," + topic + ",") != std::string::npos;
}

void send_event(Follower& follower, const Event& event) {
  if (event.number <= follower.last_sent) return;  // was in the backlog
  follower.last_sent = event.number;
  follower.responder->write("id: " + std::to_string(event.number) + "\nevent: " + event.topic +
                            "\ndata: " + dump_json(event_json(event)) + "\n\n");
}

// Subscribes before it reads the backlog, so that nothing falls between; what is in both is sent
// once.
void follow(Service& service, const ResponderPtr& to, const std::string& topics, bool has_since,
            uint64_t since) {
  const auto follower = std::make_shared<Follower>();
  follower->responder = to;
  to->begin_stream();
  follower->subscription = service.parts.events.subscribe(
      [weak = std::weak_ptr(follower), mailbox = service.mailbox, topics](const Event& event) {
        if (!wanted(topics, event.topic)) return;
        mailbox->post([weak, event] {
          if (const auto follower = weak.lock()) send_event(*follower, event);
        });
      });
  service.followers.insert(follower);
  to->on_close([&service, follower] {
    service.parts.events.unsubscribe(follower->subscription);
    service.followers.erase(follower);
  });
  if (!has_since) return to->write(": following\n\n");
  for (const Event& event : service.parts.events.since(since)) {
    if (wanted(topics, event.topic)) send_event(*follower, event);
  }
}

void events(Service& service, RouteCall& call, const ResponderPtr& to) {
  const HttpRequest& request = call.request;
  const std::string* last_id = request.header("last-event-id");
  const std::string text = last_id ? *last_id : request.query_value("since");
  uint64_t since = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), since);
  if (!text.empty() && (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size())) {
    return to->result(invalid("since: '" + text + "' is not an event number"));
  }
  const std::string topics = request.query_value("topic");
  if (request.query_value("follow") == "1")
    return follow(service, to, topics, !text.empty(), since);
  Json items = Json::array();
  for (const Event& event : service.parts.events.since(since)) {
    if (wanted(topics, event.topic)) items.push_back(event_json(event));
  }
  to->json({{"items", std::move(items)}});
}

void ready(Service& service, const ResponderPtr& to) {
  const std::string version = service.parts.versions.current()->version;
  const DeviceState::View device = device_view(service.parts);
  if (service.draining)
    return to->error({503, "the daemon is stopping", "server_error", "", "shutting_down", 1});
  if (device.phase == DeviceState::Phase::kLost)
    return to->error({503, device.reason, "server_error", "", "device_lost", 1});
  Json answer = {{"ready", true}, {"version", version}};
  if (device.phase == DeviceState::Phase::kOnHost) answer["degraded"] = true;
  to->json(answer);
}

}  // namespace

void register_collectors(const std::shared_ptr<Service>& service) {
  Metrics& metrics = service->parts.metrics;
  metrics
      .gauge("ds_build_info", "Constant 1; the label tells the build.", {{"version", DS_VERSION}})
      .set(1);
  metrics.on_collect([weak = std::weak_ptr(service), previous = std::make_shared<std::string>()] {
    const auto service = weak.lock();
    if (!service) return;
    Metrics& metrics = service->parts.metrics;
    const auto info = [&](const std::string& version) -> Gauge& {
      return metrics.gauge("ds_weights_version_info", "1 for the version that serves.",
                           {{"model", service->parts.model.name}, {"version", version}});
    };
    const std::string current = service->parts.versions.current()->version;
    if (*previous != current && !previous->empty()) info(*previous).set(0);
    info(current).set(1);
    *previous = current;
    const Json stats = service->parts.store.stats();
    if (const Json* bytes = find(stats, "bytes"); bytes && bytes->is_number()) {
      metrics.gauge("ds_replay_bytes", "Size of the replay store on disk.")
          .set(bytes->get<double>());
    }
    if (const Json* states = find(stats, "state"); states && states->is_object()) {
      for (const auto& [state, count] : states->items()) {
        metrics.gauge("ds_feedback_items", "Stored feedback by state.", {{"state", state}})
            .set(count.is_number() ? count.get<double>() : 0);
      }
    }
  });
}

void add_status_routes(Router& router, Service& service) {
  router.add("GET", "/health", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) { to->json(health(service.parts)); });
  router.add("GET", "/ready", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) { ready(service, to); });
  router.add("GET", "/metrics", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) { metrics_page(service, to); });
  router.add("GET", "/ds/v1/status", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) {
               service.answer_from(service.quick, to, [&service] { return status(service); });
             });
  router.add("GET", "/ds/v1/ps", kRead, BodyKind::kNone, [&](RouteCall&, const ResponderPtr& to) {
    to->json({{"items", service.parts.engine.ps()}});
  });
  router.add("DELETE", "/ds/v1/requests/{}", kAdmin, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               if (service.parts.engine.cancel(call.params[0]))
                 return to->json({{"cancelled", true}});
               to->result(not_found("no live request '" + call.params[0] + "'"));
             });
  router.add("GET", "/ds/v1/events", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) { events(service, call, to); });
  router.add_planned("/", "the dashboard");
}

}  // namespace ds
