// SPDX-License-Identifier: Apache-2.0
// Format: https://huggingface.co/docs/safetensors. Like the reference implementation, the reader
// wants the data section covered exactly once: no gaps, no overlaps, nothing behind it.
#include "storage/safetensors.h"

#include <algorithm>
#include <cstring>

#include "storage/json.h"

namespace ds {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's limit

/// Bytes of one element, 0 for a name that is not a dtype.
uint64_t element_bytes(std::string_view dtype) {
  struct Entry {
    std::string_view name;
    uint64_t bytes;
  };
  constexpr Entry kDtypes[] = {{"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2},    {"I64", 8},
                               {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
                               {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  for (const Entry& entry : kDtypes) {
    if (entry.name == dtype) return entry.bytes;
  }
  return 0;
}

Result<uint64_t> get_offset(const Json& value, std::string_view what) {
  if (!value.is_number_unsigned()) {
    return corrupt(std::string(what) + " is " + value.type_name() +
                   ", expected a non-negative integer");
  }
  return value.get<uint64_t>();
}

struct Range {
  uint64_t begin, end;
  const std::string* name;
};

Status read_tensor(const std::string& name, const Json& entry, std::span<const std::byte> data,
                   SafeTensor& tensor, Range& range) {
  DS_ASSIGN(tensor.dtype, get_string(entry, "dtype"));
  const uint64_t element = element_bytes(tensor.dtype);
  if (element == 0) {
    return unsupported("dtype \"" + tensor.dtype +
                       "\", expected F32, F16, BF16 or another of safetensors");
  }
  const Json* shape = find(entry, "shape");
  const Json* offsets = find(entry, "data_offsets");
  if (!shape || !shape->is_array()) return corrupt("\"shape\" is missing or no array");
  if (!offsets || !offsets->is_array() || offsets->size() != 2) {
    return corrupt("\"data_offsets\" is missing or not [begin, end]");
  }
  uint64_t bytes = element;
  for (const Json& item : *shape) {
    DS_ASSIGN(const uint64_t dim, get_offset(item, "a dimension"));
    if (dim > static_cast<uint64_t>(INT64_MAX) || __builtin_mul_overflow(bytes, dim, &bytes)) {
      return corrupt("shape " + shape->dump() + " overflows 64 bits");
    }
    tensor.shape.push_back(static_cast<int64_t>(dim));
  }
  DS_ASSIGN(range.begin, get_offset((*offsets)[0], "the begin offset"));
  DS_ASSIGN(range.end, get_offset((*offsets)[1], "the end offset"));
  if (range.begin > range.end || range.end > data.size()) {
    return corrupt("data_offsets " + offsets->dump() + " outside the " +
                   std::to_string(data.size()) + " bytes of data");
  }
  if (range.end - range.begin != bytes) {
    return corrupt("data_offsets " + offsets->dump() + " hold " +
                   std::to_string(range.end - range.begin) + " bytes, " + tensor.dtype + " " +
                   shape->dump() + " needs " + std::to_string(bytes));
  }
  range.name = &name;
  tensor.data = data.subspan(range.begin, bytes);
  return {};
}

Status check_coverage(std::vector<Range>& ranges, uint64_t data_bytes) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t covered = 0;
  for (const Range& range : ranges) {
    if (range.begin != covered) {
      return corrupt("safetensors: tensor \"" + *range.name + "\" begins at byte " +
                     std::to_string(range.begin) + " of the data, expected " +
                     std::to_string(covered));
    }
    covered = range.end;
  }
  if (covered != data_bytes) {
    return corrupt("safetensors: tensors cover " + std::to_string(covered) + " of " +
                   std::to_string(data_bytes) + " bytes of data");
  }
  return {};
}

Status read_metadata(const Json& object, std::map<std::string, std::string>& metadata) {
  if (!object.is_object()) return corrupt("safetensors: __metadata__ is no object");
  for (const auto& [key, value] : object.items()) {
    if (!value.is_string()) {
      return corrupt("safetensors: __metadata__ \"" + key + "\" is " + value.type_name() +
                     ", expected a string");
    }
    metadata[key] = value.get_ref<const std::string&>();
  }
  return {};
}

}  // namespace

Result<SafeTensors> parse_safetensors(std::span<const std::byte> bytes) {
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof header_bytes) {
    return corrupt("safetensors: " + std::to_string(bytes.size()) +
                   " bytes, expected at least 8 for the header's length");
  }
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  bytes = bytes.subspan(sizeof header_bytes);
  if (header_bytes > std::min<uint64_t>(bytes.size(), kMaxHeaderBytes)) {
    return corrupt("safetensors: header of " + std::to_string(header_bytes) + " bytes, " +
                   std::to_string(bytes.size()) + " bytes are left and " +
                   std::to_string(kMaxHeaderBytes) + " allowed");
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), header_bytes);
  Result<Json> header = parse_json(text, 8);
  if (!header.ok()) return header.status().in("safetensors: header");
  if (!header->is_object()) return corrupt("safetensors: the header is no JSON object");

  const std::span<const std::byte> data = bytes.subspan(header_bytes);
  SafeTensors contents;
  std::vector<Range> ranges;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") {
      DS_TRY(read_metadata(entry, contents.metadata));
      continue;
    }
    const auto it = contents.tensors.try_emplace(name).first;
    Status read = read_tensor(it->first, entry, data, it->second, ranges.emplace_back());
    if (!read.ok()) return read.in("safetensors: tensor \"" + name + "\"");
  }
  DS_TRY(check_coverage(ranges, data.size()));
  return contents;
}

std::string serialize_safetensors(const SafeTensors& contents) {
  Json header = Json::object();
  if (!contents.metadata.empty()) header["__metadata__"] = contents.metadata;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : contents.tensors) {
    const uint64_t element = element_bytes(tensor.dtype);
    uint64_t bytes = element;
    for (const int64_t dim : tensor.shape) bytes *= static_cast<uint64_t>(dim);
    DS_CHECK(element != 0 && bytes == tensor.data.size());
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = dump_json(header);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data starts on a multiple of 8, as HF writes it

  const uint64_t header_bytes = text.size();
  std::string out;
  out.reserve(sizeof header_bytes + text.size() + offset);
  out.append(reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes);
  out += text;
  for (const auto& [name, tensor] : contents.tensors) {
    out.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  }
  return out;
}

}  // namespace ds
