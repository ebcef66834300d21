// SPDX-License-Identifier: Apache-2.0
// Whose items a retraction may name, and the index of what waits by kind.
#include <gtest/gtest.h>

#include "storage/column_store.h"
#include "storage/record.h"
#include "storage/replay_format.h"
#include "storage/replay_store.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

class RetractionTest : public testing::Test {
 protected:
  void SetUp() override { open(); }
  void open() {
    ReplayStore::Options options;
    options.directory = folder_ / "replay";
    options.fs = &posix_file_system();
    options.clock = &system_clock_seam();
    auto store = ReplayStore::open(options);
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(*store);
  }
  Result<Ack> submit(const std::string& client, int64_t seq, Json record, bool admin = false) {
    Submission submission{client, 1, seq, std::move(record), {}};
    submission.admin = admin;
    return store_->submit_and_wait(std::move(submission));
  }
  uint64_t stored(const std::string& client, int64_t seq, Json record) {
    const auto ack = submit(client, seq, std::move(record));
    EXPECT_TRUE(ack.ok()) << ack.status().message();
    return ack.ok() ? ack->offset : 0;
  }
  static Json text(const std::string& text) { return {{"kind", "text"}, {"text", text}}; }
  static Json retract(const std::string& target) { return {{"kind", "retract"}, {"target", target}}; }

  ScratchFolder folder_;
  std::unique_ptr<ReplayStore> store_;
};

TEST_F(RetractionTest, ASourceRetractsItsOwnAndAnAdminAny) {
  stored("b", 1, text("x"));
  Json named = text("y");
  named["source"] = "ab";
  stored("b", 2, named);
  const std::string x = feedback_id("b", 1, 1), y = feedback_id("b", 1, 2);
  const Status refused = submit("a", 1, retract(x)).status();
  EXPECT_EQ(refused.code(), Code::kPermission);
  EXPECT_NE(refused.message().find("forbidden: " + x + " is not of the source \"a\""), std::string::npos)
      << refused.message();
  EXPECT_EQ(submit("a", 1, retract(y)).status().code(), Code::kPermission) << "a is not ab";
  EXPECT_EQ(submit("b", 3, retract(y)).status().code(), Code::kPermission) << "sent for another source";
  stored("b", 3, retract(x));
  Json as_ab = retract(y);
  as_ab["source"] = "ab";
  stored("b", 4, as_ab);
  EXPECT_TRUE(submit("a", 1, retract(x), true).ok());
}

TEST_F(RetractionTest, KindsAreKnownByState) {
  const uint64_t a = stored("a", 1, text("x")), b = stored("a", 2, text("y"));
  const uint64_t c =
      stored("a", 3, {{"kind", "label"}, {"model", "digits"}, {"input", {1, 2}}, {"label", 1}});
  Commit commit;
  const FateEntry queued{"queued", 1, "", 0, ""}, back{"stored", 2, "", 0, ""};
  commit.fates = {{b, queued}, {c, queued}, {c, back}};
  ASSERT_TRUE(store_->commit(commit).ok());
  using Kinds = std::vector<std::pair<uint64_t, std::string>>;
  EXPECT_EQ(store_->kinds_in_state("stored"), (Kinds{{a, "text"}, {c, "label"}}));
  EXPECT_EQ(store_->kinds_in_state("queued"), (Kinds{{b, "text"}}));
  EXPECT_EQ(store_->kinds_in_state("held"), Kinds{});

  // The index itself holds them; a store from before it did is read record by record.
  store_.reset();
  {
    auto columns = ColumnStore::open(folder_ / "replay/db", nullptr);
    ASSERT_TRUE(columns.ok()) << columns.status().message();
    const auto indexed = (*columns)->get(Column::kState, state_key("stored", c));
    ASSERT_TRUE(indexed.ok() && *indexed);
    EXPECT_EQ(**indexed, "label");
    Batch batch(**columns);
    batch.put(Column::kState, state_key("stored", c), "");
    ASSERT_TRUE((*columns)->write(batch, ColumnStore::Durability::kSynced).ok());
  }
  open();
  EXPECT_EQ(store_->kinds_in_state("stored"), (Kinds{{a, "text"}, {c, "label"}}));
}

}  // namespace
}  // namespace ds
