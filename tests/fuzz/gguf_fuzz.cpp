// SPDX-License-Identifier: Apache-2.0
// A GGUF file up to what the daemon does at load: read, dequantise both ends of every tensor, build
// tokenizer and chat template.
#include <vector>

#include "engine/tokenizer.h"
#include "storage/dequantize.h"
#include "storage/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto read = ds::read_gguf_model(std::as_bytes(std::span(data, size)));
  if (!read.ok()) return 0;
  for (const auto& [name, tensor] : read->tensors) {
    const int64_t step = ds::block_weights(tensor.dtype);
    std::vector<float> out(static_cast<size_t>(step));
    ds::dequantize(tensor.dtype, tensor.data, step, out.data());
    ds::dequantize(tensor.dtype, tensor.data + tensor.bytes - ds::block_bytes(tensor.dtype), step,
                   out.data());
  }
  const auto tokenizer = ds::Tokenizer::create(read->tokenizer);
  const auto chat = ds::ChatTemplate::create(read->tokenizer);
  if (!tokenizer.ok() || !chat.ok() || !chat->available()) return 0;
  const std::vector<ds::ChatMessage> messages{{"user", "hello <|im_end|> 12"}};
  (void)chat->render(**tokenizer, messages, true).ok();
  return 0;
}
