// SPDX-License-Identifier: Apache-2.0
// run: a conversation in which the user can say what was good, bad or wrong, see it learned, and
// undo it.
#include <poll.h>
#include <unistd.h>

#include <cstdio>

#include "ctl/answer.h"
#include "ctl/feedback.h"
#include "ctl/interrupt.h"
#include "ctl/line_editor.h"
#include "ctl/output.h"
#include "ctl/progress.h"

namespace ds::ctl {
namespace {

constexpr int kPollMs = 250;
constexpr int64_t kLearnPatienceMs = 10 * 60 * 1000;

constexpr const char* kHelp =
    "/good          the last answer was good\n"
    "/bad [why]     the last answer was bad\n"
    "/fix TEXT      what the answer should have been\n"
    "/undo          take the last feedback back\n"
    "/why           what became of the last feedback, and which version answered\n"
    "/version       which version serves\n"
    "/new           start a new conversation\n"
    "/quit          leave (or Ctrl-D)\n";

/// No further change is to be expected from learning alone.
bool is_settled(const std::string& state) {
  for (const char* settled : {"served", "held", "quarantined", "reverted", "expired", "erased"}) {
    if (state == settled) return true;
  }
  return false;
}

class Chat {
 public:
  Chat(Session& session, const AskOptions& options)
      : session_(session), options_(options), terminal_(isatty(STDIN_FILENO)) {
    start_over();
  }

  int loop();

 private:
  void start_over() {
    messages_ = Json::array();
    if (options_.system.empty()) return;
    messages_.push_back({{"role", "system"}, {"content", options_.system}});
  }
  void say(const std::string& text) const { session_.print(text); }
  void complain(const Status& status) { exit_ = session_.fail(status); }
  bool command(const std::string& line);  ///< false = leave
  void answer(const std::string& line);
  bool has_answer();
  bool give(Json record);
  void wait_until_learned();
  bool report(const std::string& id, int64_t& stored_ms);
  void undo();
  void why();
  void which_version();

  Session& session_;
  const AskOptions options_;
  const bool terminal_;
  Json messages_;
  Answer last_;
  std::string last_feedback_;
  std::vector<std::string> pending_;  ///< given, and not yet told what became of it
  int exit_ = kDone;
};

int Chat::loop() {
  const auto status = session_.get("/ready");
  if (!status.ok()) return session_.fail(status.status());
  if (terminal_) say(text_at(*status, "version") + " serves; /help for what else can be said\n");
  LineEditor editor;
  for (;;) {
    int64_t stored_ms = 0;
    std::erase_if(pending_, [&](const std::string& id) { return report(id, stored_ms); });
    auto line = editor.read("> ");
    if (!line) break;
    if (interrupted()) {
      clear_interrupt();
      continue;
    }
    const size_t begin = line->find_first_not_of(" \t");
    if (begin == std::string::npos) continue;
    *line = line->substr(begin, line->find_last_not_of(" \t\r") + 1 - begin);
    exit_ = kDone;
    if (line->front() != '/') {
      answer(*line);
    } else if (!command(*line)) {
      break;
    }
    if (interrupted()) clear_interrupt();
    if (exit_ == kUnreachable) return exit_;
    if (!terminal_ && exit_ != kDone) return exit_;
  }
  if (terminal_) say("\n");
  return kDone;
}

void Chat::answer(const std::string& line) {
  messages_.push_back({{"role", "user"}, {"content", line}});
  const auto answer =
      stream_answer(session_, chat_request(options_, messages_, true), [&](std::string_view piece) {
        say(isatty(STDOUT_FILENO) ? printable(piece, true) : std::string(piece));
      });
  if (!answer.ok()) {
    messages_.erase(messages_.size() - 1);
    if (terminal_) say("\n");
    if (answer.status().code() != Code::kCancelled) complain(answer.status());
    return;
  }
  last_ = *answer;
  messages_.push_back({{"role", "assistant"}, {"content", last_.text}});
  say(last_.text.ends_with('\n') ? "" : "\n");
  if (terminal_) say(paint(last_.version, Colour::kDim, session_.colour()) + "\n");
}

bool Chat::has_answer() {
  if (!last_.id.empty()) return true;
  say("there is no answer yet\n");
  return false;
}

bool Chat::give(Json record) {
  record["response_id"] = last_.id;
  const auto ack = session_.post("/ds/v1/feedback", record);
  if (!ack.ok()) {
    complain(ack.status());
    return false;
  }
  last_feedback_ = text_at(*ack, "id");
  say("stored " + last_feedback_ + "\n");
  return true;
}

/// Tells the end of an item's way, once it has one. True when there is nothing more to wait for.
bool Chat::report(const std::string& id, int64_t& stored_ms) {
  const auto item = session_.get("/ds/v1/feedback/" + url_encode(id));
  if (!item.ok()) return true;
  const Json& fate = list_at(*item, "fate");
  if (fate.empty()) return false;
  stored_ms = integer_at(fate[0], "at_ms");
  const Json& now = fate[fate.size() - 1];
  const std::string state = text_at(now, "state");
  if (!is_settled(state)) return false;
  const double seconds = static_cast<double>(integer_at(now, "at_ms") - stored_ms) / 1000;
  const std::string reason = text_at(now, "reason", "");
  if (state == "served") {
    say("learned in " + text_at(now, "version") + " (" + number_text(seconds, 3) + " s)\n");
  } else {
    say(state + (reason.empty() ? "" : ": " + reason) + "\n");
  }
  return true;
}

/// Watches the last feedback until it is served or will not be. Any key goes on without waiting and is the
/// first of the next line; the outcome is then told before a later prompt.
void Chat::wait_until_learned() {
  Progress progress("learning", 0);
  int64_t stored_ms = 0;
  const int64_t end_ms = wall_ms() + kLearnPatienceMs;
  while (wall_ms() < end_ms) {
    const auto item = session_.get("/ds/v1/feedback/" + url_encode(last_feedback_));
    const Json& fate = item.ok() ? list_at(*item, "fate") : list_at(Json(), "fate");
    const std::string state = fate.empty() ? "stored" : text_at(fate[fate.size() - 1], "state");
    if (!item.ok() || is_settled(state)) {
      progress.clear();
      report(last_feedback_, stored_ms);
      return;
    }
    progress.update(0, state + (terminal_ ? "  (Enter goes on)" : ""));
    pollfd watched[2] = {{interrupt_fd(), POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    if (poll(watched, terminal_ ? 2 : 1, kPollMs) > 0) break;
  }
  pending_.push_back(last_feedback_);
}

void Chat::undo() {
  if (last_feedback_.empty()) return say("there is no feedback to undo\n");
  const std::string id = last_feedback_;
  Progress progress("undo", 0);
  const auto reply = watched([&] { return session_.remove("/ds/v1/feedback/" + url_encode(id)); },
                             [&] { progress.update(0); });
  progress.clear();
  if (!reply.ok()) return complain(reply.status());
  std::erase(pending_, id);
  last_feedback_.clear();
  const std::string version = text_at(*reply, "version", "");
  say(text_at(*reply, "state") + (version.empty() ? "" : ", " + version + " serves") + "\n");
}

void Chat::why() {
  if (!last_.id.empty())
    say("the last answer (" + last_.id + ") was given by " + last_.version + "\n");
  if (last_feedback_.empty()) return say("no feedback yet\n");
  const auto item = session_.get("/ds/v1/feedback/" + url_encode(last_feedback_));
  if (!item.ok()) return complain(item.status());
  say(last_feedback_ + "\n" + fate_text(*item));
}

void Chat::which_version() {
  const auto versions = session_.get("/ds/v1/versions");
  if (!versions.ok()) return complain(versions.status());
  const std::string pinned = text_at(*versions, "pinned", "");
  say(text_at(*versions, "current") + " serves" + (pinned.empty() ? "" : ", pinned: " + pinned) +
      "\n");
}

bool Chat::command(const std::string& line) {
  const size_t space = line.find(' ');
  const std::string word = line.substr(0, space);
  const std::string rest =
      space == std::string::npos ? "" : line.substr(line.find_first_not_of(' ', space));
  if (word == "/quit" || word == "/exit") return false;
  if (word == "/good" && has_answer()) {
    if (give({{"kind", "rating"}, {"rating", 1}})) pending_.push_back(last_feedback_);
  } else if (word == "/bad" && has_answer()) {
    Json record = {{"kind", "rating"}, {"rating", -1}};
    if (!rest.empty()) record["comment"] = rest;
    if (give(std::move(record))) pending_.push_back(last_feedback_);
  } else if (word == "/fix" && has_answer()) {
    if (rest.empty()) {
      say("say what the answer should have been: /fix TEXT\n");
    } else if (give({{"kind", "correction"}, {"correction", rest}})) {
      wait_until_learned();
    }
  } else if (word == "/undo") {
    undo();
  } else if (word == "/why") {
    why();
  } else if (word == "/version") {
    which_version();
  } else if (word == "/new") {
    start_over();
  } else if (word == "/help") {
    say(kHelp);
  } else if (word != "/good" && word != "/bad" && word != "/fix") {
    say("unknown command " + printable(word) + "\n" + kHelp);
  }
  return true;
}

}  // namespace

int chat(Session& session, const AskOptions& options) {
  if (session.json()) {
    return session.fail_as(kUsage, "usage", "run talks to people, -o json is for programs",
                           "use dsctl ask -o json");
  }
  return Chat(session, options).loop();
}

}  // namespace ds::ctl
