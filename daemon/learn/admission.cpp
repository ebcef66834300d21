// SPDX-License-Identifier: Apache-2.0
#include "learn/admission.h"

#include <algorithm>
#include <cctype>
#include <deque>
#include <map>
#include <set>

#include "learn/lessons.h"

namespace ds {
namespace {

/// Answers by the conversation before them: who gives way to whom.
class Conversations {
 public:
  void add(const FeedbackItem& item) {
    const Result<Lesson> lesson = lesson_of(item);
    if (!lesson.ok() || lesson->kind != Lesson::Kind::kChat) return;
    std::string key;
    for (const ChatMessage& m : lesson->context) key += m.role + ":" + normalised(m.content) + "/";
    key_of_[item.offset] = key;
    answers_[key].push_back(
        {item.offset, item.id, normalised(lesson->answer), item.kind == "correction"});
  }

  /// The id of an item that this one gives way to; empty = none.
  std::string superseded_by(const FeedbackItem& item) const {
    const auto key = key_of_.find(item.offset);
    if (key == key_of_.end()) return {};
    const std::vector<Answer>& all = answers_.at(key->second);
    const auto self = std::find_if(all.begin(), all.end(),
                                   [&](const Answer& a) { return a.offset == item.offset; });
    for (const Answer& a : all) {
      if (a.offset > item.offset && (a.correction || a.text == self->text)) return a.id;
    }
    return {};
  }

 private:
  struct Answer {
    uint64_t offset;
    std::string id, text;
    bool correction;
  };
  std::map<uint64_t, std::string> key_of_;
  std::map<std::string, std::vector<Answer>> answers_;
};

std::string nearly_same_reason(const std::string& as) { return "says nearly the same as " + as; }

std::set<std::string> word_trigrams(const std::string& text) {
  std::vector<std::string> words(1);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) != 0 || byte >= 0x80)
      words.back() += static_cast<char>(std::tolower(byte));
    else if (!words.back().empty())
      words.emplace_back();
  }
  if (words.back().empty()) words.pop_back();
  std::set<std::string> out;
  for (size_t i = 0; i + 3 <= words.size(); ++i)
    out.insert(words[i] + " " + words[i + 1] + " " + words[i + 2]);
  return out;
}

}  // namespace

double likeness(const std::string& a, const std::string& b) {
  const std::set<std::string> left = word_trigrams(a), right = word_trigrams(b);
  if (left.empty() || right.empty()) return normalised(a) == normalised(b) ? 1.0 : 0.0;
  const auto common = static_cast<double>(std::count_if(
      left.begin(), left.end(), [&](const std::string& g) { return right.count(g) != 0; }));
  return common / (static_cast<double>(left.size() + right.size()) - common);
}

std::vector<FeedbackItem> fair_share(std::vector<FeedbackItem> items, size_t limit) {
  if (items.size() <= limit) return items;
  std::set<std::string> sources;
  for (const FeedbackItem& item : items) sources.insert(item.source);
  if (sources.size() < kSourcesForQuota) {
    items.resize(limit);
    return items;
  }
  std::vector<std::string> order;
  std::map<std::string, std::deque<FeedbackItem>> by_source;
  for (FeedbackItem& item : items) {
    if (by_source.count(item.source) == 0) order.push_back(item.source);
    by_source[item.source].push_back(std::move(item));
  }
  std::vector<FeedbackItem> taken;
  while (taken.size() < limit) {
    for (const std::string& source : order) {
      std::deque<FeedbackItem>& queue = by_source[source];
      if (!queue.empty() && taken.size() < limit) {
        taken.push_back(std::move(queue.front()));
        queue.pop_front();
      }
    }
  }
  std::sort(taken.begin(), taken.end(),
            [](const FeedbackItem& a, const FeedbackItem& b) { return a.offset < b.offset; });
  return taken;
}

Admission admit(std::vector<FeedbackItem> items) {
  Admission out;
  Conversations conversations;
  for (const FeedbackItem& item : items) conversations.add(item);
  std::vector<std::pair<std::string, std::string>> texts;  // admitted: id, text
  for (FeedbackItem& item : items) {
    if (item.kind == "text") {
      const std::string text = item.record.value("text", "");
      const auto twin = std::find_if(texts.begin(), texts.end(), [&](const auto& other) {
        return likeness(other.second, text) >= kNearDuplicate;
      });
      if (twin != texts.end()) {
        out.quarantined.push_back({std::move(item), nearly_same_reason(twin->first)});
        continue;
      }
      texts.emplace_back(item.id, text);
    } else if (const std::string by = conversations.superseded_by(item); !by.empty()) {
      out.quarantined.push_back({std::move(item), superseded_reason(by)});
      continue;
    }
    out.admitted.push_back(std::move(item));
  }
  return out;
}

std::string superseded_by(const FeedbackItem& item, const std::vector<FeedbackItem>& others) {
  Conversations conversations;
  conversations.add(item);
  for (const FeedbackItem& other : others) conversations.add(other);
  return conversations.superseded_by(item);
}

std::string superseded_reason(const std::string& by) { return "superseded by " + by; }

bool gave_way_to(const FeedbackItem& item, const std::string& id) {
  if (item.fate.empty() || item.fate.back().state != "quarantined") return false;
  const std::string& reason = item.fate.back().reason;
  return reason == superseded_reason(id) || reason == nearly_same_reason(id);
}

std::vector<FeedbackItem> not_superseded(const std::vector<FeedbackItem>& earlier,
                                         const std::vector<FeedbackItem>& fresh) {
  Conversations conversations;
  for (const auto* items : {&earlier, &fresh}) {
    for (const FeedbackItem& item : *items) conversations.add(item);
  }
  std::vector<FeedbackItem> out;
  for (const FeedbackItem& item : earlier) {
    if (conversations.superseded_by(item).empty()) out.push_back(item);
  }
  return out;
}

}  // namespace ds
