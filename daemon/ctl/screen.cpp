// SPDX-License-Identifier: Apache-2.0
#include "ctl/screen.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>

#include "ctl/interrupt.h"

namespace ds::ctl {
namespace {

winsize terminal_size() {
  winsize size = {};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) size.ws_col = 80;
  if (size.ws_row == 0) size.ws_row = 24;
  return size;
}

}  // namespace

bool on_terminal() { return isatty(STDIN_FILENO) && isatty(STDOUT_FILENO); }

Screen::Screen() {
  if (tcgetattr(STDIN_FILENO, &saved_) == 0) {
    termios raw = saved_;
    raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);  // ISIG stays: Ctrl-C is a signal
    keys_ = tcsetattr(STDIN_FILENO, TCSANOW, &raw) == 0;
  }
  std::fputs("\033[?1049h\033[?25l", stdout);
}

Screen::~Screen() {
  std::fputs("\033[?25h\033[?1049l", stdout);
  std::fflush(stdout);
  if (keys_) tcsetattr(STDIN_FILENO, TCSANOW, &saved_);
}

int Screen::columns() const { return terminal_size().ws_col; }
int Screen::rows() const { return terminal_size().ws_row; }

void Screen::draw(const std::string& frame) {
  std::string out = "\033[H";
  int left = rows();
  for (size_t begin = 0; begin < frame.size() && left > 0; --left) {
    size_t end = frame.find('\n', begin);
    if (end == std::string::npos) end = frame.size();
    out += frame.substr(begin, end - begin) + "\033[K";
    if (left > 1) out += "\n";
    begin = end + 1;
  }
  out += "\033[J";
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

bool Screen::leave_within(int ms) {
  pollfd watched[2] = {{STDIN_FILENO, POLLIN, 0}, {interrupt_fd(), POLLIN, 0}};
  if (poll(watched, interrupt_fd() >= 0 ? 2 : 1, ms) <= 0) return interrupted();
  if (interrupted()) return true;
  char key = 0;
  const ssize_t got = read(STDIN_FILENO, &key, 1);
  return got <= 0 || key == 'q' || key == 'Q' || key == 27;
}

}  // namespace ds::ctl
