// SPDX-License-Identifier: Apache-2.0
// Why items wait, and for how long: a full disk, the rounds of task models beside them, an item
// that had taken their place.
#include <gmock/gmock.h>

#include <atomic>
#include <cmath>

#include "learner_house.h"

namespace ds {
namespace {

using test::curriculum;
using test::exact;
using test::House;
using test::Settings;
using test::taught;
using testing::ElementsAre;
using testing::HasSubstr;

// ---- a full disk ----

/// Follows the learner's thread: it asks for rounds of task models each time it looks around.
class Looks {
 public:
  explicit Looks(House& house) : house_(house) {
    house.close();
    house.tasks = [this](bool) -> int64_t {
      ++count_;
      count_.notify_all();
      return -1;
    };
    house.reopen();
  }
  ~Looks() { house_.close(); }

  /// Until it has looked again, with all that was there before in sight.
  void wait() {
    for (int look = 0; look < 2; ++look) {
      const int before = count_;
      house_.learner->notify();
      count_.wait(before);
    }
  }
  /// Until it has this many states; whatever leads there happens within a look or two.
  void wait_for(const std::string& id, size_t states) {
    for (int i = 0; i < 20 && house_.states(id).size() < states; ++i) wait();
    EXPECT_EQ(house_.states(id).size(), states) << house_.fate(id).reason;
  }

 private:
  House& house_;
  std::atomic<int> count_ = 0;
};

TEST(FullDisk, WhatItKeptFromServingIsTriedAgainAfterMaxWait) {
  HandClock clock;
  House house(Settings{{"learn.max_wait", "30s"}}, clock);
  Looks looks(house);
  house.disk.full = true;
  const std::string id = house.say(curriculum()[0]);
  looks.wait_for(id, 3);
  EXPECT_THAT(house.states(id), ElementsAre("stored", "queued", "queued"));
  EXPECT_THAT(house.fate(id).reason, HasSubstr("the disk is full"));
  EXPECT_EQ(house.last_round()["outcome"], "held");
  EXPECT_EQ(house.last_round()["reason"], house.fate(id).reason);

  clock.now_ms += 29'999;
  const std::string later = house.say(curriculum()[1]);  // does not shorten the wait
  looks.wait();
  EXPECT_EQ(house.store->last_round(), 1u);
  clock.now_ms += 1;
  looks.wait_for(later, 3);
  EXPECT_EQ(house.store->last_round(), 2u);
  EXPECT_EQ(house.states(id).size(), 3u) << "what is known is not told again";
  EXPECT_EQ(house.versions->current_number(), 1);

  house.disk.full = false;
  looks.wait();
  EXPECT_EQ(house.store->last_round(), 2u);
  clock.now_ms += 30'000;
  looks.wait_for(id, 5);
  EXPECT_THAT(house.states(id), ElementsAre("stored", "queued", "queued", "trained", "served"));
  EXPECT_EQ(house.fate(later).version, "v2");
}

TEST(FullDisk, AStepTriesAtOnceAndALaterStartToo) {
  HandClock clock;
  House house({}, clock);
  Looks looks(house);
  house.disk.full = true;
  const std::string id = house.say(curriculum()[0]);
  looks.wait_for(id, 3);
  EXPECT_EQ(house.step()["outcome"], "held");
  house.disk.full = false;
  EXPECT_EQ(house.step()["outcome"], "published");
  house.disk.full = true;
  const std::string second = house.say(curriculum()[1]);
  clock.now_ms += 60'000;
  looks.wait_for(second, 3);
  house.disk.full = false;
  house.reopen();
  looks.wait_for(second, 5);
  EXPECT_EQ(house.fate(second).state, "served");
}

TEST(FullDisk, DoesNotChangeWhatTheLogDecides) {
  const std::vector<Json> records = curriculum();
  House house(exact(2));
  house.say(records[0]), house.say(records[1]);
  house.learn_all();
  house.disk.full = true;
  house.say(records[2]), house.say(records[3]);
  while (house.step()["outcome"] != "held") {
  }
  house.disk.full = false;
  for (size_t i = 4; i < records.size(); ++i) house.say(records[i]);
  house.learn_all();
  EXPECT_EQ(house.hash(), taught(exact(2), records)->hash());
}

TEST(FullDisk, AnUndoThatCannotBeWrittenChangesNothing) {
  House house;
  const std::string first = house.teach(curriculum()[0]);
  const std::string second = house.teach(curriculum()[1]);
  house.disk.full = true;
  const Result<Json> answer = house.undo(first);
  ASSERT_FALSE(answer.ok());
  EXPECT_THAT(answer.status().message(), HasSubstr("the disk is full"));
  for (const std::string& id : {first, second}) EXPECT_EQ(house.states(id).back(), "served");
  house.disk.full = false;
  ASSERT_TRUE(house.undo(first).ok());
  EXPECT_EQ(house.fate(first).state, "reverted");
}

TEST(FullDisk, ARetractionThatItPreventedIsDoneLater) {
  House house;
  const std::string first = house.teach(curriculum()[0]);
  const std::string second = house.teach(curriculum()[1]);
  house.disk.full = true;
  const std::string retraction = house.say({{"kind", "retract"}, {"target", first}});
  EXPECT_THAT(house.step()["outcome"].get<std::string>(), HasSubstr("the disk is full"));
  EXPECT_EQ(house.fate(retraction).state, "queued");
  EXPECT_EQ(house.fate(first).state, "served");
  house.disk.full = false;
  house.learn_all();
  EXPECT_EQ(house.fate(retraction).state, "trained");
  EXPECT_EQ(house.fate(first).state, "reverted");
  EXPECT_EQ(house.fate(second).state, "served");
}

TEST(TaskRounds, AreAskedByTheLoopAndForcedByAStep) {
  House house(Settings{{"learn.enabled", "false"}});
  std::atomic<int> forced = 0, asked = 0;
  house.close();
  house.tasks = [&](bool at_once) -> int64_t {
    if (at_once) return ++forced % 3 == 0 ? -1 : 0;  // two rounds, then nothing waits
    ++asked;
    asked.notify_all();
    return -1;
  };
  house.reopen();
  EXPECT_EQ(house.step()["outcome"], "empty");
  EXPECT_EQ(forced, 3);
  house.step();  // the loop has come around in between
  EXPECT_EQ(asked, 0) << "learn.enabled is off";
  ASSERT_TRUE(house.config.set_live("learn.enabled", "true").ok());
  house.learner->notify();
  asked.wait(0);
  house.close();
}

// ---- what had given way ----

/// Rounds open by step() alone.
class Superseded : public testing::Test {
 protected:
  std::string correct(const std::string& answer) {
    return house.say({{"kind", "correction"},
                      {"messages", {{{"role", "user"}, {"content", "When does the pump run?"}}}},
                      {"correction", answer}});
  }
  std::string tell(const std::string& text) {
    return house.say({{"kind", "text"}, {"text", text}});
  }
  /// A round of two corrections, of which the newer one is learned.
  void learn_two() {
    first = correct("At eight."), second = correct("At nine.");
    ASSERT_EQ(house.step()["outcome"], "published");
    ASSERT_EQ(house.fate(first).reason, "superseded by " + second);
    ASSERT_EQ(house.fate(second).state, "served");
  }
  void undo(const std::string& id) {
    const Result<Json> answer = house.undo(id);
    ASSERT_TRUE(answer.ok()) << answer.status().message();
    EXPECT_EQ(house.fate(id).state, "reverted");
  }

  House house{Settings{{"learn.enabled", "false"}}};
  std::string first, second;
};

TEST_F(Superseded, ComesBackWhenTheNewerIsTakenBack) {
  learn_two();
  undo(second);
  EXPECT_EQ(house.fate(first).state, "queued");
  EXPECT_THAT(house.fate(first).reason, HasSubstr(second));
  EXPECT_EQ(house.step()["outcome"], "published");
  EXPECT_THAT(house.states(first),
              ElementsAre("stored", "quarantined", "queued", "trained", "served"));
}

TEST_F(Superseded, StaysWhereSomethingNewerStillStands) {
  learn_two();
  const std::string third = correct("At ten.");  // in a round of its own
  ASSERT_EQ(house.step()["outcome"], "published");
  undo(second);
  EXPECT_EQ(house.fate(first).state, "quarantined");
  EXPECT_EQ(house.fate(first).reason, "superseded by " + third);
  const std::string fourth = correct("At eleven.");  // waits still
  undo(third);
  EXPECT_EQ(house.fate(first).reason, "superseded by " + fourth);
  undo(fourth);
  EXPECT_EQ(house.fate(first).state, "queued");
  EXPECT_EQ(house.step()["outcome"], "published");
  EXPECT_EQ(house.fate(first).state, "served");
}

TEST_F(Superseded, ComesBackThoughTheNewerWasNeverLearned) {
  house.tamper = [](Adapters& a) { a.parameters().data()[7] = std::nanf(""); };
  first = correct("At eight."), second = correct("At nine.");
  ASSERT_EQ(house.step()["outcome"], "held");
  house.tamper = nullptr;
  undo(second);
  EXPECT_EQ(house.step()["outcome"], "published");
  EXPECT_EQ(house.fate(first).state, "served");
}

TEST_F(Superseded, ComesBackThoughARollbackCameFirst) {
  learn_two();
  ASSERT_TRUE(house.versions->rollback(1, "a test").ok());
  ASSERT_TRUE(house.versions->unpin().ok());
  EXPECT_EQ(house.fate(first).state, "quarantined") << "the newer one may come back";
  undo(second);
  EXPECT_EQ(house.fate(first).state, "queued");
}

TEST_F(Superseded, StaysWhenTheUndoFails) {
  learn_two();
  const std::string later = tell("The pump of the north well is opened at nine every day.");
  ASSERT_EQ(house.step()["outcome"], "published");
  house.disk.full = true;
  ASSERT_FALSE(house.undo(second).ok());
  EXPECT_EQ(house.fate(first).reason, "superseded by " + second);
}

TEST_F(Superseded, ANearTwinOfATextComesBackToo) {
  const std::string text =
      "The pump of the north well is opened at nine on every day but Sunday, and"
      " the pump of the south well at ten on every day but Monday.";
  first = tell(text), second = tell(text + " So it is.");
  ASSERT_EQ(house.step()["outcome"], "published");
  ASSERT_EQ(house.fate(second).reason, "says nearly the same as " + first);
  undo(first);
  EXPECT_EQ(house.fate(second).state, "queued");
}

}  // namespace
}  // namespace ds
