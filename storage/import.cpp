// SPDX-License-Identifier: Apache-2.0
// Shapes: OpenAI "Supervised fine-tuning" and "Direct preference optimization" guides; TRL
// docs/source/dataset_formats.md; Open WebUI backend/open_webui/models/feedbacks.py.
#include "storage/import.h"

#include <algorithm>
#include <string>

namespace ds {
namespace {

using Records = std::vector<Json>;

/// Copies what the record kinds share, so that a file may carry it beside its own format.
void copy_common(const Json& line, Json& record) {
  for (const char* name :
       {"response_id", "version", "domain", "source", "ts", "ttl_days", "tools"}) {
    if (const Json* value = find(line, name)) record[name] = *value;
  }
}

/// A string as one message of `role`; messages as they are.
Json as_messages(const Json& text_or_messages, const char* role) {
  if (!text_or_messages.is_string()) return text_or_messages;
  return Json::array({{{"role", role}, {"content", text_or_messages}}});
}

/// Prompt and completion, each a string or messages, as one conversation.
Result<Json> joined_messages(const Json& line) {
  Json messages = Json::array();
  for (const auto& [name, role] : {std::pair{"prompt", "user"}, {"completion", "assistant"}}) {
    const Json part = as_messages(line[name], role);
    if (!part.is_array()) {
      return invalid(std::string("\"") + name + "\" is " + part.type_name() +
                     ", expected a string or an array of messages");
    }
    for (const Json& message : part) messages.push_back(message);
  }
  return messages;
}

/// OpenAI: {"input":{"messages":[..]}, "preferred_output":[..], "non_preferred_output":[..]}.
Result<Records> openai_preference(const Json& line) {
  const Json* input = find(line, "input");
  const Json* messages = input ? find(*input, "messages") : nullptr;
  if (!messages) return invalid("\"input.messages\" is missing, expected the prompt's messages");
  const Json* rejected = find(line, "non_preferred_output");
  if (!rejected) return invalid("\"non_preferred_output\" is missing, expected messages");
  Json record = {{"kind", "preference"},
                 {"messages", *messages},
                 {"chosen", line["preferred_output"]},
                 {"rejected", *rejected}};
  copy_common(line, record);
  if (const Json* tools = find(*input, "tools")) record["tools"] = *tools;
  return Records{record};
}

/// Where two conversations part: that many leading messages are equal.
size_t common_messages(const Json& a, const Json& b) {
  size_t n = 0;
  while (n < a.size() && n < b.size() && a[n] == b[n]) ++n;
  return n;
}

/// The common beginning of two texts, cut back to a whole character and before a trailing space (as
/// TRL's extract_prompt).
std::string common_text(const std::string& a, const std::string& b) {
  size_t n = static_cast<size_t>(
      std::mismatch(a.begin(),
                    a.begin() + static_cast<std::ptrdiff_t>(std::min(a.size(), b.size())),
                    b.begin())
          .first -
      a.begin());
  const auto inside = [](const std::string& text, size_t at) {
    return at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80;
  };
  while (n > 0 && (inside(a, n) || inside(b, n))) --n;
  if (n > 0 && a[n - 1] == ' ') --n;
  return a.substr(0, n);
}

/// TRL: {"prompt","chosen","rejected"}, or without "prompt": what both begin with is the prompt.
Result<Records> trl_preference(const Json& line) {
  Json record = {
      {"kind", "preference"}, {"chosen", line["chosen"]}, {"rejected", line["rejected"]}};
  copy_common(line, record);
  if (const Json* prompt = find(line, "prompt")) {
    record["messages"] = as_messages(*prompt, "user");
    return Records{record};
  }
  if (const Json* messages = find(line, "messages")) {
    record["messages"] = *messages;
    return Records{record};
  }
  const Json &chosen = line["chosen"], &rejected = line["rejected"];
  if (chosen.is_array() && rejected.is_array()) {
    const size_t n = common_messages(chosen, rejected);
    const auto at = static_cast<std::ptrdiff_t>(n);
    record["messages"] = Json(Json::array_t(chosen.begin(), chosen.begin() + at));
    record["chosen"] = Json(Json::array_t(chosen.begin() + at, chosen.end()));
    record["rejected"] = Json(Json::array_t(rejected.begin() + at, rejected.end()));
  } else if (chosen.is_string() && rejected.is_string()) {
    const std::string prompt = common_text(chosen, rejected);
    record["messages"] = as_messages(prompt, "user");
    record["chosen"] = chosen.get<std::string>().substr(prompt.size());
    record["rejected"] = rejected.get<std::string>().substr(prompt.size());
    if (prompt.empty()) record["messages"] = Json::array();
  } else {
    return invalid(std::string("\"chosen\" is ") + chosen.type_name() + " and \"rejected\" is " +
                   rejected.type_name() + ", expected two strings or two arrays of messages");
  }
  if (record["messages"].empty()) {
    return invalid("\"prompt\" is missing, and \"chosen\" and \"rejected\" begin differently");
  }
  return Records{record};
}

/// TRL: {"prompt","completion","label":bool}.
Result<Records> trl_unpaired(const Json& line) {
  DS_ASSIGN(Json messages, joined_messages(line));
  Json record = {{"kind", "rating"},
                 {"rating", line["label"].get<bool>() ? 1 : -1},
                 {"messages", std::move(messages)}};
  copy_common(line, record);
  return Records{record};
}

Result<Records> demonstration(const Json& line, Json messages) {
  Json record = {{"kind", "demonstration"}, {"messages", std::move(messages)}};
  copy_common(line, record);
  return Records{record};
}

// --- Open WebUI ---

/// What a record needs of an Open WebUI message.
Json plain_message(const Json& message) {
  const Json *role = find(message, "role"), *content = find(message, "content");
  return {{"role", role ? *role : Json("user")}, {"content", content ? *content : Json("")}};
}

const Json* history_message(const Json& history, const Json& id) {
  return id.is_string() ? find(history, id.get_ref<const std::string&>()) : nullptr;
}

/// From the first message down to `message` itself; the length bound stops a cycle of parents.
Json branch_to(const Json& history, const Json& message) {
  Json::array_t branch;
  for (const Json* at = &message; at && branch.size() <= history.size();) {
    branch.push_back(plain_message(*at));
    const Json* parent = find(*at, "parentId");
    at = parent ? history_message(history, *parent) : nullptr;
  }
  std::reverse(branch.begin(), branch.end());
  return branch;
}

/// Ratings come as numbers or as numerals.
Result<double> webui_rating(const Json& data) {
  const Json* rating = find(data, "rating");
  if (rating && rating->is_number()) return rating->get<double>();
  if (rating && (*rating == "1" || *rating == "-1" || *rating == "0")) {
    return *rating == "1" ? 1.0 : *rating == "0" ? 0.0 : -1.0;
  }
  return invalid("\"data.rating\" is " + (rating ? dump_json(*rating) : "missing") +
                 ", expected 1 or -1");
}

/// A pair per other answer to the same question, unless that was rated alike.
void add_sibling_pairs(const Json& history, const Json& answer, double rating, const Json& common,
                       Records& records) {
  const Json* parent_id = find(answer, "parentId");
  const Json* parent = parent_id ? history_message(history, *parent_id) : nullptr;
  const Json* children = parent ? find(*parent, "childrenIds") : nullptr;
  if (rating == 0 || !children || !children->is_array()) return;
  for (const Json& id : *children) {
    const Json* sibling = history_message(history, id);
    if (!sibling || sibling == &answer) continue;
    const Json other = plain_message(*sibling), own = plain_message(answer);
    if (other["role"] != "assistant" || other["content"] == own["content"]) continue;
    if (const Json* note = find(*sibling, "annotation")) {
      const auto theirs = webui_rating(*note);
      if (theirs.ok() && *theirs * rating > 0) continue;
    }
    Json record = common;
    record["kind"] = "preference";
    record["messages"] = branch_to(history, *parent);
    record["chosen"] = rating > 0 ? own["content"] : other["content"];
    record["rejected"] = rating > 0 ? other["content"] : own["content"];
    records.push_back(std::move(record));
  }
}

/// {"type","data":{"rating","reason","comment",..},"meta":{"message_id",..},
///  "snapshot":{"chat":{"chat":{"history":{"messages":{id: {..,"parentId","childrenIds"}}}}}}}.
Result<Records> open_webui(const Json& line) {
  DS_ASSIGN(const double rating, webui_rating(line["data"]));
  const Json* meta = find(line, "meta");
  const Json* id = meta ? find(*meta, "message_id") : nullptr;
  if (!id || !id->is_string()) return invalid("\"meta.message_id\" is missing, expected a string");
  const Json* at = find(line, "snapshot");
  for (const char* name : {"chat", "chat", "history", "messages"}) {
    at = at ? find(*at, name) : nullptr;
  }
  if (!at || !at->is_object()) {
    return invalid("\"snapshot.chat.chat.history.messages\" is missing, expected an object");
  }
  const Json* answer = history_message(*at, *id);
  if (!answer) {
    return invalid("the snapshot has no message " + dump_json(*id) + ", expected the rated one");
  }
  Json common = Json::object();
  copy_common(line, common);
  common.erase("version");  // Open WebUI's own row version
  if (const Json* created = find(line, "created_at")) common["ts"] = *created;
  for (const char* name : {"reason", "comment"}) {
    const Json* text = find(line["data"], name);
    if (text && text->is_string() && *text != "") common[name] = *text;
  }
  Json record = common;
  record["kind"] = "rating";
  record["rating"] = std::clamp(rating, -1.0, 1.0);
  record["messages"] = branch_to(*at, *answer);
  Records records{record};
  add_sibling_pairs(*at, *answer, rating, common, records);
  return records;
}

}  // namespace

Result<std::vector<Json>> import_line(const Json& line) {
  if (!line.is_object()) {
    return invalid(std::string("the line is ") + line.type_name() + ", expected an object");
  }
  const auto has = [&](const char* name) { return find(line, name) != nullptr; };
  if (has("kind")) return Records{line};
  if (has("preferred_output")) return openai_preference(line);
  if (has("data") && has("snapshot")) return open_webui(line);
  if (has("chosen") && has("rejected")) return trl_preference(line);
  if (has("completions") && has("labels")) {
    return unsupported(
        "TRL's stepwise format (\"completions\", \"labels\") is not learned from yet");
  }
  if (has("prompt") && has("completion")) {
    if (has("label") && line["label"].is_boolean()) return trl_unpaired(line);
    DS_ASSIGN(Json messages, joined_messages(line));
    return demonstration(line, std::move(messages));
  }
  if (has("messages")) return demonstration(line, line["messages"]);
  if (has("text")) {
    Json record = {{"kind", "text"}, {"text", line["text"]}};
    copy_common(line, record);
    return Records{record};
  }
  std::string keys;
  for (const auto& [key, value] : line.items()) {
    if (keys.size() < 200) keys += (keys.empty() ? "" : ", ") + key;
  }
  return invalid("no known format has the keys {" + keys +
                 "}, expected those of a record, OpenAI, TRL or Open WebUI line");
}

}  // namespace ds
