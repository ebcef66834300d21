// SPDX-License-Identifier: Apache-2.0
// ChatML templates. No Jinja engine: the shipped text is recognised, apart from its default system
// message, and rendered by hand.
#include "engine/tokenizer.h"

namespace ds {
namespace {

constexpr std::string_view kStart = "<|im_start|>";
constexpr std::string_view kEnd = "<|im_end|>";

// SmolLM2's template is kLoop + kDefaultBefore + default system message + kDefaultAfter + kTurn +
// kAnswer; plain ChatML lacks the default's part. Line ends as after unescaping "\n".
constexpr std::string_view kLoop = "{% for message in messages %}";
constexpr std::string_view kDefaultBefore =
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n";
constexpr std::string_view kDefaultAfter = "<|im_end|>\n' }}{% endif %}";
constexpr std::string_view kTurn =
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}";
constexpr std::string_view kAnswer =
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
constexpr std::string_view kPreamble =
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}";

/// Jinja reads "\n" in a string as a line end; templates come with either spelling.
std::string unescape_newlines(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escape = text[i] == '\\' && i + 1 < text.size() && text[i + 1] == 'n';
    out += escape ? '\n' : text[i];
    if (escape) ++i;
  }
  return out;
}

bool consume(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

/// True if `text` is ChatML; `default_system` becomes the message it adds, empty if it adds none.
bool match_chatml(std::string_view text, std::string& default_system) {
  consume(text, kPreamble);
  if (!consume(text, kLoop)) return false;
  if (consume(text, kDefaultBefore)) {
    const size_t end = text.find(kDefaultAfter);
    if (end == std::string_view::npos) return false;
    default_system = text.substr(0, end);
    // A quote or backslash could end or change the string literal: not what we recognise.
    if (default_system.find_first_of("'\\") != std::string::npos) return false;
    text.remove_prefix(end + kDefaultAfter.size());
  }
  if (!consume(text, kTurn) || !consume(text, kAnswer)) return false;
  return text.empty() || text == "\n";
}

/// The id of a turn marker, which must be a special token: user text could spell any other.
Result<TokenId> marker_id(const TokenizerData& data, std::string_view marker) {
  for (const int32_t id : data.special) {
    const auto index = static_cast<size_t>(id);
    if (index < data.tokens.size() && data.tokens[index] == marker) return id;
  }
  return invalid("the chat template needs the special token " + std::string(marker) +
                 ", which the vocabulary has not");
}

void append(std::vector<TokenId>& ids, const std::vector<TokenId>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

}  // namespace

Result<ChatTemplate> ChatTemplate::create(const TokenizerData& data) {
  ChatTemplate chat;
  if (data.chat_template.empty()) return chat;
  if (!match_chatml(unescape_newlines(data.chat_template), chat.default_system_)) {
    return unsupported("chat template \"" + data.chat_template.substr(0, 60) +
                       "...\", expected ChatML as SmolLM2 ships it");
  }
  DS_ASSIGN(chat.start_of_turn_, marker_id(data, kStart));
  DS_ASSIGN(chat.end_of_turn_, marker_id(data, kEnd));
  chat.available_ = true;
  return chat;
}

std::vector<TokenId> ChatTemplate::turn(const Tokenizer& tokenizer,
                                        const ChatMessage& message) const {
  std::vector<TokenId> ids{start_of_turn_};
  append(ids, tokenizer.encode(message.role + "\n" + message.content, false));
  ids.push_back(end_of_turn_);
  append(ids, tokenizer.encode("\n", false));
  return ids;
}

Result<std::vector<TokenId>> ChatTemplate::render(const Tokenizer& tokenizer,
                                                  std::span<const ChatMessage> messages,
                                                  bool open_answer) const {
  if (!available_) return unsupported("this model has no chat template; use completions");
  if (messages.empty()) return invalid("messages is empty, expected at least one");
  std::vector<TokenId> ids;
  if (messages[0].role != "system") ids = default_system_ids(tokenizer);
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      return invalid("messages[" + std::to_string(i) + "].role is \"" + role +
                     "\", expected system, user or assistant");
    }
    append(ids, turn(tokenizer, messages[i]));
  }
  if (open_answer) {
    ids.push_back(start_of_turn_);
    append(ids, tokenizer.encode("assistant\n", false));
  }
  return ids;
}

std::vector<TokenId> ChatTemplate::default_system_ids(const Tokenizer& tokenizer) const {
  if (!available_ || default_system_.empty()) return {};
  return turn(tokenizer, {"system", default_system_});
}

}  // namespace ds
