// SPDX-License-Identifier: Apache-2.0
// Each rule of admission alone, on plain items.
#include "learn/admission.h"

#include <gtest/gtest.h>

#include <map>

namespace ds {
namespace {

FeedbackItem item_of(uint64_t offset, const std::string& kind, Json record,
                     const std::string& source = "s") {
  FeedbackItem item;
  item.offset = offset;
  item.id = "fb_" + std::to_string(offset);
  item.kind = kind;
  item.source = source;
  item.record = std::move(record);
  return item;
}

FeedbackItem correction(uint64_t offset, const std::string& question, const std::string& answer) {
  return item_of(
      offset, "correction",
      {{"messages", {{{"role", "user"}, {"content", question}}}}, {"correction", answer}});
}

FeedbackItem demonstration(uint64_t offset, const std::string& question,
                           const std::string& answer) {
  return item_of(offset, "demonstration",
                 {{"messages",
                   {{{"role", "user"}, {"content", question}},
                    {{"role", "assistant"}, {"content", answer}}}}});
}

FeedbackItem text(uint64_t offset, const std::string& words) {
  return item_of(offset, "text", {{"text", words}});
}

std::vector<uint64_t> offsets(const std::vector<FeedbackItem>& items) {
  std::vector<uint64_t> out;
  for (const FeedbackItem& item : items) out.push_back(item.offset);
  return out;
}

using Offsets = std::vector<uint64_t>;

TEST(Admit, ALaterCorrectionOfTheSameConversationWins) {
  const Admission got =
      admit({correction(1, "When do you open?", "At 8."), correction(2, "Who?", "Ann."),
             correction(3, "when do you open", "At 9.")});
  EXPECT_EQ(offsets(got.admitted), (Offsets{2, 3}));
  ASSERT_EQ(got.quarantined.size(), 1u);
  EXPECT_EQ(got.quarantined[0].item.offset, 1u);
  EXPECT_EQ(got.quarantined[0].reason, "superseded by fb_3");
}

TEST(Admit, DifferentDemonstrationsOfOnePromptAllStayButCopiesDoNot) {
  const Admission got =
      admit({demonstration(1, "A joke?", "Knock, knock."), demonstration(2, "A joke?", "A horse."),
             demonstration(3, "A joke?", "a horse")});
  EXPECT_EQ(offsets(got.admitted), (Offsets{1, 3}));
}

TEST(Admit, ADemonstrationDoesNotOverruleACorrection) {
  const Admission got =
      admit({correction(1, "When?", "At 8."), demonstration(2, "When?", "At 9.")});
  EXPECT_EQ(offsets(got.admitted), (Offsets{1, 2}));
}

TEST(Admit, NearlyEqualTextsEnterOnce) {
  const std::string words =
      "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
      "fifteen sixteen seventeen eighteen nineteen twenty";
  const Admission got = admit({text(1, words), text(2, words + "!"), text(3, words + " more"),
                               text(4, "quite another text"), text(5, "Quite another TEXT."),
                               text(6, "quite other words")});
  EXPECT_EQ(offsets(got.admitted), (Offsets{1, 4, 6}));
  EXPECT_EQ(got.quarantined[0].reason, "says nearly the same as fb_1");
}

TEST(Likeness, IsTheShareOfCommonTrigrams) {
  EXPECT_DOUBLE_EQ(likeness("a b c d", "a b c e"), 1.0 / 3.0);
  EXPECT_DOUBLE_EQ(likeness("a b c d", "A, b. C d"), 1.0);
  EXPECT_DOUBLE_EQ(likeness("", ""), 1.0);
  EXPECT_DOUBLE_EQ(likeness("a", "b"), 0.0);
}

TEST(NotSuperseded, AnOldAnswerIsNotRehearsedAgainstItsCorrection) {
  const std::vector<FeedbackItem> earlier = {correction(1, "When?", "At 8."),
                                             correction(2, "Who?", "Ann."), text(3, "some text")};
  EXPECT_EQ(offsets(not_superseded(earlier, {correction(9, "When?", "At 9.")})), (Offsets{2, 3}));
  EXPECT_EQ(offsets(not_superseded(earlier, {})), (Offsets{1, 2, 3}));
}

TEST(SupersededBy, TellsWhichOfTheOthersItGivesWayTo) {
  const FeedbackItem item = correction(1, "When?", "At 8.");
  EXPECT_EQ(superseded_by(item, {}), "");
  EXPECT_EQ(superseded_by(item, {correction(2, "Who?", "Ann."), text(3, "When?")}), "");
  EXPECT_EQ(superseded_by(item, {correction(9, "when", "At 9."), correction(2, "Who?", "Ann.")}),
            "fb_9");
  EXPECT_EQ(superseded_by(correction(9, "When?", "At 9."), {item}), "") << "the older one";
}

TEST(GaveWayTo, KnowsTheReasonsOfAdmission) {
  std::vector<FeedbackItem> items = {correction(1, "When?", "At 8."), text(2, "some text")};
  const Admission got =
      admit({items[0], items[1], correction(3, "When?", "At 9."), text(4, "Some text!")});
  ASSERT_EQ(got.quarantined.size(), 2u);
  for (const Rejected& r : got.quarantined) {
    FeedbackItem item = r.item;
    const std::string by = item.offset == 1 ? "fb_3" : "fb_2";
    EXPECT_FALSE(gave_way_to(item, by)) << "it has no fate";
    item.fate.push_back({"quarantined", 0, "", 0, r.reason});
    EXPECT_TRUE(gave_way_to(item, by)) << r.reason;
    EXPECT_FALSE(gave_way_to(item, by + "0"));
    item.fate.push_back({"reverted", 0, "", 0, r.reason});
    EXPECT_FALSE(gave_way_to(item, by)) << "it is no longer in quarantine";
  }
}

std::vector<FeedbackItem> busy_and_quiet(int sources) {
  std::vector<FeedbackItem> items;
  for (uint64_t i = 1; i <= 40; ++i) items.push_back(item_of(i, "text", {}, "busy"));
  for (int s = 1; s < sources; ++s)
    items.push_back(
        item_of(static_cast<uint64_t>(40 + s), "text", {}, "quiet" + std::to_string(s)));
  return items;
}

TEST(FairShare, FromEightSourcesOnTheyTakeTurns) {
  const std::vector<FeedbackItem> taken = fair_share(busy_and_quiet(8), 16);
  std::map<std::string, int> count;
  for (const FeedbackItem& item : taken) ++count[item.source];
  EXPECT_EQ(taken.size(), 16u);
  EXPECT_EQ(count.size(), 8u);
  EXPECT_EQ(count["busy"], 9);
  EXPECT_TRUE(std::is_sorted(taken.begin(), taken.end(),
                             [](const auto& a, const auto& b) { return a.offset < b.offset; }));
}

TEST(FairShare, BelowThatTheOldestCome) {
  const Offsets taken = offsets(fair_share(busy_and_quiet(7), 16));
  for (uint64_t i = 0; i < 16; ++i) EXPECT_EQ(taken[i], i + 1);
  EXPECT_EQ(fair_share(busy_and_quiet(8), 100).size(), 47u);
}

}  // namespace
}  // namespace ds
