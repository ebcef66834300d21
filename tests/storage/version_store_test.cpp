// SPDX-License-Identifier: Apache-2.0
#include "storage/version_store.h"

#include <gtest/gtest.h>

#include <cstring>

#include "storage/hash.h"
#include "tests/storage/power_cut_files.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

const std::string kBase(64, 'a');

StoredTensor tensor(const std::string& name, float first) {
  StoredTensor made{name, "F32", {2, 3}, std::string(24, '\0')};
  for (int i = 0; i < 6; ++i) {
    const float value = first + static_cast<float>(i);
    std::memcpy(made.data.data() + 4 * i, &value, 4);
  }
  return made;
}

VersionManifest manifest_of(int64_t number) {
  VersionManifest manifest;
  manifest.model = "default";
  manifest.number = number;
  manifest.parent = number - 1;
  manifest.base_sha256 = kBase;
  manifest.method = "lora";
  manifest.round = static_cast<uint64_t>(number) * 10;
  manifest.created_ms = 1000 + number;
  manifest.items = {"fb_0123456789abcdef0123"};
  manifest.details = {{"rank", 8}, {"loss", 0.1}, {"whole", 2.0}};
  return manifest;
}

std::vector<StoredTensor> delta_of(int64_t number) {
  return {tensor("base_model.b.lora_B.weight", static_cast<float>(number)),
          tensor("base_model.a.lora_A.weight", static_cast<float>(-number))};
}

std::vector<StoredTensor> checkpoint_of(int64_t number) {
  return {tensor("adam.m", static_cast<float>(number) * 100)};
}

Status write(VersionStore& store, int64_t number) {
  return store.write(manifest_of(number), delta_of(number), checkpoint_of(number));
}

/// Whole and as written, or a failure.
void expect_whole(const VersionStore& store, int64_t number) {
  const auto manifest = store.manifest("default", number);
  ASSERT_TRUE(manifest.ok()) << manifest.status().message();
  EXPECT_EQ(manifest->round, static_cast<uint64_t>(number) * 10);
  EXPECT_EQ(manifest->details, manifest_of(number).details);
  EXPECT_EQ(manifest->items, manifest_of(number).items);
  EXPECT_EQ(manifest->weight_hash, weight_hash(kBase, delta_of(number)));
  const auto delta = store.read_delta("default", number);
  ASSERT_TRUE(delta.ok()) << delta.status().message();
  ASSERT_EQ(delta->size(), 2u);
  EXPECT_EQ((*delta)[0].data, delta_of(number)[1].data) << "in name order";
  EXPECT_EQ((*delta)[0].shape, (std::vector<int64_t>{2, 3}));
  const auto checkpoint = store.read_checkpoint("default", number);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ(checkpoint->at(0).data, checkpoint_of(number)[0].data);
}

std::vector<int64_t> numbers(const VersionStore& store) {
  std::vector<int64_t> found;
  const auto list = store.list("default");
  EXPECT_TRUE(list.ok()) << list.status().message();
  if (list.ok()) {
    for (const VersionManifest& manifest : *list) found.push_back(manifest.number);
  }
  return found;
}

TEST(WeightHash, IsTheDocumentedBytes) {
  // Written out by hand: base, then per tensor in name order its lengths, name, dtype, dims, data.
  std::string bytes;
  for (int i = 0; i < 32; ++i) bytes += '\xaa';
  const auto u32 = [&](uint32_t v) { bytes.append(reinterpret_cast<const char*>(&v), 4); };
  const auto u64 = [&](uint64_t v) { bytes.append(reinterpret_cast<const char*>(&v), 8); };
  for (const char* name : {"B", "a"}) {  // bytewise: capitals first
    u32(1);
    bytes += name;
    u32(4);
    bytes += "BF16";
    u32(2);
    u64(1);
    u64(2);
    bytes += std::string(4, name[0]);
  }
  const std::vector<StoredTensor> tensors = {{"a", "BF16", {1, 2}, "aaaa"},
                                             {"B", "BF16", {1, 2}, "BBBB"}};
  EXPECT_EQ(weight_hash(kBase, tensors), to_hex(sha256(bytes)));
}

TEST(VersionStore, WritesReadsListsAndRemoves) {
  ScratchFolder folder;
  VersionStore store(posix_file_system(), folder.path());
  EXPECT_TRUE(numbers(store).empty());
  for (const int64_t number : {10, 2, 1}) {
    const Status written = write(store, number);
    ASSERT_TRUE(written.ok()) << written.message();
  }
  EXPECT_EQ(numbers(store), (std::vector<int64_t>{1, 2, 10})) << "by number, not by name";
  for (const int64_t number : {1, 2, 10}) expect_whole(store, number);
  EXPECT_EQ(store.models(), std::vector<std::string>{"default"});
  EXPECT_EQ(write(store, 2).code(), Code::kConflict) << "a version is never changed";
  ASSERT_TRUE(store.remove("default", 2).ok());
  EXPECT_EQ(numbers(store), (std::vector<int64_t>{1, 10}));
  EXPECT_EQ(store.manifest("default", 2).status().code(), Code::kNotFound);
  EXPECT_EQ(store.remove("default", 2).code(), Code::kNotFound);
}

TEST(VersionStore, RefusesWhatIsNotAVersion) {
  ScratchFolder folder;
  VersionStore store(posix_file_system(), folder.path());
  for (const char* name : {"", "../up", "Upper", ".hidden", "a/b", "a b", "-x"}) {
    VersionManifest manifest = manifest_of(1);
    manifest.model = name;
    EXPECT_EQ(store.write(manifest, {}, {}).code(), Code::kInvalid) << name;
    EXPECT_EQ(store.read_delta(name, 1).status().code(), Code::kInvalid) << name;
    EXPECT_EQ(store.remove(name, 1).code(), Code::kInvalid) << name;
  }
  VersionManifest manifest = manifest_of(0);
  EXPECT_EQ(store.write(manifest, {}, {}).code(), Code::kInvalid);
  manifest = manifest_of(1);
  manifest.base_sha256 = "abc";
  EXPECT_EQ(store.write(manifest, {}, {}).code(), Code::kInvalid);
  manifest = manifest_of(1);
  manifest.weight_hash = std::string(64, '0');
  EXPECT_EQ(store.write(manifest, delta_of(1), {}).code(), Code::kInvalid);
  EXPECT_FALSE(store.write(manifest_of(1), {tensor("x", 1), tensor("x", 1)}, {}).ok());
  EXPECT_TRUE(numbers(store).empty()) << "nothing of it was written";
}

TEST(VersionStore, AnyChangedByteIsFound) {
  ScratchFolder folder;
  FileSystem& fs = posix_file_system();
  VersionStore store(fs, folder.path());
  ASSERT_TRUE(write(store, 1).ok());
  const std::string at = folder / "models/default/versions/v1/";
  for (const char* file : {"manifest.json", "delta.safetensors", "checkpoint.safetensors"}) {
    const std::string bytes = *fs.read(at + file);
    for (size_t i = 0; i < bytes.size(); i += 7) {
      std::string changed = bytes;
      changed[i] = static_cast<char>(changed[i] ^ 1);
      ASSERT_TRUE(write_file_synced(fs, at + file, changed).ok());
      const auto delta = store.read_delta("default", 1);
      const auto checkpoint = store.read_checkpoint("default", 1);
      // White space of the manifest is no content: then all must be as written.
      if (delta.ok() && checkpoint.ok()) {
        ASSERT_STREQ(file, "manifest.json") << "byte " << i;
        expect_whole(store, 1);
      }
    }
    ASSERT_TRUE(write_file_synced(fs, at + file, bytes).ok());
  }
  expect_whole(store, 1);
}

/// A crash before every single change of the file system, three ways of losing what was not synced.
TEST(VersionStore, ACrashAnywhereLeavesTheOldOrTheNew) {
  using Loss = PowerCutFiles::Loss;
  int cuts = 0;
  for (const Loss loss : {Loss::kAllUnsynced, Loss::kUnsyncedBytes, Loss::kAtRandom}) {
    for (const bool removing : {false, true}) {
      for (int k = 0, done = false; !done; ++k) {
        PowerCutFiles fs;
        ASSERT_TRUE(fs.make_directories("/data").ok());
        ASSERT_TRUE(fs.sync_directory("/").ok());
        VersionStore store(fs, "/data");
        ASSERT_TRUE(write(store, 1).ok());
        if (removing) {
          ASSERT_TRUE(write(store, 2).ok());
        }
        fs.cut_power(Loss::kAllUnsynced, 0);
        EXPECT_EQ(numbers(store),
                  removing ? (std::vector<int64_t>{1, 2}) : (std::vector<int64_t>{1}));
        fs.stop_before(k);
        const Status changed = removing ? store.remove("default", 2) : write(store, 2);
        done = changed.ok();
        fs.cut_power(loss, static_cast<uint64_t>(k));
        cuts += 1;

        VersionStore again(fs, "/data");
        ASSERT_TRUE(again.clean().ok());
        const auto left = numbers(again);
        for (const int64_t number : left) expect_whole(again, number);
        ASSERT_TRUE(left == std::vector<int64_t>{1} || left == (std::vector<int64_t>{1, 2}))
            << "crash before change " << k;
        if (done) {
          EXPECT_EQ(left.size(), removing ? 1u : 2u) << "it was reported durable";
        }
        const auto names = fs.list("/data/models/default/versions");
        EXPECT_EQ(names->size(), left.size()) << "leftovers after one restart";
        if (left.size() == 1) {
          ASSERT_TRUE(write(again, 2).ok()) << "the number is free again";
          expect_whole(again, 2);
        }
      }
    }
  }
  std::printf("%d crashes\n", cuts);
  EXPECT_GT(cuts, 60);
}

/// The very first version makes the folders above it; those must last too.
TEST(VersionStore, TheFirstVersionIsDurableWithItsFolders) {
  PowerCutFiles fs;
  ASSERT_TRUE(fs.make_directories("/data").ok());
  ASSERT_TRUE(fs.sync_directory("/").ok());
  VersionStore store(fs, "/data");
  fs.stop_before(3);  // folders made, not all of them synced
  EXPECT_FALSE(write(store, 1).ok());
  fs.stop_before(1000);  // the process goes on: the power stayed
  ASSERT_TRUE(write(store, 1).ok());
  fs.cut_power(PowerCutFiles::Loss::kAllUnsynced, 0);
  expect_whole(store, 1);
}

}  // namespace
}  // namespace ds
