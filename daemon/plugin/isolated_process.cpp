// SPDX-License-Identifier: Apache-2.0
#include "plugin/isolated_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "storage/seams.h"

namespace ds {
namespace {

constexpr int64_t kCancelTickNs = 10'000'000;

Status failed(const char* what) {
  return io_error(std::string("plugin helper: ") + what + ": " + std::strerror(errno));
}

/// A number that none of the helper's own takes; closed by exec.
Result<Descriptor> out_of_the_way(int fd) {
  Descriptor moved(fcntl(fd, F_DUPFD_CLOEXEC, 64));
  if (moved.get() < 0) return failed("descriptor");
  return moved;
}

/// What a tool's program needs to be found and to write; no secrets of the daemon.
std::vector<std::string> helper_environment() {
  std::vector<std::string> out;
  constexpr std::string_view kPassedOn[] = {"PATH=", "LANG=", "LC_ALL=", "TMPDIR=", "TZ="};
  for (char** at = environ; *at != nullptr; ++at) {
    const std::string_view variable = *at;
    if (std::any_of(std::begin(kPassedOn), std::end(kPassedOn),
                    [&](std::string_view name) { return variable.starts_with(name); }))
      out.emplace_back(variable);
  }
  return out;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

Result<pid_t> spawn(const HelperLaunch& launch, int arena, int socket) {
  DS_ASSIGN(const Descriptor file_at, out_of_the_way(launch.file));
  DS_ASSIGN(const Descriptor arena_at, out_of_the_way(arena));
  DS_ASSIGN(const Descriptor socket_at, out_of_the_way(socket));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, file_at.get(), kHelperFile);
  posix_spawn_file_actions_adddup2(&actions, arena_at.get(), kHelperArena);
  posix_spawn_file_actions_adddup2(&actions, socket_at.get(), kHelperSocket);
  posix_spawn_file_actions_addclosefrom_np(&actions, kHelperSocket + 1);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  std::vector<std::string> arguments = {launch.program, launch.kind,   launch.component,
                                        launch.path,    launch.sha256, std::to_string(getpid())};
  std::vector<std::string> environment = helper_environment();
  pid_t pid = -1;
  const int error = posix_spawn(&pid, launch.program.c_str(), &actions, &attributes,
                                pointers(arguments).data(), pointers(environment).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return io_error(launch.program + ": " + std::strerror(error));
  return pid;
}

}  // namespace

Result<std::unique_ptr<HelperProcess>> HelperProcess::start(const HelperLaunch& launch) {
  std::unique_ptr<HelperProcess> out(new HelperProcess());
  const Descriptor memory(memfd_create("ds-plugin-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (memory.get() < 0 || ftruncate(memory.get(), static_cast<off_t>(launch.arena_bytes)) != 0 ||
      fcntl(memory.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0)
    return failed("arena");
  void* at = mmap(nullptr, launch.arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (at == MAP_FAILED) return failed("arena");
  out->arena_ = static_cast<std::byte*>(at);
  out->arena_bytes_ = launch.arena_bytes;
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) return failed("socket");
  out->socket_ = Descriptor(ends[0]);
  const Descriptor other(ends[1]);
  DS_ASSIGN(out->pid_, spawn(launch, memory.get(), other.get()));
  out->pidfd_ = Descriptor(pidfd_of(out->pid_));
  if (out->pidfd_.get() < 0) return failed("pidfd");
  return out;
}

HelperProcess::~HelperProcess() {
  finish();
  if (arena_ != nullptr) munmap(arena_, arena_bytes_);
}

std::string HelperProcess::finish() {
  if (pid_ < 0) return "ended before";
  kill(-pid_, SIGKILL);  // with what a tool started; not yet reaped, so the number is still its own
  kill(pid_, SIGKILL);
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
  return WIFSIGNALED(status) ? "signal " + std::to_string(WTERMSIG(status))
                             : "exit status " + std::to_string(WEXITSTATUS(status));
}

HelperProcess::Answer HelperProcess::take_reply() {
  const uint64_t bytes = head().reply_bytes.load(std::memory_order_acquire);
  const uint64_t sequence = head().reply_sequence.load(std::memory_order_acquire);
  std::string why;
  if (sequence != sequence_)
    why = "its reply is to request " + std::to_string(sequence) + ", expected " +
          std::to_string(sequence_);
  else if (bytes > room())
    why = "its reply has " + std::to_string(bytes) + " bytes, at most " + std::to_string(room());
  if (!why.empty()) {
    finish();
    return {End::kGarbage, {}, why};
  }
  const auto* at = reinterpret_cast<const char*>(arena_ + kArenaHeadBytes + room());
  return {End::kReply, std::string(at, bytes), {}};
}

HelperProcess::Answer HelperProcess::exchange(std::string_view request, int64_t kill_at_ns,
                                              const uint32_t* cancel, int64_t grace_ns) {
  std::memcpy(arena_ + kArenaHeadBytes, request.data(), request.size());
  head().stop.store(0, std::memory_order_relaxed);
  head().request_bytes.store(request.size(), std::memory_order_relaxed);
  head().sequence.store(++sequence_, std::memory_order_release);
  char byte = 1;
  bool cancelled = false;
  if (send(socket_.get(), &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL) != 1)
    return {End::kDied, {}, finish()};
  for (;;) {
    const int64_t now = system_clock_seam().monotonic_ns();
    if (now >= kill_at_ns) {
      finish();
      return {cancelled ? End::kCancelled : End::kLate, {}, "no answer in time, killed"};
    }
    if (cancel != nullptr && !cancelled && __atomic_load_n(cancel, __ATOMIC_RELAXED) != 0) {
      cancelled = true;
      head().stop.store(1, std::memory_order_relaxed);
      kill_at_ns = std::min(kill_at_ns, now + grace_ns);
    }
    int64_t left = kill_at_ns - now;
    if (cancel != nullptr && !cancelled) left = std::min(left, kCancelTickNs);
    const timespec wait{left / 1'000'000'000, left % 1'000'000'000};
    pollfd watched[2] = {{socket_.get(), POLLIN, 0}, {pidfd_.get(), POLLIN, 0}};
    if (ppoll(watched, 2, &wait, nullptr) <= 0) continue;
    const ssize_t got = watched[0].revents != 0 ? recv(socket_.get(), &byte, 1, MSG_DONTWAIT) : -1;
    if (got == 1) return take_reply();
    if (got == 0 || watched[1].revents != 0) return {End::kDied, {}, finish()};
  }
}

}  // namespace ds
