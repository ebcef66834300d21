// SPDX-License-Identifier: Apache-2.0
// Versions on disk: models/<name>/versions/vN/{manifest.json, delta.safetensors,
// checkpoint.safetensors}. A version is written once, as a whole or not at all (temporary folder,
// fsync, rename, fsync of the parent), and never changed. Which version serves is not here: that
// pointer lives in the replay store, in the same batch as the round that made it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "ds/status.h"
#include "storage/json.h"
#include "storage/safetensors.h"
#include "storage/seams.h"

namespace ds {

struct StoredTensor {
  std::string name, dtype;  ///< PEFT names in HF layout; "F32" or "BF16"
  std::vector<int64_t> shape;
  std::string data;  ///< little-endian bytes
};

struct VersionManifest {
  std::string model;        ///< "default", "digits"
  int64_t number = 0;       ///< vN
  int64_t parent = 0;       ///< 0 = none
  std::string base_sha256;  ///< of the base the delta belongs to
  std::string weight_hash;  ///< hex; see weight_hash()
  std::string method;       ///< "base", "lora", "full", "mlp"
  uint64_t round = 0;       ///< number of the round that made it
  int64_t created_ms = 0;
  std::vector<std::string> items;  ///< ids of the feedback it newly learned
  Json details;                    ///< rank, scale, steps, losses, gate scores
};

/// SHA-256 over the 32 bytes of base_sha256, then per tensor in bytewise name order: u32 name
/// length, name, u32 dtype length, dtype, u32 ndim, u64 dims, data; integers little-endian. Hex.
std::string weight_hash(const std::string& base_sha256_hex,
                        const std::vector<StoredTensor>& tensors);

class VersionStore {
 public:
  VersionStore(FileSystem& fs, std::string data_directory);

  /// Removes half-written temporary folders left by a crash.
  Status clean();
  /// Durable when it returns ok. manifest.weight_hash must be that of `delta`, or empty (then it is
  /// filled in). kConflict when the version exists, kInvalid for names, numbers, tensors that are
  /// none.
  Status write(const VersionManifest& manifest, const std::vector<StoredTensor>& delta,
               const std::vector<StoredTensor>& checkpoint);
  Result<std::vector<VersionManifest>> list(const std::string& model) const;  ///< by number
  Result<VersionManifest> manifest(const std::string& model, int64_t number) const;
  /// Reads and verifies the hash named in the manifest.
  Result<std::vector<StoredTensor>> read_delta(const std::string& model, int64_t number) const;
  Result<std::vector<StoredTensor>> read_checkpoint(const std::string& model, int64_t number) const;
  Status remove(const std::string& model, int64_t number);  ///< the whole folder, crash-safe
  std::vector<std::string> models() const;                  ///< that have versions, by name

 private:
  std::string directory(const std::string& model, int64_t number) const;
  Result<std::vector<StoredTensor>> read_tensors(const std::string& model, int64_t number,
                                                 std::string_view file) const;
  FileSystem& fs_;
  std::string root_;
};

}  // namespace ds
