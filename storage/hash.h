// SPDX-License-Identifier: Apache-2.0
// SHA-256 (OpenSSL) for identities of files, records and weights.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace ds {

using Sha256Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  void update(const void* data, size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  Sha256Digest finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

Sha256Digest sha256(std::string_view bytes);
/// Its first eight bytes, big-endian: where 64 bits are identity enough.
constexpr uint64_t first_word(const Sha256Digest& digest) {
  uint64_t word = 0;
  for (size_t i = 0; i < 8; ++i) word = word << 8 | digest[i];
  return word;
}
std::string to_hex(std::span<const uint8_t> bytes);

}  // namespace ds
