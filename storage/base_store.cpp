// SPDX-License-Identifier: Apache-2.0
#include "storage/base_store.h"

#include <algorithm>
#include <cstring>

#include "storage/hash.h"
#include "storage/llama_tensors.h"
#include "storage/safetensors.h"

namespace ds {
namespace {

constexpr int kBaseFormat = 1;
constexpr const char* kFormatKey = "driftstone_base";
constexpr const char* kFile = "/model.safetensors";

bool is_sha256(std::string_view name) {
  return name.size() == 64 && name.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

Status check_format(const SafeTensors& file) {
  const auto format = file.metadata.find(kFormatKey);
  if (format == file.metadata.end()) return corrupt(std::string(kFormatKey) + " is missing");
  if (format->second == std::to_string(kBaseFormat)) return {};
  return unsupported("base format " + format->second + ", this program knows formats up to " +
                     std::to_string(kBaseFormat));
}

}  // namespace

BaseStore::BaseStore(FileSystem& fs, std::string data_directory)
    : fs_(fs), data_(std::move(data_directory)), root_(data_ + "/bases") {}

Result<std::string> BaseStore::encode(const ModelConfig& config, const NamedTensors& tensors) {
  SafeTensors file;
  file.metadata = {{"format", "pt"}, {kFormatKey, std::to_string(kBaseFormat)}};
  for (const ExpectedTensor& wanted : llama_tensors(config)) {
    const auto found = tensors.find(wanted.hf_name);
    if (found == tensors.end()) return invalid("tensor " + wanted.hf_name + " is missing");
    const auto elements = static_cast<size_t>(elements_of(wanted.shape));
    if (found->second.size() != elements) {
      return invalid(wanted.hf_name + ": " + std::to_string(found->second.size()) +
                     " elements, the model wants " + std::to_string(elements));
    }
    file.tensors[wanted.hf_name] = {"F32", wanted.shape, std::as_bytes(std::span(found->second))};
  }
  if (file.tensors.size() != tensors.size()) return invalid("there are tensors of another model");
  return serialize_safetensors(file);
}

Status BaseStore::write(const std::string& sha256, std::string_view file) {
  if (!is_sha256(sha256)) return invalid("base \"" + sha256 + "\", expected 64 hex digits");
  const std::string folder = root_ + "/" + sha256, temporary = folder + kTemporarySuffix;
  if (!fs_.exists(folder)) {
    DS_TRY(fs_.make_directories(root_));
    DS_TRY(fs_.sync_directory(data_));
    if (fs_.exists(temporary)) DS_TRY(fs_.remove_all(temporary));
    DS_TRY(fs_.make_directories(temporary));
    DS_TRY(write_file_synced(fs_, temporary + kFile, file));
    DS_TRY(fs_.sync_directory(temporary));
    DS_TRY(fs_.rename(temporary, folder));
  }
  return fs_.sync_directory(root_);
}

Result<NamedTensors> BaseStore::read(const std::string& sha256, const ModelConfig& config) const {
  if (!is_sha256(sha256)) return invalid("base \"" + sha256 + "\", expected 64 hex digits");
  const std::string path = root_ + "/" + sha256 + kFile;
  DS_ASSIGN(const std::string bytes, fs_.read(path));
  if (const std::string got = to_hex(ds::sha256(bytes)); got != sha256) {
    return corrupt(path + ": SHA-256 is " + got + ", expected " + sha256);
  }
  const auto file = parse_safetensors(std::as_bytes(std::span(bytes.data(), bytes.size())));
  if (!file.ok()) return file.status().in(path);
  DS_TRY(check_format(*file).in(path));
  NamedTensors tensors;
  for (const ExpectedTensor& wanted : llama_tensors(config)) {
    const auto found = file->tensors.find(wanted.hf_name);
    if (found == file->tensors.end()) {
      return corrupt(path + ": tensor " + wanted.hf_name + " is missing");
    }
    const auto& [dtype, shape, data] = found->second;
    if (dtype != "F32") return corrupt(path + ": " + wanted.hf_name + " is " + dtype + ", not F32");
    DS_TRY(check_shape(wanted.hf_name, shape, wanted.shape).in(path));
    std::vector<float>& tensor = tensors[wanted.hf_name];
    tensor.resize(data.size() / sizeof(float));
    std::memcpy(tensor.data(), data.data(), data.size());
  }
  return tensors;
}

Status BaseStore::remove(const std::string& sha256) {
  const std::string folder = root_ + "/" + sha256;
  if (!is_sha256(sha256) || !fs_.exists(folder)) return not_found("no base " + sha256);
  // Out of sight first, so that a crash leaves the base whole or gone.
  const std::string temporary = folder + ".removed" + kTemporarySuffix;
  if (fs_.exists(temporary)) DS_TRY(fs_.remove_all(temporary));
  DS_TRY(fs_.rename(folder, temporary));
  DS_TRY(fs_.sync_directory(root_));
  DS_TRY(fs_.remove_all(temporary));
  return fs_.sync_directory(root_);
}

Status BaseStore::keep_only(const std::set<std::string>& sha256s) {
  if (!fs_.exists(root_)) return {};
  DS_ASSIGN(const std::vector<std::string> names, fs_.list(root_));
  bool changed = false;
  for (const std::string& name : names) {
    if (name.ends_with(kTemporarySuffix)) {
      DS_TRY(fs_.remove_all(root_ + "/" + name));
      changed = true;
    } else if (is_sha256(name) && !sha256s.contains(name)) {
      DS_TRY(remove(name));
    }
  }
  return changed ? fs_.sync_directory(root_) : Status();
}

}  // namespace ds
