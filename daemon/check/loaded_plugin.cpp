// SPDX-License-Identifier: Apache-2.0
#include "check/loaded_plugin.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "storage/hash.h"

namespace ds::check {
namespace {

constexpr off_t kMaxBytes = off_t{1} << 30;

}  // namespace

Result<std::vector<std::byte>> read_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return io_error(path + ": " + std::strerror(errno));
  struct stat info {};
  std::vector<std::byte> out;
  Status status;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size > kMaxBytes) {
    status = invalid(path + ": not a regular file of at most 1 GiB");
  } else {
    out.resize(static_cast<size_t>(info.st_size));
    for (size_t at = 0; at < out.size();) {
      const ssize_t n = read(fd, out.data() + at, out.size() - at);
      if (n <= 0) {
        status = io_error(path + ": read " + std::to_string(at) + " of " +
                          std::to_string(out.size()) + " bytes");
        break;
      }
      at += static_cast<size_t>(n);
    }
  }
  close(fd);
  DS_TRY(status);
  return out;
}

std::string sha256_hex(std::span<const std::byte> bytes) {
  return to_hex(sha256({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
}

Result<JudgedFile> judge_file(const std::string& path) {
  JudgedFile out;
  out.path = path;
  DS_ASSIGN(out.bytes, read_file(path));
  out.sha256 = sha256_hex(out.bytes);
  DS_ASSIGN(out.note, inspect_plugin(out.bytes));
  return out;
}

}  // namespace ds::check
