// SPDX-License-Identifier: Apache-2.0
#include "storage/file_bytes.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace ds {
namespace {

constexpr size_t kAlignment = 64;           // bytes; a cache line and an AVX-512 vector
constexpr size_t kChunk = size_t{1} << 20;  // bytes hashed while they are still in the L2 cache

Status read_all(int fd, std::span<std::byte> out, Sha256& hash) {
  size_t got = 0;
  while (got < out.size()) {
    const ssize_t n = ::read(fd, out.data() + got, std::min(kChunk, out.size() - got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return io_error(std::string("cannot read: ") + std::strerror(errno));
    if (n == 0) {
      return corrupt("ends at byte " + std::to_string(got) + ", expected " +
                     std::to_string(out.size()) + " (changed while being read)");
    }
    hash.update(out.data() + got, static_cast<size_t>(n));
    got += static_cast<size_t>(n);
  }
  return {};
}

}  // namespace

void FileBytes::Free::operator()(std::byte* memory) const { std::free(memory); }

Result<FileBytes> FileBytes::read(const std::string& path, Sha256& hash, uint64_t anchor) {
  // O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const std::string what = path + ": " + std::strerror(errno);
    return errno == ENOENT ? not_found(what) : io_error(what);
  }
  struct stat info;
  Status status;
  FileBytes file;
  if (::fstat(fd, &info) != 0) {
    status = io_error(std::strerror(errno));
  } else if (!S_ISREG(info.st_mode)) {
    status = invalid("not a regular file");
  } else {
    file.bytes_ = static_cast<size_t>(info.st_size);
    file.shift_ = (kAlignment - std::min<uint64_t>(anchor, file.bytes_) % kAlignment) % kAlignment;
    const size_t rounded = (file.shift_ + file.bytes_ + kAlignment) / kAlignment * kAlignment;
    file.buffer_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
    if (!file.buffer_) {
      status = io_error("no memory for its " + std::to_string(file.bytes_) + " bytes");
    } else {
      status = read_all(fd, {file.buffer_.get() + file.shift_, file.bytes_}, hash);
    }
  }
  ::close(fd);
  if (!status.ok()) return status.in(path);
  return file;
}

}  // namespace ds
