// SPDX-License-Identifier: Apache-2.0
#include "ctl/interrupt.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>

namespace ds::ctl {
namespace {

int g_pipe[2] = {-1, -1};  // a signal handler can reach nothing but a global
volatile std::sig_atomic_t g_interrupted = 0;

void on_signal(int) {
  const int saved = errno;
  g_interrupted = 1;
  [[maybe_unused]] const ssize_t written = write(g_pipe[1], "x", 1);
  errno = saved;
}

}  // namespace

void catch_interrupts() {
  if (pipe2(g_pipe, O_CLOEXEC | O_NONBLOCK) != 0) return;
  struct sigaction action = {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

bool interrupted() { return g_interrupted != 0; }

void clear_interrupt() {
  g_interrupted = 0;
  char drained[64];
  while (read(g_pipe[0], drained, sizeof drained) > 0) {
  }
}

int interrupt_fd() { return g_pipe[0]; }

bool wait_or_interrupt(int ms) {
  pollfd watched = {g_pipe[0], POLLIN, 0};
  poll(&watched, g_pipe[0] >= 0 ? 1 : 0, ms);
  return interrupted();
}

}  // namespace ds::ctl
