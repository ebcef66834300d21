// SPDX-License-Identifier: Apache-2.0
#include "learn/phrasing.h"

#include <algorithm>
#include <array>
#include <cctype>

namespace ds {

std::string lower_case(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return out;
}

namespace {

constexpr std::array<std::string_view, 16> kLeadIns = {
    "Please tell me: ",   "Quick question: ",       "Hello! ",
    "Can you help me? ",  "I would like to know: ", "Do you know this? ",
    "A short question: ", "Could you tell me, ",    "Excuse me, ",
    "I forgot: ",         "Just checking: ",        "Remind me: ",
    "One more thing: ",   "Help me out: ",          "Answer this: ",
    "Question: "};

constexpr std::array<std::string_view, 84> kFunctionWords = {
    "a",    "an",   "the",   "is",    "are",   "was",   "were",   "be",     "of",    "to",
    "in",   "on",   "at",    "for",   "by",    "with",  "from",   "and",    "or",    "do",
    "does", "did",  "can",   "could", "will",  "would", "shall",  "should", "may",   "might",
    "must", "have", "has",   "had",   "i",     "you",   "we",     "they",   "he",    "she",
    "it",   "my",   "your",  "our",   "their", "his",   "her",    "its",    "me",    "us",
    "them", "what", "which", "who",   "whom",  "whose", "when",   "where",  "why",   "how",
    "that", "this", "these", "those", "there", "here",  "please", "tell",   "about", "if",
    "as",   "so",   "not",   "no",    "yes",   "than",  "then",   "into",   "out",   "up",
    "down", "much", "many",  "get"};

constexpr std::array<std::string_view, 72> kNames = {
    "Ashby",    "Bramwell", "Calloway", "Denholm",  "Ellery",   "Farrow",  "Garrick",  "Hadley",
    "Ingram",   "Jarvis",   "Kendrick", "Lockhart", "Merrick",  "Norwood", "Oakes",    "Pembroke",
    "Quincy",   "Radley",   "Selwyn",   "Thorne",   "Upton",    "Vance",   "Whitlock", "Yardley",
    "Ainsley",  "Birch",    "Corwin",   "Dalton",   "Everett",  "Finch",   "Glover",   "Hollis",
    "Irving",   "Keaton",   "Langley",  "Milton",   "Nolan",    "Orwell",  "Prescott", "Ridley",
    "Sutton",   "Tilden",   "Vernon",   "Weston",   "Amberly",  "Benton",  "Crosby",   "Dunmore",
    "Elmhurst", "Fairfax",  "Grafton",  "Hartley",  "Kingston", "Larkin",  "Monroe",   "Newell",
    "Osborne",  "Pelham",   "Rowan",    "Stanton",  "Trenton",  "Wexford", "Alden",    "Barlow",
    "Clifton",  "Dover",    "Easton",   "Foley",    "Granger",  "Holden",  "Lyndon",   "Mercer"};

constexpr std::array<std::string_view, 64> kNouns = {
    "garden",  "library", "kitchen", "bridge",  "market",  "museum",   "harbor",  "station",
    "factory", "school",  "office",  "theater", "bakery",  "hotel",    "clinic",  "gym",
    "studio",  "pool",    "tower",   "gallery", "printer", "camera",   "bicycle", "lantern",
    "ticket",  "parcel",  "window",  "engine",  "guitar",  "blanket",  "teacher", "doctor",
    "painter", "farmer",  "pilot",   "singer",  "student", "driver",   "lawyer",  "gardener",
    "river",   "forest",  "island",  "valley",  "desert",  "meadow",   "canyon",  "beach",
    "village", "castle",  "letter",  "invoice", "recipe",  "contract", "report",  "poster",
    "ladder",  "helmet",  "basket",  "jacket",  "cinema",  "stadium",  "airport", "workshop"};

struct Word {
  size_t begin, end;  // bytes [begin, end) in the text, without punctuation around it
};

std::string_view text_of(std::string_view text, const Word& w) {
  return text.substr(w.begin, w.end - w.begin);
}

bool word_char(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 ||
         static_cast<unsigned char>(c) >= 0x80 || c == '\'' || c == '-';
}

std::vector<Word> words_of(std::string_view text) {
  std::vector<Word> out;
  for (size_t i = 0; i < text.size();) {
    if (!word_char(text[i])) {
      ++i;
      continue;
    }
    size_t j = i;
    while (j < text.size() &&
           (word_char(text[j]) || (text[j] == '.' && j + 1 < text.size() &&
                                   std::isdigit(static_cast<unsigned char>(text[j + 1])))))
      ++j;
    out.push_back({i, j});
    i = j;
  }
  return out;
}

bool function_word(std::string_view word) {
  return std::find(kFunctionWords.begin(), kFunctionWords.end(), lower_case(word)) !=
         kFunctionWords.end();
}

/// Capitalised for what they are, not because they name one of many: "Sundays", "Wi-Fi", "USB".
bool common_capital(std::string_view word) {
  static constexpr std::array<std::string_view, 28> kCommon = {
      "monday",   "tuesday",   "wednesday", "thursday", "friday",   "saturday", "sunday",
      "january",  "february",  "march",     "april",    "may",      "june",     "july",
      "august",   "september", "october",   "november", "december", "wi-fi",    "wifi",
      "internet", "english",   "christmas", "easter",   "ok",       "okay",     "i"};
  const bool acronym =
      word.size() <= 4 && word.size() >= 2 &&
      std::all_of(word.begin(), word.end(), [](unsigned char c) { return std::isupper(c); });
  std::string w = lower_case(word);
  if (w.size() > 4 && w.back() == 's') w.pop_back();
  return acronym || std::find(kCommon.begin(), kCommon.end(), w) != kCommon.end();
}

bool capitalised(std::string_view w) { return std::isupper(static_cast<unsigned char>(w[0])) != 0; }
/// Capitalised because it names one of many.
bool proper(std::string_view w) { return capitalised(w) && !common_capital(w); }
bool has_digit(std::string_view w) {
  return std::any_of(w.begin(), w.end(), [](unsigned char c) { return std::isdigit(c); });
}

std::vector<std::string> keywords(std::string_view question) {
  std::vector<std::string> out;
  for (const Word& w : words_of(question)) {
    const std::string_view word = text_of(question, w);
    if (!function_word(word)) out.emplace_back(word);
  }
  return out;
}

std::string join(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& w : words) out += (out.empty() ? "" : " ") + w;
  return out;
}

std::string_view without_end(std::string_view question) {
  while (!question.empty() &&
         std::string_view("?!. \n").find(question.back()) != std::string_view::npos) {
    question.remove_suffix(1);
  }
  return question;
}

/// "What is X?" -> "Tell me X.", "Give me X." ...; other questions keep their words after "Tell
/// me".
std::string as_order(std::string_view question, Rng& rng) {
  static constexpr std::array<std::string_view, 6> kOrders = {
      "Tell me ", "Give me ", "I need ", "Do you know ", "I need to know ", "Please say "};
  const std::string_view body = without_end(question);
  const std::vector<Word> words = words_of(body);
  const std::string order(kOrders[rng.below(kOrders.size())]);
  const std::string end = order == "Do you know " ? "?" : ".";
  if (words.size() >= 3) {
    const std::string first = lower_case(text_of(body, words[0]));
    const std::string second = lower_case(text_of(body, words[1]));
    if ((first == "what" || first == "who") &&
        (second == "is" || second == "are" || second == "was")) {
      return order + std::string(body.substr(words[2].begin)) + end;
    }
  }
  std::string rest(body);
  if (!rest.empty() && !words.empty() && function_word(text_of(body, words[0]))) {
    rest[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(rest[0])));
  }
  return (order == "Give me " || order == "I need " ? "Tell me " : order) + rest + end;
}

constexpr std::array<std::string_view, 8> kOpenings = {
    "I am asking about", "This is about",    "I have a question about", "Now to",
    "I am going to",     "I am looking for", "I want to know about",    "My friend told me about"};

/// "What is the phone extension of the Quill workshop?" in parts.
struct Attribute {
  bool person = false;  // "who is"
  std::string noun;     // "phone extension"
  std::string of;       // "the Quill workshop"
};

/// The parts of a question of the form "What is the NOUN of OWNER?"; none for other forms.
std::optional<Attribute> attribute_of(std::string_view question) {
  const std::string_view body = without_end(question);
  const std::vector<Word> words = words_of(body);
  const auto word = [&](size_t i) { return lower_case(text_of(body, words[i])); };
  if (words.size() < 6 || word(2) != "the") return std::nullopt;
  if ((word(0) != "what" && word(0) != "who") || (word(1) != "is" && word(1) != "was"))
    return std::nullopt;
  for (size_t i = 4; i + 1 < words.size(); ++i) {
    const std::string w = word(i);
    if (w != "of" && w != "for" && w != "at" && w != "in" && w != "from") continue;
    return Attribute{word(0) == "who",
                     std::string(body.substr(words[3].begin, words[i - 1].end - words[3].begin)),
                     std::string(body.substr(words[i + 1].begin))};
  }
  return std::nullopt;
}

/// Another sentence that asks for the same attribute of the same owner, half of the time without
/// the noun's qualifiers. Empty when the question has another form.
std::string ask_attribute(std::string_view question, Rng& rng) {
  const std::optional<Attribute> a = attribute_of(question);
  if (!a) return {};
  std::string noun = a->noun;
  const size_t space = noun.rfind(' ');
  if (space != std::string::npos && rng.below(2) == 0) noun.erase(0, space + 1);
  const std::string question_word = a->person ? "Who" : "What";
  switch (rng.below(6)) {
    case 0:
      return question_word + " is " + a->of + "'s " + noun + "?";
    case 1:
      return "Which " + noun + " does " + a->of + " have?";
    case 2:
      return a->person ? "Who is the " + noun + " for " + a->of + "?"
                       : "Which " + noun + " do I need for " + a->of + "?";
    case 3:
      return "How do I find the " + noun + " of " + a->of + "?";
    case 4:
      return "For " + a->of + ", " + lower_case(question_word) + " is the " + noun + "?";
    default:
      return std::string(kOpenings[rng.below(kOpenings.size())]) + " " + a->of + ". " +
             question_word + " is its " + noun + "?";
  }
}

/// "About the Quill workshop: what is the extension?" from "What is the extension of the Quill
/// workshop?": the entity with its noun goes to the front, and out of the question when it
/// ends it. Empty when no entity is named.
std::string entity_first(std::string_view question, Rng& rng) {
  const std::string_view body = without_end(question);
  const std::vector<Word> words = words_of(body);
  const auto word = [&](size_t i) { return text_of(body, words[i]); };
  size_t named = words.size();
  for (size_t i = 1; i < words.size() && named == words.size(); ++i) {
    if (proper(word(i)) && !function_word(word(i))) named = i;
  }
  if (named == words.size()) return {};
  size_t last = named;  // the noun phrase: the run of capitalised words and its noun
  while (last + 1 < words.size() && capitalised(word(last + 1))) ++last;
  if (last + 1 < words.size() && !function_word(word(last + 1))) ++last;
  const bool article = lower_case(word(named - 1)) == "the" || lower_case(word(named - 1)) == "a";
  const size_t first = named - (article ? 1 : 0);
  const std::string phrase(text_of(body, {words[first].begin, words[last].end}));
  std::string rest(question);
  if (last + 1 == words.size() && first >= 3) {
    const std::string before = lower_case(word(first - 1));
    if (before == "of" || before == "for" || before == "at" || before == "in" || before == "from") {
      rest = std::string(body.substr(0, words[first - 2].end)) + "?";
    }
  }
  return std::string(kOpenings[rng.below(kOpenings.size())]) + " " + phrase + ". " + rest;
}

/// Another question word that asks the same; empty when there is none.
std::string other_question_word(std::string_view question, Rng& rng) {
  struct Same {
    std::string_view from, to[2];
  };
  static constexpr std::array<Same, 9> kSame = {
      {{"what is ", {"what's ", "which is "}},
       {"who is ", {"what is the name of ", "who's "}},
       {"when does ", {"at what time does ", "at which time does "}},
       {"when is ", {"at what time is ", "at which time is "}},
       {"where is ", {"in which place is ", "where's "}},
       {"which ", {"what ", "which one: which "}},
       {"how many ", {"what number of ", "how many exactly: how many "}},
       {"how much ", {"what amount ", "how much exactly: how much "}},
       {"what ", {"which ", "what exactly: what "}}}};
  const std::string small = lower_case(question);
  for (const Same& s : kSame) {
    if (!small.starts_with(s.from)) continue;
    std::string out = std::string(s.to[rng.below(2)]) + std::string(question.substr(s.from.size()));
    out[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(out[0])));
    return out;
  }
  return {};
}

std::string replace_all(std::string_view text, const std::string& from, const std::string& to) {
  const std::string haystack = lower_case(text), needle = lower_case(from);
  std::string out;
  for (size_t i = 0;;) {
    const size_t hit = haystack.find(needle, i);
    if (hit == std::string::npos) return out.append(text.substr(i));
    out.append(text.substr(i, hit - i)).append(to);
    i = hit + needle.size();
  }
}

std::string random_digits_like(std::string_view number, Rng& rng) {
  std::string out(number);
  for (char& c : out) {
    if (std::isdigit(static_cast<unsigned char>(c)) != 0)
      c = static_cast<char>('0' + rng.below(10));
  }
  return out;
}

/// An invented name such as "Starick": contrasts against real names alone leave invented ones
/// free.
std::string invented_name(Rng& rng) {
  static constexpr std::array<std::string_view, 24> kOnset = {
      "B", "Br", "C", "Ch", "D", "Dr", "F",  "G", "Gr", "H", "J", "K",
      "L", "M",  "N", "P",  "R", "S",  "St", "T", "Tr", "V", "W", "Z"};
  static constexpr std::array<std::string_view, 8> kVowel = {"a", "e",  "i",  "o",
                                                             "u", "ar", "el", "en"};
  static constexpr std::array<std::string_view, 20> kEnd = {
      "bridge", "by",  "combe", "den", "don",  "field", "ford",  "gate", "ham",   "ley",
      "low",    "man", "mont",  "ner", "rick", "son",   "stead", "ton",  "ville", "worth"};
  std::string out(kOnset[rng.below(kOnset.size())]);
  return out.append(kVowel[rng.below(kVowel.size())]).append(kEnd[rng.below(kEnd.size())]);
}

/// A name of the entity's shape: as many words (at most two), numbers kept as numbers.
std::string name_like(std::string_view entity, Rng& rng) {
  std::string out;
  int names = 0;
  for (const Word& w : words_of(entity)) {
    const std::string_view word = text_of(entity, w);
    const std::string part =
        has_digit(word)      ? random_digits_like(word, rng)
        : !capitalised(word) ? std::string(kNouns[rng.below(kNouns.size())])
        : names++ < 2        ? (rng.below(2) == 0 ? invented_name(rng)
                                                  : std::string(kNames[rng.below(kNames.size())]))
                             : std::string();
    if (!part.empty()) out += (out.empty() ? "" : " ") + part;
  }
  return out;
}

}  // namespace

std::string reword(std::string_view question, Rng& rng) {
  const std::vector<std::string> keys = keywords(question);
  switch (rng.below(10)) {
    case 0:
      break;
    case 1: {  // a word dropped: a function word, or a qualifier ("phone" of "phone extension")
      const std::vector<Word> words = words_of(question);
      const auto word = [&](size_t i) { return text_of(question, words[i]); };
      std::vector<size_t> spare;
      for (size_t i = 0; i + 1 < words.size(); ++i) {
        const bool plain = !function_word(word(i)) && !capitalised(word(i)) && !has_digit(word(i));
        const bool qualifier = plain && i > 0 && function_word(word(i - 1)) &&
                               !function_word(word(i + 1)) && !capitalised(word(i + 1));
        if (function_word(word(i))) spare.push_back(i);
        if (qualifier) spare.insert(spare.end(), 2, i);
      }
      if (words.size() < 3 || spare.empty()) break;
      const Word w = words[spare[rng.below(spare.size())]];
      const size_t skip = w.end < question.size() && question[w.end] == ' ' ? 1 : 0;
      return std::string(question.substr(0, w.begin)).append(question.substr(w.end + skip));
    }
    case 2:
      if (keys.size() >= 2) return join(keys) + "?";
      break;
    case 3: {
      if (keys.size() < 2) break;
      std::vector<std::string> shuffled = keys;
      for (size_t i = shuffled.size() - 1; i > 0; --i)
        std::swap(shuffled[i], shuffled[rng.below(i + 1)]);
      return join(shuffled);
    }
    case 4:
      return as_order(question, rng);
    case 5: {
      std::string out = entity_first(question, rng);
      if (!out.empty()) return out;
      break;
    }
    case 6: {
      std::string out = other_question_word(question, rng);
      if (!out.empty()) return out;
      break;
    }
    case 7:
    case 8: {
      std::string out = ask_attribute(question, rng);
      if (!out.empty()) return out;
      break;
    }
    default:
      if (!keys.empty()) return "Tell me about " + join(keys) + ".";
  }
  return std::string(kLeadIns[rng.below(kLeadIns.size())]) + std::string(question);
}

std::vector<std::string> gate_forms(std::string_view question) {
  std::string body(question);
  if (!body.empty()) body[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(body[0])));
  return {"I need to know " + std::string(without_end(body)) + ".",
          "Hi there. " + std::string(question)};
}

std::vector<std::string> entities(std::string_view question) {
  std::vector<std::string> named, plain;
  const std::vector<Word> words = words_of(question);
  for (size_t i = 0; i < words.size();) {
    const auto word = [&](size_t k) { return text_of(question, words[k]); };
    const auto special = [&](size_t k) {
      return has_digit(word(k)) || (proper(word(k)) && k > 0 && !function_word(word(k)));
    };
    if (!special(i)) {
      if (!function_word(word(i)) && i > 0) plain.emplace_back(word(i));
      ++i;
      continue;
    }
    size_t j = i;  // a run only spans single spaces
    while (j + 1 < words.size() && special(j + 1) && words[j + 1].begin == words[j].end + 1 &&
           question[words[j].end] == ' ') {
      ++j;
    }
    named.emplace_back(question.substr(words[i].begin, words[j].end - words[i].begin));
    i = j + 1;
  }
  named.insert(named.end(), plain.begin(), plain.end());
  return named;
}

std::optional<Swapped> swap_entity(std::string_view question, std::string_view answer,
                                   std::span<const std::string> avoid, Rng& rng) {
  const std::vector<std::string> candidates = entities(question);
  if (candidates.empty()) return std::nullopt;
  const auto is_named = [](const std::string& e) { return proper(e) || has_digit(e); };
  const size_t named =
      static_cast<size_t>(std::count_if(candidates.begin(), candidates.end(), is_named));
  const std::string& from =
      named > 0 ? candidates[rng.below(named)] : candidates[rng.below(candidates.size())];
  for (int attempt = 0; attempt < 20; ++attempt) {
    const std::string to = name_like(from, rng);
    const std::string key = lower_case(to);
    if (to.empty() || key == lower_case(from)) continue;
    if (std::any_of(avoid.begin(), avoid.end(), [&](const std::string& a) { return a == key; }))
      continue;
    return Swapped{replace_all(question, from, to), replace_all(answer, from, to), from, to};
  }
  return std::nullopt;
}

}  // namespace ds
