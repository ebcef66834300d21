// SPDX-License-Identifier: Apache-2.0
// Sampling parameters, prompts and the hand-over between the engine's thread and the IO thread.
#include "serve/generation.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace ds {
namespace {

constexpr size_t kMaxStops = 4;
constexpr int64_t kMaxTokens = 1 << 30;  // the context ends an answer long before
constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();

void read_stops(Fields& fields, GenerateRequest& request) {
  const Json* stop = fields.get("stop");
  if (!stop) return;
  const Json list = stop->is_array() ? *stop : Json::array({*stop});
  if (list.size() > kMaxStops) {
    return fields.fail("stop", std::to_string(list.size()) + " strings, expected at most 4");
  }
  for (const Json& item : list) {
    if (!item.is_string() || item.get_ref<const std::string&>().empty()) {
      return fields.fail("stop",
                         "expected a non-empty string or a list of them, got " + dump_json(item));
    }
    request.stop.push_back(item.get<std::string>());
  }
}

void read_logit_bias(Fields& fields, int64_t vocab_size, GenerateRequest& request) {
  const Json* bias = fields.get("logit_bias");
  if (!bias) return;
  if (!bias->is_object()) return fields.fail("logit_bias", "expected an object of token id: bias");
  for (const auto& [key, value] : bias->items()) {
    int64_t id = -1;
    const auto parsed = std::from_chars(key.data(), key.data() + key.size(), id);
    if (parsed.ec != std::errc() || parsed.ptr != key.data() + key.size() || id < 0 ||
        id >= vocab_size) {
      return fields.fail("logit_bias",
                         "'" + key + "' is not a token id below " + std::to_string(vocab_size));
    }
    if (!value.is_number() || std::abs(value.get<double>()) > 100) {
      return fields.fail("logit_bias",
                         "bias of " + key + " must be in [-100, 100], got " + dump_json(value));
    }
    request.sampling.logit_bias.emplace_back(static_cast<TokenId>(id), value.get<float>());
  }
}

// Text of a message's content; false if it is neither text nor a list of text parts.
bool read_content(Fields& fields, const std::string& where, const Json* content,
                  std::string& text) {
  if (content && content->is_string()) {
    text = content->get<std::string>();
    return true;
  }
  if (!content || !content->is_array()) {
    fields.fail(where + ".content", "expected a string or a list of parts, got " +
                                        std::string(content ? content->type_name() : "none"));
    return false;
  }
  for (const Json& part : *content) {
    const Result<std::string> type = get_string(part, "type");
    if (!type.ok()) {
      fields.fail(where + ".content", "a part: " + type.status().message());
      return false;
    }
    if (*type != "text") {
      fields.fail(where + ".content",
                  "part of type '" + *type + "': no encoder for it is loaded, only text",
                  "unsupported_content");
      return false;
    }
    const Result<std::string> piece = get_string(part, "text");
    if (!piece.ok()) {
      fields.fail(where + ".content", "a text part: " + piece.status().message());
      return false;
    }
    text += *piece;
  }
  return true;
}

}  // namespace

const Json* Fields::get(const std::string& key) {
  known_.insert(key);
  return find(object_, key);
}

std::string Fields::ignored() const {
  std::string names;
  int count = 0;
  for (const auto& [key, value] : object_.items()) {
    if (known_.contains(key)) continue;
    if (++count > 20) return names + ", ...";
    names += (names.empty() ? "" : ", ") + key.substr(0, 64);
  }
  return names;
}

void Fields::fail(const std::string& key, const std::string& message, const std::string& code) {
  if (error_) return;
  error_ = ApiError{400, key + ": " + message, "invalid_request_error", key, code};
}

int64_t Fields::integer(const std::string& key, int64_t fallback, int64_t least, int64_t most) {
  const Json* value = get(key);
  if (!value) return fallback;
  int64_t number = 0;
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(kMaxInt)) {
    number = kMaxInt;
  } else if (value->is_number_integer()) {
    number = value->get<int64_t>();
  } else if (value->is_number_float() && value->get<double>() == std::floor(value->get<double>()) &&
             std::abs(value->get<double>()) < 9e15) {
    number = static_cast<int64_t>(value->get<double>());
  } else {
    fail(key, "expected an integer, got " + dump_json(*value).substr(0, 60));
    return fallback;
  }
  if (number >= least && number <= most) return number;
  const std::string upper = most == kMaxInt ? "" : " and at most " + std::to_string(most);
  fail(key, std::to_string(number) + " is out of range: at least " + std::to_string(least) + upper);
  return fallback;
}

double Fields::number(const std::string& key, double fallback, double least, double most) {
  const Json* value = get(key);
  if (!value) return fallback;
  if (!value->is_number()) {
    fail(key, "expected a number, got " + dump_json(*value).substr(0, 60));
    return fallback;
  }
  const double number = value->get<double>();
  if (number >= least && number <= most) return number;  // false for NaN
  fail(key, dump_json(*value) + " is out of range: " + dump_json(least) + " to " + dump_json(most));
  return fallback;
}

bool Fields::flag(const std::string& key, bool fallback) {
  const Json* value = get(key);
  if (!value) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  fail(key, "expected true or false, got " + dump_json(*value).substr(0, 60));
  return fallback;
}

std::string Fields::text(const std::string& key, const std::string& fallback) {
  const Json* value = get(key);
  if (!value) return fallback;
  if (value->is_string()) return value->get<std::string>();
  fail(key, "expected a string, got " + dump_json(*value).substr(0, 60));
  return fallback;
}

void read_sampling(Fields& fields, int64_t vocab_size, GenerateRequest& request) {
  request.model = fields.text("model", "");
  request.max_tokens = fields.integer("max_tokens", -1, 0, kMaxInt);
  request.max_tokens = fields.integer("max_completion_tokens", request.max_tokens, 0, kMaxInt);
  request.max_tokens = std::min(request.max_tokens, kMaxTokens);
  Sampling& sampling = request.sampling;
  sampling.temperature = static_cast<float>(fields.number("temperature", 1, 0, 2));
  sampling.top_p = static_cast<float>(fields.number("top_p", 1, 0, 1));
  sampling.min_p = static_cast<float>(fields.number("min_p", 0, 0, 1));
  sampling.top_k = static_cast<int>(fields.integer("top_k", 0, 0, std::numeric_limits<int>::max()));
  sampling.presence_penalty = static_cast<float>(fields.number("presence_penalty", 0, -2, 2));
  sampling.frequency_penalty = static_cast<float>(fields.number("frequency_penalty", 0, -2, 2));
  if (fields.get("seed")) {
    sampling.seed = static_cast<uint64_t>(
        fields.integer("seed", 0, std::numeric_limits<int64_t>::min(), kMaxInt));
  } else {
    sampling.seed = std::stoull(random_hex(8), nullptr, 16);
  }
  read_stops(fields, request);
  read_logit_bias(fields, vocab_size, request);
}

std::vector<ChatMessage> read_messages(Fields& fields) {
  std::vector<ChatMessage> messages;
  const Json* list = fields.get("messages");
  if (!list || !list->is_array() || list->empty()) {
    const std::string got = !list ? "none" : list->is_array() ? "an empty one" : list->type_name();
    fields.fail("messages", "expected a non-empty list of {role, content}, got " + got);
    return messages;
  }
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string where = "messages[" + std::to_string(i) + "]";
    const Result<std::string> role = get_string((*list)[i], "role");
    if (!role.ok()) {
      fields.fail(where, role.status().message());
      return messages;
    }
    ChatMessage message{*role == "developer" ? "system" : *role, ""};
    if (message.role != "system" && message.role != "user" && message.role != "assistant") {
      fields.fail(where + ".role", "'" + *role + "', expected system, user or assistant");
      return messages;
    }
    if (!read_content(fields, where, find((*list)[i], "content"), message.content)) return messages;
    messages.push_back(std::move(message));
  }
  return messages;
}

std::optional<ApiError> set_chat_prompt(const Service& service,
                                        const std::vector<ChatMessage>& messages,
                                        GenerateRequest& request) {
  const ChatTemplate& chat = service.parts.chat_template;
  if (!chat.available()) {
    return ApiError{400, "this model has no chat template: use /v1/completions",
                    "invalid_request_error", "messages", "no_chat_template"};
  }
  Result<std::vector<TokenId>> ids = chat.render(*service.parts.tokenizer, messages, true);
  if (!ids.ok()) return ApiError{400, ids.status().message(), "invalid_request_error", "messages"};
  request.prompt = {Segment{std::move(*ids)}};
  request.stop_ids = {chat.end_of_turn(), service.parts.tokenizer->eos()};
  return std::nullopt;
}

Status submit_generation(Service& service, GenerateRequest request, TraceSeed seed,
                         OnChunk on_chunk, OnFinish on_finish) {
  auto mailbox = service.mailbox;
  auto trace = std::make_shared<Trace>();
  trace->response_id = request.id;
  trace->messages = std::move(seed.messages);
  trace->source = std::move(seed.source);
  // Read again on each call of a callback, so the callables are shared rather than copied per
  // token.
  OnChunk hand_over_chunk = [](const Chunk&) {};
  if (on_chunk) {
    hand_over_chunk =
        [mailbox, on_chunk = std::make_shared<OnChunk>(std::move(on_chunk))](const Chunk& chunk) {
          mailbox->post([on_chunk, chunk] { (*on_chunk)(chunk); });
        };
  }
  auto finished = std::make_shared<OnFinish>(std::move(on_finish));
  return service.parts.engine.submit(
      std::move(request), std::move(hand_over_chunk),
      [&service, mailbox, trace, finished](const Finish& finish) {
        const auto deliver = [mailbox, finished, finish] {
          mailbox->post([finished, finish] { (*finished)(finish); });
        };
        if (!finish.status.ok() || finish.finish_reason == "cancelled") return deliver();
        service.quick.post([&service, trace, finish, deliver] {
          trace->version = finish.version;
          trace->at_ms = service.parts.clock.unix_ms();
          trace->answer = finish.text;
          if (const Status stored = service.parts.store.put_trace(*trace); !stored.ok()) {
            service.parts.metrics
                .counter("ds_trace_errors_total", "Answers whose trace could not be stored.")
                .add();
          }
          deliver();
        });
      });
}

ApiError generation_error(const Service& service, const Status& status) {
  ApiError error = api_error(status);
  if (status.code() == Code::kNotFound) {
    error.param = "model";
    error.code = "model_not_found";
    error.message += "; known: default, " + service.parts.model.name;
    for (const Json& item : service.parts.versions.list()) {
      if (const Json* version = find(item, "version"))
        error.message += ", " + version->get<std::string>();
    }
  }
  if (status.code() == Code::kUnsupported) error.status = 400, error.type = "invalid_request_error";
  return error;
}

double shortest(float value) {
  if (!std::isfinite(value)) return value;
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double out = 0;
  std::from_chars(text, end, out);
  return out;
}

}  // namespace ds
