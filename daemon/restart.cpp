// SPDX-License-Identifier: Apache-2.0
#include "restart.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace ds {
namespace {

constexpr int64_t kHour = 3600;

/// Ours are close-on-exec anyway; those of libraries and drivers need not be.
void close_on_exec_from(int first) {
  DIR* open = opendir("/proc/self/fd");
  if (open == nullptr) return;
  while (const dirent* entry = readdir(open)) {
    int fd = -1;  // of "." and ".."
    const char* const name = entry->d_name;
    std::from_chars(name, name + std::strlen(name), fd);
    if (fd >= first) fcntl(fd, F_SETFD, fcntl(fd, F_GETFD) | FD_CLOEXEC);
  }
  closedir(open);
}

}  // namespace

Restarts Restarts::parse(const std::string& text) {
  Restarts out;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at < end) {
    int64_t second = 0;
    const auto [next, error] = std::from_chars(at, end, second);
    if (error == std::errc()) out.failed_s_.push_back(second);
    at = std::find(next, end, ',');
    if (at < end) ++at;
  }
  std::ranges::sort(out.failed_s_);
  return out;
}

std::string Restarts::text() const {
  std::string out;
  for (const int64_t second : failed_s_) out += (out.empty() ? "" : ",") + std::to_string(second);
  return out;
}

int64_t Restarts::within_hour(int64_t now_s) const {
  return std::ranges::count_if(failed_s_, [&](int64_t s) { return s > now_s - kHour; });
}

bool Restarts::allowed(int64_t now_s, int64_t most) const { return within_hour(now_s) < most; }

void Restarts::add(int64_t now_s) {
  std::erase_if(failed_s_, [&](int64_t s) { return s <= now_s - kHour; });
  failed_s_.push_back(now_s);
}

Status Restarts::execute(const std::string& program, char** arguments) const {
  setenv(kVariable, text().c_str(), 1);
  constexpr int kAfterStandardStreams = 3;
  close_on_exec_from(kAfterStandardStreams);
  execv(program.c_str(), arguments);
  return io_error(program + ": cannot be executed anew: " + std::strerror(errno));
}

}  // namespace ds
