// SPDX-License-Identifier: Apache-2.0
// A whole file in private memory. Model files are read, not mapped: a mapping of a file that
// somebody truncates later kills the process with SIGBUS in the middle of an answer.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "ds/status.h"
#include "storage/hash.h"

namespace ds {

class FileBytes {
 public:
  /// Reads a regular file to its end and feeds it to `hash` on the way, in one pass. Byte `anchor`
  /// of the file (at most its size) lands on a multiple of 64; safetensors needs that, as its
  /// header has any length.
  static Result<FileBytes> read(const std::string& path, Sha256& hash, uint64_t anchor = 0);

  std::span<const std::byte> bytes() const { return {buffer_.get() + shift_, bytes_}; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte[], Free> buffer_;
  size_t shift_ = 0;  ///< of the file's first byte in buffer_
  size_t bytes_ = 0;
};

}  // namespace ds
