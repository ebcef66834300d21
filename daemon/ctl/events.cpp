// SPDX-License-Identifier: Apache-2.0
// events, logs: what happened, and what happens.
#include "ctl/events.h"

#include <array>

#include "ctl/commands.h"
#include "ctl/output.h"

namespace ds::ctl {
namespace {

std::string target(std::optional<int64_t> since, const std::string& topics, bool follow) {
  std::string path = follow ? "/ds/v1/events?follow=1" : "/ds/v1/events?follow=0";
  if (since) path += "&since=" + std::to_string(*since);
  return topics.empty() ? path : path + "&topic=" + url_encode(topics);
}

/// debug 0 .. error 3; unknown names count as info.
size_t level_number(const std::string& level) {
  constexpr std::array<std::string_view, 4> kLevels = {"debug", "info", "warn", "error"};
  for (size_t i = 0; i < kLevels.size(); ++i) {
    if (kLevels[i] == level) return i;
  }
  return 1;
}

std::string log_line(const Json& event, bool colour) {
  const std::string level = text_at(event, "level", "info");
  const Colour shade = level == "error"   ? Colour::kRed
                       : level == "warn"  ? Colour::kYellow
                       : level == "debug" ? Colour::kDim
                                          : Colour::kNone;
  std::string padded = level;
  padded.resize(std::max<size_t>(5, padded.size()), ' ');
  return clock_text(integer_at(event, "at_ms")) + "  " + paint(padded, shade, colour) + "  " +
         text_at(event, "unit") + ": " + text_at(event, "message") + "\n";
}

}  // namespace

std::string event_line(const Json& event, bool colour) {
  std::string topic = text_at(event, "topic", "?");
  topic.resize(std::max<size_t>(8, topic.size()), ' ');
  std::string said;
  if (event.is_object()) {
    for (const auto& [key, value] : event.items()) {
      if (key == "number" || key == "at_ms" || key == "topic") continue;
      if (value.is_null() || value.is_object() || value == "") continue;  // -o json has all
      std::string text = text_at(event, key);
      if (value.is_number_float()) text = number_text(value.get<double>(), 4);
      if (value.is_array()) text = std::to_string(value.size());
      said += (said.empty() ? "" : "  ") + printable(key) + "=" + text;
    }
  }
  const std::string state = text_at(event, "outcome", text_at(event, "state", ""));
  return clock_text(integer_at(event, "at_ms")) + "  " + paint(topic, state_colour(state), colour) +
         "  " + said + "\n";
}

int events(Session& session, const EventOptions& options) {
  const auto show = [&](const Json& event) {
    if (session.json()) {
      session.json_line(event);
    } else {
      session.print(event_line(event, session.colour()));
    }
  };
  if (options.follow) {
    const HttpRequest request = {"GET", target(options.since, options.topics, true), ""};
    const Status status =
        session.follow(request, session.timeout_ms(Patience::kLong),
                       [&](std::string_view, const Json& event) { return show(event), true; });
    if (!status.ok()) return session.fail(status);
    return session.fail(unavailable("the daemon ended the event stream"),
                        "it stopped, or dropped a reader that was too slow; run the command again");
  }
  const auto reply = session.get(target(options.since, options.topics, false));
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.EventList/1", *reply);
    return kDone;
  }
  for (const Json& event : list_at(*reply, "items")) show(event);
  return kDone;
}

int logs(Session& session, const LogOptions& options) {
  const size_t least = level_number(options.level);
  const auto wanted = [&](const Json& event) {
    return level_number(text_at(event, "level", "info")) >= least;
  };
  const auto reply = session.get(target(0, "log", false));
  if (!reply.ok()) return session.fail(reply.status());
  Json kept = Json::array();
  int64_t last = 0;
  for (const Json& event : list_at(*reply, "items")) {
    last = std::max(last, integer_at(event, "number"));
    if (wanted(event)) kept.push_back(event);
  }
  const size_t lines = static_cast<size_t>(std::max<int64_t>(options.lines, 0));
  if (kept.size() > lines) kept.erase(kept.begin(), kept.end() - static_cast<long>(lines));
  if (session.json() && !options.follow) {
    session.document("ds.EventList/1", kept);
    return kDone;
  }
  const auto show = [&](const Json& event) {
    if (session.json()) {
      session.json_line(event);
    } else {
      session.print(log_line(event, session.colour()));
    }
  };
  for (const Json& event : kept) show(event);
  if (!options.follow) return kDone;
  const Status status =
      session.follow({"GET", target(last, "log", true), ""}, session.timeout_ms(Patience::kLong),
                     [&](std::string_view, const Json& event) {
                       if (wanted(event)) show(event);
                       return true;
                     });
  if (!status.ok()) return session.fail(status);
  return session.fail(unavailable("the daemon ended the event stream"),
                      "it stopped, or dropped a reader that was too slow; run the command again");
}

}  // namespace ds::ctl
