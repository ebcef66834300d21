// SPDX-License-Identifier: Apache-2.0
// ds-plugin-helper: runs one instance of one component of a plugin file for the daemon, one call at
// a time (plugin/isolation_wire.h). Started by the daemon only.
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "plugin/abi.h"
#include "plugin/isolated_calls.h"
#include "plugin/isolated_syscalls.h"

namespace ds {
namespace {

[[noreturn]] void leave(const char* why) {
  std::fprintf(stderr, "ds-plugin-helper: %s\n", why);
  _exit(2);
}

void write_file(const char* path, const std::string& text) {
  const int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return;
  (void)!write(fd, text.data(), text.size());
  close(fd);
}

/// No network where the system lets a user have none.
void leave_network() {
  const std::string uid = std::to_string(getuid()), gid = std::to_string(getgid());
  if (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0) return;
  write_file("/proc/self/setgroups", "deny");
  write_file("/proc/self/uid_map", uid + " " + uid + " 1");
  write_file("/proc/self/gid_map", gid + " " + gid + " 1");
}

/// No new privileges, no core file, no network, no calls that reach into the daemon.
void restrict_self(pid_t daemon) {
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);
  leave_network();
  if (!forbid_syscalls(daemon)) leave("the kernel has no system call filters");
}

/// Ends this process when the daemon ends. PR_SET_PDEATHSIG would do so when the thread ends that
/// started it.
void end_with(pid_t daemon) {
  const int fd = pidfd_of(daemon);
  if (fd < 0 || getppid() != daemon) leave("the daemon is gone");
  std::thread([fd] {
    pollfd ended{fd, POLLIN, 0};
    while (poll(&ended, 1, -1) <= 0) {
    }
    kill(0, SIGKILL);  // with what a tool started
  }).detach();
}

std::string file_bytes() {
  struct stat about {};
  if (fstat(kHelperFile, &about) != 0) leave("no file");
  std::string bytes(static_cast<size_t>(about.st_size), '\0');
  size_t at = 0;
  while (at < bytes.size()) {
    const ssize_t got =
        pread(kHelperFile, bytes.data() + at, bytes.size() - at, static_cast<off_t>(at));
    if (got <= 0) leave("the file cannot be read");
    at += static_cast<size_t>(got);
  }
  return bytes;
}

void serve(char** arguments) {
  struct stat about {};
  if (fstat(kHelperArena, &about) != 0) leave("no arena");
  const auto arena_bytes = static_cast<uint64_t>(about.st_size);
  void* mapped = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, kHelperArena, 0);
  if (mapped == MAP_FAILED) leave("the arena cannot be mapped");
  auto* base = static_cast<char*>(mapped);
  auto& head = *static_cast<ArenaHead*>(mapped);
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
  HelperCalls calls(kind_of_name(arguments[1]), arguments[2],
                    {arguments[3], file_bytes(), arguments[4]},
                    reinterpret_cast<const uint32_t*>(&head.stop), arena_room(arena_bytes));
  for (char byte = 0;;) {
    const ssize_t got = recv(kHelperSocket, &byte, 1, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got != 1) return;
    const uint64_t sequence = head.sequence.load(std::memory_order_acquire);
    const std::string reply =
        calls.answer({base + kArenaHeadBytes, head.request_bytes.load(std::memory_order_relaxed)});
    std::memcpy(base + kArenaHeadBytes + arena_room(arena_bytes), reply.data(), reply.size());
    head.reply_sequence.store(sequence, std::memory_order_release);
    head.reply_bytes.store(reply.size(), std::memory_order_release);
    if (send(kHelperSocket, &byte, 1, MSG_NOSIGNAL) != 1) return;
  }
}

}  // namespace
}  // namespace ds

int main(int count, char** arguments) {
  if (count != ds::kHelperArguments) ds::leave("is started by dsd only");
  const auto daemon = static_cast<pid_t>(std::atol(arguments[5]));
  ds::restrict_self(daemon);
  ds::end_with(daemon);
  ds::serve(arguments);
  _exit(0);  // what the plugin has at exit, or its threads, cannot get in the way
}
