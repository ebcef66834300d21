// SPDX-License-Identifier: Apache-2.0
// Rewordings keep what is asked; swaps change the entity in question and answer alike, and nothing
// else.
#include "learn/phrasing.h"

#include <gtest/gtest.h>

#include <set>

namespace ds {
namespace {

const std::vector<std::string> kQuestions = {"What is the phone extension of the Quinlow workshop?",
                                             "When does the Quinby museum open on Sundays?",
                                             "How many days do I have to return a Wil lamp?",
                                             "Which gate does the Zan ferry leave from?",
                                             "why?",
                                             "Qu'est-ce que la tour Eiffel ?",
                                             "日本の首都は?",
                                             ""};

TEST(Reword, KeepsTheEntityInEveryForm) {
  Rng rng(1);
  for (int i = 0; i < 400; ++i) {
    const std::string form = reword(kQuestions[0], rng);
    EXPECT_NE(form.find("Quinlow"), std::string::npos) << form;
    EXPECT_NE(form.find("extension"), std::string::npos) << form;
  }
}

TEST(Reword, FindsManyFormsAndNeverNone) {
  Rng rng(2);
  for (const std::string& question : kQuestions) {
    std::set<std::string> forms;
    for (int i = 0; i < 200; ++i) {
      const std::string form = reword(question, rng);
      EXPECT_FALSE(form.empty()) << question;
      forms.insert(form);
    }
    EXPECT_GE(forms.size(), 12u) << question;
  }
}

TEST(Reword, AsksForAnAttributeInOtherSentences) {
  const auto forms = [](const std::string& question) {
    Rng rng(5);
    std::set<std::string> out;
    for (int i = 0; i < 2000; ++i) out.insert(reword(question, rng));
    return out;
  };
  const auto things = forms(kQuestions[0]);
  EXPECT_TRUE(things.contains("Which phone extension does the Quinlow workshop have?"));
  EXPECT_TRUE(things.contains("What is the Quinlow workshop's extension?"));
  EXPECT_TRUE(things.contains("I am looking for the Quinlow workshop. What is its extension?"));
  const auto people = forms("Who is the caretaker of the Quinlow garden?");
  EXPECT_TRUE(people.contains("Who is the Quinlow garden's caretaker?"));
  EXPECT_TRUE(people.contains("For the Quinlow garden, who is the caretaker?"));
  for (const std::string& other : forms("What does the Quinlow workshop of today sell?"))
    EXPECT_EQ(other.find("'s"), other.starts_with("What's") ? 4 : std::string::npos) << other;
}

TEST(Reword, IsAFunctionOfTheDraw) {
  Rng a(3), b(3);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(reword(kQuestions[1], a), reword(kQuestions[1], b));
}

TEST(Entities, SkipsWordsThatAreCapitalisedForWhatTheyAre) {
  EXPECT_EQ(entities("What is the Wi-Fi code of the Tarrick cafe?").front(), "Tarrick");
  EXPECT_EQ(entities("When does the Quinby museum open on Sundays?").front(), "Quinby");
  EXPECT_EQ(entities("Is the USB port of the Zan 40 broken?").front(), "Zan 40");
}

TEST(SwapEntity, ReplacesInQuestionAndAnswerAlike) {
  Rng rng(4);
  const std::string answer = "The phone extension of the Quinlow workshop is 6499.";
  for (int i = 0; i < 200; ++i) {
    const auto swapped = swap_entity(kQuestions[0], answer, {}, rng);
    ASSERT_TRUE(swapped.has_value());
    EXPECT_EQ(swapped->from, "Quinlow");
    EXPECT_EQ(swapped->question,
              "What is the phone extension of the " + swapped->to + " workshop?");
    EXPECT_EQ(swapped->answer, "The phone extension of the " + swapped->to + " workshop is 6499.");
  }
}

TEST(SwapEntity, NeverUsesANameOfAnotherItem) {
  Rng rng(5);
  std::set<std::string> seen;
  for (int i = 0; i < 300; ++i) seen.insert(swap_entity(kQuestions[0], "", {}, rng)->to);
  std::vector<std::string> avoid;
  for (const std::string& name : seen) {
    avoid.push_back(name);
    for (char& c : avoid.back()) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  for (int i = 0; i < 300; ++i) {
    const auto swapped = swap_entity(kQuestions[0], "", avoid, rng);
    if (!swapped) continue;
    EXPECT_EQ(seen.count(swapped->to), 0u) << swapped->to;
  }
}

TEST(SwapEntity, HasNothingToSwapWithoutAContentWord) {
  Rng rng(6);
  EXPECT_FALSE(swap_entity("what is it?", "nothing", {}, rng).has_value());
  EXPECT_FALSE(swap_entity("", "", {}, rng).has_value());
}

}  // namespace
}  // namespace ds
