// SPDX-License-Identifier: Apache-2.0
#include "storage/model_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "storage/dequantize.h"
#include "storage/file_bytes.h"
#include "storage/gguf.h"
#include "storage/hf_folder.h"
#include "storage/llama_tensors.h"

namespace ds {
namespace {

// 256 MB of FP32: 2^20 positions of head size 64.
constexpr int64_t kMaxRotations = int64_t{1} << 26;

/// A ModelFile with the memory behind its tensors.
class LoadedModel final : public ModelFile {
 public:
  LoadedModel(const std::string& path, ModelContents contents, std::vector<FileBytes> files,
              std::string sha256_hex)
      : files_(std::move(files)) {
    path_ = path;
    name_ = contents.name.empty() ? display_name(path) : std::move(contents.name);
    sha256_ = std::move(sha256_hex);
    config_ = contents.config;
    // Every position has a row in the table of rotations: a number in the file must not size it.
    config_.context = std::min(config_.context, kMaxRotations / config_.head_dim);
    tokenizer_ = std::move(contents.tokenizer);
    config_.padding_id = tokenizer_.pad;
    tensors_ = std::move(contents.tensors);
  }

 private:
  static std::string display_name(const std::string& path) {
    const std::filesystem::path normal = std::filesystem::path(path).lexically_normal();
    return normal.has_filename() ? normal.stem().string() : normal.parent_path().stem().string();
  }

  std::vector<FileBytes> files_;
};

}  // namespace

Result<std::unique_ptr<ModelFile>> ModelFile::open(const std::string& path) {
  Sha256 hash;
  std::vector<FileBytes> files;
  ModelContents contents;
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    DS_ASSIGN(HfFolder folder, read_hf_folder(path, hash));
    contents = std::move(folder.contents);
    files = std::move(folder.files);
  } else {
    DS_ASSIGN(FileBytes file, FileBytes::read(path, hash));
    Result<ModelContents> read = read_gguf_model(file.bytes());
    if (!read.ok()) return read.status().in(path);
    contents = std::move(read).value();
    files.push_back(std::move(file));
  }
  return std::unique_ptr<ModelFile>(std::make_unique<LoadedModel>(
      path, std::move(contents), std::move(files), to_hex(hash.finish())));
}

Result<std::string> ModelFile::digest(const std::string& path) {
  std::vector<std::string> files = {path};
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    DS_ASSIGN(files, hf_weight_files(path));
  }
  constexpr size_t kChunk = size_t{1} << 20;
  std::string chunk(kChunk, '\0');
  Sha256 hash;
  for (const std::string& file : files) {
    if (!std::filesystem::is_regular_file(file, error)) return not_found(file + ": no such file");
    std::ifstream in(file, std::ios::binary);
    if (!in) return io_error(file + ": cannot be opened");
    while (in.read(chunk.data(), kChunk) || in.gcount() > 0) {
      hash.update(chunk.data(), static_cast<size_t>(in.gcount()));
    }
    if (in.bad()) return io_error(file + ": cannot be read");
  }
  return to_hex(hash.finish());
}

// llama.cpp stores the rows of one head in the order 0, h/2, 1, h/2 + 1, ... so that its RoPE can
// rotate neighbours (convert_hf_to_gguf.py: permute). HF rotates row i with row i + h/2.
int64_t ModelFile::file_row(const TensorInfo& tensor, int64_t hf_row) const {
  if (!tensor.permuted_rows) return hf_row;
  const int64_t half = config_.head_dim / 2;
  const int64_t in_head = hf_row % config_.head_dim;
  return hf_row - in_head + 2 * (in_head % half) + in_head / half;
}

Status ModelFile::read_f32(const std::string& name, std::span<float> out) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) return not_found(path_ + ": no tensor " + name);
  const TensorInfo& tensor = it->second;
  const int64_t elements = elements_of(tensor.shape);
  if (static_cast<int64_t>(out.size()) != elements) {
    return invalid(name + ": room for " + std::to_string(out.size()) + " values, expected " +
                   std::to_string(elements));
  }
  if (!tensor.permuted_rows) {
    dequantize(tensor.dtype, tensor.data, elements, out.data());
    return {};
  }
  const int64_t rows = tensor.shape[0];
  const int64_t columns = elements / rows;  // 1 for a bias, whose format has no blocks
  const int64_t bytes_per_row = static_cast<int64_t>(tensor.bytes) / rows;
  for (int64_t row = 0; row < rows; ++row) {
    dequantize(tensor.dtype, tensor.data + file_row(tensor, row) * bytes_per_row, columns,
               out.data() + row * columns);
  }
  return {};
}

Result<NamedTensors> ModelFile::read_all_f32() const {
  NamedTensors tensors;
  for (const ExpectedTensor& wanted : llama_tensors(config_)) {
    std::vector<float>& tensor = tensors[wanted.hf_name];
    tensor.resize(static_cast<size_t>(elements_of(wanted.shape)));
    DS_TRY(read_f32(wanted.hf_name, tensor));
  }
  return tensors;
}

}  // namespace ds
