// SPDX-License-Identifier: Apache-2.0
// Hostile plugin files at the whole door, Plugins::load: each is refused with its reason, and none
// of its code runs. The files are a plugin that works (hostile_plugin.cpp, which says when the
// loader runs any of it), linked or damaged or laid out to do harm; all but those about trust carry
// a good signature.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "plugin/plugins.h"
#include "storage/hash.h"
#include "storage/signature.h"
#include "tests/daemon/elf_patch.h"
#include "tests/daemon/hostile_marks.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using Bytes = std::string;

Bytes read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Files, keys and a plugin host in a folder of their own.
struct House {
  ScratchFolder folder;
  KeyPair trusted = *make_ed25519(), foreign = *make_ed25519();
  Bytes good = read_bytes(DS_HOSTILE_PLUGIN);
  std::unique_ptr<Plugins> plugins;
  int marks = memfd_create("marks", MFD_CLOEXEC);

  House() {
    EXPECT_FALSE(good.empty());
    EXPECT_EQ(dup2(marks, kMarkDescriptor), kMarkDescriptor);
    fs::create_directories(data() + "/keys");
    fs::create_directories(folder / "no-modules");
    std::ofstream(data() + "/keys/release.pem") << trusted.public_pem;
    open_plugins();
  }
  ~House() {
    plugins.reset();
    close(kMarkDescriptor);
    close(marks);
  }
  House(const House&) = delete;

  std::string data() const { return folder / "plugins"; }
  void open_plugins() {
    plugins.reset();
    auto opened = Plugins::open({folder / "no-modules", data(), Json::object()}, {},
                                posix_file_system(), system_clock_seam());
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    plugins = std::move(*opened);
  }
  std::string lay(const std::string& name, const Bytes& bytes, mode_t mode = 0700) const {
    const std::string path = folder / name;
    fs::create_directories(fs::path(path).parent_path());
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
    EXPECT_EQ(chmod(path.c_str(), mode), 0);
    return path;
  }
  void sign(const std::string& path, const Bytes& bytes, const KeyPair& key) const {
    std::ofstream(path + ".sig", std::ios::binary | std::ios::trunc)
        << *sign_ed25519(key.private_pem, bytes);
    EXPECT_EQ(chmod((path + ".sig").c_str(), 0600), 0);
  }
  std::string lay_signed(const std::string& name, const Bytes& bytes, mode_t mode = 0700) const {
    const std::string path = lay(name, bytes, mode);
    sign(path, bytes, trusted);
    return path;
  }
  /// "loaded", or why not.
  std::string load(const std::string& path) const {
    const auto loaded = plugins->load(path, false, Json());
    return loaded.ok() ? "loaded" : loaded.status().message();
  }
  /// What has run since the last time: kMarkX, in order.
  std::string ran() const {
    struct stat s {};
    EXPECT_EQ(fstat(marks, &s), 0);
    Bytes out(static_cast<size_t>(s.st_size), '\0');
    EXPECT_EQ(pread(marks, out.data(), out.size(), 0), s.st_size);
    EXPECT_EQ(ftruncate(marks, 0), 0);
    EXPECT_EQ(lseek(kMarkDescriptor, 0, SEEK_SET), 0);
    return out;
  }
};

struct Hostile {
  const char* name;
  const char* reason;                            // must be in the message
  std::function<std::string(const House&)> lay;  // the path to load; empty: cannot be made here
};

void expect_refused(const std::vector<Hostile>& files) {
  const House house;
  for (const Hostile& file : files) {
    const std::string path = file.lay(house);
    if (path.empty()) continue;
    EXPECT_THAT(house.load(path), HasSubstr(file.reason)) << file.name;
    EXPECT_EQ(house.ran(), "") << file.name;
  }
  EXPECT_TRUE(house.plugins->names(DS_KIND_TOOL).empty());
  EXPECT_EQ(house.load(house.lay_signed("good.so", house.good)), "loaded");
  EXPECT_EQ(house.ran(), std::string({kMarkResolver, kMarkInit, kMarkConstructor}))
      << "the good file shows that all of it is seen";
}

/// The good file with some bytes changed, signed as it then is.
Hostile damaged(const char* name, const char* reason, std::function<void(Bytes&)> damage) {
  return {name, reason, [damage = std::move(damage)](const House& house) {
            Bytes bytes = house.good;
            damage(bytes);
            return house.lay_signed("damaged.so", bytes);
          }};
}

Hostile linked(const char* name, const char* reason) {
  return {name, reason, [name](const House& house) {
            return house.lay_signed(
                "linked.so", read_bytes(DS_HOSTILE_FOLDER "/hostile_" + Bytes(name) + ".so"));
          }};
}

size_t header_field(size_t offset) { return offset; }
#define FIELD(member) header_field(offsetof(Elf64_Ehdr, member))
#define NOTE_FIELD(f, member) (note_at(f) + offsetof(ds_note, member))

void retag(Bytes& file, int64_t from, int64_t to) {
  set<int64_t>(file, dynamic_at(file, from), to);
}
void set_dynamic(Bytes& file, int64_t tag, uint64_t value) {
  set<uint64_t>(file, dynamic_at(file, tag) + 8, value);
}
void set_entry(Bytes& file, size_t member, uint8_t value) {
  file[entry_symbol_at(file) + member] = static_cast<char>(value);
}

// ---- where a file stands and who could have written it ----------------------------------------

std::vector<Hostile> placement() {
  const auto inside = [](const char* open_folder, const char* path, mode_t mode) {
    return [=](const House& house) {
      const std::string file = house.lay_signed(path, house.good);
      EXPECT_EQ(chmod((house.folder / open_folder).c_str(), mode), 0);
      return file;
    };
  };
  const auto given_away = [](const char* what, const char* path) {
    return [=](const House& house) {
      if (geteuid() != 0) return std::string();
      const std::string file = house.lay_signed(path, house.good);
      EXPECT_EQ(chown((house.folder / what).c_str(), 12345, 12345), 0);
      return file;
    };
  };
  return {
      {"symlink", "a symbolic link",
       [](const House& house) {
         fs::create_symlink(house.lay_signed("target.so", house.good), house.folder / "link.so");
         return house.folder / "link.so";
       }},
      {"symlink_to_nothing", "a symbolic link",
       [](const House& house) {
         fs::create_symlink("nowhere.so", house.folder / "dangling.so");
         return house.folder / "dangling.so";
       }},
      {"world_writable", "mode 0702",
       [](const House& house) { return house.lay_signed("world.so", house.good, 0702); }},
      {"group_writable", "mode 0720",
       [](const House& house) { return house.lay_signed("group.so", house.good, 0720); }},
      {"world_writable_parent", "/open: mode 0777", inside("open", "open/in.so", 0777)},
      {"world_writable_ancestor", "/far: mode 0772", inside("far", "far/off/in.so", 0772)},
      {"foreign_owner", "/theirs.so: owned by user 12345", given_away("theirs.so", "theirs.so")},
      {"foreign_folder", "/foreign: owned by user 12345", given_away("foreign", "foreign/in.so")},
      {"folder", "not a regular file",
       [](const House& house) {
         fs::create_directory(house.folder / "folder.so");
         return house.folder / "folder.so";
       }},
      {"pipe", "not a regular file",  // opening it must not wait for a writer
       [](const House& house) {
         EXPECT_EQ(mkfifo((house.folder / "pipe.so").c_str(), 0600), 0);
         return house.folder / "pipe.so";
       }},
      {"too_large", "bytes, at most 268435456",
       [](const House& house) {
         const std::string path = house.lay("large.so", house.good);
         EXPECT_EQ(truncate(path.c_str(), static_cast<off_t>(kPluginFileLimit) + 1), 0);
         return path;
       }},
  };
}

TEST(HostilePluginFiles, PlacesThatOthersReachAreRefused) { expect_refused(placement()); }

// ---- who says that it may run ------------------------------------------------------------------

std::vector<Hostile> untrusted() {
  return {
      {"unknown", "is not allowed and the file has no signature",
       [](const House& house) { return house.lay("unknown.so", house.good); }},
      {"foreign_signature", "of none of the 1 trusted keys",
       [](const House& house) {
         const std::string path = house.lay("foreign.so", house.good);
         house.sign(path, house.good, house.foreign);
         return path;
       }},
      {"signature_of_another_file", "of none of the 1 trusted keys",
       [](const House& house) {
         const std::string path = house.lay("other.so", house.good);
         house.sign(path, house.good + '\0', house.trusted);
         return path;
       }},
      {"changed_after_signing", "of none of the 1 trusted keys",
       [](const House& house) {
         const std::string path = house.lay_signed("changed.so", house.good);
         std::ofstream(path, std::ios::app | std::ios::binary) << '\0';
         return path;
       }},
      {"short_signature", "of none of the 1 trusted keys",
       [](const House& house) {
         const std::string path = house.lay_signed("short.so", house.good);
         fs::resize_file(path + ".sig", 63);
         return path;
       }},
      {"empty_signature", "of none of the 1 trusted keys",
       [](const House& house) {
         const std::string path = house.lay_signed("empty.so", house.good);
         fs::resize_file(path + ".sig", 0);
         return path;
       }},
      {"signature_by_link", ".sig: a symbolic link",
       [](const House& house) {
         const std::string path = house.lay_signed("linked_sig.so", house.good);
         fs::rename(path + ".sig", path + ".real");
         fs::create_symlink(path + ".real", path + ".sig");
         return path;
       }},
      {"signature_that_others_write", ".sig: mode 0602",
       [](const House& house) {
         const std::string path = house.lay_signed("open_sig.so", house.good);
         EXPECT_EQ(chmod((path + ".sig").c_str(), 0602), 0);
         return path;
       }},
      {"swapped_after_explain", "of none of the 1 trusted keys",
       [](const House& house) {
         const std::string path = house.lay_signed("swapped.so", house.good);
         EXPECT_EQ(house.plugins->explain(path)["loads"], true);
         fs::rename(house.lay("evil.so", house.good + '\0'), path);
         return path;
       }},
  };
}

TEST(HostilePluginFiles, WhatNobodyVouchesForIsRefused) { expect_refused(untrusted()); }

// ---- the file itself ---------------------------------------------------------------------------

std::vector<Hostile> headers() {
  const auto header16 = [](size_t at, uint16_t value) {
    return [=](Bytes& f) { set<uint16_t>(f, at, value); };
  };
  const auto in_segment = [](uint32_t type, size_t member, auto value) {
    return [=](Bytes& f) { set(f, segment_at(f, type) + member, value); };
  };
  return {
      damaged("empty", "not an ELF", [](Bytes& f) { f.clear(); }),
      damaged("script", "not an ELF", [](Bytes& f) { f = "#!/bin/sh\n"; }),
      damaged("only_magic", "truncated", [](Bytes& f) { f.resize(20); }),
      damaged("half", "truncated", [](Bytes& f) { f.resize(f.size() / 2); }),
      damaged("last_byte_gone", "truncated", [](Bytes& f) { f.pop_back(); }),
      damaged("class_32", "ELF class 1", [](Bytes& f) { f[EI_CLASS] = 1; }),
      damaged("big_endian", "byte order 2", [](Bytes& f) { f[EI_DATA] = 2; }),
      damaged("wrong_arch", "built for machine 8", header16(FIELD(e_machine), EM_MIPS)),
      damaged("program", "ELF type 2", header16(FIELD(e_type), ET_EXEC)),
      damaged("program_headers_far", "program headers",
              [](Bytes& f) { set<uint64_t>(f, FIELD(e_phoff), ~0ull - 8); }),
      damaged("program_header_size", "program headers of 8", header16(FIELD(e_phentsize), 8)),
      damaged("segment_overflow", "truncated: segment",
              in_segment(PT_LOAD, offsetof(Elf64_Phdr, p_offset), ~0ull - 4)),
      damaged("segment_overlap", "shares pages",
              in_segment(PT_LOAD, sizeof(Elf64_Phdr) + offsetof(Elf64_Phdr, p_vaddr), uint64_t{0})),
      damaged("writable_code", "writable and executable",
              in_segment(PT_LOAD, offsetof(Elf64_Phdr, p_flags), 7u)),
      damaged("no_stack", "PT_GNU_STACK",
              in_segment(PT_GNU_STACK, offsetof(Elf64_Phdr, p_type), uint32_t{PT_NULL})),
      linked("executable_stack", "executable stack"),
  };
}

TEST(HostilePluginFiles, HeadersThatLieAreRefused) { expect_refused(headers()); }

std::vector<Hostile> notes() {
  return {
      damaged("no_note", "no Driftstone note", [](Bytes& f) { f[note_at(f) + 12] = 'd'; }),
      damaged("note_size", "with 96 bytes",
              [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, descsz), 96); }),
      damaged("note_overflow", "ends behind its segment",
              [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, descsz), ~0u); }),
      damaged("note_type", "type 2", [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, type), 2); }),
      damaged("major", "plugin ABI 2.",
              [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, abi_major), 2); }),
      damaged("kinds_unknown", "kinds mask 260",
              [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, kinds_mask), 260); }),
      damaged("kinds_none", "kinds mask 0",
              [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, kinds_mask), 0); }),
      damaged("id_upper", "id \"org.Dr", [](Bytes& f) { f[NOTE_FIELD(f, id) + 4] = 'D'; }),
      damaged("id_no_dot", "reverse-domain",
              [](Bytes& f) { std::memcpy(&f[NOTE_FIELD(f, id)], "nodots", 7); }),
      damaged("id_empty", "reverse-domain", [](Bytes& f) { f[NOTE_FIELD(f, id)] = 0; }),
      damaged("id_endless", "does not end",
              [](Bytes& f) { std::memset(&f[NOTE_FIELD(f, id)], 'a', 96); }),
      damaged("features_unknown", "does not know",
              [](Bytes& f) { set<uint32_t>(f, NOTE_FIELD(f, cpu_features), 64); }),
  };
}

TEST(HostilePluginFiles, BadNotesAreRefused) { expect_refused(notes()); }

std::vector<Hostile> dynamic_sections() {
  return {
      linked("runpath", "DT_RUNPATH"),
      linked("rpath", "DT_RPATH"),
      damaged("textrel", "DT_TEXTREL", [](Bytes& f) { retag(f, DT_FLAGS_1, DT_TEXTREL); }),
      damaged("textrel_flag", "DF_TEXTREL", [](Bytes& f) { set_dynamic(f, DT_FLAGS, DF_TEXTREL); }),
      damaged("audit", "audit", [](Bytes& f) { retag(f, DT_NEEDED, DT_AUDIT); }),
      damaged("needed_by_path", "by path", [](Bytes& f) { f[f.find("libc.so.6") + 4] = '/'; }),
      damaged("no_dynamic", "no dynamic section",
              [](Bytes& f) { set<uint32_t>(f, segment_at(f, PT_DYNAMIC), PT_NULL); }),
  };
}

TEST(HostilePluginFiles, DynamicSectionsThatPullInMoreAreRefused) {
  expect_refused(dynamic_sections());
}

std::vector<Hostile> symbols() {
  return {
      linked("second_export", "expected nothing but ds_plugin_entry_v1"),
      damaged("other_export", "exports \"ds_plugin_entry_v9\"",
              [](Bytes& f) { f[f.find(DS_ENTRY_NAME) + 17] = '9'; }),
      damaged("no_export", "does not export",
              [](Bytes& f) {
                set<uint16_t>(f, entry_symbol_at(f) + offsetof(Elf64_Sym, st_shndx), SHN_UNDEF);
              }),
      damaged("entry_is_data", "is no function",
              [](Bytes& f) {
                set_entry(f, offsetof(Elf64_Sym, st_info), ELF64_ST_INFO(STB_GLOBAL, STT_OBJECT));
              }),
      damaged("entry_is_resolver", "is no function",
              [](Bytes& f) {
                set_entry(f, offsetof(Elf64_Sym, st_info),
                          ELF64_ST_INFO(STB_GLOBAL, STT_GNU_IFUNC));
              }),
      damaged("entry_is_unique", "is shared by all files",
              [](Bytes& f) {
                set_entry(f, offsetof(Elf64_Sym, st_info), ELF64_ST_INFO(STB_GNU_UNIQUE, STT_FUNC));
              }),
      damaged("hash_far", "hash table", [](Bytes& f) { set_dynamic(f, DT_GNU_HASH, 1ull << 40); }),
      damaged("symbols_far", "symbol table",
              [](Bytes& f) { set_dynamic(f, DT_SYMTAB, ~0ull - 64); }),
      damaged("strings_short", "a name lies outside",
              [](Bytes& f) { set_dynamic(f, DT_STRSZ, 4); }),
      damaged("no_hash", "exports nothing", [](Bytes& f) { retag(f, DT_GNU_HASH, 0x60000000); }),
  };
}

TEST(HostilePluginFiles, FalseExportsAreRefused) { expect_refused(symbols()); }

// ---- swaps -------------------------------------------------------------------------------------

// Another file takes the path's place again and again while it is loaded: what runs is what was
// judged. The evil one would run as well: only its last byte differs.
TEST(HostilePluginFiles, AFileSwappedWhileItIsLoadedNeverRunsUnjudged) {
  const House house;
  const Bytes evil = house.good + '\0';
  const std::string path = house.lay_signed("racing.so", house.good);
  const std::string evil_sha256 = to_hex(sha256(evil)), good_sha256 = to_hex(sha256(house.good));
  std::atomic<bool> stop{false};
  std::thread swapper([&] {
    for (bool to_evil = true; !stop; to_evil = !to_evil)
      fs::rename(house.lay("next.so", to_evil ? evil : house.good), path);
  });
  int loaded = 0, refused = 0;
  for (int i = 0; i < 5000 && (i < 60 || loaded == 0 || refused == 0); ++i) {
    const auto answer = house.plugins->load(path, false, Json());
    if (answer.ok()) {
      ++loaded;
      EXPECT_EQ((*answer)["sha256"], good_sha256);
    } else {
      ++refused;
      EXPECT_THAT(answer.status().message(), testing::AnyOf(HasSubstr("of none of the 1 trusted"),
                                                            HasSubstr("became shorter")));
    }
  }
  stop = true;
  swapper.join();
  EXPECT_GT(loaded, 0);
  EXPECT_GT(refused, 0);
  const Bytes ran = house.ran();
  EXPECT_EQ(std::count(ran.begin(), ran.end(), kMarkConstructor), loaded);
  const auto shown = house.plugins->show("hostile");
  ASSERT_TRUE(shown.ok());
  for (const Json& generation : (*shown)["generations"])
    EXPECT_NE(generation["sha256"], evil_sha256);
}

// The host's own copy of an installed file is no more trusted than any other.
TEST(HostilePluginFiles, AnInstalledFileSwappedBetweenTwoStartsIsRefused) {
  House house;
  ASSERT_EQ(house.load(house.lay_signed("good.so", house.good)), "loaded");
  house.ran();
  const std::string copy = house.data() + "/" + to_hex(sha256(house.good)) + ".so";
  std::ofstream(copy, std::ios::app | std::ios::binary) << '\0';
  house.open_plugins();
  const Json refused = house.plugins->list()["refused"];
  ASSERT_EQ(refused.size(), 1u);
  EXPECT_THAT(refused[0]["reason"].get<std::string>(), HasSubstr("SHA-256 is"));
  EXPECT_EQ(house.ran(), "");
  fs::remove(copy);
  fs::create_symlink(house.folder / "good.so", copy);
  house.open_plugins();
  EXPECT_THAT(house.plugins->list()["refused"][0]["reason"].get<std::string>(),
              HasSubstr("a symbolic link"));
  EXPECT_EQ(house.ran(), "");
}

}  // namespace
}  // namespace ds
