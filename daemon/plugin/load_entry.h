// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "ds/plugin.h"
#include "ds/status.h"
#include "storage/descriptor.h"

namespace ds {

/// A memory file of these bytes that nobody can change any more; `name` is what it is called in a
/// process's maps.
Result<Descriptor> sealed_file(const std::string& name, std::span<const std::byte> bytes);

/// Loads a file from its bytes by way of a sealed memory file that stays open: glibc would hand out
/// the old library for a path or descriptor number that it has seen. Runs the file's constructors;
/// it is never unmapped. The entry of a file that was judged before (plugin/elf_file.h), or why
/// not. `name` is what the memory file is called in the process's maps; `file`, if given, its
/// number.
Result<ds_plugin_entry_fn> load_entry(const std::string& name, std::span<const std::byte> bytes,
                                      int* file = nullptr);

}  // namespace ds
