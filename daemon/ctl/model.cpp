// SPDX-License-Identifier: Apache-2.0
// model: the language model and the task models beside it.
#include "ctl/commands.h"
#include "ctl/output.h"

namespace ds::ctl {
namespace {

constexpr const char* kListHint = "dsctl model ls lists the models";

}  // namespace

int model_list(Session& session) {
  const auto reply = session.get("/ds/v1/models");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.ModelList/1", *reply);
    return kDone;
  }
  Table table({"NAME", "KIND", "VERSION", ">PARAMETERS", "SHA256"});
  for (const Json& item : list_at(*reply, "items")) {
    table.row({text_at(item, "name"), text_at(item, "kind"), text_at(item, "version"),
               count_text(integer_at(item, "parameters")), text_at(item, "sha256").substr(0, 12)});
  }
  session.print(table.text(session.colour()));
  return kDone;
}

int model_show(Session& session, const std::string& name) {
  const auto reply = session.get("/ds/v1/models/" + url_encode(name));
  if (!reply.ok()) return session.fail(reply.status(), kListHint);
  if (session.json()) {
    session.document("ds.Model/1", *reply);
    return kDone;
  }
  std::vector<std::pair<std::string, std::string>> lines;
  for (const auto& [key, value] : reply->items()) lines.emplace_back(key, text_at(*reply, key));
  session.print(key_values(lines));
  return kDone;
}

int model_new(Session& session, const std::string& name, const std::vector<int64_t>& sizes) {
  const auto reply = session.post("/ds/v1/models", {{"name", name}, {"mlp", sizes}});
  if (!reply.ok()) {
    return session.fail(reply.status(), "sizes are inputs, hidden layers, classes: 784,100,100,10");
  }
  if (session.json()) {
    session.document("ds.Model/1", *reply);
    return kDone;
  }
  session.print(name + " created, " + text_at(*reply, "version", "v1") + "\n");
  return kDone;
}

}  // namespace ds::ctl
