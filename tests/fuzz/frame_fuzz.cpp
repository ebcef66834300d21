// SPDX-License-Identifier: Apache-2.0
// Frames of the data socket: u8 number of frames, then per frame u16 length (little-endian) and
// bytes. Whatever they hold, parse() gives a message or an error that can be encoded.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "serve/wire.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  std::vector<std::string_view> frames;
  size_t at = 1;
  for (int i = 0; i < data[0] && at + 2 <= size; ++i) {
    const size_t wanted = data[at] | data[at + 1] << 8;
    at += 2;
    const size_t length = wanted < size - at ? wanted : size - at;
    frames.emplace_back(reinterpret_cast<const char*>(data) + at, length);
    at += length;
  }
  ds::wire::Limits limits;
  limits.max_header_bytes = 8192;
  limits.max_attachment_bytes = 4096;
  limits.max_attachments = 4;
  limits.vocab_size = 640;
  const ds::wire::Message message = ds::wire::parse(frames, limits);
  if (const auto* error = std::get_if<ds::wire::Error>(&message)) {
    if (error->code.empty() || ds::dump_json(ds::wire::encode(*error)).empty()) std::abort();
  }
  if (const auto* feedback = std::get_if<ds::wire::Feedback>(&message)) {
    if (feedback->submission.seq < 1 || feedback->submission.client.empty()) std::abort();
  }
  return 0;
}
