// SPDX-License-Identifier: Apache-2.0
// Cuts text into the words inside which BPE may merge. Written out by hand instead of as a regular
// expression, because it is the inner loop of encoding; Unicode categories come from utf8proc.
#pragma once

#include <cstddef>
#include <string_view>

namespace ds {

enum class PreTokenizer {
  kGpt2,    ///< GPT-2's expression over the whole text
  kSmolLm,  ///< every numeric character alone, then GPT-2's expression inside the pieces between
};

/// Yields the words of `text` in order; together they are the text. GPT-2's expression is
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// (Radford et al., 2019, encoder.py). Bytes that are not UTF-8 count as one symbol each.
class WordSplitter {
 public:
  WordSplitter(std::string_view text, PreTokenizer kind) : text_(text), kind_(kind) {}

  /// The next word, empty at the end.
  std::string_view next();

 private:
  size_t word_end() const;

  std::string_view text_;
  size_t position_ = 0;
  PreTokenizer kind_;
};

}  // namespace ds
