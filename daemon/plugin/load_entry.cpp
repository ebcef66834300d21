// SPDX-License-Identifier: Apache-2.0
#include "plugin/load_entry.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>

namespace ds {
namespace {

/// EBUSY while the kernel itself holds a page of the file, to move or to count it (mm/memfd.c waits
/// some 150 ms for that): it lets go soon.
Status seal(int file) {
  constexpr int kTries = 20;
  constexpr unsigned kSeals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
  for (int i = 0; i < kTries; ++i) {
    if (fcntl(file, F_ADD_SEALS, kSeals) == 0) return {};
    if (errno != EBUSY) break;
    const timespec pause{0, 10'000'000};
    nanosleep(&pause, nullptr);
  }
  return io_error(std::string("sealing: ") + std::strerror(errno));
}

}  // namespace

Result<Descriptor> sealed_file(const std::string& name, std::span<const std::byte> bytes) {
  Descriptor file(memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (file.get() < 0) return io_error(std::string("memory file: ") + std::strerror(errno));
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t wrote = write(file.get(), bytes.data() + done, bytes.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return io_error(std::string("memory file: ") + std::strerror(errno));
    done += static_cast<size_t>(wrote);
  }
  DS_TRY(seal(file.get()));
  return file;
}

Result<ds_plugin_entry_fn> load_entry(const std::string& name, std::span<const std::byte> bytes,
                                      int* file) {
  DS_ASSIGN(Descriptor sealed, sealed_file(name, bytes));
  void* handle =
      dlopen(("/proc/self/fd/" + std::to_string(sealed.get())).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    return Status(Code::kPlugin, why != nullptr ? why : "cannot be loaded");
  }
  const int fd = sealed.release();
  void* entry = dlsym(handle, DS_ENTRY_NAME);
  if (entry == nullptr) return Status(Code::kPlugin, DS_ENTRY_NAME " is missing");
  if (file != nullptr) *file = fd;
  return reinterpret_cast<ds_plugin_entry_fn>(entry);
}

}  // namespace ds
