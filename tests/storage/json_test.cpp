// SPDX-License-Identifier: Apache-2.0
#include "storage/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace ds {
namespace {

using testing::HasSubstr;

TEST(Json, ParsesAndDumps) {
  const Result<Json> json = parse_json(R"({"b":[1,-2,2.5,"x\u00e9"],"a":null})");
  ASSERT_TRUE(json.ok()) << json.status().message();
  EXPECT_EQ(dump_json(*json), "{\"a\":null,\"b\":[1,-2,2.5,\"x\xc3\xa9\"]}");
}

TEST(Json, ErrorsSayWhere) {
  const auto message = [](std::string_view text) { return parse_json(text).status().message(); };
  EXPECT_THAT(message("{\"a\":}"), HasSubstr("byte 6"));
  EXPECT_THAT(message("1 2"), HasSubstr("byte 3"));
  EXPECT_THAT(message(""), HasSubstr("byte 1"));
  EXPECT_THAT(message("\"\xff\""), HasSubstr("UTF-8"));
  EXPECT_THAT(message("1e999"), HasSubstr("number overflow parsing '1e999'"));
  EXPECT_THAT(message("NaN"), HasSubstr("byte 1"));
}

TEST(Json, RefusesDeepNestingBeforeParsing) {
  EXPECT_TRUE(parse_json(std::string(64, '[') + std::string(64, ']')).ok());
  EXPECT_THAT(parse_json(std::string(65, '[') + std::string(65, ']')).status().message(),
              HasSubstr("byte 64: nested deeper than 64"));
  EXPECT_FALSE(parse_json(std::string(10'000'000, '[')).ok());
  EXPECT_TRUE(parse_json("\"\\\"[[[[\"", 2).ok());  // brackets in a string do not count
}

TEST(Json, DumpNeverFails) { EXPECT_EQ(dump_json(Json("a\xff")), "\"a\xef\xbf\xbd\""); }

TEST(Json, CanonicalTextIsEqualForEqualValues) {
  const auto canonical = [](std::string_view text) { return canonical_json(*parse_json(text)); };
  EXPECT_EQ(canonical(R"({ "b" : 1.0, "a" : [1e2, -0.0, 0.1, 1e300] })"),
            R"({"a":[100,0,0.1,1e+300],"b":1})");
  EXPECT_EQ(canonical("18446744073709551615"), "18446744073709551615");
  EXPECT_EQ(canonical("-9223372036854775808"), "-9223372036854775808");
  EXPECT_EQ(canonical("\"\\u00e9\\n\""), "\"\xc3\xa9\\n\"");
  EXPECT_EQ(canonical("[true,false,null,{}]"), "[true,false,null,{}]");
}

TEST(Json, TypedMembersNameKeyFoundAndWanted) {
  const Json object = *parse_json(R"({"s":"x","i":7,"f":2.0,"h":2.5,"n":null,"b":true,
                                      "big":18446744073709551615})");
  EXPECT_EQ(get_string(object, "s").value(), "x");
  EXPECT_EQ(get_int(object, "i").value(), 7);
  EXPECT_EQ(get_int(object, "f").value(), 2);
  EXPECT_EQ(get_number(object, "i").value(), 7.0);
  EXPECT_EQ(get_int(object, "n", 5).value(), 5);
  EXPECT_EQ(get_bool(object, "absent", true).value(), true);
  EXPECT_EQ(find(object, "n"), nullptr);
  EXPECT_EQ(find(Json("text"), "n"), nullptr);
  EXPECT_THAT(get_int(object, "s").status().message(), HasSubstr("\"s\" is string"));
  EXPECT_THAT(get_int(object, "h").status().message(), HasSubstr("2.5"));
  EXPECT_THAT(get_int(object, "big", 1).status().message(), HasSubstr("18446744073709551615"));
  EXPECT_THAT(get_string(object, "absent").status().message(), HasSubstr("missing"));
  EXPECT_THAT(get_bool(object, "i", false).status().message(), HasSubstr("true or false"));
  EXPECT_THAT(get_number(Json(3), "x").status().message(), HasSubstr("expected an object"));
}

}  // namespace
}  // namespace ds
