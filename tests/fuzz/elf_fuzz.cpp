// SPDX-License-Identifier: Apache-2.0
// Plugin files: whatever the bytes, inspect_plugin() gives a verdict; what it accepts has an id and
// kinds.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "plugin/elf_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto verdict = ds::inspect_plugin(std::as_bytes(std::span(data, size)), ~0u);
  if (verdict.ok()) {
    if (!ds::is_plugin_id(verdict->id) || verdict->kinds == 0) std::abort();
  } else if (verdict.status().message().empty()) {
    std::abort();
  }
  return 0;
}
