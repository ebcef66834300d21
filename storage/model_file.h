// SPDX-License-Identifier: Apache-2.0
// A language model on disk, read-only: one GGUF file (`llama` architecture) or one Hugging Face
// folder (config.json, tokenizer.json, *.safetensors). Both come out in the same shape: HF tensor
// names, HF row order (GGUF's permuted Q/K rows are put back), FP32 on request.
//
// Every header field is hostile until checked: offsets and sizes with overflow-checked arithmetic
// against the real file size, counts against the bytes left, names against the architecture.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ds/status.h"

namespace ds {

/// FP32 tensors by HF name, row-major: masters of every weight, or their gradients.
using NamedTensors = std::map<std::string, std::vector<float>>;

enum class RopeScaling { kNone, kLinear, kLlama3 };

/// Shape of a Llama-family decoder. Field names follow config.json of Hugging Face.
struct ModelConfig {
  std::string architecture = "llama";
  int64_t n_layers = 0, d_model = 0, d_ff = 0, vocab = 0;
  int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int64_t context = 0;  ///< positions the model was trained for, at most 2^26 / head_dim
  float norm_eps = 1e-5f;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling = RopeScaling::kNone;
  double rope_factor = 1.0, rope_low_freq_factor = 1.0, rope_high_freq_factor = 4.0;
  int64_t rope_original_context = 0;
  bool tied_head = true;
  bool attention_bias = false, mlp_bias = false, qk_norm = false;
  int32_t padding_id =
      -1;  ///< its embedding row gets no gradient from being read, as in transformers
};

/// What a byte-level BPE tokenizer is built from.
struct TokenizerData {
  std::vector<std::string>
      tokens;  ///< index = id, "" = unused; in GPT-2's byte-to-unicode alphabet
  std::vector<std::string> merges;    ///< "left right", best first
  std::vector<int32_t> special;       ///< ids that only special-token parsing may yield
  std::vector<int32_t> user_defined;  ///< added, not special: matched in any text before BPE
  std::string pre_tokenizer;          ///< "smollm", "gpt-2"; Tokenizer refuses others by name
  int32_t bos = -1, eos = -1, pad = -1, unk = -1;
  std::string chat_template;  ///< Jinja text as shipped; empty if none
};

enum class FileDtype { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1 };
std::string_view dtype_name(FileDtype dtype);

/// Of a tensor; 1 for one without dimensions.
inline int64_t elements_of(std::span<const int64_t> shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  return elements;
}

struct TensorInfo {
  std::string name;  ///< HF name, e.g. "model.layers.3.mlp.up_proj.weight"
  FileDtype dtype;
  std::vector<int64_t> shape;  ///< row-major, outermost first: [out, in] for a linear layer
  const std::byte* data;  ///< in the ModelFile's memory and as long-lived; GGUF: aligned to >= 8
  uint64_t bytes;
  bool permuted_rows = false;  ///< GGUF Q/K: read_f32() un-permutes
};

class ModelFile {
 public:
  /// Opens a GGUF file or an HF folder. Errors name the file, the field and its offset.
  static Result<std::unique_ptr<ModelFile>> open(const std::string& path);
  /// What sha256() would be, in one pass over the file or folder and little memory; nothing is checked.
  static Result<std::string> digest(const std::string& path);
  virtual ~ModelFile() = default;

  const std::string& path() const { return path_; }
  const std::string& name() const { return name_; }  ///< general.name or folder name; for display
  /// Hex, of the GGUF file or of the safetensors files one after the other in name order.
  const std::string& sha256() const { return sha256_; }
  const ModelConfig& config() const { return config_; }
  const TokenizerData& tokenizer() const { return tokenizer_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }

  /// Row of the file that holds row `hf_row` of the tensor in HF's order: the same one unless
  /// permuted_rows. For readers that repack quantised rows without read_f32.
  int64_t file_row(const TensorInfo& tensor, int64_t hf_row) const;

  /// Dequantises one tensor to FP32 in HF row order. `out` holds exactly its elements.
  Status read_f32(const std::string& name, std::span<float> out) const;
  /// The same of all tensors that the model consists of.
  Result<NamedTensors> read_all_f32() const;

 protected:
  std::string path_, name_, sha256_;
  ModelConfig config_;
  TokenizerData tokenizer_;
  std::map<std::string, TensorInfo> tensors_;
};

}  // namespace ds
