// SPDX-License-Identifier: Apache-2.0
// What the reader of plugin files says of a real module, and that nothing breaks it. What it
// refuses is in hostile_plugin_files_test.cpp.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "ds/plugin.h"
#include "plugin/elf_file.h"
#include "tests/daemon/elf_patch.h"

namespace ds {
namespace {

using testing::Contains;

constexpr uint32_t kAllFeatures = 15;

std::string module_bytes() {
  std::ifstream in(DS_MODULES_DIR "/attention_dense.so", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

Result<PluginFile> judge(const std::string& file, uint32_t machine = kAllFeatures) {
  return inspect_plugin(std::as_bytes(std::span(file.data(), file.size())), machine);
}

TEST(PluginElf, ARealModuleIsDescribed) {
  const auto file = judge(module_bytes());
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->id, "org.driftstone.attention-dense");
  EXPECT_EQ(file->abi_minor, DS_ABI_MINOR);
  EXPECT_EQ(file->kinds, 1u << DS_KIND_ATTENTION);
  EXPECT_THAT(file->needed, Contains("libc.so.6"));
}

TEST(PluginElf, AFeatureThatTheMachineLacksIsNamed) {
  std::string file = module_bytes();
  set<uint32_t>(file, note_at(file) + offsetof(ds_note, cpu_features),
                DS_CPU_AVX2 | DS_CPU_AMX_BF16);
  EXPECT_TRUE(judge(file).ok());
  const auto verdict = judge(file, DS_CPU_AVX2);
  ASSERT_FALSE(verdict.ok());
  EXPECT_EQ(verdict.status().message(), "needs AMX BF16, which this machine lacks");
}

// Every length, and words of noise in the tables that are read: a verdict, never a crash.
TEST(PluginElf, NoLengthAndNoNoiseBreaksTheReader) {
  const std::string good = module_bytes();
  for (size_t n = 0; n < 8192; n += 7) EXPECT_FALSE(judge(good.substr(0, n)).ok()) << n;
  std::mt19937_64 rng(20261126);
  const auto dynamic = get<Elf64_Phdr>(good, segment_at(good, PT_DYNAMIC));
  std::string file = good;  // one for all: a copy of a sanitizer's module is many megabytes
  for (int i = 0; i < 3000; ++i) {
    std::array<size_t, 3> places{};
    for (size_t& at : places) {
      at = rng() % 2 ? rng() % 7168 : dynamic.p_offset + rng() % dynamic.p_filesz;
      set<uint32_t>(file, at, rng() % 3 ? static_cast<uint32_t>(rng()) : ~0u);
    }
    const auto verdict = judge(file);
    EXPECT_TRUE(!verdict.ok() || is_plugin_id(verdict->id));
    for (const size_t at : places) set(file, at, get<uint32_t>(good, at));
  }
}

TEST(PluginElf, IdsAreReverseDomainNames) {
  for (const char* id : {"org.acme.nf4", "a.b", "io.x-y.z1"}) EXPECT_TRUE(is_plugin_id(id)) << id;
  for (const char* id : {"", "nf4", ".a", "a.", "a..b", "Org.x", "a.b c", "a/b.c", "a.b\n"})
    EXPECT_FALSE(is_plugin_id(id)) << id;
}

}  // namespace
}  // namespace ds
