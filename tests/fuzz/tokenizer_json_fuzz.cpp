// SPDX-License-Identifier: Apache-2.0
// tokenizer.json: whatever is accepted must encode any text, and plain text never to special ids.
#include "engine/tokenizer.h"
#include "storage/hf_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto json = ds::parse_json(text);
  if (!json.ok()) return 0;
  const auto read = ds::parse_hf_tokenizer(*json, ds::Json(), ds::Json::object(), 1 << 16);
  if (!read.ok()) return 0;
  const auto tokenizer = ds::Tokenizer::create(*read);
  if (!tokenizer.ok()) return 0;
  for (const ds::TokenId id : (*tokenizer)->encode(text.substr(0, 4096), false)) {
    DS_CHECK(id >= 0 && id < (*tokenizer)->vocab_size() && !(*tokenizer)->is_special(id));
  }
  for (const ds::TokenId id : (*tokenizer)->encode(text.substr(0, 4096), true)) {
    DS_CHECK(id >= 0 && id < (*tokenizer)->vocab_size());
  }
  return 0;
}
