// SPDX-License-Identifier: Apache-2.0
// Second step of the GGUF reader: metadata to ModelConfig and TokenizerData, tensors to HF names.
// Keys as written by llama.cpp's convert_hf_to_gguf.py for the architecture `llama`.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "storage/dequantize.h"
#include "storage/gguf.h"

namespace ds {
namespace {

// Token types of tokenizer.ggml.token_type (llama.h: llama_token_type).
constexpr int64_t kControlToken = 3;
constexpr int64_t kUserDefinedToken = 4;

/// Typed access to metadata. Messages name the key, the type found and the type wanted.
class Metadata {
 public:
  explicit Metadata(const Gguf& file) : file_(file) {}

  bool has(std::string_view key) const { return file_.metadata.contains(key); }

  Result<int64_t> integer(std::string_view key) const {
    DS_ASSIGN(const GgufValue value, scalar(key, "an integer"));
    return integer_at(key, value, 0);
  }
  Result<int64_t> integer(std::string_view key, int64_t fallback) const {
    if (!has(key)) return fallback;
    return integer(key);
  }

  Result<double> real(std::string_view key) const {
    DS_ASSIGN(const GgufValue value, scalar(key, "a float"));
    if (value.type == GgufType::kF32) return static_cast<double>(load<float>(value, 0));
    if (value.type == GgufType::kF64) return load<double>(value, 0);
    return wrong_type(key, value, "a float");
  }
  Result<double> real(std::string_view key, double fallback) const {
    if (!has(key)) return fallback;
    return real(key);
  }

  Result<std::string> text(std::string_view key) const {
    DS_ASSIGN(const GgufValue value, scalar(key, "a string"));
    if (value.type != GgufType::kString) return wrong_type(key, value, "a string");
    return std::string(string_bytes(value).substr(sizeof(uint64_t)));
  }
  Result<std::string> text(std::string_view key, std::string_view fallback) const {
    if (!has(key)) return std::string(fallback);
    return text(key);
  }

  Result<GgufValue> strings(std::string_view key) const {
    DS_ASSIGN(const GgufValue value, find(key, "an array of strings"));
    if (value.is_array && value.type == GgufType::kString) return value;
    return wrong_type(key, value, "an array of strings");
  }
  /// Copies an array of strings, whose lengths parse_gguf has checked.
  static std::vector<std::string> copy_strings(const GgufValue& value) {
    std::vector<std::string> out;
    out.reserve(value.count);
    std::string_view rest = string_bytes(value);
    for (uint64_t i = 0; i < value.count; ++i) {
      uint64_t length;
      std::memcpy(&length, rest.data(), sizeof length);
      out.emplace_back(rest.substr(sizeof length, length));
      rest.remove_prefix(sizeof length + length);
    }
    return out;
  }

  Result<std::vector<int32_t>> integers_equal_to(std::string_view key, int64_t wanted,
                                                 uint64_t count) const {
    std::vector<int32_t> indices;
    if (!has(key)) return indices;
    DS_ASSIGN(const GgufValue value, find(key, "an array of integers"));
    if (!value.is_array) return wrong_type(key, value, "an array of integers");
    if (value.count != count) {
      return invalid(std::string(key) + " has " + std::to_string(value.count) +
                     " entries, expected one per token: " + std::to_string(count));
    }
    for (uint64_t i = 0; i < count; ++i) {
      DS_ASSIGN(const int64_t entry, integer_at(key, value, i));
      if (entry == wanted) indices.push_back(static_cast<int32_t>(i));
    }
    return indices;
  }

 private:
  template <typename T>
  static T load(const GgufValue& value, uint64_t index) {
    T out;
    std::memcpy(&out, value.bytes.data() + index * sizeof(T), sizeof out);
    return out;
  }
  static std::string_view string_bytes(const GgufValue& value) {
    return {reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size()};
  }

  static Status wrong_type(std::string_view key, const GgufValue& value, std::string_view wanted) {
    const std::string type(gguf_type_name(value.type));
    return invalid(std::string(key) + " is " + (value.is_array ? "an array of " + type : type) +
                   ", expected " + std::string(wanted));
  }

  static Result<int64_t> integer_at(std::string_view key, const GgufValue& value, uint64_t i) {
    switch (value.type) {
      case GgufType::kU8:
        return load<uint8_t>(value, i);
      case GgufType::kI8:
        return load<int8_t>(value, i);
      case GgufType::kU16:
        return load<uint16_t>(value, i);
      case GgufType::kI16:
        return load<int16_t>(value, i);
      case GgufType::kU32:
        return load<uint32_t>(value, i);
      case GgufType::kI32:
        return load<int32_t>(value, i);
      case GgufType::kI64:
        return load<int64_t>(value, i);
      case GgufType::kU64:
        if (const auto n = load<uint64_t>(value, i); n <= static_cast<uint64_t>(INT64_MAX)) {
          return static_cast<int64_t>(n);
        }
        return invalid(std::string(key) + " is above 2^63");
      default:
        return wrong_type(key, value, "an integer");
    }
  }

  Result<GgufValue> find(std::string_view key, std::string_view wanted) const {
    const auto it = file_.metadata.find(key);
    if (it == file_.metadata.end()) {
      return invalid("metadata key " + std::string(key) + " is missing, expected " +
                     std::string(wanted));
    }
    return it->second;
  }
  Result<GgufValue> scalar(std::string_view key, std::string_view wanted) const {
    DS_ASSIGN(const GgufValue value, find(key, wanted));
    if (value.is_array) return wrong_type(key, value, wanted);
    return value;
  }

  const Gguf& file_;
};

/// Wavelength-dependent divisors of the rotation frequencies, as Llama 3.1 defines them
/// (transformers: _compute_llama3_parameters).
float llama3_divisor(const ModelConfig& c, int64_t pair) {
  const double exponent = 2.0 * static_cast<double>(pair) / static_cast<double>(c.head_dim);
  const double wavelength = 2.0 * M_PI * std::pow(c.rope_theta, exponent);
  const auto original = static_cast<double>(c.rope_original_context);
  if (wavelength < original / c.rope_high_freq_factor) return 1.0f;
  if (wavelength > original / c.rope_low_freq_factor) return static_cast<float>(c.rope_factor);
  const double smooth = (original / wavelength - c.rope_low_freq_factor) /
                        (c.rope_high_freq_factor - c.rope_low_freq_factor);
  return static_cast<float>(1.0 / ((1.0 - smooth) / c.rope_factor + smooth));
}

/// llama.cpp ships Llama 3's scaling only as its result, the tensor rope_freqs.weight. The settings
/// are found again: the largest divisor is the factor, the original context a power of two.
Status recover_llama3(const GgufTensor& freqs, ModelConfig& c) {
  if (freqs.dtype != FileDtype::kF32) return unsupported("rope_freqs.weight is not F32");
  DS_TRY(check_shape("rope_freqs.weight", freqs.shape, {c.head_dim / 2}));
  std::vector<float> divisors(static_cast<size_t>(c.head_dim / 2));
  dequantize(freqs.dtype, freqs.data.data(), c.head_dim / 2, divisors.data());
  c.rope_scaling = RopeScaling::kLlama3;
  c.rope_factor = *std::max_element(divisors.begin(), divisors.end());
  for (c.rope_original_context = 256; c.rope_original_context <= int64_t{1} << 24;
       c.rope_original_context *= 2) {
    bool equal = c.rope_factor >= 1.0;
    for (int64_t i = 0; equal && i < c.head_dim / 2; ++i) {
      const float wanted = llama3_divisor(c, i);
      equal = std::abs(divisors[static_cast<size_t>(i)] - wanted) <= 1e-4f * wanted;
    }
    if (equal) return {};
  }
  return unsupported(
      "rope_freqs.weight: no Llama 3 scaling with low 1 and high 4 gives its values");
}

Status read_rope(const Metadata& meta, const Gguf& file, ModelConfig& c) {
  DS_ASSIGN(c.rope_theta, meta.real("llama.rope.freq_base", 10000.0));
  DS_ASSIGN(const int64_t rotated, meta.integer("llama.rope.dimension_count", c.head_dim));
  if (rotated != c.head_dim) {
    return unsupported("llama.rope.dimension_count is " + std::to_string(rotated) +
                       ", expected the head size " + std::to_string(c.head_dim));
  }
  DS_ASSIGN(c.rope_factor, meta.real("llama.rope.scale_linear", 1.0));  // files of 2023
  DS_ASSIGN(const std::string scaling,
            meta.text("llama.rope.scaling.type", c.rope_factor == 1.0 ? "none" : "linear"));
  if (scaling == "linear") {
    c.rope_scaling = RopeScaling::kLinear;
    DS_ASSIGN(c.rope_factor, meta.real("llama.rope.scaling.factor", c.rope_factor));
  } else if (scaling != "none") {
    return unsupported("llama.rope.scaling.type \"" + scaling + "\", expected none or linear");
  }
  const auto freqs = file.tensors.find("rope_freqs.weight");
  if (freqs == file.tensors.end()) return {};
  if (c.rope_scaling != RopeScaling::kNone) {
    return unsupported("rope_freqs.weight together with llama.rope.scaling.type " + scaling);
  }
  DS_TRY(check_config(c));
  return recover_llama3(freqs->second, c);
}

Result<ModelConfig> read_config(const Metadata& meta, const Gguf& file) {
  ModelConfig c;
  DS_ASSIGN(c.architecture, meta.text("general.architecture"));
  if (c.architecture != "llama") {
    return unsupported("general.architecture \"" + c.architecture + "\", expected \"llama\"");
  }
  DS_ASSIGN(const int64_t experts, meta.integer("llama.expert_count", 0));
  if (experts != 0) {
    return unsupported("llama.expert_count " + std::to_string(experts) + ", expected 0");
  }
  DS_ASSIGN(c.n_layers, meta.integer("llama.block_count"));
  DS_ASSIGN(c.d_model, meta.integer("llama.embedding_length"));
  DS_ASSIGN(c.d_ff, meta.integer("llama.feed_forward_length"));
  DS_ASSIGN(c.context, meta.integer("llama.context_length"));
  DS_ASSIGN(c.n_heads, meta.integer("llama.attention.head_count"));
  DS_ASSIGN(c.n_kv_heads, meta.integer("llama.attention.head_count_kv", c.n_heads));
  DS_ASSIGN(const double epsilon, meta.real("llama.attention.layer_norm_rms_epsilon"));
  c.norm_eps = static_cast<float>(epsilon);
  const int64_t usual = c.n_heads > 0 ? c.d_model / c.n_heads : 0;
  DS_ASSIGN(c.head_dim, meta.integer("llama.attention.key_length", usual));
  DS_ASSIGN(const int64_t v_dim, meta.integer("llama.attention.value_length", c.head_dim));
  if (v_dim != c.head_dim) {
    return unsupported("llama.attention.value_length " + std::to_string(v_dim) +
                       ", expected key_length " + std::to_string(c.head_dim));
  }
  DS_ASSIGN(const GgufValue tokens, meta.strings("tokenizer.ggml.tokens"));
  c.vocab = static_cast<int64_t>(std::min<uint64_t>(tokens.count, INT64_MAX));
  c.tied_head = !file.tensors.contains("output.weight");
  c.attention_bias = file.tensors.contains("blk.0.attn_q.bias");
  c.mlp_bias = file.tensors.contains("blk.0.ffn_up.bias");
  DS_TRY(read_rope(meta, file, c));
  DS_TRY(check_config(c));
  if (static_cast<uint64_t>(c.n_layers) > file.tensors.size()) {
    return invalid("llama.block_count is " + std::to_string(c.n_layers) + ", the file has " +
                   std::to_string(file.tensors.size()) + " tensors");
  }
  return c;
}

Result<int32_t> token_id(const Metadata& meta, std::string_view key, int64_t vocab) {
  DS_ASSIGN(const int64_t id, meta.integer(key, -1));
  if (id < -1 || id >= vocab) {
    return invalid(std::string(key) + " is " + std::to_string(id) + ", the vocabulary has " +
                   std::to_string(vocab) + " tokens");
  }
  return static_cast<int32_t>(id);
}

Result<TokenizerData> read_tokenizer(const Metadata& meta, int64_t vocab) {
  DS_ASSIGN(const std::string model, meta.text("tokenizer.ggml.model"));
  if (model != "gpt2") {
    return unsupported("tokenizer.ggml.model \"" + model + "\", expected \"gpt2\"");
  }
  TokenizerData data;
  DS_ASSIGN(data.pre_tokenizer, meta.text("tokenizer.ggml.pre"));
  DS_ASSIGN(const GgufValue tokens, meta.strings("tokenizer.ggml.tokens"));
  DS_ASSIGN(const GgufValue merges, meta.strings("tokenizer.ggml.merges"));
  data.tokens = Metadata::copy_strings(tokens);
  data.merges = Metadata::copy_strings(merges);
  constexpr std::string_view kTypes = "tokenizer.ggml.token_type";
  DS_ASSIGN(data.special, meta.integers_equal_to(kTypes, kControlToken, tokens.count));
  DS_ASSIGN(data.user_defined, meta.integers_equal_to(kTypes, kUserDefinedToken, tokens.count));
  DS_ASSIGN(data.bos, token_id(meta, "tokenizer.ggml.bos_token_id", vocab));
  DS_ASSIGN(data.eos, token_id(meta, "tokenizer.ggml.eos_token_id", vocab));
  DS_ASSIGN(data.unk, token_id(meta, "tokenizer.ggml.unknown_token_id", vocab));
  DS_ASSIGN(data.pad, token_id(meta, "tokenizer.ggml.padding_token_id", vocab));
  DS_ASSIGN(data.chat_template, meta.text("tokenizer.chat_template", ""));
  return data;
}

Status map_tensors(const Gguf& file, const ModelConfig& config,
                   std::map<std::string, TensorInfo>& out) {
  size_t used = file.tensors.contains("rope_freqs.weight") ? 1 : 0;
  const std::vector<ExpectedTensor> expected = llama_tensors(config);
  for (const ExpectedTensor& want : expected) {
    const auto it = file.tensors.find(want.gguf_name);
    if (it == file.tensors.end()) return missing_tensor(want.gguf_name, want.shape);
    const GgufTensor& found = it->second;
    DS_TRY(check_shape(want.gguf_name, found.shape, want.shape));
    if (want.shape.size() == 1 && block_weights(found.dtype) != 1) {
      return unsupported(want.gguf_name + ": " + std::string(dtype_name(found.dtype)) +
                         ", expected F32, F16 or BF16 for a vector");
    }
    out[want.hf_name] = {want.hf_name,      found.dtype,       found.shape,
                         found.data.data(), found.data.size(), want.gguf_permuted_rows};
    ++used;
  }
  if (used == file.tensors.size()) return {};
  std::map<std::string_view, bool> known{{"rope_freqs.weight", true}};
  for (const ExpectedTensor& want : expected) known.emplace(want.gguf_name, true);
  for (const auto& [name, tensor] : file.tensors) {
    if (!known.contains(name)) {
      return unsupported("unknown tensor " + std::string(name) + " for the llama architecture");
    }
  }
  return {};
}

}  // namespace

Result<ModelContents> read_gguf_model(std::span<const std::byte> bytes) {
  DS_ASSIGN(const Gguf file, parse_gguf(bytes));
  const Metadata meta(file);
  ModelContents contents;
  DS_ASSIGN(contents.config, read_config(meta, file));
  DS_ASSIGN(contents.name, meta.text("general.name", ""));
  // Shapes before the tokenizer: the embedding's rows bound the vocabulary that is copied.
  DS_TRY(map_tensors(file, contents.config, contents.tensors));
  DS_ASSIGN(contents.tokenizer, read_tokenizer(meta, contents.config.vocab));
  return contents;
}

}  // namespace ds
