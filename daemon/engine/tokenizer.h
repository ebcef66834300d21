// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE (GPT-2 family) from a model file's own vocabulary, and the chat template around
// it. The reference is Hugging Face tokenizers: equal ids on equal text.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ds/status.h"
#include "storage/model_file.h"

namespace ds {

using TokenId = int32_t;

class Tokenizer {
 public:
  /// Refuses an unknown pre-tokenizer by name, merges that name missing or special tokens, and
  /// vocabularies that cannot spell printable ASCII.
  static Result<std::shared_ptr<const Tokenizer>> create(const TokenizerData& data);
  ~Tokenizer();

  /// Ids of UTF-8 text (invalid bytes are encoded as bytes; a byte that the vocabulary lacks yields
  /// nothing, as in transformers). With `parse_special`, the text of special
  /// tokens such as <|im_start|> yields their ids; without it they are ordinary text. Adds no BOS.
  std::vector<TokenId> encode(std::string_view text, bool parse_special) const;

  /// Raw bytes of one token (special tokens: their text). Empty for ids out of range.
  std::string_view bytes(TokenId id) const;
  std::string decode(std::span<const TokenId> ids) const;  ///< concatenated bytes; may split UTF-8

  bool is_special(TokenId id) const;
  TokenId eos() const;
  TokenId bos() const;
  int64_t vocab_size() const;

 private:
  Tokenizer();
  struct Tables;
  std::unique_ptr<Tables> tables_;
};

struct ChatMessage {
  std::string role;  ///< system, user, assistant
  std::string content;
};

/// ChatML as SmolLM2 ships it. Not available() when the file has no template: chat is refused,
/// completions work.
class ChatTemplate {
 public:
  /// Recognises the shipped Jinja text; an unknown one is refused by its first 60 characters.
  static Result<ChatTemplate> create(const TokenizerData& data);

  bool available() const { return available_; }

  /// Ids of a conversation, user content never yielding special ids. Adds the template's default
  /// system turn when the first message is not a system message. With `open_answer`, ends with the
  /// header of the assistant's turn, ready to generate.
  Result<std::vector<TokenId>> render(const Tokenizer& tokenizer,
                                      std::span<const ChatMessage> messages,
                                      bool open_answer) const;

  /// Ids of the default system turn alone: the prefix that every chat without a system message
  /// shares.
  std::vector<TokenId> default_system_ids(const Tokenizer& tokenizer) const;

  /// Token that ends an assistant turn (<|im_end|>).
  TokenId end_of_turn() const { return end_of_turn_; }

 private:
  /// One whole turn with its markers and the line end behind it.
  std::vector<TokenId> turn(const Tokenizer& tokenizer, const ChatMessage& message) const;

  bool available_ = false;
  std::string default_system_;
  TokenId start_of_turn_ = -1, end_of_turn_ = -1;
};

/// Joins token bytes into text and holds back bytes of an unfinished UTF-8 character.
class Utf8Stream {
 public:
  /// Text that became complete by these bytes; invalid sequences become U+FFFD.
  std::string push(std::string_view bytes);
  std::string flush();  ///< what is left at the end, invalid bytes as U+FFFD

 private:
  std::string pending_;
};

}  // namespace ds
