// SPDX-License-Identifier: Apache-2.0
#include "storage/version_store.h"

#include <algorithm>
#include <charconv>

#include "storage/hash.h"
#include "storage/record.h"

namespace ds {
namespace {

constexpr int kManifestFormat = 1;
constexpr std::string_view kManifest = "manifest.json";
constexpr std::string_view kDelta = "delta.safetensors";
constexpr std::string_view kCheckpoint = "checkpoint.safetensors";

void hash_little_endian(Sha256& hash, uint64_t value, size_t bytes) {
  uint8_t buffer[8];
  for (size_t i = 0; i < bytes; ++i) buffer[i] = static_cast<uint8_t>(value >> (8 * i));
  hash.update(buffer, bytes);
}

/// The 32 bytes of a digest in hex; other text contributes nothing, and write() refuses it.
std::string from_hex(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i + 2 <= hex.size(); i += 2) {
    uint8_t byte = 0;
    const auto parsed = std::from_chars(hex.data() + i, hex.data() + i + 2, byte, 16);
    if (parsed.ptr != hex.data() + i + 2) return {};
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

Result<std::string> serialize(const std::vector<StoredTensor>& tensors) {
  SafeTensors contents;
  for (const StoredTensor& tensor : tensors) {
    const auto data = std::as_bytes(std::span(tensor.data.data(), tensor.data.size()));
    if (!contents.tensors.emplace(tensor.name, SafeTensor{tensor.dtype, tensor.shape, data})
             .second) {
      return invalid("tensor " + tensor.name + " is there twice");
    }
  }
  return serialize_safetensors(contents);
}

Result<std::vector<StoredTensor>> deserialize(const std::string& bytes) {
  DS_ASSIGN(const SafeTensors contents,
            parse_safetensors(std::as_bytes(std::span(bytes.data(), bytes.size()))));
  std::vector<StoredTensor> tensors;
  for (const auto& [name, tensor] : contents.tensors) {
    tensors.push_back(
        {name, tensor.dtype, tensor.shape,
         std::string(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size())});
  }
  return tensors;
}

Json to_json(const VersionManifest& manifest, const std::string& delta,
             const std::string& checkpoint) {
  Json json = {
      {"format", kManifestFormat},
      {"model", manifest.model},
      {"number", manifest.number},
      {"parent", manifest.parent},
      {"base_sha256", manifest.base_sha256},
      {"weight_hash", manifest.weight_hash},
      {"method", manifest.method},
      {"round", manifest.round},
      {"created_ms", manifest.created_ms},
      {"items", manifest.items},
      {"details", manifest.details},
      {"files", {{kDelta, to_hex(sha256(delta))}, {kCheckpoint, to_hex(sha256(checkpoint))}}}};
  json["seal"] = to_hex(sha256(canonical_json(json)));
  return json;
}

/// Checks format and seal.
Result<Json> open_manifest(std::string_view text) {
  DS_ASSIGN(Json json, parse_json(text));
  DS_ASSIGN(const int64_t format, get_int(json, "format"));
  if (format > kManifestFormat) {
    return unsupported("manifest format " + std::to_string(format) +
                       ", this program knows formats up to " + std::to_string(kManifestFormat));
  }
  DS_ASSIGN(const std::string seal, get_string(json, "seal"));
  Json unsealed = json;
  unsealed.erase("seal");
  if (to_hex(sha256(canonical_json(unsealed))) != seal) {
    return corrupt("the seal does not match the manifest");
  }
  return json;
}

Result<VersionManifest> from_json(const Json& json) {
  VersionManifest manifest;
  DS_ASSIGN(manifest.model, get_string(json, "model"));
  DS_ASSIGN(manifest.number, get_int(json, "number"));
  DS_ASSIGN(manifest.parent, get_int(json, "parent"));
  DS_ASSIGN(manifest.base_sha256, get_string(json, "base_sha256"));
  DS_ASSIGN(manifest.weight_hash, get_string(json, "weight_hash"));
  DS_ASSIGN(manifest.method, get_string(json, "method"));
  DS_ASSIGN(const int64_t round, get_int(json, "round"));
  manifest.round = static_cast<uint64_t>(round);
  DS_ASSIGN(manifest.created_ms, get_int(json, "created_ms"));
  if (const Json* items = find(json, "items")) {
    for (const Json& item : *items) {
      if (!item.is_string()) return corrupt("an item of the manifest is no string");
      manifest.items.push_back(item.get<std::string>());
    }
  }
  if (const Json* details = find(json, "details")) manifest.details = *details;
  return manifest;
}

/// The N of "vN"; 0 for another name.
int64_t version_number(std::string_view name) {
  int64_t number = 0;
  if (name.size() < 2 || name[0] != 'v' || name[1] == '0') return 0;
  const auto parsed = std::from_chars(name.data() + 1, name.data() + name.size(), number);
  return parsed.ptr == name.data() + name.size() && number > 0 ? number : 0;
}

Status check_manifest(const VersionManifest& manifest) {
  DS_TRY(check_name("the model of a version", manifest.model));
  if (manifest.number < 1) {
    return invalid("version number " + std::to_string(manifest.number) + ", expected from 1");
  }
  if (manifest.base_sha256.size() != 64 || from_hex(manifest.base_sha256).size() != 32) {
    return invalid("base_sha256 is \"" + manifest.base_sha256 + "\", expected 64 hex digits");
  }
  return {};
}

}  // namespace

std::string weight_hash(const std::string& base_sha256_hex,
                        const std::vector<StoredTensor>& tensors) {
  std::vector<const StoredTensor*> sorted;
  for (const StoredTensor& tensor : tensors) sorted.push_back(&tensor);
  std::sort(sorted.begin(), sorted.end(),
            [](const StoredTensor* a, const StoredTensor* b) { return a->name < b->name; });
  Sha256 hash;
  hash.update(from_hex(base_sha256_hex));
  for (const StoredTensor* tensor : sorted) {
    hash_little_endian(hash, tensor->name.size(), 4);
    hash.update(tensor->name);
    hash_little_endian(hash, tensor->dtype.size(), 4);
    hash.update(tensor->dtype);
    hash_little_endian(hash, tensor->shape.size(), 4);
    for (const int64_t dim : tensor->shape) {
      hash_little_endian(hash, static_cast<uint64_t>(dim), 8);
    }
    hash.update(tensor->data);
  }
  return to_hex(hash.finish());
}

VersionStore::VersionStore(FileSystem& fs, std::string data_directory)
    : fs_(fs), root_(std::move(data_directory)) {}

std::string VersionStore::directory(const std::string& model, int64_t number) const {
  return root_ + "/models/" + model + "/versions/v" + std::to_string(number);
}

std::vector<std::string> VersionStore::models() const {
  std::vector<std::string> found;
  const auto names = fs_.list(root_ + "/models");
  if (!names.ok()) return found;
  for (const std::string& name : *names) {
    if (check_name("", name).ok() && fs_.exists(root_ + "/models/" + name + "/versions")) {
      found.push_back(name);
    }
  }
  return found;
}

Status VersionStore::clean() {
  for (const std::string& model : models()) {
    const std::string versions = root_ + "/models/" + model + "/versions";
    DS_ASSIGN(const std::vector<std::string> names, fs_.list(versions));
    bool changed = false;
    for (const std::string& name : names) {
      if (!name.ends_with(kTemporarySuffix)) continue;
      DS_TRY(fs_.remove_all(versions + "/" + name));
      changed = true;
    }
    if (changed) DS_TRY(fs_.sync_directory(versions));
  }
  return {};
}

Status VersionStore::write(const VersionManifest& manifest, const std::vector<StoredTensor>& delta,
                           const std::vector<StoredTensor>& checkpoint) {
  DS_TRY(check_manifest(manifest));
  const std::string name = manifest.model + "@v" + std::to_string(manifest.number);
  VersionManifest sealed = manifest;
  sealed.weight_hash = ds::weight_hash(manifest.base_sha256, delta);
  if (!manifest.weight_hash.empty() && manifest.weight_hash != sealed.weight_hash) {
    return invalid(name + ": the weights hash to " + sealed.weight_hash + ", the manifest says " +
                   manifest.weight_hash);
  }
  const std::string folder = directory(manifest.model, manifest.number);
  if (fs_.exists(folder)) return conflict(name + " exists; a version is never changed");
  auto delta_bytes = serialize(delta), checkpoint_bytes = serialize(checkpoint);
  if (!delta_bytes.ok()) return delta_bytes.status().in(name + " delta");
  if (!checkpoint_bytes.ok()) return checkpoint_bytes.status().in(name + " checkpoint");
  const std::string manifest_text =
      dump_json(to_json(sealed, *delta_bytes, *checkpoint_bytes), 1) + "\n";

  // The folders above must be as durable as what is put in them. Existing ones too: a process that
  // died before its syncs may have made them.
  const std::string models = root_ + "/models", model = models + "/" + manifest.model;
  const std::string versions = model + "/versions";
  DS_TRY(fs_.make_directories(versions));
  for (const std::string& parent : {root_, models, model}) DS_TRY(fs_.sync_directory(parent));
  const std::string temporary = folder + std::string(kTemporarySuffix);
  if (fs_.exists(temporary)) DS_TRY(fs_.remove_all(temporary));
  const auto write_files = [&]() -> Status {
    DS_TRY(fs_.make_directories(temporary));
    DS_TRY(write_file_synced(fs_, temporary + "/" + std::string(kDelta), *delta_bytes));
    DS_TRY(write_file_synced(fs_, temporary + "/" + std::string(kCheckpoint), *checkpoint_bytes));
    DS_TRY(write_file_synced(fs_, temporary + "/" + std::string(kManifest), manifest_text));
    return fs_.sync_directory(temporary);
  };
  if (Status written = write_files(); !written.ok()) {
    // On a full disk the part that was written would hold what everything else waits for.
    const Status removed = fs_.remove_all(temporary);
    return removed.ok() ? written : written.in("leaving " + temporary + " behind");
  }
  DS_TRY(fs_.rename(temporary, folder));
  return fs_.sync_directory(versions);
}

Result<VersionManifest> VersionStore::manifest(const std::string& model, int64_t number) const {
  DS_TRY(check_name("the model of a version", model));
  const std::string name = model + "@v" + std::to_string(number);
  const std::string path = directory(model, number) + "/" + std::string(kManifest);
  if (!fs_.exists(directory(model, number))) return not_found("no version " + name);
  DS_ASSIGN(const std::string text, fs_.read(path));
  const auto json = open_manifest(text);
  if (!json.ok()) return json.status().in(path);
  auto manifest = from_json(*json);
  if (!manifest.ok()) return manifest.status().in(path);
  if (manifest->model != model || manifest->number != number) {
    return corrupt(path + " is of " + manifest->model + "@v" + std::to_string(manifest->number) +
                   ", expected " + name);
  }
  return manifest;
}

Result<std::vector<VersionManifest>> VersionStore::list(const std::string& model) const {
  DS_TRY(check_name("the model of a version", model));
  std::vector<VersionManifest> found;
  const std::string versions = root_ + "/models/" + model + "/versions";
  if (!fs_.exists(versions)) return found;
  DS_ASSIGN(const std::vector<std::string> names, fs_.list(versions));
  for (const std::string& name : names) {
    const int64_t number = version_number(name);
    if (number == 0) continue;
    DS_ASSIGN(VersionManifest one, manifest(model, number));
    found.push_back(std::move(one));
  }
  std::sort(found.begin(), found.end(),
            [](const VersionManifest& a, const VersionManifest& b) { return a.number < b.number; });
  return found;
}

Result<std::vector<StoredTensor>> VersionStore::read_tensors(const std::string& model,
                                                             int64_t number,
                                                             std::string_view file) const {
  DS_TRY(check_name("the model of a version", model));
  const std::string folder = directory(model, number), path = folder + "/" + std::string(file);
  if (!fs_.exists(folder)) return not_found("no version " + model + "@v" + std::to_string(number));
  DS_ASSIGN(const std::string text, fs_.read(folder + "/" + std::string(kManifest)));
  const auto json = open_manifest(text);
  if (!json.ok()) return json.status().in(folder);
  const Json* files = find(*json, "files");
  if (!files) return corrupt(folder + ": the manifest names no files");
  DS_ASSIGN(const std::string expected, get_string(*files, file));
  DS_ASSIGN(const std::string bytes, fs_.read(path));
  if (const std::string got = to_hex(sha256(bytes)); got != expected) {
    return corrupt(path + ": SHA-256 is " + got + ", expected " + expected);
  }
  auto tensors = deserialize(bytes);
  if (!tensors.ok()) return tensors.status().in(path);
  return tensors;
}

Result<std::vector<StoredTensor>> VersionStore::read_delta(const std::string& model,
                                                           int64_t number) const {
  DS_ASSIGN(const VersionManifest version, manifest(model, number));
  DS_ASSIGN(std::vector<StoredTensor> tensors, read_tensors(model, number, kDelta));
  if (const std::string got = ds::weight_hash(version.base_sha256, tensors);
      got != version.weight_hash) {
    return corrupt(model + "@v" + std::to_string(number) + ": the weights hash to " + got +
                   ", expected " + version.weight_hash);
  }
  return tensors;
}

Result<std::vector<StoredTensor>> VersionStore::read_checkpoint(const std::string& model,
                                                                int64_t number) const {
  return read_tensors(model, number, kCheckpoint);
}

Status VersionStore::remove(const std::string& model, int64_t number) {
  DS_TRY(check_name("the model of a version", model));
  const std::string folder = directory(model, number);
  if (!fs_.exists(folder)) return not_found("no version " + model + "@v" + std::to_string(number));
  // Out of sight first, so that a crash leaves the version whole or gone.
  const std::string temporary = folder + ".removed" + std::string(kTemporarySuffix);
  if (fs_.exists(temporary)) DS_TRY(fs_.remove_all(temporary));
  const std::string versions = root_ + "/models/" + model + "/versions";
  DS_TRY(fs_.rename(folder, temporary));
  DS_TRY(fs_.sync_directory(versions));
  DS_TRY(fs_.remove_all(temporary));
  return fs_.sync_directory(versions);
}

}  // namespace ds
