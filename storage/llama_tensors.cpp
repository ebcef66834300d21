// SPDX-License-Identifier: Apache-2.0
#include "storage/llama_tensors.h"

#include <cmath>

namespace ds {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

Status in_range(std::string_view what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid(std::string(what) + " is " + std::to_string(value) + ", expected " +
                 std::to_string(low) + " to " + std::to_string(high));
}

Status positive(std::string_view what, double value) {
  if (std::isfinite(value) && value > 0) return {};
  return invalid(std::string(what) + " is " + std::to_string(value) +
                 ", expected a positive number");
}

}  // namespace

Status check_config(const ModelConfig& c) {
  // Far above any known model and small enough that rows * columns * 4 bytes stays below 2^63.
  constexpr int64_t kMaxWidth = int64_t{1} << 24;
  DS_TRY(in_range("number of layers", c.n_layers, 1, 1 << 14));
  DS_TRY(in_range("hidden size", c.d_model, 1, kMaxWidth));
  DS_TRY(in_range("feed-forward size", c.d_ff, 1, kMaxWidth));
  DS_TRY(in_range("vocabulary size", c.vocab, 1, kMaxWidth));
  DS_TRY(in_range("context length", c.context, 1, int64_t{1} << 31));
  DS_TRY(in_range("number of attention heads", c.n_heads, 1, 1 << 14));
  DS_TRY(in_range("number of key-value heads", c.n_kv_heads, 1, c.n_heads));
  DS_TRY(in_range("head size", c.head_dim, 2, 1 << 12));
  if (c.n_heads % c.n_kv_heads != 0) {
    return invalid(std::to_string(c.n_heads) + " attention heads, expected a multiple of the " +
                   std::to_string(c.n_kv_heads) + " key-value heads");
  }
  if (c.head_dim % 2 != 0) {
    return invalid("head size is " + std::to_string(c.head_dim) +
                   ", expected an even number (RoPE rotates pairs)");
  }
  DS_TRY(positive("norm epsilon", c.norm_eps));
  DS_TRY(positive("rope theta", c.rope_theta));
  DS_TRY(positive("rope factor", c.rope_factor));
  if (c.rope_scaling == RopeScaling::kLlama3) {
    DS_TRY(positive("rope low_freq_factor", c.rope_low_freq_factor));
    DS_TRY(positive("rope high_freq_factor", c.rope_high_freq_factor));
    DS_TRY(in_range("rope original_max_position_embeddings", c.rope_original_context, 1,
                    int64_t{1} << 31));
    if (c.rope_high_freq_factor <= c.rope_low_freq_factor) {
      return invalid("rope high_freq_factor is " + std::to_string(c.rope_high_freq_factor) +
                     ", expected more than low_freq_factor " +
                     std::to_string(c.rope_low_freq_factor));
    }
  }
  return {};
}

std::vector<ExpectedTensor> llama_tensors(const ModelConfig& c) {
  const int64_t q_rows = c.n_heads * c.head_dim;
  const int64_t kv_rows = c.n_kv_heads * c.head_dim;
  struct Linear {
    const char *hf, *gguf;
    int64_t out, in;
    bool bias, permuted;
  };
  const Linear linears[] = {
      {"self_attn.q_proj", "attn_q", q_rows, c.d_model, c.attention_bias, true},
      {"self_attn.k_proj", "attn_k", kv_rows, c.d_model, c.attention_bias, true},
      {"self_attn.v_proj", "attn_v", kv_rows, c.d_model, c.attention_bias, false},
      {"self_attn.o_proj", "attn_output", c.d_model, q_rows, c.attention_bias, false},
      {"mlp.gate_proj", "ffn_gate", c.d_ff, c.d_model, c.mlp_bias, false},
      {"mlp.up_proj", "ffn_up", c.d_ff, c.d_model, c.mlp_bias, false},
      {"mlp.down_proj", "ffn_down", c.d_model, c.d_ff, c.mlp_bias, false},
  };
  std::vector<ExpectedTensor> all;
  all.push_back({"model.embed_tokens.weight", "token_embd.weight", {c.vocab, c.d_model}});
  for (int64_t layer = 0; layer < c.n_layers; ++layer) {
    const std::string hf = "model.layers." + std::to_string(layer) + ".";
    const std::string gguf = "blk." + std::to_string(layer) + ".";
    all.push_back({hf + "input_layernorm.weight", gguf + "attn_norm.weight", {c.d_model}});
    all.push_back({hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight", {c.d_model}});
    for (const Linear& l : linears) {
      all.push_back({hf + l.hf + ".weight", gguf + l.gguf + ".weight", {l.out, l.in}, l.permuted});
      if (l.bias) {
        all.push_back({hf + l.hf + ".bias", gguf + l.gguf + ".bias", {l.out}, l.permuted});
      }
    }
  }
  all.push_back({"model.norm.weight", "output_norm.weight", {c.d_model}});
  if (!c.tied_head) all.push_back({"lm_head.weight", "output.weight", {c.vocab, c.d_model}});
  return all;
}

Status missing_tensor(const std::string& name, const std::vector<int64_t>& wanted) {
  return invalid("tensor " + name + " is missing, expected " + shape_text(wanted));
}

Status check_shape(const std::string& name, const std::vector<int64_t>& found,
                   const std::vector<int64_t>& wanted) {
  if (found == wanted) return {};
  if (found.size() != wanted.size()) {
    return invalid(name + ": shape " + shape_text(found) + ", the model wants " +
                   shape_text(wanted));
  }
  const size_t axis = found[0] != wanted[0] ? 0 : 1;
  const char* unit = wanted.size() == 1 ? " values" : axis == 0 ? " rows" : " columns";
  return invalid(name + ": " + std::to_string(found[axis]) + unit + ", the model wants " +
                 std::to_string(wanted[axis]));
}

}  // namespace ds
