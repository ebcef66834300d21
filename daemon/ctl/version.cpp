// SPDX-License-Identifier: Apache-2.0
// version: which weights there are, which serve, and how to go back.
#include "ctl/commands.h"
#include "ctl/output.h"

namespace ds::ctl {
namespace {

constexpr const char* kListHint = "dsctl version ls lists the versions";

/// "12" is read as "v12".
std::string version_name(const std::string& text) {
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
  return digits ? "v" + text : text;
}

std::string items_text(const Json& item) {
  if (const Json* items = dig(item, "items"); items && items->is_array()) {
    return count_text(static_cast<int64_t>(items->size()));
  }
  return count_text(integer_at(item, "items_count"));
}

void print_list(Session& session, const Json& document) {
  const std::string pinned = text_at(document, "pinned", "");
  Table table({"VERSION", "PARENT", "STATE", "METHOD", ">ITEMS", ">SIZE", "HASH", ">AGE"});
  for (const Json& item : list_at(document, "items")) {
    const std::string name = text_at(item, "version");
    const auto bytes = number_at(item, "bytes");
    const std::string state = text_at(item, "state") + (name == pinned ? ", pinned" : "");
    table.row({name, text_at(item, "parent"), state, text_at(item, "method"), items_text(item),
               bytes ? size_text(*bytes) : "-", text_at(item, "weight_hash").substr(0, 8),
               age_at(document, item, "created_ms")},
              state_colour(state), 2);
  }
  session.print(table.text(session.colour()));
}

/// Runs a change of the serving version and says what serves now.
int change(Session& session, const std::string& verb, const Json& body) {
  const auto reply = session.post("/ds/v1/versions/" + verb, body);
  if (!reply.ok()) return session.fail(reply.status(), kListHint);
  if (session.json()) {
    session.document("ds.VersionChange/1", *reply);
    return kDone;
  }
  const std::string pinned = text_at(*reply, "pinned", "");
  session.print(text_at(*reply, "current", text_at(body, "to", text_at(body, "version", "it"))) +
                " serves" + (pinned.empty() ? "" : ", pinned: " + pinned) + "\n");
  if (verb == "rollback") {
    session.print("new versions will not serve until dsctl version unpin or promote\n");
  }
  return kDone;
}

}  // namespace

int version_list(Session& session) {
  const auto reply = session.get("/ds/v1/versions");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.VersionList/1", *reply);
  } else {
    print_list(session, *reply);
  }
  return kDone;
}

int version_show(Session& session, const std::string& version) {
  const auto reply = session.get("/ds/v1/versions/" + url_encode(version_name(version)));
  if (!reply.ok()) return session.fail(reply.status(), kListHint);
  if (session.json()) {
    session.document("ds.Version/1", *reply);
    return kDone;
  }
  std::vector<std::pair<std::string, std::string>> lines;
  for (const char* key : {"version", "parent", "state", "method", "fingerprint", "weight_hash"}) {
    lines.emplace_back(key, text_at(*reply, key));
  }
  lines.emplace_back("created", age_at(*reply, *reply, "created_ms") + " ago");
  lines.emplace_back("items", items_text(*reply));
  for (const Json& id : list_at(*reply, "items")) {
    lines.emplace_back("", id.is_string() ? id.get<std::string>() : dump_json(id));
  }
  if (const Json* details = dig(*reply, "details"); details && details->is_object()) {
    for (const auto& [key, value] : details->items())
      lines.emplace_back(key, text_at(*details, key));
  }
  session.print(key_values(lines));
  return kDone;
}

int version_diff(Session& session, const std::string& a, const std::string& b) {
  const auto reply = session.get("/ds/v1/versions/diff?a=" + url_encode(version_name(a)) +
                                 "&b=" + url_encode(version_name(b)));
  if (!reply.ok()) return session.fail(reply.status(), kListHint);
  if (session.json()) {
    session.document("ds.VersionDiff/1", *reply);
    return kDone;
  }
  const Json& hashes = list_at(*reply, "weight_hash");
  const auto hash = [&](size_t i) {
    return i < hashes.size() && hashes[i].is_string() ? hashes[i].get<std::string>().substr(0, 8)
                                                      : "-";
  };
  const auto norm = number_at(*reply, "delta_norm");
  std::string text = text_at(*reply, "a") + " (" + hash(0) + ") -> " + text_at(*reply, "b") + " (" +
                     hash(1) + ")  delta norm " + (norm ? number_text(*norm, 4) : "-") + "\n";
  for (const Json& id : list_at(*reply, "items_added")) {
    text += "+ " + printable(id.is_string() ? id.get<std::string>() : dump_json(id)) + "\n";
  }
  for (const Json& id : list_at(*reply, "items_removed")) {
    text += "- " + printable(id.is_string() ? id.get<std::string>() : dump_json(id)) + "\n";
  }
  session.print(text);
  return kDone;
}

int version_promote(Session& session, const std::string& version) {
  return change(session, "promote", {{"to", version_name(version)}});
}

int version_rollback(Session& session, const std::string& to, const std::string& reason) {
  Json body = Json::object();
  if (!to.empty()) body["to"] = version_name(to);
  if (!reason.empty()) body["reason"] = reason;
  return change(session, "rollback", body);
}

int version_pin(Session& session, const std::string& version) {
  return change(session, "pin", {{"version", version_name(version)}});
}

int version_unpin(Session& session) { return change(session, "unpin", Json::object()); }

}  // namespace ds::ctl
