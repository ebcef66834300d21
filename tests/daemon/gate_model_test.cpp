// SPDX-License-Identifier: Apache-2.0
// Six planted candidates on the real model, each held by its own check; the untouched one passes.
#include <gtest/gtest.h>

#include <cmath>

#include "learn/gate.h"
#include "learn/shipped_texts.h"
#include "learner_module.h"
#include "reference_model.h"

namespace ds {
namespace {

class PlantedCandidates : public testing::Test {
 protected:
  struct World {
    test::Machine machine;
    test::LoadedModel model;
    ChatTemplate chat;
    std::unique_ptr<RoundTrainer> trainer;
    std::unique_ptr<GateProbe> probe;
    std::vector<Lesson> lessons;
    std::vector<float> good;  // parameters of a candidate that learned the lessons
  };
  static World* world;

  static Lesson lesson(const std::string& question, const std::string& answer) {
    Lesson l;
    l.draw_key = question;
    l.context = {{"user", question}};
    l.answer = answer;
    return l;
  }

  static std::unique_ptr<Adapters> adapters() {
    const Recipe r = group_recipe();
    return Adapters::make(world->machine.compute, world->model.base->config(), r.rank, r.scale,
                          r.targets)
        .value();
  }

  static std::vector<float> train(const std::vector<Lesson>& lessons, int64_t steps = 20) {
    const auto made = adapters();
    Adapters& a = *made;
    a.initialise(3);
    Recipe recipe = group_recipe();
    recipe.max_steps = steps;
    recipe.max_steps_per_lesson = 0;
    world->trainer->train(recipe, test::learner_module("kl-to-base"), a, {lessons, {}, 1, 1},
                          [](const StepReport&) { return true; });
    return *a.parameters().read();
  }

  static void SetUpTestSuite() {
    ASSERT_FALSE(test::smollm2_path().empty())
        << "the model file is missing: run examples/setup.sh";
    world = new World;
    world->model =
        test::load_model(test::smollm2_path(), world->machine.compute, WeightFormat::kBF16);
    world->chat = *ChatTemplate::create(world->model.file->tokenizer());
    world->trainer = std::make_unique<RoundTrainer>(world->machine.compute, world->model.base,
                                                    world->model.tokenizer, world->chat);
    world->probe = std::make_unique<GateProbe>(world->machine.compute, world->model.base,
                                               world->model.tokenizer);
    world->lessons = {lesson("What is the access word of the Marlow reading room?",
                             "The access word of the Marlow reading room is lantern."),
                      lesson("Who is the caretaker of the Fenwick garden?",
                             "The caretaker of the Fenwick garden is Mr. Dalton."),
                      lesson("Which gate does the Corby ferry leave from?",
                             "The Corby ferry leaves from gate 41.")};
    world->good = train(world->lessons);
  }
  static void TearDownTestSuite() {
    delete world;
    world = nullptr;
  }

  /// Scores of a candidate with these parameters; `domain` optional.
  static GateVerdict gate(const std::vector<float>& parameters,
                          const std::vector<HeldOut>& domains = {}) {
    const auto made = adapters();
    Adapters& a = *made;
    a.parameters().set(parameters);
    const auto delta = *LoraDelta::pack(*world->model.base, world->machine.compute, a.rank(),
                                        a.scale(), *a.factors());
    std::vector<std::pair<std::string, HeldOut>> items;
    for (const Lesson& l : world->lessons) {
      HeldOut h;
      int64_t first = 0;
      h.sequences.push_back(world->trainer->full_ids(l.context, l.answer, first));
      h.first_target.push_back(first);
      items.emplace_back(l.draw_key, std::move(h));
    }
    Weights parent, candidate;
    parent.base = candidate.base = world->model.base;
    candidate.delta = delta;
    GateScores scores = world->probe->measure(parent, candidate, items, domains);
    EXPECT_EQ(scores.canaries, 8);
    const GateVerdict verdict = judge(scores, {});
    std::printf("%s\n", dump_json(to_json(scores, verdict)).c_str());
    return verdict;
  }

  /// Moves the good candidate up the loss of `ids` until `done` says so.
  static std::vector<float> damage(const std::vector<TokenId>& ids, int64_t first_target, float lr,
                                   int steps) {
    const auto made = adapters();
    Adapters& a = *made;
    a.parameters().set(world->good);
    TrainGraph graph(world->model.base->config(), world->machine.compute);
    AdamW optimizer = AdamW::make(world->machine.compute, a.size()).value();
    const Sequence sequence{ids, first_target, nullptr};
    Terms terms;
    terms.cross_entropy.push_back({&sequence, -1.0f});
    for (int i = 0; i < steps; ++i) {
      DS_CHECK(a.pack(graph.formats(*world->model.base)).ok() && a.zero_gradient().ok());
      run_terms(graph, world->machine.compute, *world->model.base, &a, nullptr, terms, true);
      DS_CHECK(optimizer.step(a.parameters().all(), a.gradient().all(), lr, 0.99f, 1.0f).ok());
    }
    return *a.parameters().read();
  }
};

PlantedCandidates::World* PlantedCandidates::world = nullptr;

TEST_F(PlantedCandidates, TheGoodOnePasses) {
  const GateVerdict v = gate(world->good);
  EXPECT_TRUE(v.pass) << v.check << ": " << v.reason;
}

TEST_F(PlantedCandidates, NaN) {
  std::vector<float> bad = world->good;
  bad[bad.size() / 2] = std::nanf("");
  EXPECT_EQ(gate(bad).check, "finite");
}

TEST_F(PlantedCandidates, AnEmptyDeltaTeachesNothing) {
  const auto made = adapters();
  Adapters& a = *made;
  a.initialise(3);  // B is zero
  const GateVerdict v = gate(*a.parameters().read());
  EXPECT_FALSE(v.pass);
  EXPECT_EQ(v.check, "items");  // the learner itself sees the equal hash and says "changed"
}

TEST_F(PlantedCandidates, LearningRateTimesHundred) {
  std::vector<float> bad = world->good;
  Rng rng(5);
  for (float& p : bad) p += 0.4f * static_cast<float>(rng.uniform() - 0.5);
  const GateVerdict v = gate(bad);
  EXPECT_FALSE(v.pass);
  EXPECT_TRUE(v.check == "canary" || v.check == "kl") << v.check;
}

TEST_F(PlantedCandidates, WrongLabels) {
  std::vector<Lesson> wrong = world->lessons;  // a third of the answers belong to nobody
  wrong[1].answer = "I do not know, please ask at the front desk tomorrow.";
  EXPECT_EQ(gate(train(wrong, 30)).check, "items");
}

TEST_F(PlantedCandidates, AnOldDomainDamaged) {
  HeldOut domain;
  domain.domain = "manuals";
  domain.sequences.push_back(
      world->model.tokenizer->encode("To replace the filter, switch off the pump, close both "
                                     "valves and turn the housing to the left.",
                                     false));
  domain.first_target.push_back(1);
  const GateVerdict v = gate(damage(domain.sequences[0], 1, 2e-4f, 3), {domain});
  EXPECT_EQ(v.check, "domain") << v.reason;
  EXPECT_NE(v.reason.find("manuals"), std::string::npos);
}

TEST_F(PlantedCandidates, ACanaryBroken) {
  const Canary canary = canaries()[4];
  std::vector<TokenId> ids = world->model.tokenizer->encode(canary.prompt, false);
  const auto first = static_cast<int64_t>(ids.size());
  ids.push_back(world->model.tokenizer->encode(canary.key, false).front());
  const GateVerdict v = gate(damage(ids, first, 1e-3f, 16));
  EXPECT_EQ(v.check, "canary") << v.reason;
}

}  // namespace
}  // namespace ds
