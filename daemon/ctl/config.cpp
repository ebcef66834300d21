// SPDX-License-Identifier: Apache-2.0
// config: the daemon's settings and where each came from.
#include "config.h"

#include "ctl/commands.h"
#include "ctl/output.h"
#include "ctl/progress.h"

namespace ds::ctl {

int config_show(Session& session, bool origin) {
  const auto reply = session.get("/ds/v1/config");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.ConfigList/1", *reply);
    return kDone;
  }
  std::vector<std::string> headings = {"NAME", "VALUE"};
  if (origin) headings.insert(headings.end(), {"DEFAULT", "CHANGES", "ORIGIN"});
  Table table(headings);
  for (const Json& item : list_at(*reply, "items")) {
    std::vector<std::string> cells = {text_at(item, "name"), text_at(item, "value")};
    if (origin) {
      cells.push_back(text_at(item, "default"));
      cells.push_back(flag_at(item, "live") ? "at once" : "restart");
      cells.push_back(text_at(item, "origin"));
    }
    const bool changed = text_at(item, "origin") != "default";
    table.row(std::move(cells), changed ? Colour::kBold : Colour::kNone, 1);
  }
  session.print(table.text(session.colour()));
  return kDone;
}

int config_set(Session& session, const std::string& name, const std::string& value) {
  Progress progress("config set", 0);  // weights may have to be made anew, and calibrated
  const auto reply = watched(
      [&] {
        return session.post("/ds/v1/config", {{"name", name}, {"value", value}}, Patience::kLong);
      },
      [&] { progress.update(0); });
  progress.clear();
  if (!reply.ok()) return session.fail(reply.status(), "dsctl config show lists the settings");
  if (session.json()) {
    session.document("ds.ConfigChange/1", *reply);
  } else {
    session.print(name + " = " + value + ", until the daemon restarts\n");
  }
  return kDone;
}

int config_doc(Session& session) {
  session.print(settings_markdown());
  return kDone;
}

}  // namespace ds::ctl
