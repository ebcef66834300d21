// SPDX-License-Identifier: Apache-2.0
// learn: rounds of training, by hand and at a glance.
#include "ctl/commands.h"
#include "ctl/output.h"
#include "ctl/progress.h"
#include "ctl/status.h"

namespace ds::ctl {
namespace {

std::string outcome_text(const Json& outcome, bool colour) {
  const std::string what = text_at(outcome, "outcome");
  const std::string version = text_at(outcome, "version", "");
  const std::string reason = text_at(outcome, "reason", "");
  std::string text = "round " + count_text(integer_at(outcome, "round")) + "  " +
                     paint(what, state_colour(what), colour);
  if (!version.empty()) text += "  " + version;
  const size_t items = list_at(outcome, "items").size();
  text += "  " + std::to_string(items) + (items == 1 ? " item  " : " items  ") +
          count_text(integer_at(outcome, "steps")) + " steps";
  if (const auto seconds = number_at(outcome, "seconds")) text += "  " + duration_text(*seconds);
  return text + (reason.empty() ? "" : "  " + reason) + "\n";
}

int outcome_exit(const std::string& outcome) {
  if (outcome == "held") return kNotGood;
  if (outcome == "dropped") return kInTheWay;
  return outcome == "failed" ? kFailed : kDone;
}

}  // namespace

int learn_status(Session& session) {
  const auto reply = session.get("/ds/v1/learn");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.LearnStatus/1", *reply);
    return kDone;
  }
  const auto oldest = number_at(*reply, "oldest_wait_s");
  const auto share = number_at(*reply, "share");
  const auto rate = number_at(*reply, "tokens_per_s");
  std::string text =
      learning_line(*reply) + "\n" + "oldest waits " + (oldest ? duration_text(*oldest) : "-") +
      "   share " + (share ? percent_text(*share) : "-") + "   " +
      (rate ? number_text(*rate) : "-") + " tokens/s" +
      (flag_at(*reply, "enabled", true) ? "" : "   disabled by learn.enabled") + "\n";
  Table table({">ROUND", "OUTCOME", "VERSION", ">ITEMS", ">STEPS", ">TIME", "REASON"});
  for (const Json& round : list_at(*reply, "rounds")) {
    const auto seconds = number_at(round, "seconds");
    const std::string outcome = text_at(round, "outcome");
    table.row({text_at(round, "round"), outcome, text_at(round, "version"),
               std::to_string(list_at(round, "items").size()), text_at(round, "steps"),
               seconds ? duration_text(*seconds) : "-", text_at(round, "reason", "")},
              state_colour(outcome), 1);
  }
  if (!table.empty()) text += "\n" + table.text(session.colour());
  session.print(text);
  return kDone;
}

int learn_step(Session& session, bool wait) {
  if (!wait) {
    const auto reply = session.post("/ds/v1/learn/step", {{"wait", false}});
    if (!reply.ok()) return session.fail(reply.status());
    if (session.json()) {
      session.document("ds.LearnOutcome/1", *reply);
    } else {
      session.print("round started; dsctl learn watch follows it\n");
    }
    return kDone;
  }
  Progress progress("learn step", 0);
  Session watcher(session.options());  // has its own memory of errors: it polls beside the call
  const auto reply = watched(
      [&] {
        return session.post("/ds/v1/learn/step", {{"wait", true}}, Patience::kLong);
      },
      [&] {
        const auto now = watcher.get("/ds/v1/learn");
        if (!now.ok()) return;
        const auto loss = number_at(*now, "loss");
        progress.set_total(integer_at(*now, "max_steps"));
        progress.update(integer_at(*now, "step"),
                        text_at(*now, "state") + (loss ? "  loss " + number_text(*loss) : ""));
      });
  progress.clear();
  if (!reply.ok())
    return session.fail(reply.status(), "dsctl learn status shows what is under way");
  if (session.json()) {
    session.document("ds.LearnOutcome/1", *reply);
  } else {
    session.print(outcome_text(*reply, session.colour()));
  }
  return outcome_exit(text_at(*reply, "outcome"));
}

int learn_pause(Session& session, bool paused) {
  const auto reply =
      session.post(paused ? "/ds/v1/learn/pause" : "/ds/v1/learn/resume", Json::object());
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.LearnStatus/1", *reply);
  } else {
    session.print(paused ? "learning paused; feedback is stored and waits\n"
                         : "learning resumed\n");
  }
  return kDone;
}

}  // namespace ds::ctl
