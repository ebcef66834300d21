// SPDX-License-Identifier: Apache-2.0
// What a client sees of a token stream: stop strings across tokens, whole characters, log
// probabilities beside their text; and that the cut into tokens never changes the text.
#include "engine/answer.h"

#include <gtest/gtest.h>

#include "storage/seams.h"

namespace ds {
namespace {

TokenInfo info(TokenId id) {
  TokenInfo out;
  out.id = id;
  return out;
}

TEST(StopText, EndsBeforeAStopStringAcrossPieces) {
  StopText stop({"<end>"});
  EXPECT_EQ(stop.push("hello <"), "hello ");
  EXPECT_EQ(stop.push("en"), "");
  EXPECT_EQ(stop.push("d> more"), "");
  EXPECT_TRUE(stop.stopped());
  EXPECT_EQ(stop.push("x"), "");
  EXPECT_EQ(stop.flush(), "");
}

TEST(StopText, ShowsWhatTurnsOutToBeHarmless) {
  StopText stop({"<end>", "\n\n"});
  EXPECT_EQ(stop.push("a<en"), "a");
  EXPECT_EQ(stop.push("t\n"), "<ent");
  EXPECT_EQ(stop.flush(), "\n");
  EXPECT_FALSE(stop.stopped());
}

TEST(StopText, FirstToEndDecidesThenTheLonger) {
  StopText first({"abcd", "bc"});
  EXPECT_EQ(first.push("xabcd"), "xa");
  StopText longer({"bc", "abc"});
  EXPECT_EQ(longer.push("xabc"), "x");
}

/// The text as it is with everything in one piece.
std::string whole(const std::vector<std::string>& stops, const std::string& text) {
  StopText stop(stops);
  std::string out = stop.push(text);
  return out + stop.flush();
}

TEST(StopText, CutsDoNotMatter) {
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(seed);
    Rng rng(seed);
    const auto word = [&](uint64_t longest) {
      std::string out;
      for (uint64_t n = 1 + rng.below(longest); n > 0; --n)
        out += static_cast<char>('a' + rng.below(2));
      return out;
    };
    const std::vector<std::string> stops = {word(4), word(6)};
    const std::string text = word(20);
    StopText stop(stops);
    std::string shown;
    for (size_t at = 0; at < text.size();) {
      const size_t n = std::min<size_t>(1 + rng.below(3), text.size() - at);
      shown += stop.push(text.substr(at, n));
      at += n;
      const std::string expected = whole(stops, text);
      ASSERT_TRUE(std::string_view(expected).starts_with(shown))
          << "shown and not part of the answer";
    }
    EXPECT_EQ(shown + stop.flush(), whole(stops, text));
  }
}

TEST(Answer, HoldsBackHalfCharacters) {
  Answer answer({});
  const std::string smile = "\xf0\x9f\x98\x80";
  answer.add("hi" + smile.substr(0, 2), std::nullopt);
  EXPECT_EQ(answer.take().text, "hi");
  answer.add(smile.substr(2), std::nullopt);
  EXPECT_EQ(answer.take().text, smile);
  answer.add(smile.substr(0, 3), std::nullopt);
  EXPECT_EQ(answer.take().text, "");
  answer.end();
  EXPECT_EQ(answer.take().text, "\xef\xbf\xbd");
  EXPECT_EQ(answer.text(), "hi" + smile + "\xef\xbf\xbd");
}

TEST(Answer, StopStringSplitInsideACharacter) {
  Answer answer({"\xe2\x82\xac"});  // a euro sign in two tokens
  answer.add("5\xe2", std::nullopt);
  answer.add("\x82\xac", std::nullopt);
  EXPECT_TRUE(answer.stopped());
  answer.end();
  EXPECT_EQ(answer.text(), "5");
}

TEST(Answer, LogprobsComeWithTheirText) {
  Answer answer({"END"});
  answer.add("one", info(1));
  EXPECT_EQ(answer.take().tokens.size(), 1u);
  answer.add(" E", info(2));
  Chunk chunk = answer.take();
  EXPECT_EQ(chunk.text, " ");
  ASSERT_EQ(chunk.tokens.size(), 1u);  // its text has begun to show
  EXPECT_EQ(chunk.tokens[0].id, 2);
  answer.add("N", info(3));
  EXPECT_TRUE(answer.take().tokens.empty());
  answer.add("D", info(4));
  EXPECT_TRUE(answer.stopped());
  answer.end();
  chunk = answer.take();
  EXPECT_EQ(chunk.text, "");
  EXPECT_TRUE(chunk.tokens.empty());  // nothing of the stop string shows
  EXPECT_EQ(answer.tokens().size(), 2u);
}

TEST(Answer, EndReleasesWhatWasHeld) {
  Answer answer({"END"});
  answer.add("E", info(1));
  answer.add("", info(2));  // a special token: no text
  EXPECT_TRUE(answer.take().tokens.empty());
  answer.end();
  const Chunk chunk = answer.take();
  EXPECT_EQ(chunk.text, "E");
  EXPECT_EQ(chunk.tokens.size(), 2u);
}

}  // namespace
}  // namespace ds
