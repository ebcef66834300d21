// SPDX-License-Identifier: Apache-2.0
#include "check/child.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>

namespace ds::check {
namespace {

constexpr int kExceptionExit = 86;
constexpr size_t kDoingBytes = 256;
char* doing = nullptr;  // of the innermost child; shared with its parent
std::string& context() {
  static std::string text;
  return text;
}

[[noreturn]] void on_terminate() { _exit(std::current_exception() ? kExceptionExit : 134); }

void write_all(int fd, const std::string& bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t n = write(fd, bytes.data() + at, bytes.size() - at);
    if (n <= 0) return;
    at += static_cast<size_t>(n);
  }
}

[[noreturn]] void child_main(int fd, const std::function<std::string()>& work) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  for (const int signal_number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    signal(signal_number, SIG_DFL);
  }
  std::set_terminate(on_terminate);
  write_all(fd, "=" + work());  // '=' tells a whole answer, if empty, from none
  close(fd);
  std::fflush(nullptr);
  _exit(0);  // no destructors: what the plugin registered has been judged elsewhere
}

/// Until the pipe closes or the time is over; true = closed.
bool read_until_closed(int fd, int timeout_ms, std::string& out) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::milliseconds(timeout_ms);
  for (char piece[65536];;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    if (left <= 0) return false;
    pollfd wait{fd, POLLIN, 0};
    const int ready = poll(&wait, 1, static_cast<int>(left));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return false;
    const ssize_t n = read(fd, piece, sizeof piece);
    if (n <= 0) return true;
    out.append(piece, static_cast<size_t>(n));
  }
}

}  // namespace

void now_doing(const std::string& what) {
  if (doing == nullptr) return;
  const std::string text = context() + what;
  const size_t n = std::min(text.size(), kDoingBytes - 1);
  std::memcpy(doing, text.data(), n);
  doing[n] = 0;
}
void now_within(const std::string& text) { context() = text.empty() ? "" : text + ": "; }

std::string ChildResult::how_it_ended() const {
  switch (end) {
    case End::kDone:
      return "ended";
    case End::kSignal:
      return "ended by signal " + std::to_string(detail) + " (" + strsignal(detail) + ")";
    case End::kTimeout:
      return "gave no answer within " + std::to_string(detail) + " ms";
    case End::kException:
      return "let an exception cross the boundary";
    case End::kExit:
      return "ended the process with status " + std::to_string(detail);
  }
  return "";
}

ChildResult run_in_child(const std::function<std::string()>& work, int timeout_ms) {
  ChildResult result;
  int ends[2];
  void* shared =
      mmap(nullptr, kDoingBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED || pipe(ends) != 0) {
    result.end = ChildResult::End::kExit;
    result.answer = "no process could be made";
    return result;
  }
  std::fflush(nullptr);
  char* const outer = doing;
  doing = static_cast<char*>(shared);
  const pid_t pid = fork();
  if (pid == 0) {
    close(ends[0]);
    child_main(ends[1], work);
  }
  doing = outer;
  close(ends[1]);
  std::string bytes;
  const bool closed = read_until_closed(ends[0], timeout_ms, bytes);
  close(ends[0]);
  if (!closed) kill(pid, SIGKILL);
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (closed && WIFEXITED(status) && WEXITSTATUS(status) == 0 && bytes.starts_with("=")) {
    result.answer = bytes.substr(1);
  } else {
    result.answer = static_cast<const char*>(shared);
    if (!closed) {
      result.end = ChildResult::End::kTimeout;
      result.detail = timeout_ms;
    } else if (WIFSIGNALED(status)) {
      result.end = ChildResult::End::kSignal;
      result.detail = WTERMSIG(status);
    } else {
      result.detail = WEXITSTATUS(status);
      result.end =
          result.detail == kExceptionExit ? ChildResult::End::kException : ChildResult::End::kExit;
    }
  }
  munmap(shared, kDoingBytes);
  return result;
}

}  // namespace ds::check
