// SPDX-License-Identifier: Apache-2.0
// Sampling against its definition: filters, penalties, seeds, frequencies, log probabilities, bad
// input.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "storage/seams.h"

namespace ds {
namespace {

const TokenCounts kNone;

class Sampler : public testing::Test {
 protected:
  TokenId draw(const std::vector<float>& logits, const Sampling& s, uint64_t position = 0,
               const TokenCounts& counts = kNone) {
    const Result<TokenId> token = sample_token(logits, s, counts, position, scratch);
    EXPECT_TRUE(token.ok()) << token.status().message();
    return token.ok() ? *token : -1;
  }
  /// Ids that come up in `n` draws.
  std::set<TokenId> support(const std::vector<float>& logits, const Sampling& s, int n = 4000) {
    std::set<TokenId> seen;
    for (int i = 0; i < n; ++i) seen.insert(draw(logits, s, static_cast<uint64_t>(i)));
    return seen;
  }
  SampleScratch scratch;
};

std::vector<float> random_logits(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> out(n);
  for (float& x : out) x = static_cast<float>(8 * rng.uniform() - 4);
  return out;
}

TEST_F(Sampler, GreedyTakesTheFirstOfTheLargest) {
  Sampling greedy;
  greedy.temperature = 0;
  for (const size_t n : {1u, 7u, 8u, 9u, 31u}) {
    for (size_t at = 0; at < n; ++at) {
      std::vector<float> logits(n, -1.0f);
      logits[at] = 2;
      if (at + 1 < n) logits.back() = 2;
      EXPECT_EQ(draw(logits, greedy), static_cast<TokenId>(at));
    }
  }
}

TEST_F(Sampler, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {1.0f, 0.0f, -1.0f, 2.0f};
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    Sampling s;
    s.temperature = temperature;
    double total = 0, p[4], seen[4] = {};
    for (int i = 0; i < 4; ++i) total += p[i] = std::exp(logits[i] / temperature);
    constexpr int kDraws = 40000;
    for (int i = 0; i < kDraws; ++i) ++seen[draw(logits, s, static_cast<uint64_t>(i))];
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(seen[i] / kDraws, p[i] / total, 0.01) << i;
  }
}

TEST_F(Sampler, EqualSeedsAndPositionsGiveEqualTokens) {
  const std::vector<float> logits = random_logits(640, 7);
  Sampling a, b;
  a.seed = 1, b.seed = 2;
  int differ_by_seed = 0, differ_by_position = 0;
  for (uint64_t i = 0; i < 200; ++i) {
    EXPECT_EQ(draw(logits, a, i), draw(logits, a, i));
    differ_by_seed += draw(logits, a, i) != draw(logits, b, i);
    differ_by_position += draw(logits, a, i) != draw(logits, a, i + 1);
  }
  EXPECT_GT(differ_by_seed, 150);
  EXPECT_GT(differ_by_position, 150);
}

TEST_F(Sampler, TopKKeepsTheBest) {
  Sampling s;
  s.temperature = 2;
  s.top_k = 2;
  EXPECT_EQ(support({0, 3, 1, 2.5f, -1}, s), (std::set<TokenId>{1, 3}));
  s.top_k = 1;
  EXPECT_EQ(support({0, 3, 1, 3, -1}, s), (std::set<TokenId>{1}));
  s.top_k = 50;  // more than there are
  EXPECT_EQ(support({0, 0, 0}, s), (std::set<TokenId>{0, 1, 2}));
}

TEST_F(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  const auto log_of = [](std::vector<double> p) {
    std::vector<float> out;
    for (const double x : p) out.push_back(static_cast<float>(std::log(x)));
    return out;
  };
  const std::vector<float> logits = log_of({0.15, 0.5, 0.05, 0.3});
  Sampling s;
  s.top_p = 0.45f;
  EXPECT_EQ(support(logits, s), (std::set<TokenId>{1}));
  s.top_p = 0.75f;
  EXPECT_EQ(support(logits, s), (std::set<TokenId>{1, 3}));
  s.top_p = 0.9f;
  EXPECT_EQ(support(logits, s), (std::set<TokenId>{0, 1, 3}));
  // Renormalised after top-k: 0.5 of 0.8 is already more than 0.6.
  s.top_k = 2;
  s.top_p = 0.6f;
  EXPECT_EQ(support(logits, s), (std::set<TokenId>{1}));
}

TEST_F(Sampler, TopPMatchesASortOfEverything) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    const std::vector<float> logits = random_logits(1000, seed);
    Sampling s;
    s.top_p = 0.3f + 0.03f * static_cast<float>(seed);
    std::vector<TokenId> order(logits.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<TokenId>(i);
    std::ranges::sort(order, {}, [&](TokenId id) { return -logits[static_cast<size_t>(id)]; });
    double total = 0, sum = 0;
    for (const float x : logits) total += std::exp(static_cast<double>(x));
    std::set<TokenId> nucleus;
    for (const TokenId id : order) {
      if (sum >= s.top_p * total) break;
      sum += std::exp(static_cast<double>(logits[static_cast<size_t>(id)]));
      nucleus.insert(id);
    }
    for (const TokenId id : support(logits, s, 500)) EXPECT_TRUE(nucleus.contains(id)) << id;
  }
}

TEST_F(Sampler, MinPIsRelativeToTheBest) {
  Sampling s;
  s.min_p = 0.5f;
  EXPECT_EQ(support({std::log(0.4f), std::log(0.24f), std::log(0.15f), std::log(0.21f)}, s),
            (std::set<TokenId>{0, 1, 3}));
  s.min_p = 1;
  EXPECT_EQ(support({1, 2, 0}, s), (std::set<TokenId>{1}));
}

TEST_F(Sampler, BiasAndPenaltiesMoveTheChoice) {
  Sampling s;
  s.temperature = 0;
  const std::vector<float> logits = {1.0f, 1.5f, 0.0f};
  s.logit_bias = {{2, 5.0f}};
  EXPECT_EQ(draw(logits, s), 2);
  s.logit_bias = {{1, -100.0f}};
  EXPECT_EQ(draw(logits, s), 0);
  s.logit_bias.clear();
  s.presence_penalty = 0.6f;
  EXPECT_EQ(draw(logits, s, 0, {{1, 1}}), 0);
  EXPECT_EQ(draw(logits, s, 0, {{1, 5}, {0, 1}}), 1);  // once per token, however often
  s.presence_penalty = 0;
  s.frequency_penalty = 0.2f;
  EXPECT_EQ(draw(logits, s, 0, {{1, 2}}), 1);
  EXPECT_EQ(draw(logits, s, 0, {{1, 3}}), 0);
  s.frequency_penalty = -2;  // rewards repetition
  EXPECT_EQ(draw(logits, s, 0, {{2, 1}}), 2);
}

TEST_F(Sampler, TinyTemperatureIsGreedy) {
  Sampling s;
  s.temperature = 1e-30f;
  EXPECT_EQ(support({0.0f, 0.1f, -3.0f}, s, 100), (std::set<TokenId>{1}));
}

TEST_F(Sampler, NonFiniteLogitsAreNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::infinity()}) {
    for (size_t at = 0; at < 19; ++at) {
      std::vector<float> logits(19, 0.5f);
      logits[at] = bad;
      const auto token = sample_token(logits, {}, kNone, 0, scratch);
      ASSERT_FALSE(token.ok());
      EXPECT_NE(token.status().message().find("token " + std::to_string(at) + " "),
                std::string::npos)
          << token.status().message();
      EXPECT_FALSE(score_token(logits, 0, 3, scratch).ok());
    }
  }
}

TEST_F(Sampler, LogprobsAreOfTheRawDistribution) {
  const std::vector<float> logits = random_logits(643, 3);
  double total = 0;
  for (const float x : logits) total += std::exp(static_cast<double>(x));
  const auto scores = score_token(logits, 17, 5, scratch);
  ASSERT_TRUE(scores.ok());
  EXPECT_NEAR(scores->logprob, logits[17] - std::log(total), 2e-6);
  std::vector<float> sorted = logits;
  std::ranges::sort(sorted, std::greater());
  ASSERT_EQ(scores->top.size(), 5u);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(logits[static_cast<size_t>(scores->top[i].first)], sorted[i]);
    EXPECT_NEAR(scores->top[i].second, sorted[i] - std::log(total), 2e-6);
  }
  EXPECT_EQ(score_token(std::vector<float>{1, 1, 1}, 0, 9, scratch)->top.size(), 3u);
}

TEST_F(Sampler, LogprobsSurviveHugeLogits) {
  const auto scores = score_token(std::vector<float>{3e38f, -3e38f, 1.0f}, 0, 1, scratch);
  ASSERT_TRUE(scores.ok());
  EXPECT_EQ(scores->logprob, 0.0f);
}

TEST(CheckSampling, RefusesWhatIsOutOfRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(check_sampling({}, 10).ok());
  const auto refused = [](auto change, const char* field) {
    Sampling s;
    change(s);
    const Status status = check_sampling(s, 10);
    EXPECT_EQ(status.code(), Code::kInvalid) << field;
    EXPECT_NE(status.message().find(field), std::string::npos) << status.message();
  };
  for (const float bad : {-0.1f, 2.1f, nan, std::numeric_limits<float>::infinity()}) {
    refused([&](Sampling& s) { s.temperature = bad; }, "temperature");
  }
  for (const float bad : {0.0f, -1.0f, 1.1f, nan})
    refused([&](Sampling& s) { s.top_p = bad; }, "top_p");
  for (const float bad : {-0.1f, 1.1f, nan}) refused([&](Sampling& s) { s.min_p = bad; }, "min_p");
  for (const float bad : {-2.1f, 2.1f, nan}) {
    refused([&](Sampling& s) { s.presence_penalty = bad; }, "presence_penalty");
    refused([&](Sampling& s) { s.frequency_penalty = bad; }, "frequency_penalty");
  }
  refused([](Sampling& s) { s.top_k = -1; }, "top_k");
  refused([](Sampling& s) { s.logit_bias = {{10, 1.0f}}; }, "logit_bias");
  refused([](Sampling& s) { s.logit_bias = {{-1, 1.0f}}; }, "logit_bias");
  refused([](Sampling& s) { s.logit_bias = {{1, 101.0f}}; }, "logit_bias");
  refused([&](Sampling& s) { s.logit_bias = {{1, nan}}; }, "logit_bias");
}

}  // namespace
}  // namespace ds
