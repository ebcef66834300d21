// SPDX-License-Identifier: Apache-2.0
// replay: the store that rehearsal draws from.
#include "ctl/commands.h"
#include "ctl/output.h"
#include "ctl/progress.h"

namespace ds::ctl {

int replay_stats(Session& session) {
  const auto reply = session.get("/ds/v1/replay");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.ReplayStats/1", *reply);
    return kDone;
  }
  Table table({"DOMAIN", ">EXAMPLES"});
  if (const Json* domains = dig(*reply, "domains"); domains && domains->is_object()) {
    for (const auto& [name, domain] : domains->items()) {
      table.row({name, count_text(integer_at(domain, "examples"))});
    }
  }
  session.print("store " + text_at(*reply, "store_id") + "  last offset " +
                count_text(integer_at(*reply, "offset")) + "\n\n" + table.text(session.colour()));
  return kDone;
}

int replay_verify(Session& session) {
  Progress progress("replay verify", 0);
  const auto reply =
      watched([&] { return session.post("/ds/v1/replay/verify", Json::object(), Patience::kLong); },
              [&] { progress.update(0); });
  progress.clear();
  const std::string hint = "dsctl backup restore brings back the last good copy";
  if (!reply.ok()) {
    const Code code = reply.status().code();
    if (code != Code::kIo && code != Code::kCorrupt) return session.fail(reply.status());
    return session.fail_as(kNotGood, "corrupt", reply.status().message(), hint);
  }
  if (!flag_at(*reply, "ok")) {
    return session.fail_as(kNotGood, "corrupt", text_at(*reply, "message", "the store is damaged"),
                           hint);
  }
  if (session.json()) {
    session.document("ds.ReplayVerify/1", *reply);
  } else {
    session.print("good, " + count_text(integer_at(*reply, "records")) + " records\n");
  }
  return kDone;
}

}  // namespace ds::ctl
