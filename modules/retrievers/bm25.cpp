// SPDX-License-Identifier: Apache-2.0
// Words by Okapi BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009):
//   score = sum over words of the query, as often as it has them, of
//           ln(1 + (N - n + 0.5) / (n + 0.5)) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * dl /
//           avgdl))
// with N texts, n of them with the word, tf times in this one, dl and avgdl words in it and on
// average. The 1 in the logarithm keeps common words from counting against a text.
//
// A word is a run of ASCII letters (case folded), digits and bytes from 0x80 on: UTF-8 as it is.
// What is published is never changed: commit makes the next state beside it, sharing the lists of
// all words that it does not touch, and swaps a pointer. It copies the dictionary: put many, then
// commit.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cmath>
#include <ctime>
#include <map>
#include <mutex>
#include <unordered_map>

#include "modules/json_members.h"

namespace ds::modules {
namespace {

bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
         (c & 0x80) != 0;
}

struct Words {
  std::map<std::string, std::uint32_t> counts;  // in order: so the sums of a search are, too
  std::uint32_t total = 0;
};
Words words_of(std::string_view text) {
  Words out;
  std::string word;
  for (std::size_t i = 0; i <= text.size(); ++i) {
    if (i < text.size() && is_letter(text[i])) {
      const char c = text[i];
      word += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    } else if (!word.empty()) {
      ++out.counts[std::exchange(word, {})];
      ++out.total;
    }
  }
  return out;
}

/// Empty text is an empty object.
JsonMembers parse_object(std::string_view text, std::string_view what, ds_code code) {
  return text.empty() ? JsonMembers() : json_members(text, what, code);
}

/// Keys of the meta object and what each must be.
JsonMembers parse_filter(std::string_view text) {
  JsonMembers out = parse_object(text, "filter", DS_E_ARG);
  for (const auto& [key, member] : out) {
    if (!member.is_scalar())
      throw sdk::error(DS_E_ARG, "filter: \"" + key + "\": " + member.type() +
                                     ", expected the string, number or boolean that it must equal");
  }
  return out;
}

bool passes(const JsonMembers& meta, const JsonMembers& filter) {
  return std::all_of(filter.begin(), filter.end(), [&](const auto& wanted) {
    const auto at = meta.find(wanted.first);
    return at != meta.end() && at->second == wanted.second;
  });
}

struct Text {
  std::string text, meta_json;
  JsonMembers meta;
};
using TextPtr = std::shared_ptr<const Text>;
using Texts = std::map<std::uint64_t, TextPtr>;

struct Posting {
  std::uint64_t id;
  std::uint32_t count;   // of the word in the text
  std::uint32_t length;  // words in the text
};
using Postings = std::vector<Posting>;  // by id

struct State {
  Texts texts;
  std::unordered_map<std::string, std::shared_ptr<const Postings>> words;
  std::uint64_t total_words = 0, version = 0;
};

/// The next state; in `changes` a null text is an erased one.
std::shared_ptr<State> next_state(const State& before, const Texts& changes) {
  auto next = std::make_shared<State>(before);
  std::map<std::string, Postings> touched;  // the new postings of each word whose list changes
  for (const auto& [id, text] : changes) {
    if (const auto old = next->texts.find(id); old != next->texts.end()) {
      const Words words = words_of(old->second->text);
      for (const auto& [word, count] : words.counts) touched[word];
      next->total_words -= words.total;
      next->texts.erase(old);
    }
    if (text == nullptr) continue;
    const Words words = words_of(text->text);
    for (const auto& [word, count] : words.counts)
      touched[word].push_back({id, count, words.total});
    next->total_words += words.total;
    next->texts.emplace(id, text);
  }
  for (auto& [word, added] : touched) {
    Postings kept;
    if (const auto old = next->words.find(word); old != next->words.end()) {
      std::copy_if(old->second->begin(), old->second->end(), std::back_inserter(kept),
                   [&](const Posting& p) { return !changes.contains(p.id); });
    }
    auto merged = std::make_shared<Postings>();
    merged->reserve(kept.size() + added.size());
    std::merge(kept.begin(), kept.end(), added.begin(), added.end(), std::back_inserter(*merged),
               [](const Posting& x, const Posting& y) { return x.id < y.id; });
    if (merged->empty())
      next->words.erase(word);
    else
      next->words.insert_or_assign(word, std::move(merged));
  }
  return next;
}

TextPtr make_text(std::string_view text, std::string_view meta, ds_code code) {
  if (text.size() >= UINT32_MAX)
    throw sdk::error(code, "text: " + std::to_string(text.size()) + " bytes, expected below 4 GiB");
  return std::make_shared<const Text>(
      Text{std::string(text), std::string(meta), parse_object(meta, "meta", code)});
}

void check_time(const ds_call& call) {
  sdk::check_cancelled(call);
  if (call.deadline_ns == 0) return;
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (now.tv_sec * std::int64_t{1'000'000'000} + now.tv_nsec >= call.deadline_ns)
    throw sdk::error(DS_E_DEADLINE, "search: past its deadline");
}

// ---- Saved form: magic, state version, count; for each text, ids ascending: id, two lengths, the
// bytes; XXH3 (64 bits) of all before. Numbers are 64 bits, little-endian.

constexpr std::string_view kMagic{"DSBM25\x00\x01", 8};  // the last byte counts formats

void append(std::string& out, std::uint64_t n) {
  out.append(reinterpret_cast<const char*>(&n), sizeof n);
}
[[noreturn]] void broken(const std::string& why) {
  throw sdk::error(DS_E_DATA, "saved state: " + why);
}
std::string_view take(std::string_view& bytes, std::uint64_t n) {
  if (n > bytes.size())
    broken("cut off, " + std::to_string(bytes.size()) + " bytes left of " + std::to_string(n));
  const std::string_view out = bytes.substr(0, static_cast<std::size_t>(n));
  bytes.remove_prefix(out.size());
  return out;
}
std::uint64_t number(std::string_view& bytes) {
  std::uint64_t n;
  std::memcpy(&n, take(bytes, sizeof n).data(), sizeof n);
  return n;
}

std::string save_state(const State& state) {
  std::string out(kMagic);
  append(out, state.version);
  append(out, state.texts.size());
  for (const auto& [id, text] : state.texts) {
    append(out, id);
    append(out, text->text.size());
    append(out, text->meta_json.size());
    out += text->text + text->meta_json;
  }
  append(out, XXH3_64bits(out.data(), out.size()));
  return out;
}

std::shared_ptr<const State> load_state(std::string_view bytes) {
  if (bytes.size() < kMagic.size() + sizeof(std::uint64_t))
    broken(std::to_string(bytes.size()) + " bytes, too few");
  std::string_view sum = bytes.substr(bytes.size() - sizeof(std::uint64_t));
  bytes.remove_suffix(sum.size());
  if (number(sum) != XXH3_64bits(bytes.data(), bytes.size())) broken("its checksum does not fit");
  if (const std::string_view magic = take(bytes, kMagic.size()); magic != kMagic)
    throw sdk::error(magic.substr(0, 7) == kMagic.substr(0, 7) ? DS_E_VERSION : DS_E_DATA,
                     "saved state: format " + std::to_string(magic[7]) + ", expected BM25 with 1");
  State empty;
  empty.version = number(bytes);
  const std::uint64_t count = number(bytes);
  Texts texts;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t id = number(bytes), text_size = number(bytes), meta_size = number(bytes);
    if (!texts.empty() && id <= texts.rbegin()->first)
      broken("text " + std::to_string(id) + " stands out of order");
    const std::string_view text = take(bytes, text_size), meta = take(bytes, meta_size);
    texts.emplace_hint(texts.end(), id, make_text(text, meta, DS_E_DATA));
  }
  if (!bytes.empty()) broken(std::to_string(bytes.size()) + " bytes after its end");
  return next_state(empty, texts);
}

struct Weights {
  double k1 = 1.2, b = 0.75;
};
double within(const sdk::context& c, const char* key, double otherwise, double most) {
  const double value = c.get(key, otherwise);
  if (!(value >= 0 && value <= most))
    throw sdk::error(DS_E_CONFIG, std::string(key) + ": " + std::to_string(value) +
                                      ", expected 0 to " + std::to_string(most));
  return value;
}
Weights weights_of(const sdk::context& c) {
  const Weights defaults;
  return {within(c, "k1", defaults.k1, 100), within(c, "b", defaults.b, 1)};
}

}  // namespace

class Bm25 {
 public:
  static constexpr std::string_view name = "bm25";
  static constexpr std::string_view summary = "words by Okapi BM25, filters on equal meta keys";
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC | DS_CAP_OUT_OF_PROCESS;
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,"properties":{)"
      R"("k1":{"type":"number","minimum":0,"maximum":100,"default":1.2,"x-ds-live":true,)"
      R"("description":"how much more a repeated word counts; 0 = not at all"},)"
      R"("b":{"type":"number","minimum":0,"maximum":1,"default":0.75,"x-ds-live":true,)"
      R"("description":"how much a long text counts less; 0 = not at all"}}})";

  explicit Bm25(sdk::context c) : weights_(weights_of(c)) {}
  void reconfigure(sdk::context c) {
    const Weights next = weights_of(c);
    const std::lock_guard lock(published_mutex_);
    weights_ = next;
  }

  /// An embedding is not looked at.
  void put(std::uint64_t id, std::string_view text, const ds_tensor*, std::string_view meta) {
    TextPtr made = make_text(text, meta, DS_E_ARG);
    const std::lock_guard lock(change_mutex_);
    waiting_.insert_or_assign(id, std::move(made));
  }
  void erase(std::span<const std::uint64_t> ids) {
    const std::lock_guard lock(change_mutex_);
    for (const std::uint64_t id : ids) waiting_.insert_or_assign(id, nullptr);
  }
  std::uint64_t commit() {
    const std::lock_guard lock(change_mutex_);
    std::shared_ptr<State> next = next_state(*published(), waiting_);
    const std::uint64_t version = ++next->version;
    publish(std::move(next));
    waiting_.clear();
    return version;
  }

  std::vector<ds_hit> search(const ds_call& call, std::string_view text, const ds_tensor*,
                             std::string_view filter_json, std::uint64_t max) const {
    const JsonMembers filter = parse_filter(filter_json);
    Weights weights;
    const std::shared_ptr<const State> state = published(&weights);
    std::vector<ds_hit> hits;
    for (const auto& [id, score] : scores(call, *state, weights, text)) {
      if (!filter.empty() && !passes(state->texts.at(id)->meta, filter)) continue;
      hits.push_back({id, static_cast<float>(score), 0});
    }
    const auto better = [](const ds_hit& x, const ds_hit& y) {
      return x.score != y.score ? x.score > y.score : x.id < y.id;
    };
    const auto kept = static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(max, hits.size()));
    std::partial_sort(hits.begin(), hits.begin() + kept, hits.end(), better);
    hits.resize(static_cast<std::size_t>(kept));
    return hits;
  }

  sdk::document fetch(std::uint64_t id) const {
    const auto state = published();
    const auto at = state->texts.find(id);
    if (at == state->texts.end())
      throw sdk::error(DS_E_ARG, "no text with id " + std::to_string(id) + " among " +
                                     std::to_string(state->texts.size()));
    return {at->second->text, at->second->meta_json};
  }

  /// Of what is committed.
  std::string save() const { return save_state(*published()); }
  void restore(std::string_view bytes, std::string_view /*saved_by*/) {
    std::shared_ptr<const State> restored = load_state(bytes);
    const std::lock_guard lock(change_mutex_);
    waiting_.clear();
    publish(std::move(restored));
  }

  std::string stats() const {
    const auto state = published();
    return "{\"texts\":" + std::to_string(state->texts.size()) +
           ",\"version\":" + std::to_string(state->version) +
           ",\"words\":" + std::to_string(state->words.size()) + "}";
  }

 private:
  /// Of each text that has a word of the query.
  static std::unordered_map<std::uint64_t, double> scores(const ds_call& call, const State& state,
                                                          const Weights& weights,
                                                          std::string_view query) {
    std::unordered_map<std::uint64_t, double> out;
    const auto texts = static_cast<double>(state.texts.size());
    const double average = static_cast<double>(state.total_words) / texts;  // unused without texts
    for (const auto& [word, times] : words_of(query).counts) {
      check_time(call);
      const auto at = state.words.find(word);
      if (at == state.words.end()) continue;
      const auto n = static_cast<double>(at->second->size());
      const double idf = times * std::log(1 + (texts - n + 0.5) / (n + 0.5));
      for (const Posting& p : *at->second) {
        const double norm = weights.k1 * (1 - weights.b + weights.b * p.length / average);
        out[p.id] += idf * p.count * (weights.k1 + 1) / (p.count + norm);
      }
    }
    return out;
  }

  std::shared_ptr<const State> published(Weights* weights = nullptr) const {
    const std::lock_guard lock(published_mutex_);
    if (weights != nullptr) *weights = weights_;
    return published_;
  }
  void publish(std::shared_ptr<const State> next) {
    const std::lock_guard lock(published_mutex_);
    published_.swap(next);  // the old one goes after the lock
  }

  std::mutex change_mutex_;  // waiting_, and one commit at a time
  Texts waiting_;            // null = to be erased
  mutable std::mutex published_mutex_;
  std::shared_ptr<const State> published_ = std::make_shared<const State>();
  Weights weights_;
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.retriever-bm25", "1.0.0", "Apache-2.0", ds::modules::Bm25)
