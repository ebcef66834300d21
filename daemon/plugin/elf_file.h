// SPDX-License-Identifier: Apache-2.0
// What a plugin file is, judged from its bytes alone: nothing of it runs, nothing is mapped. The
// reader trusts no offset, count or string of the file (tests/fuzz/elf_fuzz.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ds/status.h"

namespace ds {

struct PluginFile {
  std::string id;                   ///< "org.acme.nf4"
  uint32_t abi_minor = 0;           ///< DS_ABI_MINOR when it was compiled
  uint32_t kinds = 0;               ///< bit (1 << DS_KIND_x)
  uint32_t cpu_features = 0;        ///< DS_CPU_x that its code needs everywhere
  std::vector<std::string> needed;  ///< libraries that loading it brings in
};

/// DS_CPU_x of this machine.
uint32_t machine_cpu_features();

/// Refuses, saying what, got and expected: what is no 64-bit little-endian shared object of this
/// machine's architecture or is cut off; a missing or malformed Driftstone note, a foreign ABI
/// major, CPU features outside `machine`; whatever would let the file choose its own libraries
/// (RPATH, RUNPATH, a library by path), weaken the process (executable stack, writable code, text
/// relocations) or export anything but ds_plugin_entry_v1.
Result<PluginFile> inspect_plugin(std::span<const std::byte> file,
                                  uint32_t machine = machine_cpu_features());

/// Whether `id` is a reverse-domain name: a-z, 0-9, '.' and '-', at least one dot, no empty part.
bool is_plugin_id(std::string_view id);

}  // namespace ds
