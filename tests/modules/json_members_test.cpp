// SPDX-License-Identifier: Apache-2.0
#include "modules/json_members.h"

#include <gtest/gtest.h>

namespace ds::modules {
namespace {

JsonMember member(const std::string& json) {
  return json_members("{\"x\":" + json + "}", "test", DS_E_ARG).at("x");
}
bool same(const char* x, const char* y) { return member(x) == member(y); }

std::string refusal(std::string_view json) {
  try {
    json_members(json, "meta", DS_E_DATA);
  } catch (const sdk::error& e) {
    EXPECT_EQ(e.code, DS_E_DATA);
    return e.what();
  }
  return "taken";
}

TEST(JsonMembers, NumbersAreEqualByValueAndTheRestByType) {
  EXPECT_TRUE(same("1", "1.0"));
  EXPECT_TRUE(same("-3", "-3.0"));
  EXPECT_TRUE(same("18446744073709551615", "18446744073709551615"));
  EXPECT_FALSE(same("-1", "18446744073709551615"));
  EXPECT_FALSE(same("1", "true"));
  EXPECT_FALSE(same("0", "false"));
  EXPECT_FALSE(same("1", "\"1\""));
  EXPECT_TRUE(same("\"a\\u00e4\"", "\"aä\""));
  for (const char* other : {"null", "[]", "{}", "[1]"}) EXPECT_FALSE(same(other, other)) << other;
}

TEST(JsonMembers, OfEqualKeysTheLastCountsAndNestedOnesAreNotMembers) {
  const JsonMembers all =
      json_members(R"({"a":1,"b":{"a":2,"c":[{"d":3}]},"a":"x"})", "", DS_E_ARG);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(*all.at("a").text(), "x");
  EXPECT_STREQ(all.at("b").type(), "object");
  EXPECT_FALSE(all.at("b").is_scalar());
}

TEST(JsonMembers, SayWhatIsNoObject) {
  for (const char* broken : {"", "{", "{\"a\":1", "{\"a\":1}}", "{a:1}", "{\"a\":1e999}"})
    EXPECT_EQ(refusal(broken), "meta: not JSON") << broken;
  EXPECT_EQ(refusal("[{\"a\":1}]"), "meta: array, expected an object");
  EXPECT_EQ(refusal("\"a\""), "meta: string, expected an object");
  EXPECT_EQ(refusal("null"), "meta: null, expected an object");
  EXPECT_EQ(refusal("3"), "meta: number, expected an object");
  // Far more levels than a recursive reader stands.
  EXPECT_EQ(refusal(std::string(200'000, '[') + std::string(200'000, ']')),
            "meta: array, expected an object");
}

TEST(JsonMembers, TextIsEscapedAndNeverBrokenUtf8) {
  EXPECT_EQ(json_text("a\"\n\\ä"), "\"a\\\"\\n\\\\ä\"");
  EXPECT_EQ(json_text("\xff"), "\"\xef\xbf\xbd\"");
}

}  // namespace
}  // namespace ds::modules
