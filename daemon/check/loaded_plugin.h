// SPDX-License-Identifier: Apache-2.0
// A plugin file as a host loads it: read once, judged, its bytes sealed in memory, loaded from
// there.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ds/plugin.h"
#include "ds/status.h"
#include "plugin/abi.h"
#include "plugin/elf_file.h"
#include "plugin/load_entry.h"

namespace ds::check {

/// The file, read and judged; nothing of it has run.
struct JudgedFile {
  std::string path, sha256;
  std::vector<std::byte> bytes;
  PluginFile note;
};
Result<std::vector<std::byte>> read_file(const std::string& path);
std::string sha256_hex(std::span<const std::byte> bytes);
Result<JudgedFile> judge_file(const std::string& path);

/// What a component is checked with.
struct Subject {
  const ds_plugin* plugin = nullptr;
  const ds_component* component = nullptr;
};

/// A table of the kind, widened: fields that the plugin did not know are NULL.
template <class T>
T table_of(const ds_component& component) {
  return full_struct(static_cast<const T*>(component.table));
}
inline ds_instance_ops ops_of(const ds_component& component) { return full_struct(component.ops); }

}  // namespace ds::check
