// SPDX-License-Identifier: Apache-2.0
// Bases made by full fine-tuning: bases/<sha256>/model.safetensors, every tensor in FP32 under its
// HF name. The folder's name is the SHA-256 of the file. A base is written once, as a whole or not
// at all (temporary folder, fsync, rename, fsync of the parent), and never changed. Which versions
// use it is not here: their manifests say so.
#pragma once

#include <set>
#include <string>
#include <string_view>

#include "storage/model_file.h"
#include "storage/seams.h"

namespace ds {

class BaseStore {
 public:
  BaseStore(FileSystem& fs, std::string data_directory);

  /// The file of these tensors: the model's, all of them, nothing else. Equal tensors give equal
  /// bytes, whose SHA-256 names the base.
  static Result<std::string> encode(const ModelConfig& config, const NamedTensors& tensors);

  /// Durable when it returns ok. `sha256` is that of `file`, in hex. A base that is there already
  /// stays.
  Status write(const std::string& sha256, std::string_view file);
  /// Verifies name, format and shapes.
  Result<NamedTensors> read(const std::string& sha256, const ModelConfig& config) const;
  Status remove(const std::string& sha256);  ///< the whole folder, crash-safe
  /// Removes every other base, and what a crash has left half-written.
  Status keep_only(const std::set<std::string>& sha256s);

 private:
  FileSystem& fs_;
  const std::string data_, root_;
};

}  // namespace ds
