// SPDX-License-Identifier: Apache-2.0
// Issue and check of bearer tokens.
#include "serve/tokens.h"

#include <utility>

#include "serve/service.h"

namespace ds {

std::string Tokens::issue(uint8_t roles, int64_t lifetime_ms) {
  const int64_t now = clock_.monotonic_ns();
  std::erase_if(live_, [now](const Token& token) { return token.expires_ns <= now; });
  if (live_.size() >= 64) live_.erase(live_.begin());
  live_.push_back({random_hex(32), roles, now + lifetime_ms * 1'000'000});
  return live_.back().text;
}

uint8_t Tokens::roles(std::string_view token) const {
  const int64_t now = clock_.monotonic_ns();
  uint8_t found = 0;
  for (const Token& candidate : live_) {
    if (candidate.text.size() != token.size() || candidate.expires_ns <= now) continue;
    unsigned char difference = 0;
    for (size_t i = 0; i < token.size(); ++i) difference |= candidate.text[i] ^ token[i];
    if (difference == 0) found |= candidate.roles;
  }
  return found;
}

}  // namespace ds
