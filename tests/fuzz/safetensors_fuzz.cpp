// SPDX-License-Identifier: Apache-2.0
// A safetensors file: what is accepted must survive being written and read again.
#include "storage/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto parsed = ds::parse_safetensors(std::as_bytes(std::span(data, size)));
  if (!parsed.ok()) return 0;
  const std::string written = ds::serialize_safetensors(*parsed);
  const auto again =
      ds::parse_safetensors(std::as_bytes(std::span(written.data(), written.size())));
  DS_CHECK(again.ok());
  DS_CHECK(ds::serialize_safetensors(*again) == written);
  return 0;
}
