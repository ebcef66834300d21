// SPDX-License-Identifier: Apache-2.0
// Writes GGUF bytes for tests, well-formed or deliberately not: every field can be set to anything.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ds::test {

template <typename T>
std::string raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
inline std::string raw_string(std::string_view text) {
  return raw<uint64_t>(text.size()) + std::string(text);
}

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

/// Where a file may be cut or changed with effect: everything in front of the tensor data.
struct GgufBytes {
  std::string bytes;
  size_t header_bytes = 0;
};

class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment =
      32;  ///< for padding; the key is written only by u32("general.alignment", ..)
  int64_t extra_tensors = 0, extra_keys = 0;  ///< added to the counts in the header

  /// A key with its type id and the bytes of its value. An existing key is replaced unless `again`.
  void key(const std::string& name, uint32_t type, const std::string& value, bool again = false) {
    for (Key& k : keys_) {
      if (k.name == name && !again) {
        k = {name, type, value};
        return;
      }
    }
    keys_.push_back({name, type, value});
  }
  void u32(const std::string& name, uint32_t value) { key(name, 4, raw(value)); }
  void f32(const std::string& name, float value) { key(name, 6, raw(value)); }
  void text(const std::string& name, std::string_view value) { key(name, 8, raw_string(value)); }
  void strings(const std::string& name, const std::vector<std::string>& values) {
    std::string bytes = raw<uint32_t>(8) + raw<uint64_t>(values.size());
    for (const std::string& value : values) bytes += raw_string(value);
    key(name, 9, bytes);
  }
  void i32s(const std::string& name, const std::vector<int32_t>& values) {
    std::string bytes = raw<uint32_t>(5) + raw<uint64_t>(values.size());
    for (const int32_t value : values) bytes += raw(value);
    key(name, 9, bytes);
  }
  void remove_key(const std::string& name) {
    std::erase_if(keys_, [&](const Key& k) { return k.name == name; });
  }

  struct Tensor {
    std::string name;
    std::vector<uint64_t> dims;  ///< innermost first, as in the file
    uint32_t type = 0;
    std::string data;
    int64_t offset = -1;  ///< -1: behind the tensor before
  };
  std::vector<Tensor> tensors;

  Tensor& tensor(const std::string& name) {
    for (Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    return tensors.emplace_back(Tensor{name, {}, 0, "", -1});
  }

  GgufBytes build() const {
    std::string head = "GGUF" + raw(version) + raw<uint64_t>(tensors.size() + extra_tensors) +
                       raw<uint64_t>(keys_.size() + extra_keys);
    for (const Key& k : keys_) head += raw_string(k.name) + raw(k.type) + k.value;
    std::string data;
    for (const Tensor& t : tensors) {
      data.resize(padded(data.size()));
      head += raw_string(t.name) + raw<uint32_t>(static_cast<uint32_t>(t.dims.size()));
      for (const uint64_t dim : t.dims) head += raw(dim);
      const auto offset = t.offset < 0 ? data.size() : static_cast<uint64_t>(t.offset);
      head += raw(t.type) + raw<uint64_t>(offset);
      data += t.data;
    }
    const size_t header_bytes = head.size();
    head.resize(padded(head.size()));
    return {head + data, header_bytes};
  }

 private:
  struct Key {
    std::string name;
    uint32_t type;
    std::string value;
  };
  size_t padded(size_t n) const { return (n + alignment - 1) / alignment * alignment; }

  std::vector<Key> keys_;
};

constexpr int kSmallVocab = 100;  ///< printable ASCII, "he", and four control tokens

/// A whole one-layer model: width 32, 2 heads, 1 KV head, head size 16, F32 norms, Q8_0 embedding,
/// Q4_0 and Q4_1 matrices. Scales are FP16 1.0, quants count up.
inline GgufBuilder small_model() {
  GgufBuilder b;
  b.text("general.architecture", "llama");
  b.text("general.name", "small");
  b.u32("llama.block_count", 1);
  b.u32("llama.context_length", 64);
  b.u32("llama.embedding_length", 32);
  b.u32("llama.feed_forward_length", 64);
  b.u32("llama.attention.head_count", 2);
  b.u32("llama.attention.head_count_kv", 1);
  b.f32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  b.f32("llama.rope.freq_base", 10000.0f);
  b.text("tokenizer.ggml.model", "gpt2");
  b.text("tokenizer.ggml.pre", "smollm");
  std::vector<std::string> tokens{"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>"};
  std::vector<int32_t> types{3, 3, 3, 4};
  for (char c = '!'; c <= '~'; ++c) tokens.emplace_back(1, c);
  tokens.insert(tokens.end(), {"\u0120", "he"});
  types.resize(tokens.size(), 1);
  b.strings("tokenizer.ggml.tokens", tokens);
  b.i32s("tokenizer.ggml.token_type", types);
  b.strings("tokenizer.ggml.merges", {"h e"});
  b.u32("tokenizer.ggml.bos_token_id", 1);
  b.u32("tokenizer.ggml.eos_token_id", 2);

  const auto blocks = [](uint64_t count, size_t header, size_t quants) {
    std::string data;
    for (uint64_t i = 0; i < count; ++i) {
      data += raw<uint16_t>(0x3c00);
      if (header == 4) data += raw<uint16_t>(0xbc00);
      for (size_t q = 0; q < quants; ++q) data += static_cast<char>(i * 7 + q);
    }
    return data;
  };
  const auto add = [&](const std::string& name, uint64_t rows, uint64_t columns, uint32_t type) {
    const uint64_t n = rows * columns / 32;
    std::string data = type == 8 ? blocks(n, 2, 32) : blocks(n, type == 3 ? 4 : 2, 16);
    b.tensors.push_back({name, {columns, rows}, type, data, -1});
  };
  const auto vector = [&](const std::string& name) {
    std::string data;
    for (int i = 0; i < 32; ++i) data += raw(1.0f + static_cast<float>(i));
    b.tensors.push_back({name, {32}, 0, data, -1});
  };
  add("token_embd.weight", kSmallVocab, 32, 8);
  vector("blk.0.attn_norm.weight");
  vector("blk.0.ffn_norm.weight");
  add("blk.0.attn_q.weight", 32, 32, 2);
  add("blk.0.attn_k.weight", 16, 32, 3);
  add("blk.0.attn_v.weight", 16, 32, 2);
  add("blk.0.attn_output.weight", 32, 32, 2);
  add("blk.0.ffn_gate.weight", 64, 32, 3);
  add("blk.0.ffn_up.weight", 64, 32, 2);
  add("blk.0.ffn_down.weight", 32, 64, 3);
  vector("output_norm.weight");
  return b;
}

}  // namespace ds::test
