// SPDX-License-Identifier: Apache-2.0
// The visible side of a sequence: token bytes become whole characters, stop strings end the text,
// and each token's log probability appears together with its text.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/stop_text.h"
#include "engine/tokenizer.h"

namespace ds {

struct TokenInfo {
  TokenId id = 0;
  std::string bytes;
  bool has_logprob = false;  ///< false for the first prompt token
  float logprob = 0;         ///< natural log of the raw model distribution
  std::vector<std::pair<TokenId, float>> top;
};

struct Chunk {
  std::string text;  ///< whole characters, nothing that may turn out to be a stop string
  std::vector<TokenInfo> tokens;  ///< with logprobs >= 0; those whose text has begun to show
};

class Answer {
 public:
  explicit Answer(std::vector<std::string> stop) : stop_(std::move(stop)) {}

  /// Adds one token; `bytes` is what it adds to the text (nothing for special tokens).
  void add(std::string_view bytes, std::optional<TokenInfo> info);
  /// Generation is over: shows what was held back, unless a stop string ended the text.
  void end();
  bool stopped() const { return stop_.stopped(); }  ///< by a stop string

  Chunk take();  ///< what became visible since the last call
  const std::string& text() const { return text_; }
  const std::vector<TokenInfo>& tokens() const { return tokens_; }

 private:
  struct Held {
    size_t begin;  ///< where the token's text begins, in bytes of produced text
    TokenInfo info;
  };
  Utf8Stream utf8_;
  StopText stop_;
  size_t produced_ = 0;  ///< bytes of whole characters so far, shown or not
  std::string text_;     ///< shown
  std::deque<Held> held_;
  std::vector<TokenInfo> tokens_;
  size_t taken_bytes_ = 0, taken_tokens_ = 0;
};

}  // namespace ds
