// SPDX-License-Identifier: Apache-2.0
#include "learn/lessons.h"

#include <algorithm>
#include <cctype>

#include "storage/hash.h"

namespace ds {
namespace {

constexpr int64_t kHoldOutClusters = 100, kHoldOutOneIn = 20;
constexpr int64_t kNsPerMs = 1'000'000, kLeastBackOffMs = 1000;

/// Text of a message: a string, or text parts joined. Other parts need an encoder.
Result<std::string> text_of(const Json& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    return invalid("content: " + std::string(content.type_name()) + ", expected a string or parts");
  std::string out;
  for (const Json& part : content) {
    DS_ASSIGN(const std::string type, get_string(part, "type"));
    if (type != "text")
      return unsupported("content part \"" + type + "\": no encoder for it is loaded");
    DS_ASSIGN(const std::string text, get_string(part, "text"));
    out += text;
  }
  return out;
}

Result<std::vector<ChatMessage>> messages_of(const Json& list) {
  std::vector<ChatMessage> out;
  if (list.is_object()) {  // a completion's trace: {"prompt": "..."}
    DS_ASSIGN(const std::string prompt, get_string(list, "prompt"));
    out.push_back({"user", prompt});
    return out;
  }
  for (const Json& m : list) {
    ChatMessage message;
    DS_ASSIGN(message.role, get_string(m, "role"));
    if (message.role == "developer") message.role = "system";  // its later name at OpenAI
    const Json* content = find(m, "content");
    if (content == nullptr) return invalid("messages: a message without content");
    DS_ASSIGN(message.content, text_of(*content));
    out.push_back(std::move(message));
  }
  return out;
}

/// The conversation before the answer: the record's own messages, else the cited response's.
Result<std::vector<ChatMessage>> context_of(const Json& record) {
  if (const Json* messages = find(record, "messages")) return messages_of(*messages);
  if (const Json* joined = find(record, "joined")) return messages_of((*joined)["messages"]);
  return invalid("neither messages nor a known response");
}

Result<std::string> answer_of(const Json& record, std::string_view key) {
  const Json* answer = find(record, key);
  if (answer == nullptr) return std::string();
  if (answer->is_array())
    return answer->empty() ? Result<std::string>(std::string())
                           : text_of(answer->back()["content"]);
  return text_of(*answer);
}

}  // namespace

Result<Lesson> lesson_of(const FeedbackItem& item) {
  Lesson lesson;
  lesson.draw_key = item.draw_key;
  const Json& r = item.record;
  if (item.kind == "text") {
    lesson.kind = Lesson::Kind::kText;
    DS_ASSIGN(lesson.answer, get_string(r, "text"));
    return lesson;
  }
  if (item.kind == "demonstration") {
    DS_ASSIGN(lesson.context, messages_of(r["messages"]));
    lesson.answer = lesson.context.back().content;
    lesson.context.pop_back();
  } else if (item.kind == "correction") {
    DS_ASSIGN(lesson.context, context_of(r));
    DS_ASSIGN(lesson.answer, get_string(r, "correction"));
    DS_ASSIGN(lesson.rejected, answer_of(r, "rejected"));
    if (lesson.rejected.empty()) {
      if (const Json* joined = find(r, "joined")) {
        DS_ASSIGN(lesson.rejected, answer_of(*joined, "rejected"));
      }
    }
  } else if (item.kind == "preference") {
    lesson.kind = Lesson::Kind::kPair;
    DS_ASSIGN(lesson.context, context_of(r));
    DS_ASSIGN(lesson.answer, answer_of(r, "chosen"));
    DS_ASSIGN(lesson.rejected, answer_of(r, "rejected"));
  } else {
    return unsupported("kind " + item.kind + " is not learned by the language model");
  }
  if (lesson.context.empty() || lesson.context.back().role != "user") {
    return unsupported("the message before the answer is not the user's");
  }
  if (lesson.rejected == lesson.answer) lesson.rejected.clear();
  return lesson;
}

RoundRule round_rule(const Config& config) {
  return {config.integer("learn.min_items"), config.integer("learn.settle"),
          config.integer("learn.max_wait")};
}

int64_t round_opens_in(const RoundRule& rule, int64_t waiting, int64_t oldest_ms, int64_t newest_ms,
                       int64_t now_ms) {
  if (waiting == 0) return -1;
  const int64_t by_wait = oldest_ms + rule.max_wait_ms - now_ms;
  if (waiting < rule.min_items) return std::max<int64_t>(by_wait, 0);
  return std::max<int64_t>(std::min(by_wait, newest_ms + rule.settle_ms - now_ms), 0);
}

void BackOff::begin(const Config& config, const Clock& clock) {
  const int64_t wait_ms = std::max(config.integer("learn.max_wait"), kLeastBackOffMs);
  until_ns_ = clock.monotonic_ns() + wait_ms * kNsPerMs;
}

int64_t BackOff::left_ms(const Clock& clock) const {
  const int64_t left_ns = until_ns_ - clock.monotonic_ns();
  return left_ns <= 0 ? 0 : (left_ns + kNsPerMs - 1) / kNsPerMs;
}

std::string normalised(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) != 0 || byte >= 0x80) out += static_cast<char>(std::tolower(byte));
  }
  return out;
}

bool held_out(const std::string& text, int64_t clusters_in_domain) {
  if (clusters_in_domain < kHoldOutClusters) return false;
  return sha256(normalised(text))[0] % kHoldOutOneIn == 0;
}

}  // namespace ds
