// SPDX-License-Identifier: Apache-2.0
// safetensors: u64 little-endian header length, JSON header, raw tensor bytes. Reader over a byte
// range (hostile input is refused with what and where), writer through the FileSystem seam.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "ds/status.h"
#include "storage/seams.h"

namespace ds {

struct SafeTensor {
  std::string dtype;  ///< "F32", "F16", "BF16", ...
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

struct SafeTensors {
  std::map<std::string, SafeTensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Views into `bytes`, which must outlive the result.
Result<SafeTensors> parse_safetensors(std::span<const std::byte> bytes);

/// Serialises in bytewise name order. The same tensors always give the same bytes.
std::string serialize_safetensors(const SafeTensors& contents);

}  // namespace ds
