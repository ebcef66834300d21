// SPDX-License-Identifier: Apache-2.0
// Changing single fields of a shared object's bytes.
#pragma once

#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "ds/plugin.h"

namespace ds {

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

/// Where the program header of the first segment of a type stands.
inline size_t segment_at(const std::string& file, uint32_t type) {
  const auto header = get<Elf64_Ehdr>(file, 0);
  for (size_t i = 0; i < header.e_phnum; ++i) {
    const size_t at = header.e_phoff + i * sizeof(Elf64_Phdr);
    if (get<Elf64_Phdr>(file, at).p_type == type) return at;
  }
  ADD_FAILURE() << "no segment of type " << type;
  return 0;
}

/// Where the entry with this tag stands in the file.
inline size_t dynamic_at(const std::string& file, int64_t tag) {
  const auto segment = get<Elf64_Phdr>(file, segment_at(file, PT_DYNAMIC));
  for (size_t at = segment.p_offset; at < segment.p_offset + segment.p_filesz; at += 16) {
    if (get<Elf64_Dyn>(file, at).d_tag == tag) return at;
  }
  ADD_FAILURE() << "no dynamic entry " << tag;
  return 0;
}

inline size_t note_at(const std::string& file) {
  return file.find(std::string("\1\0\0\0Driftstone\0", 15)) - 8;  // behind namesz and descsz
}

/// The entry's record in the symbol table. Tables stand where their addresses say in these files.
inline size_t entry_symbol_at(const std::string& file) {
  const auto strings = get<Elf64_Dyn>(file, dynamic_at(file, DT_STRTAB)).d_un.d_ptr;
  const uint64_t name = file.find(DS_ENTRY_NAME, strings) - strings;
  size_t at = get<Elf64_Dyn>(file, dynamic_at(file, DT_SYMTAB)).d_un.d_ptr;
  while (get<Elf64_Sym>(file, at).st_name != name) at += sizeof(Elf64_Sym);
  return at;
}

}  // namespace ds
