// SPDX-License-Identifier: Apache-2.0
// OpenAI's wire shapes: requests checked into structs, answers out of the engine's results. Pure.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "serve/generation.h"

namespace ds {

/// Common to chat and plain completions.
struct CompletionCommon {
  GenerateRequest generate;  ///< without prompt and id
  int n = 1;                 ///< answers per prompt, 1..4
  bool stream = false, include_usage = false;
  std::string user;
  std::string ignored;  ///< fields that were not understood
};

struct ChatRequest : CompletionCommon {
  std::vector<ChatMessage> messages;
  Json raw_messages;  ///< as sent, for the trace
};

struct CompletionRequest : CompletionCommon {
  std::vector<std::variant<std::string, std::vector<TokenId>>> prompts;
  bool echo = false;
};

std::optional<ApiError> parse_chat(const Json& body, int64_t vocab_size, ChatRequest& out);
std::optional<ApiError> parse_completion(const Json& body, int64_t vocab_size,
                                         CompletionRequest& out);

/// What every object of one answer has in common.
struct AnswerHead {
  std::string id, object, model, fingerprint;
  int64_t created_s = 0;
};
Json answer(const AnswerHead& head, Json choices);
Json usage_json(int64_t prompt, int64_t completion, int64_t cached);
/// "stop" or "length" as they are; nothing else is in OpenAI's type.
Json finish_reason(const Finish& finish);

Json chat_logprobs(const Tokenizer& tokenizer, const std::vector<TokenInfo>& tokens);
/// tokens, token_logprobs, top_logprobs, text_offset in characters from `offset`.
Json completion_logprobs(const Tokenizer& tokenizer, const std::vector<TokenInfo>& tokens,
                         int64_t offset);
/// Characters of the text of `tokens`.
int64_t count_characters(const std::vector<TokenInfo>& tokens);

/// Little-endian FP32, base64.
std::string base64_floats(const std::vector<float>& values);

}  // namespace ds
