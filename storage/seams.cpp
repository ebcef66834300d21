// SPDX-License-Identifier: Apache-2.0
#include "storage/seams.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "storage/descriptor.h"

namespace ds {
namespace {

Status os_error(std::string_view action, const std::string& path, int error) {
  const std::string what = std::string(action) + " " + path + ": " + std::strerror(error);
  if (error == ENOENT) return not_found(what);
  if (error == EACCES || error == EPERM) return {Code::kPermission, what};
  return io_error(what);
}

class SystemClock final : public Clock {
 public:
  int64_t unix_ms() const override {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
  }
  int64_t monotonic_ns() const override {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  }
};

class PosixFile final : public WritableFile {
 public:
  PosixFile(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}

  Status append(std::span<const std::byte> bytes) override {
    while (!bytes.empty()) {
      const ssize_t n = ::write(fd_.get(), bytes.data(), bytes.size());
      if (n < 0) {
        if (errno == EINTR) continue;
        return os_error("cannot write", path_, errno);
      }
      bytes = bytes.subspan(static_cast<size_t>(n));
    }
    return {};
  }

  Status sync() override {
    if (::fsync(fd_.get()) != 0) return os_error("cannot sync", path_, errno);
    return {};
  }

  Status close() override {
    if (const int error = fd_.close()) return os_error("cannot close", path_, error);
    return {};
  }

 private:
  std::string path_;
  Descriptor fd_;
};

class PosixFileSystem final : public FileSystem {
 public:
  Result<std::unique_ptr<WritableFile>> create(const std::string& path) override {
    const int fd = ::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
    if (fd < 0) return os_error("cannot create", path, errno);
    return std::unique_ptr<WritableFile>(std::make_unique<PosixFile>(path, fd));
  }

  Result<std::string> read(const std::string& path) override {
    Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (fd.get() < 0) return os_error("cannot open", path, errno);
    struct stat info;
    if (::fstat(fd.get(), &info) != 0) return os_error("cannot stat", path, errno);
    std::string content(S_ISREG(info.st_mode) ? static_cast<size_t>(info.st_size) : 0, '\0');
    size_t got = 0;
    while (true) {  // to the end, wherever it is by now; one spare byte tells "full" from "end"
      if (got == content.size()) content.resize(got + std::max<size_t>(1, got / 8));
      const ssize_t n = ::read(fd.get(), content.data() + got, content.size() - got);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return os_error("cannot read", path, errno);
      if (n == 0) break;
      got += static_cast<size_t>(n);
    }
    content.resize(got);
    return content;
  }

  Result<std::vector<std::string>> list(const std::string& directory) override {
    std::vector<std::string> names;
    std::error_code error;
    std::filesystem::directory_iterator it(directory, error), end;
    while (!error && it != end) {
      names.push_back(it->path().filename().string());
      it.increment(error);
    }
    if (error) return os_error("cannot list", directory, error.value());
    std::sort(names.begin(), names.end());
    return names;
  }

  bool exists(const std::string& path) override {
    struct stat info;
    return ::stat(path.c_str(), &info) == 0;
  }

  Status make_directories(const std::string& path) override {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) return os_error("cannot make directory", path, error.value());
    return {};
  }

  Status rename(const std::string& from, const std::string& to) override {
    if (::rename(from.c_str(), to.c_str()) != 0) {
      return os_error("cannot rename to " + to + ":", from, errno);
    }
    return {};
  }

  Status remove_all(const std::string& path) override {
    std::error_code error;
    std::filesystem::remove_all(path, error);
    if (error) return os_error("cannot remove", path, error.value());
    return {};
  }

  Status sync_directory(const std::string& path) override {
    Descriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fd.get() < 0) return os_error("cannot open directory", path, errno);
    if (::fsync(fd.get()) != 0) return os_error("cannot sync directory", path, errno);
    return {};
  }
};

}  // namespace

Clock& system_clock_seam() {
  static SystemClock clock;
  return clock;
}

FileSystem& posix_file_system() {
  static PosixFileSystem fs;
  return fs;
}

// SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014): golden
// gamma increment and the finaliser Mix13, applied to a combined with b.
Status write_file_synced(FileSystem& fs, const std::string& path, std::string_view bytes) {
  DS_ASSIGN(std::unique_ptr<WritableFile> file, fs.create(path));
  DS_TRY(file->append(std::as_bytes(std::span(bytes.data(), bytes.size()))));
  DS_TRY(file->sync());
  return file->close();
}

Status write_file_atomically(FileSystem& fs, const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  Status written = write_file_synced(fs, temporary, bytes);
  if (written.ok()) written = fs.rename(temporary, path);
  if (!written.ok()) {
    (void)fs.remove_all(temporary);  // best effort: the first failure is the one to report
    return written;
  }
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return fs.sync_directory(parent.empty() ? "." : parent);
}

}  // namespace ds
