// SPDX-License-Identifier: Apache-2.0
// Feedback over HTTP: one record, an envelope with (client, epoch, seq), or lines of JSON in any of
// the known import formats; and looking up what became of it.
#include <algorithm>
#include <charconv>
#include <deque>
#include <utility>

#include "serve/admin.h"
#include "storage/import.h"

namespace ds {
namespace {

constexpr size_t kWindow = 256;          // records of one request that wait for the store
constexpr size_t kLinesPerTurn = 64;     // then the IO thread serves others
constexpr size_t kMaxRecords = 100'000;  // per request

ApiError refusal_error(const Refusal& refusal) {
  ApiError error{400, refusal.message, "invalid_request_error", "", refusal.code};
  if (refusal.code == "forbidden") error.status = 403, error.type = "permission_error";
  if (refusal.code == "busy")
    error.status = 429, error.type = "rate_limit_error", error.retry_after_s = 1;
  if (refusal.code == "shutting_down")
    error.status = 503, error.type = "server_error", error.retry_after_s = 1;
  if (refusal.code == "storage_full") error.status = 507, error.type = "server_error";
  if (refusal.code == "seq_gap" || refusal.code == "seq_conflict" ||
      refusal.code == "stale_epoch") {
    error.status = 409;
  }
  return error;
}

Json outcome_json(const Ack* ack, const Refusal* refusal) {
  if (ack) {
    return {{"offset", ack->offset},
            {"id", ack->id},
            {"state", "stored"},
            {"duplicate", ack->duplicate}};
  }
  Json json = error_json(refusal_error(*refusal));
  if (refusal->expected_seq) json["error"]["expected"] = refusal->expected_seq;
  return json;
}

// {"client", "epoch", "seq", "record"}: all three of the first or none.
Result<Submission> from_envelope(const Json& envelope) {
  Submission submission;
  const Json* record = find(envelope, "record");
  if (!record->is_object()) return invalid("record: expected an object");
  submission.record = *record;
  if (!find(envelope, "client") && !find(envelope, "epoch") && !find(envelope, "seq")) {
    return submission;
  }
  DS_ASSIGN(submission.client, get_string(envelope, "client"));
  DS_ASSIGN(submission.epoch, get_int(envelope, "epoch"));
  DS_ASSIGN(submission.seq, get_int(envelope, "seq"));
  if (submission.client.empty()) return invalid("client: empty");
  return submission;
}

// One JSON value of a request: an envelope, a record, or an import line that may hold several.
Result<std::vector<Submission>> submissions_of(const Json& json) {
  if (!json.is_object())
    return invalid("expected a JSON object, found " + std::string(json.type_name()));
  std::vector<Submission> submissions;
  if (find(json, "record")) {
    DS_ASSIGN(Submission one, from_envelope(json));
    submissions.push_back(std::move(one));
    return submissions;
  }
  DS_ASSIGN(std::vector<Json> records, import_line(json));
  for (Json& record : records) {
    Submission submission;
    submission.record = std::move(record);
    submissions.push_back(std::move(submission));
  }
  return submissions;
}

// The store takes an epoch's sequence numbers without a gap. Each anonymous record gets an epoch of
// its own, so that a refused one leaves none.
void submit(Service& service, Submission submission, std::function<void(Json, int status)> done) {
  if (submission.client.empty()) {
    submission.client = "http-" + service.process_id;
    submission.epoch = ++service.anonymous_epoch;
    submission.seq = 1;
  }
  const Json* kind_field = find(submission.record, "kind");
  const std::string kind =
      kind_field && kind_field->is_string() ? kind_field->get<std::string>() : "";
  service.parts.store.submit(
      std::move(submission), [mailbox = service.mailbox, &metrics = service.parts.metrics, kind,
                              done = std::move(done)](const Ack* ack, const Refusal* refusal) {
        count_feedback(metrics, kind, ack, refusal);
        mailbox->post(
            [done, outcome = outcome_json(ack, refusal),
             status = ack ? 200 : refusal_error(*refusal).status] { done(outcome, status); });
      });
}

// Many records of one request: read as they are sent on, at most kWindow of them waiting at a time.
struct Import : std::enable_shared_from_this<Import> {
  Import(Service& service, ResponderPtr responder, bool admin)
      : service(service), responder(std::move(responder)), admin(admin) {}

  void pump();
  bool next_line(std::string_view& line);
  void take_line(std::string_view line);
  void refuse(const Status& status) { items.push_back(error_json(api_error(status))); }

  Service& service;
  ResponderPtr responder;
  const bool admin;
  std::string body;
  size_t at = 0, line_number = 0, waiting = 0;
  std::deque<std::pair<size_t, Submission>> ready;  // with its place in `items`
  std::vector<Json> items;
};

bool Import::next_line(std::string_view& line) {
  if (at >= body.size()) return false;
  const size_t end = std::min(body.find('\n', at), body.size());
  line = std::string_view(body).substr(at, end - at);
  at = end + 1;
  ++line_number;
  return true;
}

void Import::take_line(std::string_view line) {
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return;
  const std::string where = "line " + std::to_string(line_number);
  const Result<Json> json = parse_json(line);
  if (!json.ok()) return refuse(json.status().in(where));
  Result<std::vector<Submission>> submissions = submissions_of(*json);
  if (!submissions.ok()) return refuse(submissions.status().in(where));
  for (Submission& submission : *submissions) {
    submission.admin = admin;
    ready.emplace_back(items.size(), std::move(submission));
    items.emplace_back();
  }
}

void Import::pump() {
  if (!responder->open()) return;  // nobody will read the outcomes: what was not read stays out
  const auto self = shared_from_this();
  size_t lines = 0;
  for (;;) {
    while (!ready.empty() && waiting < kWindow) {
      ++waiting;
      submit(service, std::move(ready.front().second),
             [self, place = ready.front().first](Json outcome, int) {
               self->items[place] = std::move(outcome);
               --self->waiting;
               self->pump();
             });
      ready.pop_front();
    }
    if (!ready.empty()) return;  // goes on when one is answered
    std::string_view line;
    if (items.size() >= kMaxRecords && at < body.size()) {
      refuse(invalid("more than 100000 records in one request: the rest was not read"));
      at = body.size();
    }
    if (!next_line(line)) break;
    take_line(line);
    if (++lines == kLinesPerTurn) return service.mailbox->post([self] { self->pump(); });
  }
  if (waiting == 0) responder->json({{"items", std::move(items)}});
}

void post_lines(Service& service, std::string body, bool admin, const ResponderPtr& to) {
  const auto import = std::make_shared<Import>(service, to, admin);
  import->body = std::move(body);
  import->pump();
}

void post_object(Service& service, const std::string& body, bool admin, const ResponderPtr& to) {
  const Result<Json> json = parse_json(body);
  if (!json.ok()) return to->result(json.status());
  Result<std::vector<Submission>> submissions = submissions_of(*json);
  if (!submissions.ok()) return to->result(submissions.status());
  for (Submission& submission : *submissions) submission.admin = admin;
  if (submissions->size() == 1) {
    return submit(service, std::move(submissions->front()), [to](Json outcome, int status) {
      if (status == 429 || status == 503) to->add_header("retry-after", "1");
      if (status == 409) to->add_header("x-should-retry", "false");
      to->json(outcome, status);
    });
  }
  const auto import = std::make_shared<Import>(service, to, admin);
  for (Submission& submission : *submissions) {
    import->ready.emplace_back(import->items.size(), std::move(submission));
    import->items.emplace_back();
  }
  import->pump();
}

void post_feedback(Service& service, HttpRequest& request, const ResponderPtr& to) {
  if (service.draining) return to->result(unavailable("the daemon is stopping"));
  const std::string* type = request.header("content-type");
  const bool lines = type && (type->find("ndjson") != std::string::npos ||
                              type->find("jsonl") != std::string::npos);
  const bool admin = request.roles & kAdmin;
  if (lines) return post_lines(service, std::move(request.body), admin, to);
  post_object(service, request.body, admin, to);
}

Json fate_json(const FateEntry& entry) {
  return {{"state", entry.state},
          {"at_ms", entry.at_ms},
          {"version", entry.version.empty() ? Json() : Json(entry.version)},
          {"step", entry.step},
          {"reason", entry.reason}};
}

Json summary(const FeedbackItem& item) {
  const FateEntry now = item.fate.empty() ? FateEntry{} : item.fate.back();
  return {{"id", item.id},
          {"offset", item.offset},
          {"kind", item.kind},
          {"source", item.source},
          {"domain", item.domain},
          {"state", now.state},
          {"received_ms", item.received_ms},
          {"version", now.version.empty() ? Json() : Json(now.version)}};
}

Json whole(const FeedbackItem& item) {
  Json json = summary(item);
  json["client"] = item.client;
  json["epoch"] = item.epoch;
  json["seq"] = item.seq;
  json["record"] = item.record;
  Json sizes = Json::array();
  for (const std::string& attachment : item.attachments) sizes.push_back(attachment.size());
  json["attachment_bytes"] = std::move(sizes);
  Json fate = Json::array();
  for (const FateEntry& entry : item.fate) fate.push_back(fate_json(entry));
  json["fate"] = std::move(fate);
  return json;
}

Result<uint64_t> query_number(const HttpRequest& request, const char* name, uint64_t fallback) {
  const std::string text = request.query_value(name);
  if (text.empty()) return fallback;
  uint64_t number = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), number);
  if (parsed.ec == std::errc() && parsed.ptr == text.data() + text.size()) return number;
  return invalid(std::string(name) + ": '" + text + "' is not a number");
}

void list_feedback(Service& service, RouteCall& call, const ResponderPtr& to) {
  const HttpRequest& request = call.request;
  FeedbackFilter filter;
  filter.state = request.query_value("state");
  filter.source = request.query_value("source");
  filter.kind = request.query_value("kind");
  filter.newest_first = request.query_value("newest") == "1";
  const Result<uint64_t> limit = query_number(request, "limit", 100);
  const Result<uint64_t> after = query_number(request, "after", 0);
  if (!limit.ok()) return to->result(limit.status());
  if (!after.ok()) return to->result(after.status());
  if (*limit < 1 || *limit > 1000) {
    return to->result(invalid("limit: " + std::to_string(*limit) + ", expected 1 to 1000"));
  }
  filter.limit = static_cast<int>(*limit);
  filter.after_offset = *after;
  service.answer_from(service.slow, to, [&service, filter]() -> Result<Json> {
    Json items = Json::array();
    for (const FeedbackItem& item : service.parts.store.list(filter))
      items.push_back(summary(item));
    return Json{{"items", std::move(items)}};
  });
}

void delete_feedback(Service& service, RouteCall& call, const ResponderPtr& to) {
  if (!service.parts.learn.undo)
    return to->result(unsupported("this daemon runs without a learner"));
  const std::string id = call.params[0];
  if (call.request.query_value("wait", "1") != "0") {
    return service.parts.learn.undo(id, service.answer_later(to));
  }
  service.parts.learn.undo(id, [](const Result<Json>&) {});
  to->json({{"id", id}, {"state", "pending"}}, 202);
}

}  // namespace

void add_feedback_routes(Router& router, Service& service) {
  router.add(
      "POST", "/ds/v1/feedback", kFeedback, BodyKind::kRaw,
      [&](RouteCall& call, const ResponderPtr& to) { post_feedback(service, call.request, to); });
  router.add("GET", "/ds/v1/feedback", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) { list_feedback(service, call, to); });
  router.add("GET", "/ds/v1/feedback/{}", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(
                   service.quick, to, [&service, id = call.params[0]]() -> Result<Json> {
                     DS_ASSIGN(const FeedbackItem item, service.parts.store.get(id));
                     return whole(item);
                   });
             });
  router.add("DELETE", "/ds/v1/feedback/{}", kAdmin, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) { delete_feedback(service, call, to); });
  router.add("GET", "/ds/v1/feedback-stats", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) {
               service.answer_from(service.slow, to, [&service]() -> Result<Json> {
                 return service.parts.store.stats();
               });
             });
}

}  // namespace ds
