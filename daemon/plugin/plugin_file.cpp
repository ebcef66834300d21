// SPDX-License-Identifier: Apache-2.0
#include "plugin/plugin_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>

#include "storage/descriptor.h"
#include "storage/hash.h"

namespace ds {
namespace {

std::string error_text() { return std::strerror(errno); }

Status check_owner(const struct stat& s, const std::string& path) {
  if (s.st_uid != 0 && s.st_uid != geteuid()) {
    return Status(Code::kPermission, path + ": owned by user " + std::to_string(s.st_uid) +
                                         ", expected root or user " + std::to_string(geteuid()));
  }
  const bool sticky = S_ISDIR(s.st_mode) && (s.st_mode & S_ISVTX) != 0;
  if ((s.st_mode & (S_IWGRP | S_IWOTH)) != 0 && !sticky) {
    char mode[8];
    std::snprintf(mode, sizeof mode, "%04o", s.st_mode & 07777u);
    return Status(Code::kPermission,
                  path + ": mode " + mode + ", group or others may write; expected none of them");
  }
  return {};
}

/// Opens the folder step by step, so that each part is checked and none is swapped for a link.
Result<Descriptor> open_folder(const std::filesystem::path& folder) {
  Descriptor at(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
  std::filesystem::path so_far = "/";
  for (const auto& part : folder.relative_path()) {
    so_far /= part;
    Descriptor next(openat(at.get(), part.c_str(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    struct stat s {};
    if (next.get() < 0 || fstat(next.get(), &s) != 0)
      return io_error(so_far.string() + ": " + error_text());
    DS_TRY(check_owner(s, so_far.string()));
    at = std::move(next);
  }
  return at;
}

Result<std::string> read_bytes(int fd, const std::string& path, uint64_t size) {
  std::string out;
  out.resize(size);
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t got = read(fd, out.data() + done, out.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return io_error(path + ": " + error_text());
    if (got == 0) return corrupt(path + ": became shorter while it was read");
    done += static_cast<size_t>(got);
  }
  return out;
}

}  // namespace

Result<FileContent> read_plugin_file(const std::string& path) {
  std::error_code error;
  const auto given = std::filesystem::absolute(path, error).lexically_normal();
  if (given.filename().empty()) return invalid(path + ": expected a plugin file");
  const auto folder = std::filesystem::canonical(given.parent_path(), error);
  if (error) return not_found(path + ": " + error.message());
  const std::string full = (folder / given.filename()).string();
  DS_ASSIGN(const Descriptor at, open_folder(folder));
  const Descriptor file(openat(at.get(), given.filename().c_str(),
                               O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (file.get() < 0) {
    if (errno == ELOOP)
      return Status(Code::kPermission, full + ": a symbolic link, expected the file");
    if (errno == ENOENT) return not_found(full + ": no such file");
    return io_error(full + ": " + error_text());
  }
  struct stat s {};
  if (fstat(file.get(), &s) != 0) return io_error(full + ": " + error_text());
  if (!S_ISREG(s.st_mode)) return invalid(full + ": not a regular file");
  DS_TRY(check_owner(s, full));
  const auto size = static_cast<uint64_t>(s.st_size);
  if (size > kPluginFileLimit) {
    return invalid(full + ": " + std::to_string(size) + " bytes, at most " +
                   std::to_string(kPluginFileLimit));
  }
  FileContent out;
  out.path = full;
  DS_ASSIGN(out.bytes, read_bytes(file.get(), full, size));
  const Sha256Digest digest = sha256(out.bytes);
  out.sha256 = to_hex(digest);
  return out;
}

}  // namespace ds
