// SPDX-License-Identifier: Apache-2.0
// JSON: the canonical text of what parses must parse to the same canonical text.
#include "storage/json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto json = ds::parse_json({reinterpret_cast<const char*>(data), size});
  if (!json.ok()) return 0;
  const std::string canonical = ds::canonical_json(*json);
  const auto again = ds::parse_json(canonical);
  DS_CHECK(again.ok());
  DS_CHECK(ds::canonical_json(*again) == canonical);
  DS_CHECK(ds::parse_json(ds::dump_json(*json)).ok());
  return 0;
}
