// SPDX-License-Identifier: Apache-2.0
// Short-lived bearer tokens: given out over the control socket, shown on TCP. In memory only, so a
// restart revokes them all. IO thread only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "storage/seams.h"

namespace ds {

class Tokens {
 public:
  explicit Tokens(Clock& clock) : clock_(clock) {}
  /// A new token that gives `roles` for `lifetime_ms`. At most 64 live; the oldest goes first.
  std::string issue(uint8_t roles, int64_t lifetime_ms);
  /// Roles of a live token, else 0. Compares in constant time.
  uint8_t roles(std::string_view token) const;

 private:
  struct Token {
    std::string text;
    uint8_t roles;
    int64_t expires_ns;
  };
  Clock& clock_;
  std::vector<Token> live_;
};

}  // namespace ds
