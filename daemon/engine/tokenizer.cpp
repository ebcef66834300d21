// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE: words from the pre-tokenizer, then merges in the order of their rank (Sennrich et
// al., 2016; byte alphabet of GPT-2). Tables are immutable after create(): encode() needs no lock.
#include "engine/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <functional>
#include <queue>
#include <unordered_map>

#include "engine/pre_tokenizer.h"

namespace ds {
namespace {

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100...
std::array<int32_t, 256> byte_alphabet() {
  std::array<int32_t, 256> letters;
  int32_t spare = 256;
  for (int32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    letters[static_cast<size_t>(b)] = printable ? b : spare++;
  }
  return letters;
}

/// Text in the byte alphabet to bytes. A token with other characters is its own UTF-8, as the
/// ByteLevel decoder of Hugging Face has it; no merge can produce it.
std::string to_bytes(const std::string& token, const std::array<int16_t, 324>& byte_of) {
  std::string bytes;
  const auto* text = reinterpret_cast<const uint8_t*>(token.data());
  auto left = static_cast<utf8proc_ssize_t>(token.size());
  while (left > 0) {
    int32_t codepoint = 0;
    const utf8proc_ssize_t length = utf8proc_iterate(text, left, &codepoint);
    if (length <= 0 || codepoint >= static_cast<int32_t>(byte_of.size())) return token;
    const int16_t byte = byte_of[static_cast<size_t>(codepoint)];
    if (byte < 0) return token;
    bytes += static_cast<char>(byte);
    text += length;
    left -= length;
  }
  return bytes;
}

/// Finds added tokens in raw text: leftmost, and of those the longest.
class AddedTokens {
 public:
  struct Match {
    size_t begin, end;  ///< begin = text size: none
    TokenId id;
  };

  void add(const std::string& text, TokenId id) {
    if (text.empty() || !ids_.emplace(text, id).second) return;
    std::vector<size_t>& lengths = lengths_[static_cast<uint8_t>(text[0])];
    lengths.push_back(text.size());
    std::sort(lengths.rbegin(), lengths.rend());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  }

  Match find(std::string_view text, size_t from) const {
    if (ids_.empty()) return {text.size(), text.size(), -1};
    for (size_t i = from; i < text.size(); ++i) {
      for (const size_t length : lengths_[static_cast<uint8_t>(text[i])]) {
        if (length > text.size() - i) continue;
        const auto it = ids_.find(text.substr(i, length));
        if (it != ids_.end()) return {i, i + length, it->second};
      }
    }
    return {text.size(), text.size(), -1};
  }

 private:
  std::array<std::vector<size_t>, 256> lengths_;  ///< distinct, longest first, by first byte
  struct TextHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };
  std::unordered_map<std::string, TokenId, TextHash, std::equal_to<>> ids_;
};

/// (left id, right id) -> rank. Open addressing: one cache line per look-up instead of three.
class PairRanks {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  explicit PairRanks(size_t pairs = 0) {
    size_t capacity = 16;
    while (capacity < 2 * pairs) capacity *= 2;
    slots_.assign(capacity, {kEmpty, kNone});
    shift_ = 64 - __builtin_ctzll(capacity);
  }

  void set(TokenId left, TokenId right, uint32_t rank) {
    *slot(left, right) = {key(left, right), rank};
  }
  uint32_t get(TokenId left, TokenId right) const {
    return const_cast<PairRanks*>(this)->slot(left, right)->rank;
  }

 private:
  static constexpr uint64_t kEmpty = UINT64_MAX;  // ids are not negative, so no key is this
  struct Slot {
    uint64_t key;
    uint32_t rank;
  };

  static uint64_t key(TokenId left, TokenId right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  Slot* slot(TokenId left, TokenId right) {
    const uint64_t wanted = key(left, right);
    size_t i = (wanted * 0x9e3779b97f4a7c15ull ^ wanted >> 29) * 0x9e3779b97f4a7c15ull >> shift_;
    while (slots_[i].key != wanted && slots_[i].key != kEmpty) i = (i + 1) & (slots_.size() - 1);
    return &slots_[i];
  }

  std::vector<Slot> slots_;
  int shift_ = 0;
};

struct Merge {
  TokenId left, right, merged;
};

}  // namespace

struct Tokenizer::Tables {
  PreTokenizer pre_tokenizer = PreTokenizer::kGpt2;
  std::vector<std::string> bytes;  ///< by id
  std::vector<bool> special;       ///< by id
  /// -1: the vocabulary lacks the byte, and it encodes to nothing, as in transformers. SmolLM2
  /// lacks six control characters and 15 lead bytes of rare or invalid UTF-8.
  std::array<TokenId, 256> byte_ids;
  std::vector<Merge> merges;  ///< by rank
  PairRanks ranks;
  /// Words whose encoding is exactly one token. Not every token is: its merges may be unreachable.
  std::unordered_map<std::string_view, TokenId> whole_words;
  AddedTokens special_tokens, user_tokens;
  TokenId bos = -1, eos = -1;

  Status set_tokens(const TokenizerData& data);
  Status set_merges(const TokenizerData& data);
  void set_whole_words();
};

namespace {

/// Merges the bytes of one word. Keeps its memory from word to word. O(n log n) in the word's
/// bytes.
class WordEncoder {
 public:
  WordEncoder(const std::array<TokenId, 256>& byte_ids, const std::vector<Merge>& merges,
              const PairRanks& ranks)
      : byte_ids_(byte_ids), merges_(merges), ranks_(ranks) {}

  void encode(std::string_view word, std::vector<TokenId>& out) {
    parts_.clear();
    int32_t n = 0;
    for (const char byte : word) {
      const TokenId id = byte_ids_[static_cast<uint8_t>(byte)];
      if (id < 0) continue;
      parts_.push_back({id, n - 1, n + 1});
      ++n;
    }
    if (n == 0) return;
    parts_.back().next = -1;
    queue_.clear();
    for (int32_t i = 0; i + 1 < n; ++i) offer(i);
    while (!queue_.empty()) {
      std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
      const uint64_t best = queue_.back();
      queue_.pop_back();
      apply(merges_[best >> 32], static_cast<int32_t>(best & UINT32_MAX));
    }
    for (int32_t i = 0; i >= 0; i = part(i).next) {
      out.push_back(part(i).id);
    }
  }

 private:
  struct Part {
    TokenId id;  ///< -1: merged into the part before
    int32_t previous, next;
  };
  Part& part(int32_t i) { return parts_[static_cast<size_t>(i)]; }

  /// Queues the pair of part i and the one after it: lowest rank first, then leftmost.
  void offer(int32_t i) {
    const uint32_t rank = ranks_.get(part(i).id, part(part(i).next).id);
    if (rank == PairRanks::kNone) return;
    queue_.push_back(static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(i));
    std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  }

  void apply(const Merge& merge, int32_t i) {
    Part& left = part(i);
    if (left.id != merge.left || left.next < 0 || part(left.next).id != merge.right)
      return;  // stale
    Part& right = part(left.next);
    left.id = merge.merged;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) {
      part(left.next).previous = i;
      offer(i);
    }
    if (left.previous >= 0) offer(left.previous);
  }

  const std::array<TokenId, 256>& byte_ids_;
  const std::vector<Merge>& merges_;
  const PairRanks& ranks_;
  std::vector<Part> parts_;
  std::vector<uint64_t> queue_;  ///< heap of rank << 32 | index of the left part
};

}  // namespace

Status Tokenizer::Tables::set_tokens(const TokenizerData& data) {
  const std::array<int32_t, 256> alphabet = byte_alphabet();
  std::array<int16_t, 324> byte_of;
  byte_of.fill(-1);
  for (size_t b = 0; b < 256; ++b)
    byte_of[static_cast<size_t>(alphabet[b])] = static_cast<int16_t>(b);

  const size_t n = data.tokens.size();
  special.assign(n, false);
  std::vector<bool> added(n, false);
  for (const auto* list : {&data.special, &data.user_defined}) {
    for (const int32_t id : *list) {
      if (id < 0 || static_cast<size_t>(id) >= n) {
        return invalid("added token id " + std::to_string(id) + ", the vocabulary has " +
                       std::to_string(n) + " tokens");
      }
      const auto index = static_cast<size_t>(id);
      added[index] = true;
      if (list == &data.special) special[index] = true;
      (list == &data.special ? special_tokens : user_tokens).add(data.tokens[index], id);
    }
  }
  byte_ids.fill(-1);
  bytes.reserve(n);
  for (size_t id = 0; id < n; ++id) {
    const std::string& token = data.tokens[id];
    bytes.push_back(added[id] ? token : to_bytes(token, byte_of));
    if (!added[id] && bytes[id].size() == 1) {
      byte_ids[static_cast<uint8_t>(bytes[id][0])] = static_cast<TokenId>(id);
    }
  }
  for (size_t b = ' '; b <= '~'; ++b) {
    if (byte_ids[b] < 0) {
      return unsupported("the vocabulary has no token for byte " + std::to_string(b) +
                         ", expected at least printable ASCII of byte-level BPE");
    }
  }
  return {};
}

Status Tokenizer::Tables::set_merges(const TokenizerData& data) {
  std::unordered_map<std::string_view, TokenId> ids;
  ids.reserve(data.tokens.size());
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    const std::string& token = data.tokens[id];
    if (token.empty()) continue;
    const auto [it, fresh] = ids.emplace(token, static_cast<TokenId>(id));
    if (!fresh) {
      return invalid("tokens " + std::to_string(it->second) + " and " + std::to_string(id) +
                     " are both \"" + token + "\"");
    }
  }
  ranks = PairRanks(data.merges.size());
  merges.reserve(data.merges.size());
  for (size_t rank = 0; rank < data.merges.size(); ++rank) {
    const std::string& text = data.merges[rank];
    const size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      return invalid("merge " + std::to_string(rank) + " is \"" + text +
                     "\", expected two tokens with one space between");
    }
    const std::string names[3] = {text.substr(0, space), text.substr(space + 1),
                                  text.substr(0, space) + text.substr(space + 1)};
    TokenId found[3];
    for (int i = 0; i < 3; ++i) {
      const auto it = ids.find(names[i]);
      if (it == ids.end() || special[static_cast<size_t>(it->second)]) {
        // A merge that yields a special token would let plain text spell it.
        return invalid("merge " + std::to_string(rank) + " \"" + text + "\": token \"" + names[i] +
                       (it == ids.end() ? "\" is not in the vocabulary" : "\" is special"));
      }
      found[i] = it->second;
    }
    merges.push_back({found[0], found[1], found[2]});
    ranks.set(found[0], found[1], static_cast<uint32_t>(rank));  // the last of equal pairs counts
  }
  return {};
}

void Tokenizer::Tables::set_whole_words() {
  WordEncoder encoder(byte_ids, merges, ranks);
  std::vector<TokenId> ids;
  whole_words.reserve(bytes.size());
  for (size_t id = 0; id < bytes.size(); ++id) {
    ids.clear();
    encoder.encode(bytes[id], ids);
    if (ids.size() == 1) whole_words.emplace(bytes[id], ids[0]);
  }
}

Tokenizer::Tokenizer() : tables_(std::make_unique<Tables>()) {}
Tokenizer::~Tokenizer() = default;

Result<std::shared_ptr<const Tokenizer>> Tokenizer::create(const TokenizerData& data) {
  std::shared_ptr<Tokenizer> tokenizer(new Tokenizer());
  Tables& tables = *tokenizer->tables_;
  if (data.pre_tokenizer == "smollm") {
    tables.pre_tokenizer = PreTokenizer::kSmolLm;
  } else if (data.pre_tokenizer != "gpt-2") {
    return unsupported("pre-tokenizer \"" + data.pre_tokenizer +
                       "\", expected \"smollm\" or \"gpt-2\"");
  }
  DS_TRY(tables.set_tokens(data));
  DS_TRY(tables.set_merges(data));
  tables.set_whole_words();
  tables.bos = data.bos;
  tables.eos = data.eos;
  return std::shared_ptr<const Tokenizer>(std::move(tokenizer));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool parse_special) const {
  const Tables& t = *tables_;
  std::vector<TokenId> ids;
  ids.reserve(text.size() / 3 + 1);
  WordEncoder encoder(t.byte_ids, t.merges, t.ranks);

  const auto encode_plain = [&](std::string_view piece) {
    WordSplitter splitter(piece, t.pre_tokenizer);
    for (std::string_view word = splitter.next(); !word.empty(); word = splitter.next()) {
      const auto it = t.whole_words.find(word);
      if (it != t.whole_words.end()) {
        ids.push_back(it->second);
      } else {
        encoder.encode(word, ids);
      }
    }
  };
  // Cuts `piece` at the added tokens of one kind and hands what lies between to `rest`.
  const auto cut = [&ids](const AddedTokens& added, std::string_view piece, const auto& rest) {
    for (size_t from = 0; from < piece.size();) {
      const AddedTokens::Match match = added.find(piece, from);
      rest(piece.substr(from, match.begin - from));
      if (match.id >= 0) ids.push_back(match.id);
      from = match.end;
    }
  };
  const auto encode_text = [&](std::string_view piece) { cut(t.user_tokens, piece, encode_plain); };
  if (parse_special) {
    cut(t.special_tokens, text, encode_text);
  } else {
    encode_text(text);
  }
  return ids;
}

std::string_view Tokenizer::bytes(TokenId id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return tables_->bytes[static_cast<size_t>(id)];
}

std::string Tokenizer::decode(std::span<const TokenId> ids) const {
  std::string text;
  for (const TokenId id : ids) text += bytes(id);
  return text;
}

bool Tokenizer::is_special(TokenId id) const {
  return id >= 0 && id < vocab_size() && tables_->special[static_cast<size_t>(id)];
}

TokenId Tokenizer::eos() const { return tables_->eos; }
TokenId Tokenizer::bos() const { return tables_->bos; }
int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(tables_->bytes.size()); }

}  // namespace ds
