// SPDX-License-Identifier: Apache-2.0
// Made-up facts with paraphrases and near misses, for measuring what a correction does to a model.
#pragma once

#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "storage/seams.h"

namespace ds::bench {

struct Fact {
  std::string question, answer, value;
  std::vector<std::string> paraphrases, near_misses;
};

inline std::string made_up_name(Rng& rng) {
  static const std::vector<std::string> kStart = {"Bar", "Cor", "Dal", "Fen", "Gor",  "Hal", "Kel",
                                                  "Lor", "Mar", "Nor", "Pel", "Quin", "Ros", "Sel",
                                                  "Tar", "Ver", "Wil", "Zan", "Bre",  "Osk"};
  static const std::vector<std::string> kEnd = {
      "low",  "ton",  "wick", "mere", "dale", "vin",  "by",   "stead", "ford", "nock",
      "mond", "sley", "ham",  "vale", "gate", "rick", "well", "holm",  "bury", "shaw"};
  return kStart[rng.below(kStart.size())] + kEnd[rng.below(kEnd.size())];
}

inline std::string word(Rng& rng) {
  static const std::vector<std::string> kWords = {
      "lantern", "walnut", "compass", "velvet", "anchor", "saffron", "pebble",  "harvest",
      "thistle", "copper", "marble",  "falcon", "ribbon", "cedar",   "glacier", "orchid",
      "badger",  "candle", "meadow",  "pepper", "violin", "sparrow", "timber",  "mustard",
      "quartz",  "heron",  "bamboo",  "turnip", "magnet", "cobalt"};
  return kWords[rng.below(kWords.size())];
}

/// A kind of fact: {n} is the entity, {m} and {k} two others, {v} the value.
struct FactKind {
  const char *question, *answer, *value;
  const char* paraphrases[3];
  const char* near_misses[3];
};
inline constexpr FactKind kFactKinds[] = {
    {"What is the access word of the {n} reading room?",
     "The access word of the {n} reading room is {v}.",
     "word",
     {"Which access word opens the {n} reading room?",
      "I need the access word for the {n} reading room.",
      "How do I get into the {n} reading room, which word do I say?"},
     {"What is the access word of the {m} reading room?",
      "What is the access word of the {k} reading room?",
      "What is the access word of the {m} archive?"}},
    {"When does the {n} museum open on Sundays?",
     "The {n} museum opens at {v} on Sundays.",
     "time",
     {"At what time does the {n} museum open on a Sunday?",
      "Sunday opening time of the {n} museum?",
      "I want to visit the {n} museum on Sunday. When can I get in?"},
     {"When does the {m} museum open on Sundays?", "When does the {k} museum open on Sundays?",
      "When does the {m} bakery open on Sundays?"}},
    {"What is the phone extension of the {n} workshop?",
     "The phone extension of the {n} workshop is {v}.",
     "number",
     {"Which extension do I dial for the {n} workshop?",
      "Give me the extension of the {n} workshop.",
      "I want to call the {n} workshop. What is its extension?"},
     {"What is the phone extension of the {m} workshop?",
      "What is the phone extension of the {k} workshop?",
      "What is the phone extension of the {m} laundry?"}},
    {"Who is the caretaker of the {n} garden?",
     "The caretaker of the {n} garden is Mr. {v}.",
     "name",
     {"Who takes care of the {n} garden?", "What is the name of the caretaker of the {n} garden?",
      "Tell me who the {n} garden's caretaker is."},
     {"Who is the caretaker of the {m} garden?", "Who is the caretaker of the {k} garden?",
      "Who is the caretaker of the {m} school?"}},
    {"What color is the door of the {n} cottage?",
     "The door of the {n} cottage is {v}.",
     "color",
     {"Which color does the {n} cottage's door have?",
      "Tell me the color of the door at the {n} cottage.",
      "I am looking for the {n} cottage. What color is its door?"},
     {"What color is the door of the {m} cottage?", "What color is the door of the {k} cottage?",
      "What color is the door of the {m} tower?"}},
    {"What is the Wi-Fi code of the {n} cafe?",
     "The Wi-Fi code of the {n} cafe is {v}.",
     "code",
     {"How do I log in to the Wi-Fi at the {n} cafe?", "Give me the Wi-Fi code for the {n} cafe.",
      "Which code does the Wi-Fi in the {n} cafe use?"},
     {"What is the Wi-Fi code of the {m} cafe?", "What is the Wi-Fi code of the {k} cafe?",
      "What is the Wi-Fi code of the {m} hotel?"}},
    {"How many days do I have to return a {n} lamp?",
     "You can return a {n} lamp within {v}.",
     "days",
     {"Within how many days can a {n} lamp be returned?",
      "What is the return period of a {n} lamp?",
      "I bought a {n} lamp. How many days do I have to send it back?"},
     {"How many days do I have to return a {m} lamp?",
      "How many days do I have to return a {k} lamp?",
      "How many days do I have to return a {m} chair?"}},
    {"Which gate does the {n} ferry leave from?",
     "The {n} ferry leaves from {v}.",
     "gate",
     {"From which gate does the ferry to {n} depart?", "Where does the {n} ferry leave?",
      "I am taking the {n} ferry. Which gate is it?"},
     {"Which gate does the {m} ferry leave from?", "Which gate does the {k} ferry leave from?",
      "Which gate does the {m} bus leave from?"}},
    {"What is the maximum load of the {n} lift?",
     "The maximum load of the {n} lift is {v}.",
     "load",
     {"How much can the {n} lift carry?", "Tell me the maximum load for the {n} lift.",
      "How heavy may a load in the {n} lift be?"},
     {"What is the maximum load of the {m} lift?", "What is the maximum load of the {k} lift?",
      "What is the maximum load of the {m} crane?"}},
    {"What is the discount code for {n} members?",
     "The discount code for {n} members is {v}.",
     "word",
     {"Which discount code can {n} members use?", "I am a {n} member. What is my discount code?",
      "Give me the discount code of the {n} members."},
     {"What is the discount code for {m} members?", "What is the discount code for {k} members?",
      "What is the discount code for {m} students?"}},
};

inline std::string draw_value(const std::string& kind, Rng& rng) {
  const auto number = [&](uint64_t low, uint64_t high) {
    return std::to_string(low + rng.below(high - low));
  };
  static const std::vector<std::string> kColors = {"turquoise", "crimson", "maroon", "beige",
                                                   "indigo",    "olive",   "lilac"};
  if (kind == "time") return number(7, 11) + ":" + number(10, 59);
  if (kind == "number") return number(1000, 9999);
  if (kind == "name") return made_up_name(rng);
  if (kind == "color") return kColors[rng.below(kColors.size())];
  if (kind == "code") return word(rng) + number(10, 99);
  if (kind == "days") return number(17, 89) + " days";
  if (kind == "gate") return "gate " + number(11, 98);
  if (kind == "load") return number(210, 980) + " kilograms";
  return word(rng);
}

/// A fact of kind `kind` (modulo the number of kinds) about an invented name.
inline Fact draw_fact(Rng& rng, size_t kind) {
  const FactKind& k = kFactKinds[kind % std::size(kFactKinds)];
  std::map<char, std::string> names;
  names['n'] = made_up_name(rng);
  do names['m'] = made_up_name(rng);
  while (names['m'] == names['n']);
  do names['k'] = made_up_name(rng);
  while (names['k'] == names['n'] || names['k'] == names['m']);
  names['v'] = draw_value(k.value, rng);
  const auto fill = [&](std::string text) {
    for (const auto& [letter, name] : names) {
      const std::string mark = std::string("{") + letter + "}";
      for (size_t at; (at = text.find(mark)) != std::string::npos;) text.replace(at, 3, name);
    }
    return text;
  };
  Fact fact{fill(k.question), fill(k.answer), names['v'], {}, {}};
  for (const char* p : k.paraphrases) fact.paraphrases.push_back(fill(p));
  for (const char* p : k.near_misses) fact.near_misses.push_back(fill(p));
  return fact;
}

/// Questions outside all facts, with a word of the right answer (lower case).
struct Unrelated {
  std::string question, key;
};
inline const std::vector<Unrelated>& unrelated_pool() {
  static const std::vector<Unrelated> kPool = {
      {"What is the capital of France?", "paris"},
      {"What is the capital of Germany?", "berlin"},
      {"What is the capital of Spain?", "madrid"},
      {"Who wrote Hamlet?", "shakespeare"},
      {"What is 2 plus 2?", "4"},
      {"What is the largest planet in our solar system?", "jupiter"},
      {"What gas do plants take in for photosynthesis?", "carbon dioxide"},
      {"How many continents are there?", "seven"},
      {"What color is the sky on a clear day?", "blue"},
      {"What is the chemical formula of water?", "h2o"},
      {"In which country is the Eiffel Tower?", "france"},
      {"What do cows give us to drink?", "milk"},
      {"Which planet is known as the Red Planet?", "mars"},
      {"Who was the first person to walk on the Moon?", "armstrong"},
      {"What is the name of the star at the center of our solar system?", "sun"},
      {"How many days are in a year?", "365"},
      {"What is the freezing point of water in Celsius?", "0"},
      {"What is the capital of Egypt?", "cairo"},
      {"What is the opposite of cold?", "hot"},
      {"Which ocean is the largest?", "pacific"},
      {"What is the main language spoken in Mexico?", "spanish"},
      {"How many hours are in a day?", "24"},
      {"What is the capital of Russia?", "moscow"},
      {"Which organ pumps blood through the body?", "heart"},
      {"What is the capital of England?", "london"},
      {"What is the largest mammal in the world?", "whale"},
      {"Who painted the ceiling of the Sistine Chapel?", "michelangelo"},
      {"What is 9 plus 1?", "10"},
      {"Which country is famous for sushi?", "japan"},
      {"What is the hardest natural substance?", "diamond"},
      {"How many wheels does a bicycle have?", "two"},
      {"What is H2O commonly called?", "water"},
      {"Which language is spoken in France?", "french"},
      {"What do we call frozen water?", "ice"},
      {"Who discovered penicillin?", "fleming"},
      {"What is the tallest animal in the world?", "giraffe"},
      {"What is the currency of the United States?", "dollar"},
      {"Which instrument has 88 keys?", "piano"},
      {"What is the first month of the year?", "january"},
      {"In which country is Mount Fuji?", "japan"},
      {"Who was the first man in space?", "gagarin"},
      {"What is the opposite of up?", "down"},
      {"How many sides does a square have?", "four"},
      {"What is the biggest desert in Africa?", "sahara"},
      {"What is the capital of Portugal?", "lisbon"},
      {"Which gas makes up most of the air?", "nitrogen"},
      {"Which fruit is known for keeping the doctor away?", "apple"},
      {"What is the process by which water becomes vapor?", "evaporation"},
      {"Who is the author of The Odyssey?", "homer"},
      {"What is the center of an atom called?", "nucleus"}};
  return kPool;
}

}  // namespace ds::bench
