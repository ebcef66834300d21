// SPDX-License-Identifier: Apache-2.0
// Parsing and encoding of OpenAI's shapes. Shapes follow openai-python's types.
#include "serve/openai_types.h"

#include <cstring>
#include <utility>

namespace ds {
namespace {

constexpr int kMaxAnswers = 4;
constexpr size_t kMaxPrompts = 128;
constexpr int kMaxTopLogprobs = 20;

void refuse_unless_absent(Fields& fields, const char* key, const char* what) {
  const Json* value = fields.get(key);
  if (!value || ((value->is_array() || value->is_object() || value->is_string()) && value->empty()))
    return;
  fields.fail(key, std::string("not supported yet: ") + what, "unsupported");
}

void parse_common(Fields& fields, int64_t vocab_size, CompletionCommon& out) {
  read_sampling(fields, vocab_size, out.generate);
  out.n = static_cast<int>(fields.integer("n", 1, 1, kMaxAnswers));
  out.stream = fields.flag("stream", false);
  if (const Json* options = fields.get("stream_options")) {
    Fields inner(*options);
    out.include_usage = inner.flag("include_usage", false);
    inner.get("include_obfuscation");
    if (inner.error()) fields.fail("stream_options", inner.error()->message);
  }
  out.user = fields.text("user", "");
  const std::string latency = fields.text("class", "interactive");
  if (latency == "batch") out.generate.latency = LatencyClass::kBatch;
  if (latency != "batch" && latency != "interactive") {
    fields.fail("class", "'" + latency + "', expected interactive or batch");
  }
  // Accepted and without effect here.
  for (const char* key :
       {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}) {
    fields.get(key);
  }
}

std::optional<ApiError> done(const Fields& fields, CompletionCommon& out) {
  out.ignored = fields.ignored();
  return fields.error();
}

void parse_response_format(Fields& fields) {
  const Json* format = fields.get("response_format");
  if (!format) return;
  const Result<std::string> type = get_string(*format, "type");
  if (!type.ok()) return fields.fail("response_format", type.status().message());
  if (*type == "text") return;
  fields.fail("response_format",
              "not supported yet: type '" + *type + "' (constrained decoding); use text",
              "unsupported");
}

/// The ids, or what is none: `where` and value.
std::string parse_ids(const Json& list, const std::string& where, int64_t vocab_size,
                      std::vector<TokenId>& ids) {
  for (size_t i = 0; i < list.size(); ++i) {
    const Json& item = list[i];
    if (!item.is_number_integer() || item < 0 || item >= vocab_size) {
      return where + "[" + std::to_string(i) + "] is " + dump_json(item).substr(0, 60);
    }
    ids.push_back(item.get<TokenId>());
  }
  return {};
}

void parse_prompts(Fields& fields, int64_t vocab_size, CompletionRequest& out) {
  const Json* prompt = fields.get("prompt");
  const std::string expected = "expected a string, a list of strings, token ids below " +
                               std::to_string(vocab_size) + ", or a list of id lists";
  if (!prompt) return fields.fail("prompt", "missing, " + expected);
  if (prompt->is_string()) {
    out.prompts.emplace_back(prompt->get<std::string>());
    return;
  }
  if (!prompt->is_array() || prompt->empty()) {
    return fields.fail("prompt", "got " + dump_json(*prompt).substr(0, 60) + ", " + expected);
  }
  const bool one_list = prompt->front().is_number();
  const Json list = one_list ? Json::array({*prompt}) : *prompt;
  if (list.size() > kMaxPrompts) {
    return fields.fail("prompt", std::to_string(list.size()) + " prompts, expected at most 128");
  }
  for (size_t i = 0; i < list.size(); ++i) {
    const Json& item = list[i];
    const std::string where = one_list ? "prompt" : "prompt[" + std::to_string(i) + "]";
    if (item.is_string()) {
      out.prompts.emplace_back(item.get<std::string>());
      continue;
    }
    std::vector<TokenId> ids;
    const std::string bad = item.is_array() ? parse_ids(item, where, vocab_size, ids)
                                            : where + " is " + dump_json(item).substr(0, 60);
    if (!bad.empty()) return fields.fail("prompt", bad + ", " + expected);
    out.prompts.emplace_back(std::move(ids));
  }
}

bool valid_utf8(std::string_view text) {
  return Json(std::string(text)).dump(-1, ' ', false, Json::error_handler_t::ignore) ==
         Json(std::string(text)).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Keys of a map must differ, so bytes that are not text by themselves are spelled out.
std::string token_text(std::string_view bytes) {
  if (valid_utf8(bytes)) return std::string(bytes);
  std::string out = "bytes:";
  for (const char c : bytes) {
    char hex[5];
    std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(c));
    out += hex;
  }
  return out;
}

Json byte_list(std::string_view bytes) {
  Json list = Json::array();
  for (const char c : bytes) list.push_back(static_cast<unsigned char>(c));
  return list;
}

int64_t characters(std::string_view bytes) {
  int64_t count = 0;
  for (const char c : bytes) count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return count;
}

}  // namespace

std::optional<ApiError> parse_chat(const Json& body, int64_t vocab_size, ChatRequest& out) {
  Fields fields(body);
  out.messages = read_messages(fields);
  if (const Json* messages = fields.get("messages")) out.raw_messages = *messages;
  parse_common(fields, vocab_size, out);
  const bool logprobs = fields.flag("logprobs", false);
  const int64_t top = fields.integer("top_logprobs", 0, 0, kMaxTopLogprobs);
  if (top > 0 && !logprobs) fields.fail("top_logprobs", "needs logprobs: true");
  if (logprobs) out.generate.logprobs = static_cast<int>(top);
  parse_response_format(fields);
  refuse_unless_absent(fields, "tools", "tool calls");
  refuse_unless_absent(fields, "functions", "function calls");
  const Json* choice = fields.get("tool_choice");
  if (choice && *choice != "none" && *choice != "auto") {
    fields.fail("tool_choice", "not supported yet: tool calls", "unsupported");
  }
  refuse_unless_absent(fields, "audio", "audio output");
  fields.get("parallel_tool_calls");
  fields.get("modalities");
  return done(fields, out);
}

std::optional<ApiError> parse_completion(const Json& body, int64_t vocab_size,
                                         CompletionRequest& out) {
  Fields fields(body);
  parse_prompts(fields, vocab_size, out);
  parse_common(fields, vocab_size, out);
  out.echo = fields.flag("echo", false);
  const Json* logprobs = fields.get("logprobs");
  if (logprobs && logprobs->is_boolean()) {
    if (logprobs->get<bool>()) out.generate.logprobs = 0;
  } else {
    out.generate.logprobs = static_cast<int>(fields.integer("logprobs", -1, 0, kMaxTopLogprobs));
  }
  out.generate.prompt_logprobs = out.echo && out.generate.logprobs >= 0;
  if (fields.integer("best_of", out.n, 1, kMaxAnswers) != out.n) {
    fields.fail("best_of", "not supported yet: best_of other than n", "unsupported");
  }
  refuse_unless_absent(fields, "suffix", "fill in the middle");
  return done(fields, out);
}

Json answer(const AnswerHead& head, Json choices) {
  return {{"id", head.id},
          {"object", head.object},
          {"created", head.created_s},
          {"model", head.model},
          {"system_fingerprint", head.fingerprint},
          {"choices", std::move(choices)}};
}

Json usage_json(int64_t prompt, int64_t completion, int64_t cached) {
  return {{"prompt_tokens", prompt},
          {"completion_tokens", completion},
          {"total_tokens", prompt + completion},
          {"prompt_tokens_details", {{"cached_tokens", cached}}}};
}

Json finish_reason(const Finish& finish) {
  return finish.finish_reason == "length" ? "length" : "stop";
}

Json chat_logprobs(const Tokenizer& tokenizer, const std::vector<TokenInfo>& tokens) {
  Json content = Json::array();
  for (const TokenInfo& token : tokens) {
    Json top = Json::array();
    for (const auto& [id, logprob] : token.top) {
      const std::string_view bytes = tokenizer.bytes(id);
      top.push_back({{"token", std::string(bytes)},
                     {"bytes", byte_list(bytes)},
                     {"logprob", shortest(logprob)}});
    }
    content.push_back({{"token", token.bytes},
                       {"bytes", byte_list(token.bytes)},
                       {"logprob", shortest(token.logprob)},
                       {"top_logprobs", std::move(top)}});
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json completion_logprobs(const Tokenizer& tokenizer, const std::vector<TokenInfo>& tokens,
                         int64_t offset) {
  Json texts = Json::array(), values = Json::array(), tops = Json::array(), offsets = Json::array();
  for (const TokenInfo& token : tokens) {
    texts.push_back(token_text(token.bytes));
    offsets.push_back(offset);
    offset += characters(token.bytes);
    if (!token.has_logprob) {
      values.push_back(nullptr);
      tops.push_back(nullptr);
      continue;
    }
    values.push_back(shortest(token.logprob));
    Json top = Json::object();
    for (const auto& [id, logprob] : token.top) {
      top[token_text(tokenizer.bytes(id))] = shortest(logprob);
    }
    tops.push_back(std::move(top));
  }
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

int64_t count_characters(const std::vector<TokenInfo>& tokens) {
  int64_t count = 0;
  for (const TokenInfo& token : tokens) count += characters(token.bytes);
  return count;
}

std::string base64_floats(const std::vector<float>& values) {
  static_assert(std::endian::native == std::endian::little);
  static constexpr char kDigits[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t j = 0; j < 3; ++j) {
      group = group << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    }
    for (size_t j = 0; j < 4; ++j) {
      out += i + j > bytes.size() ? '=' : kDigits[group >> (18 - 6 * j) & 63];
    }
  }
  return out;
}

}  // namespace ds
