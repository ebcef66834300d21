// SPDX-License-Identifier: Apache-2.0
// Hostile plugin files, made from a real module by changing single fields: each is refused, and the
// reason names the field.
#include <elf.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "ds/plugin.h"
#include "plugin/elf_file.h"

namespace ds {
namespace {

using testing::Contains;
using testing::HasSubstr;

constexpr uint32_t kAllFeatures = 15;

std::string module_bytes() {
  std::ifstream in(DS_MODULES_DIR "/attention_dense.so", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

Result<PluginFile> judge(const std::string& file, uint32_t machine = kAllFeatures) {
  return inspect_plugin(std::as_bytes(std::span(file.data(), file.size())), machine);
}

template <typename T>
T get(const std::string& file, size_t at) {
  T out;
  std::memcpy(&out, file.data() + at, sizeof out);
  return out;
}
template <typename T>
void set(std::string& file, size_t at, T value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

size_t segment_at(const std::string& file, uint32_t type) {
  const auto header = get<Elf64_Ehdr>(file, 0);
  for (size_t i = 0; i < header.e_phnum; ++i) {
    const size_t at = header.e_phoff + i * sizeof(Elf64_Phdr);
    if (get<Elf64_Phdr>(file, at).p_type == type) return at;
  }
  ADD_FAILURE() << "no segment of type " << type;
  return 0;
}

/// Where the entry with this tag stands in the file.
size_t dynamic_at(const std::string& file, int64_t tag) {
  const auto segment = get<Elf64_Phdr>(file, segment_at(file, PT_DYNAMIC));
  for (size_t at = segment.p_offset; at < segment.p_offset + segment.p_filesz; at += 16) {
    if (get<Elf64_Dyn>(file, at).d_tag == tag) return at;
  }
  ADD_FAILURE() << "no dynamic entry " << tag;
  return 0;
}

size_t note_at(const std::string& file) {
  return file.find(std::string("\1\0\0\0Driftstone\0", 15)) - 8;  // behind namesz and descsz
}

/// The entry's record in the symbol table. Tables stand where their addresses say in this module.
size_t entry_symbol_at(const std::string& file) {
  const auto strings = get<Elf64_Dyn>(file, dynamic_at(file, DT_STRTAB)).d_un.d_ptr;
  const uint64_t name = file.find("ds_plugin_entry_v1", strings) - strings;
  size_t at = get<Elf64_Dyn>(file, dynamic_at(file, DT_SYMTAB)).d_un.d_ptr;
  while (get<Elf64_Sym>(file, at).st_name != name) at += sizeof(Elf64_Sym);
  return at;
}

void retag(std::string& file, int64_t from, int64_t to) {
  set<int64_t>(file, dynamic_at(file, from), to);
}

struct Damage {
  const char* name;
  const char* reason;  // must be in the message
  std::function<void(std::string&)> make;
};

size_t header_field(size_t offset) { return offset; }
#define FIELD(member) header_field(offsetof(Elf64_Ehdr, member))
#define NOTE_FIELD(f, member) (note_at(f) + offsetof(ds_note, member))

std::vector<Damage> header_damage() {
  return {
      {"empty", "not an ELF", [](std::string& f) { f.clear(); }},
      {"text", "not an ELF", [](std::string& f) { f = "#!/bin/sh\n"; }},
      {"only_magic", "truncated", [](std::string& f) { f.resize(20); }},
      {"half", "truncated", [](std::string& f) { f.resize(f.size() / 2); }},
      {"last_byte_gone", "truncated", [](std::string& f) { f.pop_back(); }},
      {"class_32", "ELF class 1", [](std::string& f) { f[EI_CLASS] = 1; }},
      {"big_endian", "byte order 2", [](std::string& f) { f[EI_DATA] = 2; }},
      {"machine", "built for machine 8",
       [](std::string& f) { set<uint16_t>(f, FIELD(e_machine), 8); }},
      {"program", "ELF type 2", [](std::string& f) { set<uint16_t>(f, FIELD(e_type), ET_EXEC); }},
      {"program_headers_far", "program headers",
       [](std::string& f) { set<uint64_t>(f, FIELD(e_phoff), ~0ull - 8); }},
      {"program_header_size", "program headers of 8",
       [](std::string& f) { set<uint16_t>(f, FIELD(e_phentsize), 8); }},
      {"segment_overflow", "truncated: segment",
       [](std::string& f) {
         set<uint64_t>(f, segment_at(f, PT_LOAD) + offsetof(Elf64_Phdr, p_offset), ~0ull - 4);
       }},
      {"segment_overlap", "shares pages",
       [](std::string& f) {
         const size_t second = segment_at(f, PT_LOAD) + sizeof(Elf64_Phdr);
         set<uint64_t>(f, second + offsetof(Elf64_Phdr, p_vaddr), 0);
       }},
      {"writable_code", "writable and executable",
       [](std::string& f) {
         set<uint32_t>(f, segment_at(f, PT_LOAD) + offsetof(Elf64_Phdr, p_flags), 7);
       }},
      {"stack", "executable stack",
       [](std::string& f) {
         set<uint32_t>(f, segment_at(f, PT_GNU_STACK) + offsetof(Elf64_Phdr, p_flags), 7);
       }},
      {"no_stack", "PT_GNU_STACK",
       [](std::string& f) { set<uint32_t>(f, segment_at(f, PT_GNU_STACK), PT_NULL); }},
  };
}

std::vector<Damage> note_damage() {
  return {
      {"no_note", "no Driftstone note", [](std::string& f) { f[note_at(f) + 12] = 'd'; }},
      {"note_size", "with 96 bytes",
       [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, descsz), 96); }},
      {"note_overflow", "ends behind its segment",
       [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, descsz), ~0u); }},
      {"note_type", "type 2", [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, type), 2); }},
      {"major", "plugin ABI 2.0",
       [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, abi_major), 2); }},
      {"kinds_unknown", "kinds mask 260",
       [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, kinds_mask), 260); }},
      {"kinds_none", "kinds mask 0",
       [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, kinds_mask), 0); }},
      {"id_upper", "id \"org.Dr", [](std::string& f) { f[NOTE_FIELD(f, id) + 4] = 'D'; }},
      {"id_no_dot", "reverse-domain",
       [](std::string& f) { std::memcpy(&f[NOTE_FIELD(f, id)], "nodots", 7); }},
      {"id_empty", "reverse-domain", [](std::string& f) { f[NOTE_FIELD(f, id)] = 0; }},
      {"id_endless", "does not end",
       [](std::string& f) { std::memset(&f[NOTE_FIELD(f, id)], 'a', 96); }},
      {"features_unknown", "does not know",
       [](std::string& f) { set<uint32_t>(f, NOTE_FIELD(f, cpu_features), 64); }},
  };
}

std::vector<Damage> dynamic_damage() {
  return {
      {"runpath", "DT_RUNPATH", [](std::string& f) { retag(f, DT_NEEDED, DT_RUNPATH); }},
      {"rpath", "DT_RPATH", [](std::string& f) { retag(f, DT_NEEDED, DT_RPATH); }},
      {"textrel", "DT_TEXTREL", [](std::string& f) { retag(f, DT_FLAGS_1, DT_TEXTREL); }},
      {"textrel_flag", "DF_TEXTREL",
       [](std::string& f) { set<uint64_t>(f, dynamic_at(f, DT_FLAGS) + 8, DF_TEXTREL); }},
      {"audit", "audit", [](std::string& f) { retag(f, DT_NEEDED, DT_AUDIT); }},
      {"needed_by_path", "by path", [](std::string& f) { f[f.find("libm.so.6") + 3] = '/'; }},
      {"no_dynamic", "no dynamic section",
       [](std::string& f) { set<uint32_t>(f, segment_at(f, PT_DYNAMIC), PT_NULL); }},
      {"other_export", "exports \"ds_plugin_entry_v9\"",
       [](std::string& f) { f[f.find("ds_plugin_entry_v1") + 17] = '9'; }},
      {"no_export", "does not export",
       [](std::string& f) {
         set<uint16_t>(f, entry_symbol_at(f) + offsetof(Elf64_Sym, st_shndx), SHN_UNDEF);
       }},
      {"entry_is_data", "is no function",
       [](std::string& f) { f[entry_symbol_at(f) + offsetof(Elf64_Sym, st_info)] = 0x11; }},
      {"second_export", "expected nothing but",
       [](std::string& f) {
         set<uint16_t>(f, entry_symbol_at(f) - sizeof(Elf64_Sym) + offsetof(Elf64_Sym, st_shndx),
                       13);
       }},
      {"hash_far", "hash table",
       [](std::string& f) { set<uint64_t>(f, dynamic_at(f, DT_GNU_HASH) + 8, 1ull << 40); }},
      {"symbols_far", "symbol table",
       [](std::string& f) { set<uint64_t>(f, dynamic_at(f, DT_SYMTAB) + 8, ~0ull - 64); }},
      {"strings_short", "a name lies outside",
       [](std::string& f) { set<uint64_t>(f, dynamic_at(f, DT_STRSZ) + 8, 4); }},
      {"no_hash", "exports nothing", [](std::string& f) { retag(f, DT_GNU_HASH, 0x60000000); }},
  };
}

TEST(PluginElf, ARealModuleIsDescribed) {
  const auto file = judge(module_bytes());
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->id, "org.driftstone.attention-dense");
  EXPECT_EQ(file->abi_minor, DS_ABI_MINOR);
  EXPECT_EQ(file->kinds, 1u << DS_KIND_ATTENTION);
  EXPECT_THAT(file->needed, Contains("libc.so.6"));
}

void expect_refused(const std::vector<Damage>& all) {
  const std::string good = module_bytes();
  for (const Damage& damage : all) {
    std::string file = good;
    damage.make(file);
    const auto verdict = judge(file);
    ASSERT_FALSE(verdict.ok()) << damage.name;
    EXPECT_THAT(verdict.status().message(), HasSubstr(damage.reason)) << damage.name;
  }
}

TEST(PluginElf, DamagedHeadersAreRefused) { expect_refused(header_damage()); }
TEST(PluginElf, DamagedNotesAreRefused) { expect_refused(note_damage()); }
TEST(PluginElf, DamagedDynamicSectionsAreRefused) { expect_refused(dynamic_damage()); }

TEST(PluginElf, AFeatureThatTheMachineLacksIsNamed) {
  std::string file = module_bytes();
  set<uint32_t>(file, NOTE_FIELD(file, cpu_features), DS_CPU_AVX2 | DS_CPU_AMX_BF16);
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
  for (int i = 0; i < 3000; ++i) {
    std::string file = good;
    for (int k = 0; k < 3; ++k) {
      const size_t at = rng() % 2 ? rng() % 7168 : dynamic.p_offset + rng() % dynamic.p_filesz;
      set<uint32_t>(file, at, rng() % 3 ? static_cast<uint32_t>(rng()) : ~0u);
    }
    const auto verdict = judge(file);
    EXPECT_TRUE(!verdict.ok() || is_plugin_id(verdict->id));
  }
}

TEST(PluginElf, IdsAreReverseDomainNames) {
  for (const char* id : {"org.acme.nf4", "a.b", "io.x-y.z1"}) EXPECT_TRUE(is_plugin_id(id)) << id;
  for (const char* id : {"", "nf4", ".a", "a.", "a..b", "Org.x", "a.b c", "a/b.c", "a.b\n"})
    EXPECT_FALSE(is_plugin_id(id)) << id;
}

}  // namespace
}  // namespace ds
