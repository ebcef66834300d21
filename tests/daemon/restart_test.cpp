// SPDX-License-Identifier: Apache-2.0
#include "restart.h"

#include <gtest/gtest.h>

namespace ds {
namespace {

constexpr int64_t kNow = 1'800'000'000;

TEST(Restarts, CountsTheFailuresOfAnHour) {
  Restarts restarts;
  EXPECT_FALSE(restarts.any());
  EXPECT_FALSE(restarts.allowed(kNow, 0));
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(restarts.allowed(kNow + i, 3));
    restarts.add(kNow + i);
  }
  EXPECT_TRUE(restarts.any());
  EXPECT_FALSE(restarts.allowed(kNow + 3, 3));
  EXPECT_TRUE(restarts.allowed(kNow + 3600, 3)) << "the first is an hour old";
  EXPECT_EQ(restarts.within_hour(kNow + 3600), 2);
}

TEST(Restarts, GoesFromProcessToProcessAsText) {
  Restarts restarts;
  restarts.add(kNow);
  restarts.add(kNow + 5);
  const Restarts next = Restarts::parse(restarts.text());
  EXPECT_EQ(next.text(), restarts.text());
  EXPECT_EQ(next.within_hour(kNow + 6), 2);
  restarts.add(kNow + 7200);
  EXPECT_EQ(restarts.text(), std::to_string(kNow + 7200)) << "what is older is forgotten";
}

TEST(Restarts, TakesWhatItCanOfAnyText) {
  EXPECT_FALSE(Restarts::parse("").any());
  EXPECT_FALSE(Restarts::parse("x").any());
  EXPECT_EQ(Restarts::parse("12,x,,7").text(), "7,12");
  EXPECT_EQ(Restarts::parse("99999999999999999999999").text(), "");
}

TEST(Restarts, SaysWhyTheProgramCannotBeExecuted) {
  char name[] = "dsd";
  char* arguments[] = {name, nullptr};
  const Status failed = Restarts().execute("/nonexistent/dsd", arguments);
  EXPECT_EQ(failed.code(), Code::kIo);
  EXPECT_NE(failed.message().find("/nonexistent/dsd"), std::string::npos);
}

}  // namespace
}  // namespace ds
