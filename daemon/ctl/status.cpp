// SPDX-License-Identifier: Apache-2.0
// status, ps, cancel, metrics: what the daemon is doing now.
#include "ctl/status.h"

#include <regex.h>

#include <cstdio>

#include "ctl/commands.h"
#include "ctl/output.h"

namespace ds::ctl {
namespace {

std::string seconds_or_dash(const Json& document, std::string_view path) {
  const auto value = number_at(document, path);
  return value ? duration_text(*value) : "-";
}

std::string serving_line(const Json& status) {
  const auto used = number_at(status, "serving.kv_used");
  const auto total = number_at(status, "serving.kv_total");
  std::string fingerprint = text_at(status, "serving.fingerprint", "");
  fingerprint = fingerprint.substr(fingerprint.rfind('-') + 1);  // npos + 1 = 0: all of it
  return "serving   " + text_at(status, "serving.version") + " (" + fingerprint + ")  since " +
         age_at(status, status, "serving.since_ms") + " ago   " +
         text_at(status, "serving.running", "0") + " running, " +
         text_at(status, "serving.waiting", "0") + " waiting   kv " +
         (used && total && *total > 0 ? percent_text(*used / *total) : "-") + "   ttft p50 " +
         seconds_or_dash(status, "serving.ttft_p50_s") + " p99 " +
         seconds_or_dash(status, "serving.ttft_p99_s") + "\n";
}

std::string store_line(const Json& status) {
  return "store     " + count_text(integer_at(status, "store.items")) + " items  " +
         size_text(number_at(status, "store.bytes").value_or(0)) + "   last offset " +
         count_text(integer_at(status, "store.last_offset")) + "\n";
}

}  // namespace

std::vector<std::string> degraded_reasons(const Json& status) {
  std::vector<std::string> reasons;
  if (const std::string state = text_at(status, "device.state", "ok"); state != "ok") {
    reasons.push_back(text_at(status, "device.name") + " lost" +
                      (state == "lost" ? "" : ", the CPU serves"));
  }
  if (!flag_at(status, "learning.enabled", true)) reasons.push_back("learning disabled");
  if (text_at(status, "learning.state", "") == "paused") reasons.push_back("learning paused");
  if (number_at(status, "learning.oldest_wait_s").value_or(0) > 300) {
    reasons.push_back("feedback waits " + seconds_or_dash(status, "learning.oldest_wait_s"));
  }
  const double used = number_at(status, "serving.kv_used").value_or(0);
  const double total = number_at(status, "serving.kv_total").value_or(0);
  if (total > 0 && used / total > 0.95) reasons.push_back("kv cache full");
  return reasons;
}

std::string learning_line(const Json& learning) {
  const auto loss = number_at(learning, "loss");
  return text_at(learning, "state") + "  " + text_at(learning, "method") + "  round " +
         count_text(integer_at(learning, "round")) + "  step " +
         count_text(integer_at(learning, "step")) + "  loss " + (loss ? number_text(*loss) : "-") +
         "   " + count_text(integer_at(learning, "queued")) + " queued   lag p50 " +
         seconds_or_dash(learning, "lag_s_p50") + " last " +
         seconds_or_dash(learning, "lag_s_last");
}

std::string status_text(const Json& status, bool colour) {
  const auto reasons = degraded_reasons(status);
  std::string health = reasons.empty() ? "healthy" : "degraded: " + reasons[0];
  for (size_t i = 1; i < reasons.size(); ++i) health += ", " + reasons[i];
  const Json* learning = dig(status, "learning");
  return "driftstone  up " + uptime_text(number_at(status, "uptime_s").value_or(0)) + "  host " +
         text_at(status, "host") + "  cpu " + text_at(status, "isa") + "  pid " +
         text_at(status, "pid") + "   " + paint(health, state_colour(health), colour) + "\n" +
         "model     " + text_at(status, "model.name") + "  " +
         count_text(integer_at(status, "model.parameters")) + " parameters  sha256 " +
         text_at(status, "model.sha256").substr(0, 8) + "\n" + serving_line(status) + "learning  " +
         (learning ? learning_line(*learning) : "-") + "\n" + "gate      " +
         text_at(status, "gate.promoted", "0") + " promoted, " + text_at(status, "gate.held", "0") +
         " held, " + text_at(status, "gate.rolled_back", "0") + " rolled back\n" +
         store_line(status);
}

std::string requests_text(const Json& document, bool colour) {
  Table table({"REQUEST", "CLASS", "STATE", "VERSION", ">PROMPT", ">GEN", ">TTFT", ">AGE"});
  for (const Json& item : list_at(document, "items")) {
    const auto age = number_at(item, "age_s");
    table.row({text_at(item, "id"), text_at(item, "class"), text_at(item, "state"),
               text_at(item, "version"), count_text(integer_at(item, "prompt")),
               count_text(integer_at(item, "generated")), seconds_or_dash(item, "ttft_s"),
               age ? age_text(static_cast<int64_t>(*age * 1000)) : "-"},
              state_colour(text_at(item, "state")), 2);
  }
  return table.text(colour);
}

int status(Session& session, bool with_exit_code) {
  const auto reply = session.get("/ds/v1/status");
  if (!reply.ok()) return session.fail(reply.status());
  const auto reasons = degraded_reasons(*reply);
  if (session.json()) {
    Json document = *reply;
    document["healthy"] = reasons.empty();
    document["degraded"] = reasons;
    session.document("ds.Status/1", document);
  } else {
    session.print(status_text(*reply, session.colour()));
  }
  return with_exit_code && !reasons.empty() ? kNotGood : kDone;
}

int requests(Session& session) {
  const auto reply = session.get("/ds/v1/ps");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.RequestList/1", *reply);
  } else {
    session.print(requests_text(*reply, session.colour()));
  }
  return kDone;
}

int cancel(Session& session, const std::vector<std::string>& ids) {
  Json done = Json::array();
  for (const std::string& id : ids) {
    const auto reply = session.remove("/ds/v1/requests/" + url_encode(id), Patience::kShort);
    if (!reply.ok()) return session.fail(reply.status().in(id), "dsctl ps lists what is running");
    done.push_back(id);
    if (!session.json()) session.print(id + " cancelled\n");
  }
  if (session.json()) session.document("ds.Cancelled/1", {{"cancelled", done}});
  return kDone;
}

int metrics(Session& session, const std::string& pattern) {
  regex_t expression;
  if (regcomp(&expression, pattern.c_str(), REG_EXTENDED | REG_NOSUB) != 0) {
    return session.fail_as(kUsage, "usage", "--grep " + pattern + ": not a regular expression",
                           "POSIX extended syntax, as in grep -E");
  }
  const auto text = session.get_text("/metrics");
  std::string kept;
  for (size_t begin = 0; text.ok() && begin < text->size();) {
    size_t end = text->find('\n', begin);
    if (end == std::string::npos) end = text->size();
    const std::string line = text->substr(begin, end - begin);
    if (pattern.empty() ||
        (!line.starts_with('#') && regexec(&expression, line.c_str(), 0, nullptr, 0) == 0)) {
      kept += line + "\n";
    }
    begin = end + 1;
  }
  regfree(&expression);
  if (!text.ok()) return session.fail(text.status());
  session.print(kept);
  return kDone;
}

}  // namespace ds::ctl
