// SPDX-License-Identifier: Apache-2.0
// Each check of the gate alone, on made-up scores.
#include "learn/gate.h"

#include <gtest/gtest.h>

#include <cmath>

namespace ds {
namespace {

GateScores good() {
  GateScores s;
  s.items.push_back({"fb_1", -3.0, -0.04});
  s.items.push_back({"fb_2", -2.0, -0.3});
  s.domains["base"] = {3.0, 3.01};
  s.domains["manuals"] = {2.0, 1.9};
  s.kl = 0.02;
  s.canaries = 8;
  return s;
}

const GateLimits kLimits{0.01, 0.10};

TEST(Gate, AGoodCandidatePasses) {
  const GateVerdict v = judge(good(), kLimits);
  EXPECT_TRUE(v.pass) << v.reason;
  EXPECT_EQ(v.check, "");
}

TEST(Gate, NaNIsHeld) {
  GateScores s = good();
  s.finite = false;
  EXPECT_EQ(judge(s, kLimits).check, "finite");
  EXPECT_FALSE(judge(s, kLimits).pass);
}

TEST(Gate, AnEmptyDeltaIsHeld) {
  GateScores s = good();
  s.changed = false;
  EXPECT_EQ(judge(s, kLimits).check, "changed");
}

TEST(Gate, ABrokenCanaryIsHeldAndNamed) {
  GateScores s = good();
  s.broken_canaries = {"Once upon a time"};
  const GateVerdict v = judge(s, kLimits);
  EXPECT_EQ(v.check, "canary");
  EXPECT_NE(v.reason.find("Once upon a time"), std::string::npos);
}

TEST(Gate, DriftBeyondTheLimitIsHeld) {
  GateScores s = good();
  s.kl = 0.11;
  EXPECT_EQ(judge(s, kLimits).check, "kl");
  s.kl = std::nan("");
  EXPECT_EQ(judge(s, kLimits).check, "kl");
}

TEST(Gate, ADamagedDomainIsHeldAndNamed) {
  GateScores s = good();
  s.domains["manuals"] = {2.0, 2.03};
  const GateVerdict v = judge(s, kLimits);
  EXPECT_EQ(v.check, "domain");
  EXPECT_NE(v.reason.find("manuals"), std::string::npos);
  s.domains["manuals"] = {2.0, std::nan("")};
  EXPECT_EQ(judge(s, kLimits).check, "domain");
}

TEST(Gate, ARiseWithinTheNoiseOfItsMeasurementIsNone) {
  GateScores s = good();
  s.domains["manuals"] = {2.0, 2.10, 0.05};  // 5 % +- 2.5 %: chance alone may do that
  EXPECT_TRUE(judge(s, kLimits).pass);
  s.domains["manuals"] = {2.0, 2.13, 0.05};  // 1.5 % more than chance explains
  EXPECT_EQ(judge(s, kLimits).check, "domain");
  s.domains["manuals"] = {2.0, 2.0, std::nan("")};
  EXPECT_EQ(judge(s, kLimits).check, "domain");
}

TEST(Gate, ItemsThatDidNotImproveAreHeldAndCounted) {
  GateScores s = good();
  s.items.push_back({"fb_3", -1.0, -1.5});
  const GateVerdict v = judge(s, kLimits);
  EXPECT_EQ(v.check, "items");
  EXPECT_NE(v.reason.find("1 of 3"), std::string::npos);
  EXPECT_NE(v.reason.find("fb_3"), std::string::npos);
}

TEST(Gate, AnAnswerFarBehindTheOthersIsHeldATextIsNot) {
  GateScores s = good();
  s.items.push_back({"fb_3", -2.0, -1.9});
  const GateVerdict v = judge(s, kLimits);
  EXPECT_EQ(v.check, "items");
  EXPECT_NE(v.reason.find("0 not better than before, 1 far behind the others, first: fb_3"),
            std::string::npos)
      << v.reason;
  s.items.back().answer = false;
  EXPECT_TRUE(judge(s, kLimits).pass);
  s.items = {{"fb_1", -2.0, -1.6}, {"fb_2", -2.0, -1.7}, {"fb_3", -2.0, -1.98}};
  EXPECT_TRUE(judge(s, kLimits).pass);  // a short round: none has gone far
}

TEST(Gate, AnItemKnownBeforeNeedNotImprove) {
  GateScores s = good();
  s.items.push_back({"fb_3", -0.01, -0.02});
  EXPECT_TRUE(judge(s, kLimits).pass);
}

}  // namespace
}  // namespace ds
