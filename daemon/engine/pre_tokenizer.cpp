// SPDX-License-Identifier: Apache-2.0
#include "engine/pre_tokenizer.h"

#include <utf8proc.h>

#include <array>
#include <cstdint>

namespace ds {
namespace {

enum class CharClass : uint8_t { kLetter, kNumber, kSpace, kSymbol };

/// \s of Oniguruma: Unicode's White_Space.
bool is_white_space(int32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

CharClass classify(int32_t codepoint) {
  if (is_white_space(codepoint)) return CharClass::kSpace;
  switch (utf8proc_category(codepoint)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return CharClass::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return CharClass::kNumber;
    default:
      return CharClass::kSymbol;
  }
}

std::array<CharClass, 128> classify_ascii() {
  std::array<CharClass, 128> table;
  for (int32_t c = 0; c < 128; ++c) table[static_cast<size_t>(c)] = classify(c);
  return table;
}

struct Char {
  size_t bytes;
  CharClass kind;
};

Char char_at(std::string_view text, size_t position) {
  static const std::array<CharClass, 128> ascii = classify_ascii();
  const auto first = static_cast<uint8_t>(text[position]);
  if (first < 128) return {1, ascii[first]};
  int32_t codepoint = 0;
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data() + position);
  const size_t left = text.size() - position;
  const auto length =
      utf8proc_iterate(bytes, static_cast<utf8proc_ssize_t>(left < 4 ? left : 4), &codepoint);
  if (length <= 0) return {1, CharClass::kSymbol};
  return {static_cast<size_t>(length), classify(codepoint)};
}

/// Length of 's 't 're 've 'm 'll 'd at `rest`, which begins with an apostrophe; else 0.
size_t contraction(std::string_view rest) {
  if (rest.size() < 2) return 0;
  const char first = rest[1];
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  const std::string_view pair = rest.substr(1, 2);
  return pair == "re" || pair == "ve" || pair == "ll" ? 3 : 0;
}

}  // namespace

std::string_view WordSplitter::next() {
  const size_t begin = position_;
  if (begin < text_.size()) position_ = word_end();
  return text_.substr(begin, position_ - begin);
}

size_t WordSplitter::word_end() const {
  const size_t begin = position_;
  if (text_[begin] == '\'') {
    if (const size_t length = contraction(text_.substr(begin))) return begin + length;
  }
  size_t end = begin;
  Char c = char_at(text_, end);
  // One space joins the letters, numbers or symbols behind it; kSmolLm's numbers stand alone.
  if (text_[begin] == ' ' && begin + 1 < text_.size()) {
    const Char after = char_at(text_, begin + 1);
    const bool joins = after.kind != CharClass::kSpace &&
                       !(after.kind == CharClass::kNumber && kind_ == PreTokenizer::kSmolLm);
    if (joins) {
      ++end;
      c = after;
    }
  }
  const CharClass kind = c.kind;
  if (kind == CharClass::kNumber && kind_ == PreTokenizer::kSmolLm) return end + c.bytes;
  size_t last = end;  // where the run's last character begins
  while (true) {
    last = end;
    end += c.bytes;
    if (end == text_.size()) return end;
    c = char_at(text_, end);
    if (c.kind != kind) break;
  }
  // \s+(?!\S): white space before a word leaves its last character to that word. For kSmolLm a
  // number ends the piece, so nothing follows there.
  const bool word_follows = !(c.kind == CharClass::kNumber && kind_ == PreTokenizer::kSmolLm);
  return kind == CharClass::kSpace && word_follows && last > begin ? last : end;
}

}  // namespace ds
