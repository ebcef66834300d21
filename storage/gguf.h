// SPDX-License-Identifier: Apache-2.0
// GGUF, versions 2 and 3, little endian
// (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): header, typed key-value metadata,
// tensor descriptions, padding, tensor data. Two steps: bytes to checked views, then views to a
// Llama model in HF names.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "ds/status.h"
#include "storage/llama_tensors.h"

namespace ds {

enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
};
std::string_view gguf_type_name(GgufType type);

/// A metadata value where it lies in the file: bounds and type are checked, nothing is copied.
struct GgufValue {
  GgufType type;  ///< of the elements if is_array
  bool is_array = false;
  uint64_t count = 1;                ///< elements
  std::span<const std::byte> bytes;  ///< strings: u64 length + text each
};

struct GgufTensor {
  FileDtype dtype;
  std::vector<int64_t> shape;  ///< row-major (GGUF stores the innermost first), 1 to 4 dimensions
  std::span<const std::byte> data;
};

/// Views into the parsed bytes, which must outlive this.
struct Gguf {
  uint32_t version = 0;
  std::map<std::string_view, GgufValue> metadata;
  std::map<std::string_view, GgufTensor> tensors;
};

/// Checks every count, length and offset against the bytes given. Tensors may not overlap.
Result<Gguf> parse_gguf(std::span<const std::byte> bytes);

/// A `llama` model: config, gpt2 tokenizer, tensors in HF names. Unknown and missing tensors, other
/// architectures and wrong shapes are refused by name. TensorInfo::data points into `bytes`.
Result<ModelContents> read_gguf_model(std::span<const std::byte> bytes);

}  // namespace ds
