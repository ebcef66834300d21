// SPDX-License-Identifier: Apache-2.0
#include "storage/backup.h"

#include <gtest/gtest.h>

#include "storage/version_store.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

class BackupTest : public testing::Test {
 protected:
  void SetUp() override {
    store_ = open(folder_ / "data");
    ASSERT_TRUE(store_);
    for (int i = 1; i <= 5; ++i) append(*store_, i);
    Commit commit;
    commit.meta = {{"serving", 1}};
    ASSERT_TRUE(store_->commit(commit).ok());
    VersionStore versions(fs_, folder_ / "data");
    VersionManifest manifest;
    manifest.model = "default";
    manifest.number = 1;
    manifest.base_sha256 = std::string(64, 'b');
    const StoredTensor tensor{"w", "F32", {1}, "1234"};
    ASSERT_TRUE(versions.write(manifest, {tensor}, {tensor}).ok());
    ASSERT_TRUE(fs_.make_directories(folder_ / "data/models/default/versions/v2.tmp").ok());
  }
  std::unique_ptr<ReplayStore> open(const std::string& data) {
    ReplayStore::Options options;
    options.directory = data + "/replay";
    auto store = ReplayStore::open(options);
    EXPECT_TRUE(store.ok()) << store.status().message();
    return store.ok() ? std::move(*store) : nullptr;
  }
  static void append(ReplayStore& store, int64_t seq) {
    const Json record = {{"kind", "text"}, {"text", "text " + std::to_string(seq)}};
    const auto ack = store.submit_and_wait({"c", 1, seq, record, {}});
    ASSERT_TRUE(ack.ok()) << ack.status().message();
  }
  Status back_up() { return create_backup(*store_, fs_, folder_ / "data", folder_ / "backup"); }

  ScratchFolder folder_;
  FileSystem& fs_ = posix_file_system();
  std::unique_ptr<ReplayStore> store_;
};

TEST_F(BackupTest, RestoresWhatWasThereWhenItWasMade) {
  ASSERT_TRUE(back_up().ok()) << back_up().message();
  append(*store_, 6);  // later than the backup
  const auto manifest = verify_backup(fs_, folder_ / "backup");
  ASSERT_TRUE(manifest.ok()) << manifest.status().message();
  EXPECT_EQ((*manifest)["last_offset"], 5);
  EXPECT_EQ((*manifest)["store_id"], store_->store_id());

  const Status restored = restore_backup(fs_, folder_ / "backup", folder_ / "restored");
  ASSERT_TRUE(restored.ok()) << restored.message();
  const auto copy = open(folder_ / "restored");
  ASSERT_TRUE(copy);
  EXPECT_EQ(copy->store_id(), store_->store_id());
  EXPECT_EQ(copy->last_seq("c", 1), 5) << "a client's hello shows what is missing";
  EXPECT_EQ(copy->get(5)->record["text"], "text 5");
  EXPECT_EQ(copy->meta("serving"), Json(1));
  EXPECT_TRUE(copy->verify().ok());
  append(*copy, 6);
  VersionStore versions(fs_, folder_ / "restored");
  EXPECT_TRUE(versions.read_delta("default", 1).ok());
  EXPECT_EQ(versions.list("default")->size(), 1u);
  EXPECT_FALSE(fs_.exists(folder_ / "restored/models/default/versions/v2.tmp"));
  EXPECT_FALSE(fs_.exists(folder_ / "restored/.restore.tmp"));
  EXPECT_TRUE(verify_backup(fs_, folder_ / "backup").ok()) << "the backup is not used up";
}

TEST_F(BackupTest, NeverOverwrites) {
  ASSERT_TRUE(back_up().ok());
  EXPECT_EQ(back_up().code(), Code::kConflict);
  EXPECT_EQ(restore_backup(fs_, folder_ / "backup", folder_ / "data").code(), Code::kConflict);
  ASSERT_TRUE(fs_.make_directories(folder_ / "empty").ok());
  EXPECT_TRUE(restore_backup(fs_, folder_ / "backup", folder_ / "empty").ok());
}

TEST_F(BackupTest, AnInterruptedRestoreIsBegunAgain) {
  ASSERT_TRUE(back_up().ok());
  ASSERT_TRUE(fs_.make_directories(folder_ / "half/.restore.tmp/replay/db").ok());
  ASSERT_TRUE(fs_.make_directories(folder_ / "half/models/default/versions/v1").ok());
  const Status restored = restore_backup(fs_, folder_ / "backup", folder_ / "half");
  ASSERT_TRUE(restored.ok()) << restored.message();
  EXPECT_TRUE(VersionStore(fs_, folder_ / "half").read_delta("default", 1).ok());
  EXPECT_EQ(restore_backup(fs_, folder_ / "backup", folder_ / "half").code(), Code::kConflict)
      << "a complete one is not";
}

TEST_F(BackupTest, EveryDamageIsFoundAndNothingRestored) {
  ASSERT_TRUE(back_up().ok());
  const Json manifest = *verify_backup(fs_, folder_ / "backup");
  ASSERT_GE(manifest["files"].size(), 5u);
  for (const Json& file : manifest["files"]) {
    const std::string path = folder_ / "backup/" + file["path"].get<std::string>();
    const std::string bytes = *fs_.read(path);
    // A new file: the old one may be a hard link to the store's own.
    ASSERT_TRUE(fs_.remove_all(path).ok());
    EXPECT_EQ(verify_backup(fs_, folder_ / "backup").status().code(), Code::kCorrupt) << path;
    std::string changed = bytes.empty() ? "x" : bytes;
    if (!bytes.empty()) changed.back() = static_cast<char>(changed.back() ^ 1);
    ASSERT_TRUE(write_file_synced(fs_, path, changed).ok());
    EXPECT_EQ(verify_backup(fs_, folder_ / "backup").status().code(), Code::kCorrupt) << path;
    EXPECT_FALSE(restore_backup(fs_, folder_ / "backup", folder_ / "restored").ok());
    EXPECT_FALSE(fs_.exists(folder_ / "restored"));
    ASSERT_TRUE(write_file_synced(fs_, path, bytes).ok());
  }
  ASSERT_TRUE(write_file_synced(fs_, folder_ / "backup/extra", "x").ok());
  EXPECT_EQ(verify_backup(fs_, folder_ / "backup").status().code(), Code::kCorrupt);
}

TEST_F(BackupTest, AManifestCannotNameFilesOutside) {
  ASSERT_TRUE(back_up().ok());
  const Json whole = *verify_backup(fs_, folder_ / "backup");
  for (const char* path : {"../data/replay/LOCK", "/etc/hostname", "models/../../x"}) {
    Json manifest = whole;
    manifest["files"] = Json::array({{{"path", path}, {"sha256", ""}}});
    ASSERT_TRUE(write_file_synced(fs_, folder_ / "backup/manifest.json", dump_json(manifest)).ok());
    const auto verified = verify_backup(fs_, folder_ / "backup");
    EXPECT_NE(verified.status().message().find("outside"), std::string::npos) << path;
  }
}

}  // namespace
}  // namespace ds
