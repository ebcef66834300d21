// SPDX-License-Identifier: Apache-2.0
// The learner on a tiny random model with a chat template: rounds are a function of the log when
// they shall be, undo leaves no trace, and every item keeps a fate that tells what became of it.
#include "learn/learner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "learn/lessons.h"
#include "learner_house.h"

namespace ds {
namespace {

using test::curriculum;
using test::exact;
using test::House;
using test::lesson;
using test::Settings;
using test::taught;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;

// ---- the log decides ----

TEST(Deterministic, SameRecordsAndSeedGiveTheSameWeights) {
  const std::vector<Json> records = curriculum();
  const auto first = taught(exact(2), records);
  EXPECT_EQ(first->versions->current_number(), 4) << first->last_round();
  EXPECT_NE(first->hash(), first->versions->manifest(1)->weight_hash);

  House second(exact(2));  // the same, arriving at other times
  for (const Json& r : records) {
    second.say(r);
    second.step();
  }
  second.learn_all();
  EXPECT_EQ(second.hash(), first->hash());
  EXPECT_NE(taught(exact(2, {{"learn.seed", "1"}}), records)->hash(), first->hash());
}

TEST(Deterministic, RestartsBetweenRecordsChangeNothing) {
  const std::vector<Json> records = curriculum();
  const std::string expected = taught(exact(2), records)->hash();
  House house(exact(2));
  for (const Json& r : records) {
    house.say(r);
    house.reopen();
  }
  house.learn_all();
  EXPECT_EQ(house.hash(), expected);
}

/// Slows the learner's thread down, so that what the test does meanwhile happens in time.
class Brake {
 public:
  void hold() {
    reached_.store(true);
    reached_.notify_all();
    std::unique_lock lock(mutex_);
    released_.wait_for(lock, std::chrono::milliseconds(300), [&] { return over_; });
  }
  void wait_until_reached() { reached_.wait(false); }
  void release() {
    {
      std::lock_guard lock(mutex_);
      over_ = true;
    }
    released_.notify_all();
  }

 private:
  std::atomic<bool> reached_ = false;
  std::mutex mutex_;
  std::condition_variable released_;
  bool over_ = false;
};

TEST(Deterministic, ARoundThatAStopInterruptsIsLearnedAtTheNextStart) {
  const std::vector<Json> records = curriculum();
  const std::string expected = taught(exact(2), records)->hash();
  for (const char* where : {"while it trains", "before its gate"}) {
    SCOPED_TRACE(where);
    const bool training = std::string(where) == "while it trains";
    House house(exact(2));
    house.say(records[0]);
    house.say(records[1]);
    house.learn_all();
    Brake brake;
    if (training) {
      house.on_step = [&](int64_t step) {
        if (step >= 3) brake.hold();
      };
    } else {
      house.tamper = [&](Adapters&) { brake.hold(); };
    }
    const std::string third = house.say(records[2]), fourth = house.say(records[3]);
    brake.wait_until_reached();
    house.close();
    house.on_step = nullptr, house.tamper = nullptr;
    brake.release();
    house.reopen();
    EXPECT_THAT(house.states(third), testing::Not(Contains("reverted")));
    for (size_t i = 4; i < records.size(); ++i) house.say(records[i]);
    house.learn_all();
    EXPECT_EQ(house.hash(), expected);
    EXPECT_EQ(house.states(fourth).back(), "served");
  }
}

// ---- undo leaves no trace ----

/// Teaches `records`, undoes those at `undone` one after another, and compares with a house that
/// never had them: weights, and the state of every other item.
void expect_no_trace(const Settings& settings, const std::vector<Json>& records,
                     const std::vector<size_t>& undone, bool restart = false) {
  std::vector<std::string> ids, other_ids;
  const auto house = taught(settings, records, &ids);
  for (const size_t i : undone) {
    if (restart) house->reopen();
    const Result<Json> answer = house->undo(ids[i]);
    ASSERT_TRUE(answer.ok()) << answer.status().message();
    EXPECT_EQ((*answer)["state"], "reverted");
  }
  if (restart) house->reopen();
  house->learn_all();
  std::vector<Json> without;
  std::vector<std::string> kept;
  for (size_t i = 0; i < records.size(); ++i) {
    if (std::find(undone.begin(), undone.end(), i) != undone.end()) {
      EXPECT_EQ(house->fate(ids[i]).state, "reverted");
    } else {
      without.push_back(records[i]);
      kept.push_back(ids[i]);
    }
  }
  const auto fresh = taught(settings, without, &other_ids);
  EXPECT_EQ(house->hash(), fresh->hash());
  EXPECT_EQ(house->versions->pinned(), 0);
  // What waited for its round and what waits again are told apart by the words, not by the wait.
  const auto settled = [](std::string state) { return state == "queued" ? "stored" : state; };
  for (size_t i = 0; i < kept.size(); ++i) {
    EXPECT_EQ(settled(house->fate(kept[i]).state), settled(fresh->fate(other_ids[i]).state))
        << "item " << i << " of the rest";
  }
  // And both learn the same from what comes next.
  const Json next = lesson("Who paints the fence?", "Tom paints it.");
  for (House* h : {house.get(), fresh.get()}) {
    h->say(next);
    h->learn_all();
  }
  EXPECT_EQ(house->hash(), fresh->hash());
}

TEST(DeterministicUndo, FirstMiddleLast) {
  const std::vector<Json> records = curriculum();
  for (const int min_items : {1, 2, 3}) {
    for (const size_t undone : {size_t{0}, size_t{3}, records.size() - 1}) {
      SCOPED_TRACE("min_items " + std::to_string(min_items) + ", item " + std::to_string(undone));
      expect_no_trace(exact(min_items), records, {undone});
    }
  }
}

TEST(DeterministicUndo, ATwinIsDrawnAsIfItHadBeenAlone) {
  expect_no_trace(exact(2), curriculum(), {1});  // item 4 is the same record
}

TEST(DeterministicUndo, OneAfterAnotherAcrossRestarts) {
  expect_no_trace(exact(2), curriculum(), {4, 0, 5}, true);
}

TEST(DeterministicUndo, StartsFromAnOlderVersionWhereTheParentIsRemoved) {
  // Of the seven rounds only the versions of the last two are left.
  expect_no_trace(exact(1, {{"versions.keep", "2"}}), curriculum(), {3, 1}, true);
}

TEST(DeterministicUndo, TheOnlyItem) {
  expect_no_trace(exact(1), {curriculum()[0]}, {0});
  expect_no_trace(exact(2), {curriculum()[0], curriculum()[1]}, {1});
}

TEST(DeterministicUndo, WhatCannotBeTrainedTakesNoPlaceInARound) {
  std::vector<Json> records = curriculum();
  records.insert(records.begin() + 1, Json{{"kind", "demonstration"},
                                           {"messages",
                                            {{{"role", "system"}, {"content", "Be brief."}},
                                             {{"role", "assistant"}, {"content", "I am."}}}}});
  expect_no_trace(exact(2), records, {0});
}

TEST(DeterministicUndo, HeldRoundsAreJudgedAnew) {
  const std::vector<Json> records = curriculum();
  // A limit between the drifts of the rounds: some pass, some are held, by what they teach.
  std::vector<double> kl;
  const auto free = taught(exact(1), records);
  for (const auto& [number, round] : free->store->rounds(0))
    kl.push_back(round["gate"]["kl"].get<double>());
  std::vector<double> sorted = kl;
  std::sort(sorted.begin(), sorted.end());
  const std::string limit = std::to_string(sorted[sorted.size() / 2]);
  const Settings settings = exact(1, {{"gate.max_kl", limit}});
  std::vector<std::string> ids;
  const auto house = taught(settings, records, &ids);
  std::vector<size_t> held;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (house->fate(ids[i]).state == "held") held.push_back(i);
  }
  std::printf("max_kl %s, %zu of %zu rounds held\n", limit.c_str(), held.size(), ids.size());
  ASSERT_GT(held.size(), 0u);
  ASSERT_LT(held.size(), ids.size());
  for (const size_t undone : {size_t{0}, held.front(), size_t{5}}) {
    SCOPED_TRACE("item " + std::to_string(undone));
    expect_no_trace(settings, records, {undone});
  }
}

TEST(DeterministicUndo, ARetractionInTheStreamFillsNoRoundAndWaitsForNone) {
  const std::vector<Json> records = curriculum();
  House house(exact(2));
  const std::string first = house.say(records[0]);
  house.say(records[1]);
  house.learn_all();
  house.say({{"kind", "retract"}, {"target", first}});
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (house.fate(first).state != "reverted") {  // without a step() from outside
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(house.hash(), house.versions->manifest(1)->weight_hash);
  house.say(records[2]);
  house.learn_all();
  EXPECT_EQ(house.hash(), taught(exact(2), {records[1], records[2]})->hash());
}

// ---- fates ----

TEST(Fates, InOrderWithVersionAndStep) {
  House house;
  const std::string id = house.say(curriculum()[0]);
  house.learn_all();
  EXPECT_THAT(house.states(id), ElementsAre("stored", "queued", "trained", "served"));
  EXPECT_EQ(house.fate(id).version, "v2");
  EXPECT_GT(house.fate(id).step, 0);
  const Json round = house.last_round();
  EXPECT_EQ(round["outcome"], "published");
  EXPECT_EQ(round["items"], Json({id}));
  EXPECT_EQ(round["weight_hash"], house.hash());
}

TEST(Fates, AHeldCandidateTellsWhy) {
  House house;
  house.tamper = [](Adapters& a) { a.parameters().data()[7] = std::nanf(""); };
  const std::string id = house.say(curriculum()[0]);
  house.learn_all();
  EXPECT_THAT(house.states(id), ElementsAre("stored", "queued", "held"));
  EXPECT_THAT(house.fate(id).reason, HasSubstr("NaN"));
  EXPECT_EQ(house.last_round()["outcome"], "held");
  EXPECT_EQ(house.last_round()["reason"], house.fate(id).reason);
  EXPECT_EQ(house.versions->current_number(), 1);
  house.reopen();  // not tried again by itself
  EXPECT_EQ(house.step()["outcome"], "empty");
  EXPECT_THAT(house.fate(id).reason, HasSubstr("NaN"));
}

TEST(Fates, ARollbackDuringTrainingDropsTheCandidateAndPinsUntilUnpinned) {
  House house;
  const std::string first = house.say(curriculum()[0]);
  house.learn_all();
  ASSERT_EQ(house.versions->current_number(), 2);
  house.on_step = [&](int64_t step) {
    if (step != 2) return;
    EXPECT_TRUE(house.versions->rollback(1, "a test").ok());
  };
  const std::string second = house.say(curriculum()[1]);
  house.learn_all();
  house.on_step = nullptr;
  EXPECT_THAT(house.states(second), ElementsAre("stored", "queued", "reverted"));
  EXPECT_THAT(house.fate(second).reason, HasSubstr("left the lineage"));
  EXPECT_EQ(house.last_round()["outcome"], "dropped");
  EXPECT_EQ(house.fate(first).state, "reverted");
  EXPECT_EQ(house.versions->current_number(), 1);

  const std::string third = house.say(curriculum()[5]);  // pinned: it waits
  const Json refused = house.step();
  EXPECT_EQ(refused["outcome"], "empty");
  EXPECT_THAT(refused["reason"].get<std::string>(), HasSubstr("v1 is pinned"));
  EXPECT_THAT(house.states(third), ElementsAre("stored"));
  ASSERT_TRUE(house.versions->unpin().ok());
  house.learn_all();
  EXPECT_EQ(house.fate(third).state, "served");
  EXPECT_EQ(house.fate(second).state, "reverted");  // not requeued by itself
  EXPECT_EQ(house.versions->manifest(house.versions->current_number())->parent, 1);
}

TEST(Fates, ARollbackBetweenTrainingAndGateDropsToo) {
  House house;
  house.say(curriculum()[0]);
  house.learn_all();
  house.tamper = [&](Adapters&) { EXPECT_TRUE(house.versions->rollback(1, "a test").ok()); };
  const std::string second = house.say(curriculum()[1]);
  house.learn_all();
  EXPECT_EQ(house.fate(second).state, "reverted");
  EXPECT_EQ(house.versions->current_number(), 1);
}

TEST(Fates, WhatIsNoLessonIsQuarantined) {
  House house;
  const std::string id = house.say({{"kind", "demonstration"},
                                    {"messages",
                                     {{{"role", "system"}, {"content", "Be brief."}},
                                      {{"role", "assistant"}, {"content", "I am."}}}}});
  house.learn_all();
  EXPECT_EQ(house.fate(id).state, "quarantined");
  EXPECT_THAT(house.fate(id).reason, HasSubstr("not the user's"));
}

TEST(Fates, AnUndoThatAPinForbidsChangesNothing) {
  House house;
  const std::string first = house.say(curriculum()[0]);
  house.learn_all();
  const std::string second = house.say(curriculum()[1]);
  house.learn_all();
  ASSERT_EQ(house.versions->current_number(), 3);
  ASSERT_TRUE(house.versions->pin(3).ok());
  const Result<Json> answer = house.undo(first);
  ASSERT_FALSE(answer.ok());
  EXPECT_THAT(answer.status().message(), HasSubstr("v3 is pinned"));
  EXPECT_EQ(house.fate(first).state, "served");
  EXPECT_EQ(house.fate(second).state, "served");
  EXPECT_EQ(house.versions->current_number(), 3);
}

TEST(Fates, AnUndoThatADoubtfulRebuildPreventsChangesNothing) {
  House house;
  const std::string first = house.say(curriculum()[0]);
  house.learn_all();
  const std::string second = house.say(curriculum()[1]);
  house.learn_all();
  house.tamper = [&](Adapters&) { EXPECT_TRUE(house.versions->pin(3).ok()); };
  const Result<Json> answer = house.undo(first);
  ASSERT_FALSE(answer.ok());
  EXPECT_EQ(house.fate(first).state, "served");
  EXPECT_EQ(house.fate(second).state, "served");
}

TEST(Fates, ACorrectionOfACorrectionSupersedesItInTheSameRound) {
  House house(Settings{{"learn.enabled", "false"}});  // rounds open by step() alone
  const auto correct = [&](const std::string& answer) {
    return house.say({{"kind", "correction"},
                      {"messages", {{{"role", "user"}, {"content", "When does the pump run?"}}}},
                      {"correction", answer}});
  };
  const std::string first = correct("At eight."), second = correct("At nine.");
  EXPECT_EQ(house.step()["outcome"], "published");
  EXPECT_EQ(house.fate(first).state, "quarantined");
  EXPECT_EQ(house.fate(first).reason, "superseded by " + second);
  EXPECT_EQ(house.fate(second).state, "served");
}

TEST(Undo, TrainsAgainWhatRemovedVersionsHadLearned) {
  House house(Settings{{"versions.keep", "2"}});
  std::vector<std::string> ids;
  for (const size_t i : {0, 1, 2, 3, 5}) {
    ids.push_back(house.say(curriculum()[i]));
    house.learn_all();
  }
  ASSERT_EQ(house.versions->ancestors(6), (std::vector<int64_t>{6, 5, 4, 3, 2, 1}));
  for (const int64_t removed : {2, 3, 4}) ASSERT_FALSE(house.versions->manifest(removed).ok());
  const Result<Json> newest = house.undo(ids[4]);  // its parent is there
  ASSERT_TRUE(newest.ok()) << newest.status().message();
  EXPECT_EQ((*newest)["version"], "v5");

  const Result<Json> answer = house.undo(ids[1]);  // between v1 and v5 nothing is
  ASSERT_TRUE(answer.ok()) << answer.status().message();
  const Result<VersionManifest> made = house.versions->manifest(house.versions->current_number());
  ASSERT_TRUE(made.ok());
  EXPECT_EQ(made->parent, 1);
  EXPECT_THAT(made->items, ElementsAre(ids[0], ids[2], ids[3]));
  for (const size_t kept : {0, 2, 3}) EXPECT_EQ(house.fate(ids[kept]).state, "served") << kept;
  for (const size_t undone : {1, 4}) EXPECT_EQ(house.fate(ids[undone]).state, "reverted") << undone;
}

TEST(Undo, OfAnUnknownItemIsNotFound) {
  House house;
  EXPECT_EQ(house.undo("fb_0").status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace ds
