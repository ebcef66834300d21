// SPDX-License-Identifier: Apache-2.0
// top, learn watch: the daemon's life, redrawn. Frames are pure functions of the daemon's answers.
#include <cmath>

#include "ctl/commands.h"
#include "ctl/events.h"
#include "ctl/interrupt.h"
#include "ctl/output.h"
#include "ctl/plot.h"
#include "ctl/screen.h"
#include "ctl/status.h"

namespace ds::ctl {
namespace {

constexpr int kPlainColumns = 100;
constexpr int kCurveRows = 8;
constexpr size_t kTopEvents = 10;

/// Cuts every line to the terminal's width. Colour codes would be cut too: only for plain text.
std::string fitted(const std::string& text, int columns) {
  std::string out;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    out += shortened(text.substr(begin, end - begin), static_cast<size_t>(columns)) + "\n";
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return out;
}

std::string top_frame(const Json& status, const Json& requests, const Json& events, int columns) {
  std::string frame = status_text(status, false) + "\n" + requests_text(requests, false) + "\n";
  const Json& items = list_at(events, "items");
  const size_t first = items.size() > kTopEvents ? items.size() - kTopEvents : 0;
  for (size_t i = items.size(); i > first; --i) {
    if (text_at(items[i - 1], "topic") != "log") frame += event_line(items[i - 1], false);
  }
  return fitted(frame, columns);
}

Result<std::string> fetch_top(Session& session, int columns) {
  DS_ASSIGN(const Json status, session.get("/ds/v1/status"));
  DS_ASSIGN(const Json requests, session.get("/ds/v1/ps"));
  DS_ASSIGN(const Json events, session.get("/ds/v1/events?since=0"));
  return top_frame(status, requests, events, columns);
}

/// What `learn watch` has seen so far.
struct Curve {
  std::vector<double> losses;
  int64_t last_event = 0;
};

/// Step events carry the loss; a change of round leaves a gap in the curve.
void take_steps(const Json& events, Curve& curve) {
  for (const Json& event : list_at(events, "items")) {
    curve.last_event = std::max(curve.last_event, integer_at(event, "number"));
    const auto loss = number_at(event, "loss");
    if (loss) curve.losses.push_back(*loss);
  }
}

std::string watch_frame(const Json& learning, const Curve& curve, int columns) {
  constexpr int kLabel = 8;
  double low = 0, high = 0;
  const int width = std::max(columns - kLabel, 10);
  const auto lines = braille_plot(curve.losses, width, kCurveRows, low, high);
  std::string frame = learning_line(learning) + "\n\n";
  for (int r = 0; r < kCurveRows; ++r) {
    std::string label = r == 0 ? number_text(high) : r + 1 == kCurveRows ? number_text(low) : "";
    if (curve.losses.empty()) label.clear();
    label.resize(kLabel - 1, ' ');
    frame += label + " " + lines[r] + "\n";
  }
  frame += "        loss of the last " + count_text(static_cast<int64_t>(curve.losses.size())) +
           " steps\n\n";
  const Json& rounds = list_at(learning, "rounds");
  for (size_t i = rounds.size(); i > 0 && rounds.size() - i < 5; --i) {
    const Json& round = rounds[i - 1];
    frame += "round " + text_at(round, "round") + "  " + text_at(round, "outcome") + "  " +
             text_at(round, "version", "") + "  " + text_at(round, "reason", "") + "\n";
  }
  return fitted(frame, columns);
}

Result<std::string> fetch_watch(Session& session, Curve& curve, int columns) {
  DS_ASSIGN(const Json learning, session.get("/ds/v1/learn"));
  DS_ASSIGN(const Json steps,
            session.get("/ds/v1/events?topic=step&since=" + std::to_string(curve.last_event)));
  take_steps(steps, curve);
  return watch_frame(learning, curve, columns);
}

/// Redraws until the user leaves. The daemon going away ends it, after the screen is given back.
template <typename Frame>
int redraw(Session& session, int interval_ms, Frame&& frame) {
  Status status;
  {
    Screen screen;
    do {
      const Result<std::string> text = frame(screen.columns());
      status = text.status();
      if (!status.ok()) break;
      screen.draw(*text);
    } while (!screen.leave_within(interval_ms));
  }
  if (status.code() == Code::kCancelled || interrupted()) return kInterrupted;
  return status.ok() ? kDone : session.fail(status);
}

int print_once(Session& session, const Result<std::string>& frame) {
  if (!frame.ok()) return session.fail(frame.status());
  session.print(*frame);
  return kDone;
}

/// Elsewhere than on a terminal: the learning events as they come, one JSON each.
int watch_lines(Session& session, bool once) {
  const std::string target = "/ds/v1/events?topic=step,gate,version&since=0";
  if (once) {
    const auto reply = session.get(target);
    if (!reply.ok()) return session.fail(reply.status());
    for (const Json& event : list_at(*reply, "items")) session.json_line(event);
    return kDone;
  }
  const Status status = session.follow(
      {"GET", target + "&follow=1", ""}, session.timeout_ms(Patience::kLong),
      [&](std::string_view, const Json& event) { return session.json_line(event), true; });
  if (!status.ok()) return session.fail(status);
  return session.fail(unavailable("the daemon ended the event stream"),
                      "it stopped, or dropped a reader that was too slow; run the command again");
}

}  // namespace

int top(Session& session, bool once, double interval_s) {
  if (once || session.json() || !on_terminal()) {
    if (!session.json()) return print_once(session, fetch_top(session, kPlainColumns));
    return status(session, false);
  }
  const int interval_ms = static_cast<int>(interval_s * 1000);
  return redraw(session, interval_ms, [&](int columns) { return fetch_top(session, columns); });
}

int learn_watch(Session& session, bool once) {
  if (session.json() || !on_terminal()) return watch_lines(session, once);
  Curve curve;
  if (once) return print_once(session, fetch_watch(session, curve, kPlainColumns));
  return redraw(session, 500, [&](int columns) { return fetch_watch(session, curve, columns); });
}

}  // namespace ds::ctl
