// SPDX-License-Identifier: Apache-2.0
// What a Llama-family model consists of: limits of its numbers, and name and shape of every tensor
// in HF and in GGUF spelling. Both readers check a file against this list before anything uses it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ds/status.h"
#include "storage/model_file.h"

namespace ds {

/// A model file read but for the memory that its tensors point into.
struct ModelContents {
  std::string name;
  ModelConfig config;
  TokenizerData tokenizer;
  std::map<std::string, TensorInfo> tensors;  ///< by HF name
};

struct ExpectedTensor {
  std::string hf_name, gguf_name;
  std::vector<int64_t> shape;       ///< row-major, [out, in]
  bool gguf_permuted_rows = false;  ///< Q and K
};

/// Refuses numbers that no model has, so that products of them cannot overflow 64 bits.
Status check_config(const ModelConfig& config);

/// All tensors of the model in file order: embeddings, layers, final norm, head unless tied. The
/// config has passed check_config; the caller bounds n_layers by its file first.
std::vector<ExpectedTensor> llama_tensors(const ModelConfig& config);

/// "tensor NAME is missing, expected [576, 192]".
Status missing_tensor(const std::string& name, const std::vector<int64_t>& wanted);

/// "NAME: 1536 rows, the model wants 576" unless the shapes are equal.
Status check_shape(const std::string& name, const std::vector<int64_t>& found,
                   const std::vector<int64_t>& wanted);

}  // namespace ds
