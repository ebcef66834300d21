// SPDX-License-Identifier: Apache-2.0
// Incremental UTF-8 with the replacement rule of Unicode 15, section 3.9 ("substitution of maximal
// subparts"), which Python and Rust follow as well.
#include "engine/tokenizer.h"

namespace ds {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

/// Table 3-7 of the Unicode standard: bytes of the character that `lead` begins, and the range of
/// its second byte. Length 0: no character begins so.
struct Sequence {
  size_t bytes;
  uint8_t second_low, second_high;
};

Sequence sequence_of(uint8_t lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xc2) return {0, 0, 0};
  if (lead < 0xe0) return {2, 0x80, 0xbf};
  if (lead == 0xe0) return {3, 0xa0, 0xbf};
  if (lead == 0xed) return {3, 0x80, 0x9f};
  if (lead < 0xf0) return {3, 0x80, 0xbf};
  if (lead == 0xf0) return {4, 0x90, 0xbf};
  if (lead < 0xf4) return {4, 0x80, 0xbf};
  if (lead == 0xf4) return {4, 0x80, 0x8f};
  return {0, 0, 0};
}

/// Bytes at `rest` that belong to its first character, at most `sequence.bytes`.
size_t matching_bytes(std::string_view rest, const Sequence& sequence) {
  size_t count = 1;
  while (count < sequence.bytes && count < rest.size()) {
    const auto byte = static_cast<uint8_t>(rest[count]);
    const uint8_t low = count == 1 ? sequence.second_low : 0x80;
    const uint8_t high = count == 1 ? sequence.second_high : 0xbf;
    if (byte < low || byte > high) break;
    ++count;
  }
  return count;
}

}  // namespace

std::string Utf8Stream::push(std::string_view bytes) {
  const std::string buffer = std::move(pending_) + std::string(bytes);
  pending_.clear();
  std::string text;
  std::string_view rest = buffer;
  while (!rest.empty()) {
    const Sequence sequence = sequence_of(static_cast<uint8_t>(rest[0]));
    const size_t count = matching_bytes(rest, sequence);
    if (count == sequence.bytes) {
      text += rest.substr(0, count);
    } else if (sequence.bytes > count && count == rest.size()) {
      pending_ = rest;  // could still become a character
      break;
    } else {
      text += kReplacement;
    }
    rest.remove_prefix(count);
  }
  return text;
}

std::string Utf8Stream::flush() {
  const bool unfinished = !pending_.empty();
  pending_.clear();
  return std::string(unfinished ? kReplacement : "");
}

}  // namespace ds
