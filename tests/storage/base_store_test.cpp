// SPDX-License-Identifier: Apache-2.0
#include "storage/base_store.h"

#include <gtest/gtest.h>

#include "storage/hash.h"
#include "storage/llama_tensors.h"
#include "tests/storage/power_cut_files.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

ModelConfig small_config() {
  ModelConfig c;
  c.n_layers = 1;
  c.d_model = 4;
  c.d_ff = 6;
  c.vocab = 5;
  c.n_heads = 2;
  c.n_kv_heads = 1;
  c.head_dim = 2;
  c.context = 8;
  return c;
}

NamedTensors tensors_of(float first) {
  NamedTensors tensors;
  for (const ExpectedTensor& wanted : llama_tensors(small_config())) {
    for (int64_t i = 0; i < elements_of(wanted.shape); ++i) {
      tensors[wanted.hf_name].push_back(first + static_cast<float>(i) / 7.0f);
    }
  }
  return tensors;
}

std::string file_of(float first) {
  auto file = BaseStore::encode(small_config(), tensors_of(first));
  EXPECT_TRUE(file.ok()) << file.status().message();
  return std::move(file).value();
}

std::string name_of(float first) { return to_hex(sha256(file_of(first))); }

Status write(BaseStore& store, float first) { return store.write(name_of(first), file_of(first)); }

TEST(BaseStore, ReadsWhatItWrote) {
  ScratchFolder folder;
  BaseStore store(posix_file_system(), folder.path());
  for (const float first : {1.0f, 2.0f, 1.0f}) ASSERT_TRUE(write(store, first).ok());
  for (const float first : {1.0f, 2.0f}) {
    const auto read = store.read(name_of(first), small_config());
    ASSERT_TRUE(read.ok()) << read.status().message();
    EXPECT_EQ(*read, tensors_of(first));
  }
  ASSERT_TRUE(store.keep_only({name_of(2.0f)}).ok());
  EXPECT_EQ(store.read(name_of(1.0f), small_config()).status().code(), Code::kNotFound);
  EXPECT_TRUE(store.read(name_of(2.0f), small_config()).ok());
  EXPECT_EQ(*posix_file_system().list(folder / "bases"), std::vector<std::string>{name_of(2.0f)});
}

TEST(BaseStore, KeepsOutWhatIsNoBase) {
  ScratchFolder folder;
  BaseStore store(posix_file_system(), folder.path());
  EXPECT_TRUE(store.keep_only({}).ok()) << "there is no folder yet";
  for (const std::string& name : {std::string("../x"), std::string(64, 'A'), std::string("ab")}) {
    EXPECT_EQ(store.write(name, "x").code(), Code::kInvalid) << name;
    EXPECT_EQ(store.read(name, small_config()).status().code(), Code::kInvalid) << name;
    EXPECT_EQ(store.remove(name).code(), Code::kNotFound) << name;
  }
  NamedTensors tensors = tensors_of(1);
  tensors["model.norm.weight"].push_back(0);
  EXPECT_EQ(BaseStore::encode(small_config(), tensors).status().code(), Code::kInvalid);
  tensors.erase("model.norm.weight");
  EXPECT_EQ(BaseStore::encode(small_config(), tensors).status().code(), Code::kInvalid);
  tensors = tensors_of(1);
  tensors["another"] = {1};
  EXPECT_EQ(BaseStore::encode(small_config(), tensors).status().code(), Code::kInvalid);

  ASSERT_TRUE(write(store, 1).ok());
  ASSERT_TRUE(posix_file_system().make_directories(folder / "bases/notes").ok());
  ASSERT_TRUE(store.keep_only({}).ok());
  EXPECT_EQ(*posix_file_system().list(folder / "bases"), std::vector<std::string>{"notes"})
      << "what is no base is left alone";
}

TEST(BaseStore, AnyChangedByteIsFound) {
  ScratchFolder folder;
  FileSystem& fs = posix_file_system();
  BaseStore store(fs, folder.path());
  ASSERT_TRUE(write(store, 1).ok());
  const std::string path = folder / ("bases/" + name_of(1) + "/model.safetensors");
  for (size_t i = 0; i < file_of(1).size(); i += 13) {
    std::string changed = file_of(1);
    changed[i] = static_cast<char>(changed[i] ^ 1);
    ASSERT_TRUE(write_file_synced(fs, path, changed).ok());
    EXPECT_EQ(store.read(name_of(1), small_config()).status().code(), Code::kCorrupt) << i;
  }
}

TEST(BaseStore, ANewerFormatAndAnotherModelAreRefused) {
  ScratchFolder folder;
  BaseStore store(posix_file_system(), folder.path());
  const std::string known = R"("driftstone_base":"1")", newer = R"("driftstone_base":"2")";
  std::string file = file_of(1);
  file.replace(file.find(known), known.size(), newer);
  ASSERT_TRUE(store.write(to_hex(sha256(file)), file).ok());
  const Status read = store.read(to_hex(sha256(file)), small_config()).status();
  EXPECT_EQ(read.code(), Code::kUnsupported);
  EXPECT_NE(read.message().find("base format 2"), std::string::npos) << read.message();

  ASSERT_TRUE(write(store, 1).ok());
  ModelConfig other = small_config();
  other.d_ff = 7;
  EXPECT_FALSE(store.read(name_of(1), other).ok());
}

/// A crash before every single change of the file system, three ways of losing what was not synced.
TEST(BaseStore, ACrashAnywhereLeavesTheBaseWholeOrAbsent) {
  using Loss = PowerCutFiles::Loss;
  int cuts = 0;
  for (const Loss loss : {Loss::kAllUnsynced, Loss::kUnsyncedBytes, Loss::kAtRandom}) {
    for (const bool removing : {false, true}) {
      for (int k = 0, done = false; !done; ++k, ++cuts) {
        PowerCutFiles fs;
        ASSERT_TRUE(fs.make_directories("/data").ok());
        ASSERT_TRUE(fs.sync_directory("/").ok());
        BaseStore store(fs, "/data");
        if (removing) {
          ASSERT_TRUE(write(store, 1).ok());
        }
        fs.cut_power(Loss::kAllUnsynced, 0);
        EXPECT_EQ(store.read(name_of(1), small_config()).ok(), removing);
        fs.stop_before(k);
        const Status changed = removing ? store.remove(name_of(1)) : write(store, 1);
        done = changed.ok();
        fs.cut_power(loss, static_cast<uint64_t>(k));

        BaseStore again(fs, "/data");
        ASSERT_TRUE(again.keep_only({name_of(1)}).ok());
        const bool there = fs.exists("/data/bases/" + name_of(1));
        EXPECT_EQ(again.read(name_of(1), small_config()).ok(), there)
            << "crash before change " << k;
        if (done) {
          EXPECT_EQ(there, !removing) << "it was reported durable";
        }
        ASSERT_TRUE(again.keep_only({}).ok());
        EXPECT_TRUE(!fs.exists("/data/bases") || fs.list("/data/bases")->empty());
      }
    }
  }
  EXPECT_GT(cuts, 30);
}

}  // namespace
}  // namespace ds
