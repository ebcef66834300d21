// SPDX-License-Identifier: Apache-2.0
#include "storage/hf_folder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>

#include "storage/dequantize.h"
#include "storage/safetensors.h"

namespace ds {
namespace {

constexpr uintmax_t kMaxTextBytes = uintmax_t{64} << 20;  // largest known tokenizer.json: 33 MB

/// A text file, or nothing when it does not exist.
Result<std::optional<std::string>> read_text(const std::string& path) {
  std::error_code error;
  // Of a FIFO it is an error: reading one would wait for a writer.
  const uintmax_t bytes = std::filesystem::file_size(path, error);
  if (error == std::errc::no_such_file_or_directory) return std::optional<std::string>();
  if (error) return io_error(path + ": " + error.message());
  if (bytes > kMaxTextBytes) {
    return invalid(path + ": " + std::to_string(bytes) + " bytes, expected at most " +
                   std::to_string(kMaxTextBytes));
  }
  DS_ASSIGN(std::string text, posix_file_system().read(path));
  return std::optional<std::string>(std::move(text));
}

/// A JSON file, or null when it does not exist.
Result<Json> read_json(const std::string& path) {
  DS_ASSIGN(const std::optional<std::string> text, read_text(path));
  if (!text) return Json();
  Result<Json> json = parse_json(*text);
  if (!json.ok()) return json.status().in(path);
  return json;
}

Result<Json> read_required_json(const std::string& path) {
  DS_ASSIGN(Json json, read_json(path));
  if (json.is_null()) return not_found(path + " is missing");
  return json;
}

Status read_rope(const Json& config, ModelConfig& c) {
  const Json* rope = find(config, "rope_parameters");
  const Json nothing = Json::object();
  if (rope) {
    DS_ASSIGN(c.rope_theta, get_number(*rope, "rope_theta", 10000.0));
  } else {
    DS_ASSIGN(c.rope_theta, get_number(config, "rope_theta", 10000.0));
    rope = find(config, "rope_scaling");
  }
  if (!rope) rope = &nothing;
  if (!rope->is_object()) {
    return invalid("the RoPE settings are " + std::string(rope->type_name()) +
                   ", expected an object");
  }
  // "rope_type" was called "type" before transformers 4.43.
  DS_ASSIGN(const std::string older, get_string(*rope, "type", "default"));
  DS_ASSIGN(const std::string type, get_string(*rope, "rope_type", older));
  if (type == "default") return {};
  if (type != "linear" && type != "llama3") {
    return unsupported("rope_type \"" + type + "\", expected default, linear or llama3");
  }
  DS_ASSIGN(c.rope_factor, get_number(*rope, "factor"));
  if (type == "linear") {
    c.rope_scaling = RopeScaling::kLinear;
    return {};
  }
  c.rope_scaling = RopeScaling::kLlama3;
  DS_ASSIGN(c.rope_low_freq_factor, get_number(*rope, "low_freq_factor"));
  DS_ASSIGN(c.rope_high_freq_factor, get_number(*rope, "high_freq_factor"));
  DS_ASSIGN(c.rope_original_context, get_int(*rope, "original_max_position_embeddings"));
  return {};
}

Result<FileDtype> file_dtype(const std::string& name) {
  if (name == "F32") return FileDtype::kF32;
  if (name == "F16") return FileDtype::kF16;
  if (name == "BF16") return FileDtype::kBF16;
  return unsupported("dtype " + name + ", expected F32, F16 or BF16");
}

/// Names of the safetensors files, sorted: those of the index if there is one, else the only one.
Result<std::vector<std::string>> list_weight_files(const std::string& folder) {
  const std::string index_path = folder + "/model.safetensors.index.json";
  DS_ASSIGN(const Json index, read_json(index_path));
  std::vector<std::string> names;
  if (const Json* map = find(index, "weight_map")) {
    if (!map->is_object()) {
      return invalid(index_path + ": weight_map is " + map->type_name() + ", expected an object");
    }
    for (const auto& [tensor, file] : map->items()) {
      const std::string name = file.is_string() ? file.get<std::string>() : "";
      // A name, never a path: the index must not reach outside its folder.
      if (!name.ends_with(".safetensors") || name.find('/') != std::string::npos) {
        return invalid(index_path + ": " + tensor + " is in " + dump_json(file) +
                       ", expected the name of a .safetensors file in this folder");
      }
      names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    return names;
  }
  DS_ASSIGN(const std::vector<std::string> all, posix_file_system().list(folder));
  for (const std::string& name : all) {
    if (name.ends_with(".safetensors") && !name.starts_with(".")) names.push_back(name);
  }
  if (std::find(names.begin(), names.end(), "model.safetensors") != names.end()) {
    return std::vector<std::string>{"model.safetensors"};
  }
  if (names.size() != 1) {
    return invalid(folder + ": " + std::to_string(names.size()) +
                   " *.safetensors files and no index, expected model.safetensors or an index");
  }
  return names;
}

/// Where tensor data begins, for its alignment; a file too short to say is refused later, and so is
/// what is no file (opening a FIFO here would wait for a writer).
uint64_t data_start(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return 0;
  uint64_t header_bytes = 0;
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(&header_bytes), sizeof header_bytes);
  return file && header_bytes < UINT64_MAX - 8 ? header_bytes + 8 : 0;
}

/// Tensors that some checkpoints carry and transformers ignores as well.
bool is_ignored(const std::string& name, const ModelConfig& config) {
  return (config.tied_head && name == "lm_head.weight") ||
         name.ends_with(".self_attn.rotary_emb.inv_freq");
}

Status add_tensors(const SafeTensors& file, const ModelConfig& config,
                   std::map<std::string, TensorInfo>& tensors) {
  for (const auto& [name, tensor] : file.tensors) {
    if (is_ignored(name, config)) continue;
    Result<FileDtype> dtype = file_dtype(tensor.dtype);
    if (!dtype.ok()) return dtype.status().in(name);
    const TensorInfo info{name, *dtype, tensor.shape, tensor.data.data(), tensor.data.size()};
    if (!tensors.emplace(name, info).second) {
      return invalid("tensor " + name + " is in two safetensors files");
    }
  }
  return {};
}

Status check_tensors(const ModelConfig& config, const std::map<std::string, TensorInfo>& tensors) {
  if (static_cast<uint64_t>(config.n_layers) > tensors.size()) {
    return invalid("num_hidden_layers is " + std::to_string(config.n_layers) + ", the folder has " +
                   std::to_string(tensors.size()) + " tensors");
  }
  std::map<std::string, bool> known;
  for (const ExpectedTensor& want : llama_tensors(config)) {
    const auto it = tensors.find(want.hf_name);
    if (it == tensors.end()) return missing_tensor(want.hf_name, want.shape);
    DS_TRY(check_shape(want.hf_name, it->second.shape, want.shape));
    known.emplace(want.hf_name, true);
  }
  for (const auto& [name, tensor] : tensors) {
    if (!known.contains(name)) {
      return unsupported("unknown tensor " + name + " for the llama architecture");
    }
  }
  return {};
}

}  // namespace

Result<ModelConfig> parse_hf_config(const Json& config) {
  ModelConfig c;
  DS_ASSIGN(c.architecture, get_string(config, "model_type"));
  if (c.architecture != "llama") {
    return unsupported("model_type \"" + c.architecture + "\", expected \"llama\"");
  }
  DS_ASSIGN(const std::string activation, get_string(config, "hidden_act", "silu"));
  if (activation != "silu") {
    return unsupported("hidden_act \"" + activation + "\", expected \"silu\"");
  }
  if (find(config, "quantization_config")) {
    return unsupported("quantization_config is given, expected a model that is not quantized");
  }
  DS_ASSIGN(c.n_layers, get_int(config, "num_hidden_layers"));
  DS_ASSIGN(c.d_model, get_int(config, "hidden_size"));
  DS_ASSIGN(c.d_ff, get_int(config, "intermediate_size"));
  DS_ASSIGN(c.vocab, get_int(config, "vocab_size"));
  DS_ASSIGN(c.context, get_int(config, "max_position_embeddings", 2048));
  DS_ASSIGN(c.n_heads, get_int(config, "num_attention_heads"));
  DS_ASSIGN(c.n_kv_heads, get_int(config, "num_key_value_heads", c.n_heads));
  DS_ASSIGN(c.head_dim, get_int(config, "head_dim", c.n_heads > 0 ? c.d_model / c.n_heads : 0));
  DS_ASSIGN(const double epsilon, get_number(config, "rms_norm_eps", 1e-6));
  c.norm_eps = static_cast<float>(epsilon);
  DS_ASSIGN(c.tied_head, get_bool(config, "tie_word_embeddings", false));
  DS_ASSIGN(c.attention_bias, get_bool(config, "attention_bias", false));
  DS_ASSIGN(c.mlp_bias, get_bool(config, "mlp_bias", false));
  DS_TRY(read_rope(config, c));
  DS_TRY(check_config(c));
  return c;
}

Result<std::vector<std::string>> hf_weight_files(const std::string& folder) {
  DS_ASSIGN(std::vector<std::string> names, list_weight_files(folder));
  for (std::string& name : names) name = folder + "/" + name;
  return names;
}

Result<HfFolder> read_hf_folder(const std::string& path, Sha256& hash) {
  DS_ASSIGN(const Json config_json, read_required_json(path + "/config.json"));
  Result<ModelConfig> config = parse_hf_config(config_json);
  if (!config.ok()) return config.status().in(path + "/config.json");

  HfFolder folder;
  folder.contents.config = *config;
  DS_ASSIGN(const Json tokenizer, read_required_json(path + "/tokenizer.json"));
  DS_ASSIGN(const Json tokenizer_config, read_json(path + "/tokenizer_config.json"));
  Result<TokenizerData> text =
      parse_hf_tokenizer(tokenizer, tokenizer_config, config_json, config->vocab);
  if (!text.ok()) return text.status().in(path);
  folder.contents.tokenizer = std::move(text).value();
  // Since transformers 4.52 the template may stand in its own file, which then counts.
  DS_ASSIGN(std::optional<std::string> jinja, read_text(path + "/chat_template.jinja"));
  if (jinja) folder.contents.tokenizer.chat_template = std::move(*jinja);

  DS_ASSIGN(const std::vector<std::string> files, hf_weight_files(path));
  for (const std::string& file : files) {
    DS_ASSIGN(FileBytes bytes, FileBytes::read(file, hash, data_start(file)));
    Result<SafeTensors> parsed = parse_safetensors(bytes.bytes());
    if (!parsed.ok()) return parsed.status().in(file);
    DS_TRY(add_tensors(*parsed, *config, folder.contents.tensors).in(file));
    folder.files.push_back(std::move(bytes));
  }
  DS_TRY(check_tensors(*config, folder.contents.tensors).in(path));
  return folder;
}

}  // namespace ds
