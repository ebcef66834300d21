// SPDX-License-Identifier: Apache-2.0
#include "storage/record.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace ds {
namespace {

Status field(std::string_view name, std::string_view found, std::string_view expected) {
  return invalid("\"" + std::string(name) + "\" is " + std::string(found) + ", expected " +
                 std::string(expected));
}

std::string clipped(std::string_view text) {
  constexpr size_t kShown = 40;
  return text.size() <= kShown ? std::string(text) : std::string(text.substr(0, kShown)) + "...";
}

std::string shown(std::string_view text) { return "\"" + clipped(text) + "\""; }

Result<std::string> nonempty_string(const Json& object, std::string_view key) {
  DS_ASSIGN(std::string text, get_string(object, key));
  if (text.empty()) return field(key, "empty", "text");
  return text;
}

Status check_attachment_index(const Json& object, std::string_view where, size_t attachments) {
  const auto index = get_int(object, "attachment");
  if (!index.ok()) return index.status().in(where);
  if (*index < 0 || static_cast<uint64_t>(*index) >= attachments) {
    return field(std::string(where) + ".attachment", std::to_string(*index),
                 "the index of one of the " + std::to_string(attachments) + " attachments");
  }
  return {};
}

/// A string, or an array of parts {"type": ..., "text": ... | "attachment": i}.
Status check_content(const Json& message, const std::string& where, size_t attachments) {
  const Json* content = find(message, "content");
  if (!content) {
    const Json* calls = find(message, "tool_calls");
    if (calls && calls->is_array() && !calls->empty()) return {};
    return field(where + ".content", "missing", "a string or an array of parts");
  }
  if (content->is_string()) return {};
  if (!content->is_array() || content->empty()) {
    return field(where + ".content", content->type_name(), "a string or an array of parts");
  }
  for (size_t i = 0; i < content->size(); ++i) {
    const Json& part = (*content)[i];
    const std::string at = where + ".content[" + std::to_string(i) + "]";
    const auto type = get_string(part, "type");
    if (!type.ok()) return type.status().in(at);
    if (*type == "text") {
      if (const auto text = get_string(part, "text"); !text.ok()) return text.status().in(at);
    }
    if (find(part, "attachment")) DS_TRY(check_attachment_index(part, at, attachments));
  }
  return {};
}

Status check_message(const Json& message, const std::string& where, size_t attachments) {
  constexpr std::string_view kRoles[] = {"system", "developer", "user", "assistant", "tool"};
  if (!message.is_object()) return field(where, message.type_name(), "an object");
  const auto role = get_string(message, "role");
  if (!role.ok()) return role.status().in(where);
  if (std::find(std::begin(kRoles), std::end(kRoles), *role) == std::end(kRoles)) {
    return field(where + ".role", shown(*role), "system, developer, user, assistant or tool");
  }
  if (const Json* weight = find(message, "weight")) {
    const auto value = get_number(message, "weight");
    if (!value.ok() || (*value != 0 && *value != 1)) {
      return field(where + ".weight", clipped(dump_json(*weight)), "0 or 1");
    }
  }
  return check_content(message, where, attachments);
}

Status check_messages(const Json& messages, std::string_view name, size_t attachments) {
  if (!messages.is_array() || messages.empty()) {
    return field(name, messages.is_array() ? "empty" : messages.type_name(),
                 "an array of messages");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    DS_TRY(
        check_message(messages[i], std::string(name) + "[" + std::to_string(i) + "]", attachments));
  }
  return {};
}

bool ends_with_assistant(const Json& messages) {
  return messages.is_array() && !messages.empty() &&
         messages.back().value("role", "") == "assistant";
}

/// "prompt" (string or messages) becomes "messages": one spelling inside.
Status prompt_to_messages(Json& record, size_t attachments) {
  if (const Json* prompt = find(record, "prompt")) {
    if (find(record, "messages")) {
      return invalid("both \"prompt\" and \"messages\" are given, expected one of them");
    }
    Json messages = *prompt;
    if (prompt->is_string()) {
      messages = Json::array({{{"role", "user"}, {"content", *prompt}}});
    }
    record["messages"] = std::move(messages);
    record.erase("prompt");
  }
  const Json* messages = find(record, "messages");
  return messages ? check_messages(*messages, "messages", attachments) : Status();
}

Status need_assistant_end(const Json& record) {
  const Json& messages = record.at("messages");
  if (!ends_with_assistant(messages)) {
    return field("messages", "not ended by an assistant message", "the answer as its last message");
  }
  const Json* content = find(messages.back(), "content");
  if (content && content->is_string() && content->get_ref<const std::string&>().empty()) {
    return field("messages", "ended by an empty answer", "text in the last message");
  }
  return {};
}

Status need_messages_or_response(const Json& record) {
  if (find(record, "messages") || find(record, "response_id")) return {};
  return invalid(
      "none of \"response_id\", \"messages\", \"prompt\" is given, expected one of them");
}

Status check_demonstration(Json& record, size_t attachments) {
  DS_TRY(prompt_to_messages(record, attachments));
  const Json* completion = find(record, "completion");
  if (completion) {
    if (!find(record, "messages")) return field("prompt", "missing", "given with \"completion\"");
    Json answer = *completion;
    if (completion->is_string()) {
      answer = Json::array({{{"role", "assistant"}, {"content", *completion}}});
    }
    DS_TRY(check_messages(answer, "completion", attachments));
    for (const Json& message : answer) record["messages"].push_back(message);
    record.erase("completion");
  }
  if (!find(record, "messages")) return field("messages", "missing", "an array of messages");
  return need_assistant_end(record);
}

Status check_correction(Json& record, size_t attachments) {
  DS_TRY(nonempty_string(record, "correction").status());
  if (find(record, "rejected")) DS_TRY(get_string(record, "rejected").status());
  DS_TRY(prompt_to_messages(record, attachments));
  DS_TRY(need_messages_or_response(record));
  const Json* messages = find(record, "messages");
  if (!messages || !ends_with_assistant(*messages)) return {};
  // The whole conversation was sent: its last message is the answer being corrected.
  if (find(record, "rejected")) {
    return invalid("\"messages\" ends with the answer and \"rejected\" is given too, expected one");
  }
  DS_ASSIGN(const std::string answer, get_string(messages->back(), "content"));
  record["rejected"] = answer;
  record["messages"].erase(record["messages"].size() - 1);
  if (record["messages"].empty()) return field("messages", "only the answer", "a prompt before it");
  return {};
}

/// A string, or assistant messages; one message with plain text becomes the string.
Status check_answer(Json& record, const char* name, size_t attachments) {
  const Json* answer = find(record, name);
  if (!answer) return field(name, "missing", "a string or messages");
  if (answer->is_string()) return nonempty_string(record, name).status();
  DS_TRY(check_messages(*answer, name, attachments));
  if (!ends_with_assistant(*answer)) {
    return field(name, "not ended by an assistant message", "the answer as its last message");
  }
  const Json* content = find(answer->back(), "content");
  if (answer->size() == 1 && content && content->is_string()) {
    const std::string text = content->get<std::string>();
    record[name] = text;
  }
  return {};
}

Status check_preference(Json& record, size_t attachments) {
  DS_TRY(prompt_to_messages(record, attachments));
  DS_TRY(need_messages_or_response(record));
  DS_TRY(check_answer(record, "chosen", attachments));
  DS_TRY(check_answer(record, "rejected", attachments));
  if (record["chosen"] == record["rejected"]) {
    return field("rejected", "equal to \"chosen\"", "another answer");
  }
  return {};
}

Status check_rating(Json& record, size_t attachments) {
  DS_ASSIGN(const double rating, get_number(record, "rating"));
  if (!(rating >= -1 && rating <= 1)) {
    return field("rating", dump_json(record["rating"]), "a number from -1 to 1");
  }
  DS_TRY(prompt_to_messages(record, attachments));
  if (find(record, "response_id")) return {};
  DS_TRY(need_messages_or_response(record));
  return need_assistant_end(record);
}

Result<std::vector<float>> values_of(const Json& numbers) {
  std::vector<float> values;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const Json& item = numbers[i];
    const double number = item.is_number() ? item.get<double>() : NAN;
    if (!(std::abs(number) <= std::numeric_limits<float>::max())) {
      return field("input[" + std::to_string(i) + "]", clipped(dump_json(item)),
                   "a finite FP32 number");
    }
    values.push_back(static_cast<float>(number));
  }
  return values;
}

Result<std::vector<float>> values_of(const Json& input, std::string_view bytes) {
  const std::string which = "input.attachment " + dump_json(input["attachment"]);
  DS_ASSIGN(const std::string dtype, get_string(input, "dtype", "F32"));
  if (dtype != "F32") return field("input.dtype", shown(dtype), "\"F32\"");
  if (bytes.empty() || bytes.size() % sizeof(float) != 0) {
    return field(which, std::to_string(bytes.size()) + " bytes",
                 "FP32 values, 4 bytes each, at least one");
  }
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  const auto bad = std::find_if_not(values.begin(), values.end(),
                                    [](float value) { return std::isfinite(value); });
  if (bad == values.end()) return values;
  return field(which + " value " + std::to_string(bad - values.begin()),
               std::isnan(*bad) ? "NaN" : "infinite", "a finite FP32 number");
}

Status check_task_label(Json& record, const std::vector<std::string>& attachments) {
  DS_ASSIGN(const std::string model, get_string(record, "model"));
  DS_TRY(check_name("\"model\"", model));
  DS_ASSIGN(const int64_t label, get_int(record, "label"));
  if (label < 0) return field("label", std::to_string(label), "a class number from 0");
  const Json* input = find(record, "input");
  if (!input) return field("input", "missing", "an array of numbers or {\"attachment\": i}");
  return read_input(*input, {attachments.begin(), attachments.end()}).status();
}

Status check_retract(const Json& record) {
  DS_ASSIGN(const std::string target, get_string(record, "target"));
  const bool hex = target.size() == 23 && target.starts_with("fb_") &&
                   target.find_first_not_of("0123456789abcdef", 3) == std::string::npos;
  if (!hex) return field("target", shown(target), "a feedback id: fb_ and 20 hex digits");
  return {};
}

Status check_common(const Json& record) {
  if (find(record, "joined")) {
    return invalid("\"joined\" is given, but only the store writes it, from its trace");
  }
  if (find(record, "response_id")) {
    DS_ASSIGN(const std::string id, get_string(record, "response_id"));
    DS_TRY(check_label("\"response_id\"", id));
  }
  for (const char* name : {"domain", "source"}) {
    if (!find(record, name)) continue;
    DS_ASSIGN(const std::string value, get_string(record, name));
    DS_TRY(check_label("\"" + std::string(name) + "\"", value));
  }
  for (const char* name : {"version", "ts"}) {
    const Json* value = find(record, name);
    if (value && !value->is_string() && !value->is_number()) {
      return field(name, value->type_name(), "a string or a number");
    }
  }
  if (find(record, "ttl_days")) {
    DS_ASSIGN(const double days, get_number(record, "ttl_days"));
    if (!(days > 0 && days <= 36500)) {
      return field("ttl_days", dump_json(record["ttl_days"]), "a number from above 0 to 36500");
    }
  }
  return {};
}

}  // namespace

Result<std::vector<float>> read_input(const Json& input,
                                      const std::vector<std::string_view>& attachments) {
  constexpr size_t kMaxInputs = 1u << 20;  // of the largest task model that can be made
  if (!input.is_object() && (!input.is_array() || input.empty())) {
    return field("input", input.is_array() ? "empty" : input.type_name(),
                 "an array of numbers or {\"attachment\": i}");
  }
  std::string_view bytes;
  if (input.is_object()) {
    DS_TRY(check_attachment_index(input, "input", attachments.size()));
    DS_ASSIGN(const int64_t index, get_int(input, "attachment"));
    bytes = attachments[static_cast<size_t>(index)];
  }
  const size_t count = input.is_array() ? input.size() : bytes.size() / sizeof(float);
  if (count > kMaxInputs) {
    return field("input", std::to_string(count) + " numbers",
                 "at most " + std::to_string(kMaxInputs));
  }
  return input.is_array() ? values_of(input) : values_of(input, bytes);
}

Result<Json> check_record(const Json& record, const std::vector<std::string>& attachments) {
  if (!record.is_object()) return field("record", record.type_name(), "an object");
  DS_ASSIGN(const std::string kind, get_string(record, "kind"));
  DS_TRY(check_common(record));
  Json checked = record;
  const size_t count = attachments.size();
  Status status;
  if (kind == "demonstration") {
    status = check_demonstration(checked, count);
  } else if (kind == "correction") {
    status = check_correction(checked, count);
  } else if (kind == "preference") {
    status = check_preference(checked, count);
  } else if (kind == "rating") {
    status = check_rating(checked, count);
  } else if (kind == "label") {
    status = check_task_label(checked, attachments);
  } else if (kind == "text") {
    status = nonempty_string(checked, "text").status();
  } else if (kind == "retract") {
    status = check_retract(checked);
  } else {
    return field("kind", shown(kind),
                 "demonstration, correction, preference, rating, label, text or retract");
  }
  if (!status.ok()) return status.in(kind);
  return checked;
}

Sha256Digest payload_hash_of_text(std::string_view canonical_record,
                                  const std::vector<std::string>& attachments) {
  Sha256 hash;
  hash.update(canonical_record);
  for (const std::string& bytes : attachments) {
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bytes.size() >> (8 * i));
    hash.update(length, sizeof length);
    hash.update(bytes);
  }
  return hash.finish();
}

Sha256Digest payload_hash(const Json& record, const std::vector<std::string>& attachments) {
  return payload_hash_of_text(canonical_json(record), attachments);
}

std::string draw_key(const Json& record, const std::vector<std::string>& attachments) {
  Json said = record;
  if (said.is_object()) {
    for (const char* name : {"id", "seq", "ts"}) said.erase(name);
  }
  return to_hex(payload_hash(said, attachments));
}

std::string feedback_id(const std::string& client, int64_t epoch, int64_t seq) {
  // JSON of the three, so that no client name can imitate another's numbers.
  return "fb_" + to_hex(sha256(canonical_json(Json::array({client, epoch, seq})))).substr(0, 20);
}

Status check_label(std::string_view what, std::string_view value) {
  constexpr size_t kMaxBytes = 128;
  const bool control = std::any_of(value.begin(), value.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
  if (!value.empty() && value.size() <= kMaxBytes && !control) return {};
  const std::string found =
      control ? "with control characters" : "of " + std::to_string(value.size()) + " bytes";
  return invalid(std::string(what) + " is " + found +
                 ", expected 1 to 128 bytes without control characters");
}

Status check_name(std::string_view what, std::string_view value) {
  const auto alnum = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
  const bool good = !value.empty() && value.size() <= 64 && alnum(value[0]) &&
                    std::all_of(value.begin(), value.end(), [&](char c) {
                      return alnum(c) || c == '.' || c == '_' || c == '-';
                    });
  if (good) return {};
  return invalid(std::string(what) + " is " + dump_json(Json(value)) +
                 ", expected ^[a-z0-9][a-z0-9._-]{0,63}$");
}

}  // namespace ds
