// SPDX-License-Identifier: Apache-2.0
// Learners of plugins: what they may do with the model's weights, what is refused, and that what
// they remember goes with the version.
#include "learn/learner_plugin.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/pool.h"
#include "learn/learner_memory.h"
#include "learner_house.h"
#include "learner_module.h"

namespace ds {
namespace {

using test::House;
using test::lesson;
using testing::HasSubstr;

// ---- vectors ----

class RoundVectorsTest : public testing::Test {
 protected:
  static constexpr size_t kSize = 56388;  // more than a chunk of the sums, and no multiple of it
  RoundVectorsTest() : weights_(kSize), gradient_(kSize) {
    Rng rng(5);
    for (float& v : weights_) v = static_cast<float>(rng.uniform() - 0.5);
    for (float& v : gradient_) v = static_cast<float>(rng.uniform() - 0.5);
  }
  Compute compute(const ds_parallel* parallel) const {
    return {&cpu_ops(best_cpu_isa()), {parallel}, nullptr};
  }
  std::unique_ptr<RoundVectors> vectors_on(const ds_parallel* parallel) {
    return RoundVectors::over(compute(parallel), weights_, gradient_).value();
  }
  std::vector<float> weights_, gradient_;
  Pool pool_{0};
};

TEST_F(RoundVectorsTest, OperationsEqualTheOracle) {
  const std::vector<double> w(weights_.begin(), weights_.end());
  const std::vector<double> g(gradient_.begin(), gradient_.end());
  const auto vectors = vectors_on(pool_.engine());
  const ds_vectors& v = *vectors->table();
  int32_t x = 0;
  ASSERT_EQ(v.make(v.ctx, {nullptr, 0}, &x), DS_OK);
  double zero = 1;
  ASSERT_EQ(v.dot(v.ctx, x, x, &zero), DS_OK);
  EXPECT_EQ(zero, 0);
  ASSERT_EQ(v.copy(v.ctx, DS_VEC_WEIGHTS, x), DS_OK);
  ASSERT_EQ(v.scale(v.ctx, -2.0f, x), DS_OK);
  ASSERT_EQ(v.axpy(v.ctx, 0.5f, DS_VEC_GRADIENT0, x), DS_OK);
  ASSERT_EQ(v.multiply(v.ctx, 3.0f, DS_VEC_WEIGHTS, DS_VEC_GRADIENT0, x), DS_OK);
  double want = 0, size = 0, got = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    const double value = -2 * w[i] + 0.5 * g[i] + 3 * w[i] * g[i];
    want += value * w[i], size += std::abs(value * w[i]);
  }
  ASSERT_EQ(v.dot(v.ctx, x, DS_VEC_WEIGHTS, &got), DS_OK);
  EXPECT_NEAR(got, want, 1e-6 * size);
}

TEST_F(RoundVectorsTest, SumsDoNotDependOnTheThreads) {
  const auto many = vectors_on(pool_.engine());
  const auto one = vectors_on(serial_parallel());
  double a = 0, b = 0;
  many->table()->dot(many->table()->ctx, DS_VEC_WEIGHTS, DS_VEC_GRADIENT0, &a);
  one->table()->dot(one->table()->ctx, DS_VEC_WEIGHTS, DS_VEC_GRADIENT0, &b);
  EXPECT_EQ(a, b);
}

TEST_F(RoundVectorsTest, TheParentStaysAndSlotsMove) {
  const auto vectors = vectors_on(pool_.engine());
  const ds_vectors& v = *vectors->table();
  double before = 0, after = 0, gradient = 0, moved = 0;
  v.dot(v.ctx, DS_VEC_PARENT, DS_VEC_PARENT, &before);
  v.dot(v.ctx, DS_VEC_GRADIENT0, DS_VEC_GRADIENT0, &gradient);
  EXPECT_EQ(v.scale(v.ctx, 0.0f, DS_VEC_PARENT), DS_E_ARG);
  EXPECT_EQ(v.scale(v.ctx, 0.0f, DS_VEC_WEIGHTS), DS_OK);
  v.dot(v.ctx, DS_VEC_PARENT, DS_VEC_PARENT, &after);
  EXPECT_EQ(before, after);
  EXPECT_EQ(v.dot(v.ctx, 4, 4, &moved), DS_E_ARG);
  EXPECT_EQ(v.dot(v.ctx, 2, 2, &moved), DS_OK);
  EXPECT_EQ(moved, 0) << "nothing was drawn into slot 2";
  ASSERT_TRUE(vectors->move_gradient_to(2).ok());
  v.dot(v.ctx, 2, 2, &moved);
  EXPECT_EQ(moved, gradient);
  v.dot(v.ctx, 0, 0, &moved);
  EXPECT_EQ(moved, 0);
  vectors->begin_step();
  v.dot(v.ctx, 2, 2, &moved);
  EXPECT_EQ(moved, 0);
}

TEST_F(RoundVectorsTest, NamedOnesComeBackAndOthersAreRefused) {
  const auto first = vectors_on(pool_.engine());
  int32_t x = 0, again = 0;
  const ds_vectors& v = *first->table();
  ASSERT_EQ(v.make(v.ctx, {"fisher", 6}, &x), DS_OK);
  ASSERT_EQ(v.copy(v.ctx, DS_VEC_WEIGHTS, x), DS_OK);
  ASSERT_EQ(v.make(v.ctx, {"fisher", 6}, &again), DS_OK);
  EXPECT_EQ(x, again);
  const auto second = vectors_on(pool_.engine());
  ASSERT_TRUE(second->restore(*first->named()).ok());
  const ds_vectors& s = *second->table();
  ASSERT_EQ(s.make(s.ctx, {"fisher", 6}, &x), DS_OK);
  double kept = 0, want = 0;
  s.dot(s.ctx, x, x, &kept);
  v.dot(v.ctx, DS_VEC_WEIGHTS, DS_VEC_WEIGHTS, &want);
  EXPECT_EQ(kept, want);

  const auto third = vectors_on(pool_.engine());
  EXPECT_THAT(third->restore({{"fisher", {1, 2}}}).message(),
              HasSubstr("fisher: 2 numbers, the weights are 56388"));
}

// ---- in a learner's rounds ----

/// The built-in modules and the probe.
Plugins& with_probe() {
  static const ScratchFolder data;
  static const std::unique_ptr<Plugins> plugins = [] {
    auto opened =
        Plugins::open({std::string(DS_BIN_DIR) + "/../modules", data / "plugins", Json::object()},
                      {}, posix_file_system(), system_clock_seam());
    DS_CHECK(opened.ok());
    const auto loaded = (*opened)->load(DS_LEARNER_PROBE, true, Json());
    if (!loaded.ok()) std::fprintf(stderr, "%s\n", loaded.status().message().c_str());
    DS_CHECK(loaded.ok());
    return std::move(*opened);
  }();
  return *plugins;
}

Json record_of(int n) {
  return lesson("Who keeps the key of room " + std::to_string(n) + "?",
                "Number " + std::to_string(n) + " keeps it.");
}

TEST(LearnerPlugins, AFaultIsNamedAndTheItemsWait) {
  const std::pair<const char*, const char*> faults[] = {
      {"error", "I will not"},
      {"key", "draws key 7, which no sample has"},
      {"term", "term 9, expected 1 to 5"},
      {"logits", "none are stored"},
      {"weight", "weight nan, expected a number"},
      {"slot", "slot 4, expected 0 to 3"},
      {"no combine", "slot 1, but it has no combine"},
      {"rejected", "its rejected answer, but it has none"},
      {"sequence", "a sequence (term 5), but it has no coefficients"},
      {"many", "faulty: "}};
  for (const auto& [fault, reason] : faults) {
    ASSERT_TRUE(with_probe().reload("faulty", "", {{"fault", fault}}).ok());
    House house({{"learn.learner", "faulty"}}, system_clock_seam(), with_probe());
    const std::string id = house.say(record_of(1));
    const Json outcome = house.step();
    EXPECT_THAT(outcome.value("reason", ""), HasSubstr(reason)) << fault << " " << outcome;
    EXPECT_EQ(house.versions->current_number(), 1) << fault;
    EXPECT_EQ(house.fate(id).state, "queued") << fault;
    ASSERT_TRUE(house.config.set("learn.learner", "naive", "flag").ok());
    EXPECT_EQ(house.step().value("outcome", ""), "published") << fault;
    EXPECT_EQ(house.fate(id).state, "served") << fault;
  }
}

TEST(LearnerPlugins, TheRecordsNameTheLearner) {
  House house(test::Settings{{"learn.learner", "er"}});
  house.teach(record_of(1));
  const Json by = house.last_round()["learner"];
  EXPECT_EQ(by.value("name", ""), "er");
  EXPECT_EQ(by.value("sha256", "").size(), 64u);
  EXPECT_EQ(by["config"].value("lessons", 0), 6);
  EXPECT_EQ(house.versions->manifest(2)->details["learner"], by);
}

TEST(LearnerPlugins, EachLearnerMakesItsOwnWeightsAndTheSameOnesTwice) {
  std::set<std::string> hashes;
  for (const char* learner : {"naive", "er", "kl-to-base", "remembering"}) {
    std::string first;
    for (int run = 0; run < 2; ++run) {
      House house({{"learn.learner", learner}, {"learn.deterministic", "true"}},
                  system_clock_seam(), with_probe());
      for (int n = 1; n <= 3; ++n) house.teach(record_of(n));
      EXPECT_EQ(house.versions->current_number(), 4) << learner << house.last_round();
      if (run == 0) first = house.hash();
      EXPECT_EQ(house.hash(), first) << learner;
    }
    hashes.insert(first);
  }
  EXPECT_EQ(hashes.size(), 4u);
}

/// What the learner had written when version `number` was made.
LearnerMemory memory_of(const House& house, int64_t number) {
  auto checkpoint = house.files().read_checkpoint("default", number);
  DS_CHECK(checkpoint.ok());
  auto memory = take_memory(*house.versions->manifest(number), *checkpoint);
  DS_CHECK(memory.ok());
  return std::move(memory).value();
}

TEST(LearnerPlugins, WhatOneRemembersGoesWithTheVersion) {
  House house({{"learn.learner", "remembering"}}, system_clock_seam(), with_probe());
  house.teach(record_of(1));
  house.teach(record_of(2));
  ASSERT_EQ(house.versions->current_number(), 3) << house.last_round();
  const LearnerMemory first = memory_of(house, 2), second = memory_of(house, 3);
  EXPECT_EQ(first.state, "1");
  EXPECT_EQ(second.state, "2");
  EXPECT_EQ(second.learner, "remembering");
  EXPECT_EQ(second.version, "1.2.0");
  ASSERT_TRUE(first.vectors.contains("sum"));
  EXPECT_NE(first.vectors.at("sum"), second.vectors.at("sum"));

  house.reopen();
  ASSERT_TRUE(house.versions->rollback(2, "test").ok());
  ASSERT_TRUE(house.versions->unpin().ok());
  house.teach(record_of(3));
  EXPECT_EQ(memory_of(house, 4).state, "2") << "the round that was rolled back counts no more";
}

TEST(LearnerPlugins, AnotherLearnerDoesNotReadIt) {
  House house({{"learn.learner", "remembering"}}, system_clock_seam(), with_probe());
  house.teach(record_of(1));
  ASSERT_TRUE(house.config.set("learn.learner", "naive", "flag").ok());
  house.teach(record_of(2));
  EXPECT_EQ(house.versions->current_number(), 3) << house.last_round();
  EXPECT_EQ(memory_of(house, 3).state, "");
  EXPECT_TRUE(memory_of(house, 3).vectors.empty());
}

}  // namespace
}  // namespace ds
