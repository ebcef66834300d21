// SPDX-License-Identifier: Apache-2.0
// Reads a plugin's file under the rules of who may have written it. What is returned is what was
// checked: later steps judge, hash and load these bytes and never open the path again.
#pragma once

#include <cstdint>
#include <string>

#include "ds/status.h"

namespace ds {

struct FileContent {
  std::string path;  ///< absolute, without symbolic links
  std::string bytes;
  std::string sha256;  ///< hex
};

constexpr uint64_t kPluginFileLimit = uint64_t{256} << 20;  ///< bytes

/// Refuses, saying which part of the path: a symbolic link, what is not a regular file, an owner
/// other than root or this process's user, and what group or others may write (folders with the
/// sticky bit excepted: there nobody replaces another's file).
Result<FileContent> read_plugin_file(const std::string& path);

}  // namespace ds
