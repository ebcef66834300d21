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
#include "plugin/elf_file.h"

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

/// The entry of the file, mapped into this process for good.
Result<ds_plugin_entry_fn> load_entry(std::span<const std::byte> bytes);

/// What a component is checked with.
struct Subject {
  const ds_plugin* plugin = nullptr;
  const ds_component* component = nullptr;
};

constexpr std::string_view text_of(ds_str s) {
  return {s.ptr, s.ptr == nullptr ? 0 : static_cast<size_t>(s.len)};
}
/// A table of the kind, widened: fields that the plugin did not know are NULL.
template <class T>
T table_of(const ds_component& component) {
  T out{};
  const auto* table = static_cast<const T*>(component.table);
  __builtin_memcpy(&out, table, table->size < sizeof out ? table->size : sizeof out);
  return out;
}
ds_instance_ops ops_of(const ds_component& component);
ds_component widened(const ds_component& component);

std::string_view kind_name(uint32_t kind);

}  // namespace ds::check
