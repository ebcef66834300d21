// SPDX-License-Identifier: Apache-2.0
#include "check/loaded_plugin.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
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

Result<ds_plugin_entry_fn> load_entry(std::span<const std::byte> bytes) {
  // The descriptor stays open: a reused number would give glibc's handle of the file before.
  const int fd = memfd_create("driftstone-plugin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return io_error(std::string("memfd_create: ") + std::strerror(errno));
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t n = write(fd, bytes.data() + at, bytes.size() - at);
    if (n <= 0) return io_error(std::string("memfd: ") + std::strerror(errno));
    at += static_cast<size_t>(n);
  }
  fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return unavailable(std::string("dlopen: ") + dlerror());
  void* entry = dlsym(handle, DS_ENTRY_NAME);
  if (entry == nullptr) return invalid("no " DS_ENTRY_NAME);
  return reinterpret_cast<ds_plugin_entry_fn>(entry);
}

}  // namespace ds::check
