// SPDX-License-Identifier: Apache-2.0
// What a helper process says of a plugin file: whatever the bytes, there is a verdict; what is
// accepted can be used as the daemon does, and is the only form of what it says.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "plugin/abi.h"
#include "plugin/description.h"
#include "plugin/isolated.h"
#include "plugin/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  ds::DescribedPlugin described(bytes);
  const auto given = described.read();
  if (!given.ok()) {
    if (given.status().message().empty()) std::abort();
    return 0;
  }
  ds::PluginFile note;
  note.id = ds::text_of((*given)->id);
  note.kinds = ~0u;
  const auto checked = ds::check_description(**given, note, "fuzz.so", ds::Schemas::kParse);
  if (!checked.ok()) {
    if (checked.status().message().empty()) std::abort();
    return 0;
  }
  ds::FlatWriter again;
  ds::put_description(again, *checked);
  if (again.bytes() != bytes) std::abort();
  for (const ds_component& component : checked->components) {
    if (!ds::valid_utf8(ds::text_of(component.summary))) std::abort();
    if (!ds::IsolatedInstance::cannot(component).empty()) continue;
    ds::IsolatedTable table;
    const ds_component proxied = ds::IsolatedInstance::proxied(component, table);
    if (proxied.table == component.table || proxied.ops != &table.ops) std::abort();
  }
  return 0;
}
