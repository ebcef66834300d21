// SPDX-License-Identifier: Apache-2.0
// feedback: look at, correct and undo what was said to the model. Pushing files is in
// feedback_push.cpp.
#include "ctl/feedback.h"

#include "ctl/commands.h"
#include "ctl/output.h"
#include "ctl/progress.h"

namespace ds::ctl {
namespace {

constexpr const char* kListHint = "dsctl feedback ls lists the items";

std::string fate_line(const Json& entry, int64_t first_ms) {
  const int64_t at_ms = integer_at(entry, "at_ms");
  const std::string state = text_at(entry, "state");
  std::string line = clock_text(at_ms) + "  " + state;
  line.resize(std::max<size_t>(line.size(), 22), ' ');
  const std::string version = text_at(entry, "version", "");
  const std::string reason = text_at(entry, "reason", "");
  const int64_t step = integer_at(entry, "step");
  if (!version.empty()) line += "  " + version;
  if (step > 0) line += "  step " + count_text(step);
  if (at_ms > first_ms) {
    line += "  after " + duration_text(static_cast<double>(at_ms - first_ms) / 1000);
  }
  if (!reason.empty()) line += "  " + reason;
  while (line.ends_with(' ')) line.pop_back();
  return line + "\n";
}

}  // namespace

std::string fate_text(const Json& item) {
  const Json& fate = list_at(item, "fate");
  const int64_t first_ms = fate.empty() ? 0 : integer_at(fate[0], "at_ms");
  std::string text;
  for (const Json& entry : fate) text += fate_line(entry, first_ms);
  return text;
}

int feedback_list(Session& session, const FeedbackQuery& query) {
  std::string target = "/ds/v1/feedback?limit=" + std::to_string(query.limit);
  if (!query.state.empty()) target += "&state=" + url_encode(query.state);
  if (!query.source.empty()) target += "&source=" + url_encode(query.source);
  if (!query.kind.empty()) target += "&kind=" + url_encode(query.kind);
  if (query.after > 0) target += "&after=" + std::to_string(query.after);
  if (!query.oldest) target += "&newest=1";
  const auto reply = session.get(target);
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.FeedbackList/1", *reply);
    return kDone;
  }
  Table table({"ID", "KIND", "SOURCE", "DOMAIN", "STATE", "VERSION", ">AGE"});
  for (const Json& item : list_at(*reply, "items")) {
    const std::string state = text_at(item, "state");
    const std::string version = text_at(item, "version");
    table.row({text_at(item, "id"), text_at(item, "kind"), shortened(text_at(item, "source"), 24),
               shortened(text_at(item, "domain"), 24), state, version.empty() ? "-" : version,
               age_at(*reply, item, "received_ms")},
              state_colour(state), 4);
  }
  session.print(table.text(session.colour()));
  return kDone;
}

int feedback_show(Session& session, const std::string& id) {
  const auto reply = session.get("/ds/v1/feedback/" + url_encode(id));
  if (!reply.ok()) return session.fail(reply.status(), kListHint);
  if (session.json()) {
    session.document("ds.Feedback/1", *reply);
    return kDone;
  }
  const Json* record = dig(*reply, "record");
  session.print(
      key_values({{"id", text_at(*reply, "id")},
                  {"kind", text_at(*reply, "kind")},
                  {"source", text_at(*reply, "source")},
                  {"domain", text_at(*reply, "domain")},
                  {"from", text_at(*reply, "client") + ", epoch " + text_at(*reply, "epoch") +
                               ", seq " + text_at(*reply, "seq")},
                  {"offset", text_at(*reply, "offset")},
                  {"record", record ? dump_json(*record) : "-"}}) +
      "\n" + fate_text(*reply));
  return kDone;
}

int feedback_correct(Session& session, const std::string& response_id, const std::string& text) {
  const Json record = {{"kind", "correction"}, {"response_id", response_id}, {"correction", text}};
  const auto reply = session.post("/ds/v1/feedback", record);
  if (!reply.ok()) {
    return session.fail(reply.status(), "dsctl ask --stats prints an answer's response id");
  }
  if (session.json()) {
    session.document("ds.FeedbackAck/1", *reply);
  } else {
    session.print("stored " + text_at(*reply, "id") + "\n");
  }
  return kDone;
}

int feedback_remove(Session& session, const std::vector<std::string>& ids) {
  int exit = kDone;
  const std::string what = ids.size() == 1 ? ids[0] : std::to_string(ids.size()) + " items";
  if (!session.confirmed("undo " + what, exit)) return exit;
  Progress progress("feedback rm", static_cast<int64_t>(ids.size()));
  Json done = Json::array();
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::string& id = ids[i];
    const auto reply = watched([&] { return session.remove("/ds/v1/feedback/" + url_encode(id)); },
                               [&] { progress.update(static_cast<int64_t>(i), id); });
    if (!reply.ok()) {
      progress.clear();
      return session.fail(reply.status().in(id), kListHint);
    }
    progress.update(static_cast<int64_t>(i) + 1, id);
    done.push_back(*reply);
    if (session.json()) continue;
    progress.clear();
    const std::string version = text_at(*reply, "version", "");
    session.print(id + "  " + text_at(*reply, "state") +
                  (version.empty() ? "" : ", " + version + " serves") + "\n");
  }
  progress.clear();
  if (session.json()) session.document("ds.FeedbackRemoved/1", done);
  return kDone;
}

int feedback_stats(Session& session) {
  const auto reply = session.get("/ds/v1/feedback-stats");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.FeedbackStats/1", *reply);
    return kDone;
  }
  Table table({"BY", "NAME", ">ITEMS"});
  std::vector<std::pair<std::string, std::string>> totals;
  for (const auto& [key, value] : reply->items()) {
    if (!value.is_object()) {
      totals.emplace_back(key, text_at(*reply, key));
      continue;
    }
    for (const auto& [name, count] : value.items()) {
      table.row(
          {key, name, count.is_number() ? count_text(count.get<int64_t>()) : dump_json(count)});
    }
  }
  session.print(key_values(totals) + (table.empty() ? "" : "\n" + table.text(session.colour())));
  return kDone;
}

}  // namespace ds::ctl
