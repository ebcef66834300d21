// SPDX-License-Identifier: Apache-2.0
// The pointer to the serving version: durable before visible, moved with the fates of what was
// learned, never taken back by a late candidate.
#include "engine/versions.h"

#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <utility>

#include "storage/hash.h"
#include "tests/storage/power_cut_files.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

class StandingClock final : public Clock {
 public:
  int64_t unix_ms() const override { return 1'700'000'000'000; }
  int64_t monotonic_ns() const override { return 0; }
};

const std::string kBase = to_hex(sha256("a base"));

class VersionsTest : public testing::Test {
 protected:
  void SetUp() override {
    files_ = std::make_unique<VersionStore>(posix_file_system(), folder_.path());
    open();
  }

  Status try_open(const std::string& base) {
    versions_.reset();
    store_.reset();
    ReplayStore::Options options;
    options.directory = folder_ / "replay";
    options.fs = &posix_file_system();
    options.clock = &clock_;
    auto store = ReplayStore::open(options);
    if (!store.ok()) return store.status();
    store_ = std::move(*store);
    loads_ = 0;
    auto versions = Versions::open(
        "default", base, *store_, *files_, clock_,
        [this](const auto& m) {
          ++loads_;
          if (while_loading_) std::exchange(while_loading_, nullptr)();
          const auto delta = files_->read_delta("default", m.number);
          if (!delta.ok()) return Result<std::shared_ptr<const Weights>>(delta.status());
          return Result<std::shared_ptr<const Weights>>(make_weights(m, nullptr, nullptr));
        },
        keep_);
    if (!versions.ok()) return versions.status();
    versions_ = std::move(*versions);
    versions_->on_change([this](const Json& event) {
      events_.push_back(event.at("event").get<std::string>() + " " +
                        event.at("version").get<std::string>() + " from " +
                        event.at("from").get<std::string>());
    });
    return {};
  }
  void open() {
    const Status status = try_open(kBase);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  /// Begins anew, with the versions' files there.
  void use(FileSystem& disk) {
    versions_.reset(), store_.reset();
    std::filesystem::remove_all(folder_ / "replay");
    seq_ = 0;
    ASSERT_TRUE(disk.make_directories("/data").ok());
    ASSERT_TRUE(disk.sync_directory("/").ok());
    files_ = std::make_unique<VersionStore>(disk, "/data");
    open();
  }

  /// Stores a feedback item; returns its id.
  std::string feedback(const std::string& text) {
    const auto ack =
        store_->submit_and_wait({"client", 1, ++seq_, {{"kind", "text"}, {"text", text}}, {}});
    EXPECT_TRUE(ack.ok()) << ack.status().message();
    return ack->id;
  }
  std::string fate(const std::string& id) {
    const auto item = store_->get(id);
    EXPECT_TRUE(item.ok());
    return item->fate.back().state;
  }

  VersionManifest manifest(int64_t number, int64_t parent, std::vector<std::string> items) {
    VersionManifest m;
    m.model = "default";
    m.number = number;
    m.parent = parent;
    m.base_sha256 = kBase;
    m.method = "lora";
    m.items = std::move(items);
    m.weight_hash = weight_hash(kBase, delta_of(number));
    return m;
  }
  std::vector<StoredTensor> delta_of(int64_t number) {
    return {
        {"base_model.model.lora_A.weight", "F32", {1}, std::string(4, static_cast<char>(number))}};
  }
  /// What the learner does at the end of a round.
  Status publish(int64_t number, int64_t parent, std::vector<std::string> items,
                 bool serve = true) {
    const VersionManifest m = manifest(number, parent, items);
    Commit commit;
    for (const std::string& id : items) {
      const auto item = store_->get(id);
      commit.fates.push_back(
          {item->offset, {serve ? "served" : "held", 0, version_name(number), 0, ""}});
    }
    return versions_->publish(m, delta_of(number), {}, commit, make_weights(m, nullptr, nullptr),
                              serve);
  }
  void expect_published(int64_t number, int64_t parent, std::vector<std::string> items) {
    const Status status = publish(number, parent, std::move(items));
    ASSERT_TRUE(status.ok()) << status.message();
  }

  /// Versions up to `last`, each the child of the one before, each with an item of its own.
  void publish_up_to(int64_t last) {
    for (int64_t n = versions_->next_number(); n <= last; ++n) {
      items_[n] = feedback("item " + std::to_string(n));
      expect_published(n, n - 1, {items_[n]});
    }
  }
  std::vector<int64_t> listed() {
    std::vector<int64_t> out;
    for (const Json& item : versions_->list()) out.push_back(item["number"].get<int64_t>());
    return out;
  }
  std::vector<int64_t> on_disk() {
    std::vector<int64_t> out;
    const auto all = files_->list("default");
    EXPECT_TRUE(all.ok()) << all.status().message();
    for (const VersionManifest& m : *all) out.push_back(m.number);
    return out;
  }
  void expect_removed(int64_t number) {
    const std::string name = version_name(number);
    for (const Status& status :
         {versions_->find(name).status(), versions_->manifest(number).status(),
          versions_->show(number).status(), versions_->rollback(number, ""),
          versions_->promote(number), versions_->pin(number)}) {
      EXPECT_EQ(status.code(), Code::kNotFound);
      EXPECT_NE(status.message().find("no longer has version " + name), std::string::npos)
          << status.message();
      EXPECT_NE(status.message().find("versions.keep"), std::string::npos) << status.message();
    }
  }

  void erase_pointer() {
    Commit commit;
    commit.meta.emplace_back("versions/default", Json());
    ASSERT_TRUE(store_->commit(commit).ok());
  }

  ScratchFolder folder_;
  StandingClock clock_;
  std::unique_ptr<VersionStore> files_;
  std::unique_ptr<ReplayStore> store_;
  std::unique_ptr<Versions> versions_;
  std::vector<std::string> events_;
  std::map<int64_t, std::string> items_;  ///< of publish_up_to()
  std::function<void()> while_loading_;   ///< during the next load, once
  int64_t keep_ = Versions::kKeepAll;
  int loads_ = 0;
  int64_t seq_ = 0;
};

TEST_F(VersionsTest, FirstOpenWritesTheBase) {
  EXPECT_EQ(versions_->current_number(), 1);
  EXPECT_EQ(versions_->next_number(), 2);
  EXPECT_EQ(versions_->current()->version, "v1");
  EXPECT_EQ(versions_->current()->fingerprint, "ds-v1-" + weight_hash(kBase, {}).substr(0, 8));
  EXPECT_TRUE(files_->manifest("default", 1).ok());
  EXPECT_TRUE(store_->meta("versions/default").has_value());
}

TEST_F(VersionsTest, PublishedVersionsSurviveARestart) {
  const std::string item = feedback("a");
  expect_published(2, 1, {item});
  EXPECT_EQ(fate(item), "served");
  const auto before = versions_->current();
  open();
  EXPECT_EQ(versions_->current_number(), 2);
  EXPECT_EQ(versions_->next_number(), 3);
  EXPECT_EQ(versions_->current()->fingerprint, before->fingerprint);
  EXPECT_EQ(versions_->current()->execution_id, before->execution_id);
  EXPECT_EQ(versions_->ancestors(2), (std::vector<int64_t>{2, 1}));
}

TEST_F(VersionsTest, ExecutionIdsDiffer) {
  const VersionManifest a = manifest(2, 1, {});
  VersionManifest b = a;
  b.number = 3;  // the same weights under another number
  EXPECT_NE(make_weights(a, nullptr, nullptr)->execution_id,
            make_weights(b, nullptr, nullptr)->execution_id);
  b = a;
  b.weight_hash[0] ^= 1;
  EXPECT_NE(make_weights(a, nullptr, nullptr)->execution_id,
            make_weights(b, nullptr, nullptr)->execution_id);
}

TEST_F(VersionsTest, FilesWithoutACommitGoAtOpen) {
  // A crash between the two: the files of v2 are there, the pointer never heard of them.
  ASSERT_TRUE(files_->write(manifest(2, 1, {}), delta_of(2), {}).ok());
  open();
  EXPECT_EQ(versions_->current_number(), 1);
  EXPECT_FALSE(files_->manifest("default", 2).ok());
  expect_published(2, 1, {});
}

TEST_F(VersionsTest, ACrashAtTheVeryFirstStartIsRepaired) {
  versions_.reset();
  erase_pointer();
  open();
  EXPECT_EQ(versions_->current_number(), 1);
}

TEST_F(VersionsTest, AFolderOfAnotherStoreIsRefused) {
  expect_published(2, 1, {});
  erase_pointer();
  EXPECT_EQ(try_open(kBase).code(), Code::kCorrupt);
  EXPECT_TRUE(files_->manifest("default", 2).ok());  // and not emptied
}

TEST_F(VersionsTest, AnotherBaseIsRefusedNamingBoth) {
  const std::string other = to_hex(sha256("another"));
  const Status status = try_open(other);
  EXPECT_EQ(status.code(), Code::kConflict);
  EXPECT_NE(status.message().find(other), std::string::npos);
  EXPECT_NE(status.message().find(kBase), std::string::npos);
}

TEST_F(VersionsTest, RollbackRevertsWhatIsLeftBehindAndPins) {
  const std::string a = feedback("a"), b = feedback("b"), c = feedback("c");
  expect_published(2, 1, {a});
  expect_published(3, 2, {b, c});
  const uint64_t epoch = versions_->lineage_epoch();
  ASSERT_TRUE(versions_->rollback(2, "complaints").ok());
  EXPECT_EQ(versions_->current()->version, "v2");
  EXPECT_EQ(versions_->pinned(), 2);
  EXPECT_GT(versions_->lineage_epoch(), epoch);
  EXPECT_EQ(fate(a), "served");
  EXPECT_EQ(fate(b), "reverted");
  EXPECT_EQ(fate(c), "reverted");
  EXPECT_EQ(store_->get(b)->fate.back().reason, "complaints");
  open();
  EXPECT_EQ(versions_->current_number(), 2);
  EXPECT_EQ(versions_->pinned(), 2);

  ASSERT_TRUE(versions_->promote(3).ok());
  EXPECT_EQ(versions_->current_number(), 3);
  EXPECT_EQ(versions_->pinned(), 0);
  EXPECT_EQ(fate(b), "served");
  EXPECT_EQ(events_, (std::vector<std::string>{"published v2 from v1", "published v3 from v2",
                                               "rolled_back v2 from v3", "promoted v3 from v2"}));
}

TEST_F(VersionsTest, ItemsOfBothLineagesStayServed) {
  const std::string shared = feedback("s"), only_left = feedback("l");
  expect_published(2, 1, {shared, only_left});
  ASSERT_TRUE(versions_->rollback(1, "undo").ok());
  ASSERT_TRUE(versions_->unpin().ok());
  expect_published(3, 1, {shared});  // learned again beside v2
  EXPECT_EQ(fate(only_left), "reverted");
  ASSERT_TRUE(versions_->rollback(2, "sideways").ok());
  EXPECT_EQ(fate(shared), "served");
  EXPECT_EQ(fate(only_left), "served");
  EXPECT_EQ(versions_->ancestors(3), (std::vector<int64_t>{3, 1}));
}

TEST_F(VersionsTest, RollbackToTheCurrentOnePins) {
  ASSERT_TRUE(versions_->rollback(1, "stay").ok());
  EXPECT_EQ(versions_->pinned(), 1);
  ASSERT_TRUE(versions_->rollback(1, "stay").ok());
  EXPECT_EQ(versions_->rollback(9, "").code(), Code::kNotFound);
}

TEST_F(VersionsTest, ALateCandidateCannotUndoARollback) {
  expect_published(2, 1, {});
  ASSERT_TRUE(versions_->rollback(1, "bad").ok());
  EXPECT_EQ(publish(3, 2, {}).code(), Code::kConflict);  // its parent left
  EXPECT_EQ(publish(3, 1, {}).code(), Code::kConflict);  // pinned
  EXPECT_EQ(versions_->current_number(), 1);
  EXPECT_FALSE(files_->manifest("default", 3).ok());
  ASSERT_TRUE(publish(3, 1, {}, false).ok());  // kept, not served
  EXPECT_EQ(versions_->current_number(), 1);
  ASSERT_TRUE(versions_->unpin().ok());
  EXPECT_EQ(publish(3, 1, {}).code(), Code::kConflict);  // numbers are not reused
  expect_published(4, 1, {});
}

TEST_F(VersionsTest, HeldVersionsServeOncePromoted) {
  const std::string item = feedback("a");
  ASSERT_TRUE(publish(2, 1, {item}, false).ok());
  open();
  EXPECT_EQ((*versions_->show(2))["state"], "held");
  EXPECT_EQ(versions_->current_number(), 1);
  ASSERT_TRUE(versions_->promote(2).ok());
  EXPECT_EQ((*versions_->show(2))["state"], "current");
  EXPECT_EQ(fate(item), "served");
  ASSERT_TRUE(versions_->rollback(1, "").ok());
  EXPECT_EQ((*versions_->show(2))["state"], "retired");
}

TEST_F(VersionsTest, PinsOnlyWhatServes) {
  expect_published(2, 1, {});
  EXPECT_EQ(versions_->pin(1).code(), Code::kConflict);
  EXPECT_EQ(versions_->pin(7).code(), Code::kNotFound);
  ASSERT_TRUE(versions_->pin(2).ok());
  EXPECT_EQ(publish(3, 2, {}).code(), Code::kConflict);
  ASSERT_TRUE(versions_->unpin().ok());
  expect_published(3, 2, {});
}

TEST_F(VersionsTest, NamesFindVersions) {
  expect_published(2, 1, {});
  for (const char* ref : {"", "default", "v2", "default@v2"}) {
    const auto found = versions_->find(ref);
    ASSERT_TRUE(found.ok()) << ref;
    EXPECT_EQ(*found, versions_->current()) << ref;
  }
  const auto first = versions_->find("v1");
  ASSERT_TRUE(first.ok());
  const int loads = loads_;
  EXPECT_EQ(*versions_->find("v1"), *first);  // alive: not loaded twice
  EXPECT_EQ(loads_, loads);
  for (const char* ref :
       {"v3", "v0", "v", "v2x", "other", "other@v1", "@v2", "v-1", "v99999999999999999999"}) {
    EXPECT_EQ(versions_->find(ref).status().code(), Code::kNotFound) << ref;
  }
}

TEST_F(VersionsTest, ListAndShow) {
  const std::string item = feedback("a");
  expect_published(2, 1, {item});
  const Json items = versions_->list();
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(items[0]["parent"], Json());
  EXPECT_EQ(items[1]["parent"], "v1");
  EXPECT_EQ(items[1]["state"], "current");
  EXPECT_EQ(items[1]["items_count"], 1);
  EXPECT_EQ((*versions_->show(2))["items"], Json::array({item}));
}

// ---- versions.keep ----

using Numbers = std::vector<int64_t>;

TEST_F(VersionsTest, TheOldestGoAndTheirLineageStaysKnown) {
  keep_ = 2;
  open();
  publish_up_to(5);
  EXPECT_EQ(events_, (std::vector<std::string>{"published v2 from v1", "published v3 from v2",
                                               "published v4 from v3", "pruned v2 from v4",
                                               "published v5 from v4", "pruned v3 from v5"}));
  for (const bool restarted : {false, true}) {
    SCOPED_TRACE(restarted ? "restarted" : "running");
    if (restarted) open();
    EXPECT_EQ(listed(), (Numbers{1, 4, 5}));
    EXPECT_EQ(on_disk(), (Numbers{1, 4, 5}));
    expect_removed(2);
    expect_removed(3);
    EXPECT_NE(versions_->find("v6").status().message().find("the newest is v5"), std::string::npos);
    EXPECT_EQ(versions_->ancestors(5), (Numbers{5, 4, 3, 2, 1}));
    for (const VersionManifest& m : versions_->lineage(5)) {
      const bool learned = m.number > 1;
      EXPECT_EQ(m.items,
                learned ? std::vector<std::string>{items_[m.number]} : std::vector<std::string>());
    }
  }
  // What removed versions have taught comes and goes with the lineage.
  ASSERT_TRUE(versions_->rollback(1, "all of it").ok());
  for (int64_t n = 2; n <= 5; ++n) EXPECT_EQ(fate(items_[n]), "reverted") << n;
  ASSERT_TRUE(versions_->promote(5).ok());
  for (int64_t n = 2; n <= 5; ++n) EXPECT_EQ(fate(items_[n]), "served") << n;
  publish_up_to(6);
  EXPECT_EQ(listed(), (Numbers{1, 5, 6}));
}

TEST_F(VersionsTest, WhatServesItsParentAndThePinStay) {
  publish_up_to(4);
  keep_ = 2;
  open();
  EXPECT_EQ(listed(), (Numbers{1, 2, 3, 4})) << "only a publication removes";
  ASSERT_TRUE(versions_->rollback(3, "back").ok());
  for (int64_t n = 5; n <= 7; ++n) ASSERT_TRUE(publish(n, 3, {}, false).ok());
  EXPECT_EQ(listed(), (Numbers{1, 2, 3, 6, 7}));
  EXPECT_EQ(versions_->pinned(), 3);
  ASSERT_TRUE(versions_->unpin().ok());
  expect_published(8, 3, {});
  EXPECT_EQ(listed(), (Numbers{1, 3, 7, 8})) << "the way back stays: v8 came from v3";
  ASSERT_TRUE(versions_->rollback(3, "back").ok());
}

TEST_F(VersionsTest, OfASideBranchNothingStays) {
  keep_ = 2;
  open();
  publish_up_to(3);
  ASSERT_TRUE(versions_->rollback(1, "anew").ok());
  ASSERT_TRUE(versions_->unpin().ok());
  expect_published(4, 1, {});
  EXPECT_EQ(listed(), (Numbers{1, 3, 4}));
  EXPECT_TRUE(store_->meta("versions/default/v2").has_value()) << "v3 came from it";
  expect_published(5, 4, {});
  EXPECT_EQ(listed(), (Numbers{1, 4, 5}));
  for (const char* gone : {"versions/default/v2", "versions/default/v3"})
    EXPECT_FALSE(store_->meta(gone).has_value()) << gone;
  expect_removed(2);
  expect_removed(3);
}

TEST_F(VersionsTest, ARunningAnswerKeepsARemovedVersionInMemory) {
  keep_ = 2;
  open();
  publish_up_to(2);
  const auto running = versions_->current();
  publish_up_to(4);
  expect_removed(2);
  EXPECT_EQ(running->version, "v2");
  EXPECT_EQ(running.use_count(), 1) << "nobody else holds it, so its memory goes with the answer";
}

TEST_F(VersionsTest, WhoLosesTheRaceWithARemovalHearsWhy) {
  keep_ = 2;
  publish_up_to(3);
  open();
  while_loading_ = [this] { publish_up_to(4); };  // removes v2, whose files are about to be read
  const Status found = versions_->find("v2").status();
  EXPECT_EQ(found.code(), Code::kNotFound);
  EXPECT_NE(found.message().find("versions.keep"), std::string::npos) << found.message();
  const auto alive = versions_->find("v3");
  ASSERT_TRUE(alive.ok());
  while_loading_ = nullptr;
  open();
  while_loading_ = [this] { publish_up_to(5); };
  const Status moved = versions_->rollback(3, "too late");
  EXPECT_EQ(moved.code(), Code::kNotFound);
  EXPECT_NE(moved.message().find("versions.keep"), std::string::npos) << moved.message();
  EXPECT_EQ(versions_->current_number(), 5);
}

TEST_F(VersionsTest, NothingIsRemovedWhileABackupRuns) {
  keep_ = 2;
  open();
  {
    const auto first = versions_->keep_files();
    auto second = versions_->keep_files();
    publish_up_to(4);
    second.reset();
    publish_up_to(5);
    EXPECT_EQ(on_disk(), (Numbers{1, 2, 3, 4, 5}));
  }
  publish_up_to(6);
  EXPECT_EQ(on_disk(), (Numbers{1, 5, 6}));
}

TEST_F(VersionsTest, ACrashWhileVersionsGoLeavesARegistryThatOpens) {
  using Loss = PowerCutFiles::Loss;
  keep_ = 2;
  PowerCutFiles disk;
  use(disk);
  for (int64_t n = 2; n <= 3; ++n) expect_published(n, n - 1, {});
  Numbers line = {3, 2, 1};
  int cuts = 0;
  for (bool done = false; !done; ++cuts) {
    SCOPED_TRACE("before change " + std::to_string(cuts));
    const int64_t number = versions_->next_number();
    const int before = disk.changes();
    disk.stop_before(cuts);
    if (publish(number, line[0], {}).ok()) line.insert(line.begin(), number);
    done = disk.changes() - before < cuts;
    disk.cut_power(std::array{Loss::kAllUnsynced, Loss::kUnsyncedBytes, Loss::kAtRandom}[cuts % 3],
                   static_cast<uint64_t>(cuts));

    ASSERT_TRUE(files_->clean().ok());
    open();
    ASSERT_EQ(listed(), (Numbers{1, line[1], line[0]}));
    EXPECT_EQ(on_disk(), listed());
    for (const int64_t n : listed()) EXPECT_TRUE(versions_->find(version_name(n)).ok()) << n;
    EXPECT_EQ(versions_->ancestors(line[0]), line);
    if (line.size() > 3) expect_removed(2);
  }
  std::printf("%d cuts, %zu versions\n", cuts, line.size());
  EXPECT_GT(cuts, 20);
  EXPECT_GT(line.size(), 6u);
}

TEST_F(VersionsTest, FilesThatCannotBeRemovedAreToldAndTriedAgain) {
  keep_ = 2;
  PowerCutFiles disk;
  use(disk);
  publish_up_to(3);
  const int before = disk.changes();
  const VersionManifest m = manifest(4, 3, {});
  // How many changes it takes to write a version: the removal is what comes after them.
  {
    VersionStore elsewhere(disk, "/data");
    ASSERT_TRUE(elsewhere.write(m, delta_of(4), {}).ok());
  }
  const int writes = disk.changes() - before;
  ASSERT_TRUE(files_->remove("default", 4).ok());
  std::string reason;
  versions_->on_change([&](const Json& event) {
    if (event["event"] == "pruned") reason = event["reason"];
  });
  disk.stop_before(writes);
  expect_published(4, 3, {});
  EXPECT_NE(reason.find("the power is off"), std::string::npos) << reason;
  expect_removed(2);
  disk.stop_before(1000);
  EXPECT_EQ(on_disk(), (Numbers{1, 2, 3, 4}));
  expect_published(5, 4, {});
  EXPECT_EQ(on_disk(), (Numbers{1, 4, 5}));
}

}  // namespace
}  // namespace ds
