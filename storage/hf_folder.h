// SPDX-License-Identifier: Apache-2.0
// A Hugging Face model folder: config.json, tokenizer.json, tokenizer_config.json (optional),
// chat_template.jinja (optional) and *.safetensors, one file or several with an index.
// Whatever would change the model's answers and is not implemented is refused by name.
#pragma once

#include <string>
#include <vector>

#include "ds/status.h"
#include "storage/file_bytes.h"
#include "storage/json.h"
#include "storage/llama_tensors.h"

namespace ds {

/// config.json of `model_type` llama, RoPE settings under `rope_parameters` (transformers 5) or as
/// `rope_theta` + `rope_scaling` (before).
Result<ModelConfig> parse_hf_config(const Json& config);

/// tokenizer.json (byte-level BPE). `tokenizer_config` may be null; `vocab` = rows of the
/// embedding. Names of special tokens come from tokenizer_config, else their ids from `config`.
Result<TokenizerData> parse_hf_tokenizer(const Json& tokenizer, const Json& tokenizer_config,
                                         const Json& config, int64_t vocab);

struct HfFolder {
  ModelContents contents;
  std::vector<FileBytes> files;  ///< what the tensors point into, in name order
};

/// Paths of the folder's safetensors files in the order in which they are hashed.
Result<std::vector<std::string>> hf_weight_files(const std::string& folder);

/// Reads the whole folder; `hash` is fed the safetensors files in name order.
Result<HfFolder> read_hf_folder(const std::string& path, Sha256& hash);

}  // namespace ds
