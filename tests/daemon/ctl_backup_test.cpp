// SPDX-License-Identifier: Apache-2.0
// backup verify and restore, on a real copy of a real store.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "ctl_fixture.h"
#include "storage/backup.h"

namespace ds::test {
namespace {

using testing::HasSubstr;

class CtlBackup : public testing::Test {
 protected:
  void SetUp() override {
    const std::string data = folder_.path() + "/data";
    ReplayStore::Options options;
    options.directory = data + "/replay";
    options.fs = &posix_file_system();
    options.clock = &system_clock_seam();
    auto store = ReplayStore::open(options);
    ASSERT_TRUE(store.ok()) << store.status().message();
    ASSERT_TRUE(
        (*store)->submit_and_wait({"test", 1, 1, {{"kind", "text"}, {"text", "kept"}}, {}}).ok());
    const Status made = create_backup(**store, posix_file_system(), data, copy_);
    ASSERT_TRUE(made.ok()) << made.message();
  }
  ScratchFolder folder_;
  const std::string copy_ = folder_.path() + "/copy";
};

TEST_F(CtlBackup, AGoodCopyVerifiesAndRestores) {
  EXPECT_EQ(run_dsctl({"backup", "verify", copy_}).exit, 0);
  const std::string target = folder_.path() + "/restored";
  EXPECT_EQ(run_dsctl({"backup", "restore", copy_, "--data", target}).exit, 2) << "needs --yes";
  const Ran ran = run_dsctl({"backup", "restore", copy_, "--data", target, "--yes"});
  EXPECT_EQ(ran.exit, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("restored into " + target));
  ReplayStore::Options options;
  options.directory = target + "/replay";
  options.fs = &posix_file_system();
  options.clock = &system_clock_seam();
  const auto store = ReplayStore::open(options);
  ASSERT_TRUE(store.ok()) << store.status().message();
  EXPECT_EQ((*store)->get(1)->record["text"], "kept");
  EXPECT_NE(run_dsctl({"backup", "restore", copy_, "--data", target, "--yes"}).exit, 0)
      << "a folder with data is not written over";
}

TEST_F(CtlBackup, ADamagedCopyIsEight) {
  for (const auto& entry : std::filesystem::recursive_directory_iterator(copy_)) {
    if (entry.path().extension() != ".sst" && entry.path().extension() != ".log") continue;
    std::ofstream(entry.path(), std::ios::app) << "x";
  }
  const Ran ran = run_dsctl({"backup", "verify", copy_});
  EXPECT_EQ(ran.exit, 8) << ran.out << ran.err;
  const Ran restored =
      run_dsctl({"backup", "restore", copy_, "--data", folder_.path() + "/r", "--yes"});
  EXPECT_EQ(restored.exit, 8);
}

TEST_F(CtlBackup, NoCopyIsAnError) {
  const Ran ran = run_dsctl({"backup", "verify", folder_.path() + "/none"});
  EXPECT_NE(ran.exit, 0);
  EXPECT_THAT(ran.err, HasSubstr("hint: "));
}

}  // namespace
}  // namespace ds::test
