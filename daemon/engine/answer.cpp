// SPDX-License-Identifier: Apache-2.0
#include "engine/answer.h"

namespace ds {

void Answer::add(std::string_view bytes, std::optional<TokenInfo> info) {
  if (info) held_.push_back({produced_, std::move(*info)});
  const std::string whole = utf8_.push(bytes);
  produced_ += whole.size();
  text_ += stop_.push(whole);
  while (!held_.empty() && held_.front().begin < text_.size()) {
    tokens_.push_back(std::move(held_.front().info));
    held_.pop_front();
  }
}

void Answer::end() {
  if (stopped()) return;
  text_ += stop_.push(utf8_.flush());
  if (stopped()) return;
  text_ += stop_.flush();
  for (Held& token : held_) tokens_.push_back(std::move(token.info));
  held_.clear();
}

Chunk Answer::take() {
  Chunk chunk{text_.substr(taken_bytes_), {}};
  chunk.tokens.assign(tokens_.begin() + static_cast<ptrdiff_t>(taken_tokens_), tokens_.end());
  taken_bytes_ = text_.size();
  taken_tokens_ = tokens_.size();
  return chunk;
}

}  // namespace ds
