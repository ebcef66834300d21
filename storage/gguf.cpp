// SPDX-License-Identifier: Apache-2.0
// First step of the GGUF reader: bytes to checked views.
#include "storage/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "storage/dequantize.h"

namespace ds {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF and safetensors are read in place");

constexpr uint64_t kMaxEntries = 65536;   // metadata keys or tensors; the largest models have ~2000
constexpr uint64_t kMaxKeyBytes = 65535;  // as the specification says
constexpr uint64_t kMinKeyBytes = 8 + 1 + 4 + 1;  // length, one letter, type, one byte
constexpr uint64_t kMinTensorBytes =
    8 + 1 + 4 + 8 + 4 + 8;  // length, letter, dims, dim, type, offset
constexpr uint64_t kDefaultAlignment = 32;
constexpr const char* kReadTypes = ", expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1";

/// Bytes of one value of a fixed-size type; 0 for strings, arrays and unknown types.
uint64_t fixed_bytes(GgufType type) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kI8:
    case GgufType::kBool:
      return 1;
    case GgufType::kU16:
    case GgufType::kI16:
      return 2;
    case GgufType::kU32:
    case GgufType::kI32:
    case GgufType::kF32:
      return 4;
    case GgufType::kU64:
    case GgufType::kI64:
    case GgufType::kF64:
      return 8;
    default:
      return 0;
  }
}

/// ggml's tensor types by id, nullptr for ids without one. Only six of them are read.
const char* ggml_type_name(uint32_t id) {
  constexpr const char* kNames[] = {
      "F32",   "F16",        "Q4_0",       "Q4_1",       "Q4_2",     "Q4_3",     "Q5_0",
      "Q5_1",  "Q8_0",       "Q8_1",       "Q2_K",       "Q3_K",     "Q4_K",     "Q5_K",
      "Q6_K",  "Q8_K",       "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",  "IQ1_S",    "IQ4_NL",
      "IQ3_S", "IQ2_S",      "IQ4_XS",     "I8",         "I16",      "I32",      "I64",
      "F64",   "IQ1_M",      "BF16",       "Q4_0_4_4",   "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",
      "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"};
  return id < std::size(kNames) ? kNames[id] : nullptr;
}

Result<FileDtype> tensor_dtype(uint32_t id) {
  switch (id) {
    case 0:
      return FileDtype::kF32;
    case 1:
      return FileDtype::kF16;
    case 2:
      return FileDtype::kQ4_0;
    case 3:
      return FileDtype::kQ4_1;
    case 8:
      return FileDtype::kQ8_0;
    case 30:
      return FileDtype::kBF16;
    default:
      break;
  }
  if (const char* name = ggml_type_name(id)) {
    return unsupported(std::string("type ") + name + kReadTypes);
  }
  return corrupt("type id " + std::to_string(static_cast<int32_t>(id)) + ", which ggml has not" +
                 kReadTypes);
}

/// The one place that moves through the header. Never passes the end.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}

  uint64_t position() const { return position_; }
  uint64_t left() const { return bytes_.size() - position_; }

  Result<std::span<const std::byte>> take(uint64_t count, std::string_view what) {
    if (count > left()) {
      return corrupt(std::string(what) + " at byte " + std::to_string(position_) + " needs " +
                     std::to_string(count) + " bytes, " + std::to_string(left()) + " are left");
    }
    const auto taken = bytes_.subspan(position_, count);
    position_ += count;
    return taken;
  }

  template <typename T>
  Result<T> number(std::string_view what) {
    DS_ASSIGN(const auto bytes, take(sizeof(T), what));
    T value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }

  Result<std::string_view> string(std::string_view what) {
    DS_ASSIGN(const uint64_t length, number<uint64_t>(what));
    DS_ASSIGN(const auto text, take(length, what));
    return std::string_view(reinterpret_cast<const char*>(text.data()), text.size());
  }

  /// An element count, refused when that many of at least `each` bytes cannot follow.
  Result<uint64_t> count(std::string_view what, uint64_t each) {
    const uint64_t at = position_;
    DS_ASSIGN(const uint64_t n, number<uint64_t>(what));
    if (n > left() / each) {
      return corrupt(std::string(what) + " at byte " + std::to_string(at) + " is " +
                     std::to_string(n) + ", " + std::to_string(left()) +
                     " bytes are left and each needs " + std::to_string(each));
    }
    return n;
  }

 private:
  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
};

Result<GgufType> read_type(Cursor& in) {
  const uint64_t at = in.position();
  DS_ASSIGN(const uint32_t id, in.number<uint32_t>("value type"));
  if (id > static_cast<uint32_t>(GgufType::kF64)) {
    return corrupt("value type " + std::to_string(static_cast<int32_t>(id)) + " at byte " +
                   std::to_string(at) + ", expected 0 to 12");
  }
  return static_cast<GgufType>(id);
}

Result<GgufValue> read_value(Cursor& in) {
  GgufValue value;
  DS_ASSIGN(value.type, read_type(in));
  if (value.type == GgufType::kArray) {
    value.is_array = true;
    DS_ASSIGN(value.type, read_type(in));
    if (value.type == GgufType::kArray) {
      return unsupported("arrays of arrays, expected an array of numbers, bools or strings");
    }
    const uint64_t fixed = fixed_bytes(value.type);
    DS_ASSIGN(value.count, in.count("array length", fixed ? fixed : sizeof(uint64_t)));
  }
  if (const uint64_t fixed = fixed_bytes(value.type)) {
    DS_ASSIGN(value.bytes, in.take(value.count * fixed, "value"));
    return value;
  }
  Cursor strings = in;  // walks ahead to find the end
  for (uint64_t i = 0; i < value.count; ++i) {
    DS_TRY(strings.string(value.is_array ? "string " + std::to_string(i) : "string").status());
  }
  DS_ASSIGN(value.bytes, in.take(strings.position() - in.position(), "strings"));
  return value;
}

Status read_metadata(Cursor& in, uint64_t count, Gguf& file) {
  for (uint64_t i = 0; i < count; ++i) {
    const std::string which = "metadata key " + std::to_string(i);
    DS_ASSIGN(const std::string_view key, in.string(which));
    if (key.empty() || key.size() > kMaxKeyBytes) {
      return corrupt(which + " has " + std::to_string(key.size()) + " bytes, expected 1 to 65535");
    }
    Result<GgufValue> value = read_value(in);
    if (!value.ok()) return value.status().in(key);
    if (!file.metadata.emplace(key, *value).second) {
      return corrupt("duplicate metadata key " + std::string(key));
    }
  }
  return {};
}

/// A tensor's place relative to the data section, which begins where the header will end.
struct Placement {
  uint64_t offset, bytes;
  std::string_view name;
};

Status read_tensor(Cursor& in, GgufTensor& tensor, Placement& place) {
  const uint64_t at = in.position();
  DS_ASSIGN(const uint32_t n_dims, in.number<uint32_t>("number of dimensions"));
  if (n_dims < 1 || n_dims > 4) {
    return corrupt(std::to_string(n_dims) + " dimensions at byte " + std::to_string(at) +
                   ", expected 1 to 4");
  }
  uint64_t elements = 1;
  for (uint32_t d = 0; d < n_dims; ++d) {
    DS_ASSIGN(const uint64_t size, in.number<uint64_t>("dimension"));
    if (size == 0 || __builtin_mul_overflow(elements, size, &elements) ||
        elements > static_cast<uint64_t>(INT64_MAX) / 64) {
      return corrupt("dimension " + std::to_string(d) + " is " + std::to_string(size) +
                     ": the number of elements must fit 57 bits and not be 0");
    }
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
  }
  DS_ASSIGN(const uint32_t type, in.number<uint32_t>("tensor type"));
  DS_ASSIGN(tensor.dtype, tensor_dtype(type));
  const auto block = static_cast<uint64_t>(block_weights(tensor.dtype));
  if (static_cast<uint64_t>(tensor.shape.back()) % block != 0) {
    return corrupt("rows of " + std::to_string(tensor.shape.back()) + " values, " +
                   std::string(dtype_name(tensor.dtype)) + " needs a multiple of " +
                   std::to_string(block));
  }
  place.bytes = elements / block * static_cast<uint64_t>(block_bytes(tensor.dtype));
  DS_ASSIGN(place.offset, in.number<uint64_t>("tensor offset"));
  return {};
}

Result<uint64_t> alignment_of(const Gguf& file) {
  const auto it = file.metadata.find("general.alignment");
  if (it == file.metadata.end()) return kDefaultAlignment;
  const GgufValue& value = it->second;
  if (value.type != GgufType::kU32 || value.is_array) {
    return corrupt("general.alignment is " + std::string(value.is_array ? "an array of " : "") +
                   std::string(gguf_type_name(value.type)) + ", expected u32");
  }
  uint32_t alignment;
  std::memcpy(&alignment, value.bytes.data(), sizeof alignment);
  if (alignment < 8 || !std::has_single_bit(alignment)) {
    return corrupt("general.alignment is " + std::to_string(alignment) +
                   ", expected a power of two from 8 on");
  }
  return alignment;
}

Status place_tensors(std::span<const std::byte> data, uint64_t alignment,
                     std::vector<Placement>& places, Gguf& file) {
  for (const Placement& place : places) {
    const std::string name(place.name);
    if (place.offset % alignment != 0) {
      return corrupt(name + ": offset " + std::to_string(place.offset) +
                     ", expected a multiple of the alignment " + std::to_string(alignment));
    }
    if (place.offset > data.size() || place.bytes > data.size() - place.offset) {
      return corrupt(name + ": " + std::to_string(place.bytes) + " bytes at offset " +
                     std::to_string(place.offset) + ", the file has " +
                     std::to_string(data.size()) + " bytes of tensor data");
    }
    file.tensors.at(place.name).data = data.subspan(place.offset, place.bytes);
  }
  std::sort(places.begin(), places.end(),
            [](const Placement& a, const Placement& b) { return a.offset < b.offset; });
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i].offset - places[i - 1].offset < places[i - 1].bytes) {
      return corrupt(std::string(places[i].name) + " at offset " +
                     std::to_string(places[i].offset) + " overlaps " +
                     std::string(places[i - 1].name) + ", which ends at " +
                     std::to_string(places[i - 1].offset + places[i - 1].bytes));
    }
  }
  return {};
}

Result<uint32_t> read_version(Cursor& in) {
  DS_ASSIGN(const uint32_t magic, in.number<uint32_t>("magic"));
  if (magic != 0x46554747u) return invalid("not a GGUF file (it does not start with \"GGUF\")");
  DS_ASSIGN(const uint32_t version, in.number<uint32_t>("version"));
  if (version == 2 || version == 3) return version;
  if ((version & 0xffffu) == 0 && version != 0) return unsupported("a big-endian GGUF file");
  return unsupported("GGUF version " + std::to_string(version) + ", expected 2 or 3");
}

}  // namespace

std::string_view gguf_type_name(GgufType type) {
  constexpr std::string_view kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
  return kNames[static_cast<uint32_t>(type)];
}

Result<Gguf> parse_gguf(std::span<const std::byte> bytes) {
  Cursor in(bytes);
  Gguf file;
  DS_ASSIGN(file.version, read_version(in));
  DS_ASSIGN(const uint64_t n_tensors, in.count("number of tensors", kMinTensorBytes));
  DS_ASSIGN(const uint64_t n_keys, in.count("number of metadata keys", kMinKeyBytes));
  if (n_tensors > kMaxEntries || n_keys > kMaxEntries) {
    return corrupt(std::to_string(n_tensors) + " tensors and " + std::to_string(n_keys) +
                   " metadata keys, expected at most " + std::to_string(kMaxEntries));
  }
  DS_TRY(read_metadata(in, n_keys, file));
  DS_ASSIGN(const uint64_t alignment, alignment_of(file));

  std::vector<Placement> places;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    DS_ASSIGN(const std::string_view name, in.string("name of tensor " + std::to_string(i)));
    const auto [it, fresh] = file.tensors.try_emplace(name);
    if (!fresh) return corrupt("duplicate tensor " + std::string(name));
    Placement& place = places.emplace_back();
    place.name = it->first;
    Status read = read_tensor(in, it->second, place);
    if (!read.ok()) return read.in(name);
  }
  const uint64_t padding = (alignment - in.position() % alignment) % alignment;
  const std::span<const std::byte> data =
      bytes.subspan(in.position() + std::min(padding, in.left()));
  DS_TRY(place_tensors(data, alignment, places, file));
  return file;
}

}  // namespace ds
