// SPDX-License-Identifier: Apache-2.0
// Who says that a plugin's file may run: its SHA-256 in the list of allowed ones, or an Ed25519
// signature (FILE.sig, 64 bytes over the file's bytes) by a trusted key. Closed by default.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ds/status.h"
#include "plugin/plugin_file.h"
#include "storage/json.h"
#include "storage/seams.h"

namespace ds {

class Trust {
 public:
  /// `folder`/allowed.json and `folder`/keys/*.pem (SubjectPublicKeyInfo). Nothing there: nothing
  /// is trusted.
  Trust(FileSystem& fs, std::string folder) : fs_(fs), folder_(std::move(folder)) {}
  Status read();

  /// Why the file may run ("allow-list", "signature of key release"), or kPermission and why not.
  Result<std::string> judge(const FileContent& file) const;
  /// Adds the hash to the list, durably.
  Status allow(const FileContent& file, const std::string& by);
  Json list() const;  ///< {"allowed":[{sha256, path, by}], "keys":[name]}

 private:
  FileSystem& fs_;
  const std::string folder_;
  mutable std::mutex mutex_;
  std::map<std::string, Json> allowed_;      ///< by SHA-256
  std::map<std::string, std::string> keys_;  ///< name -> PEM
};

}  // namespace ds
