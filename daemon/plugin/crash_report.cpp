// SPDX-License-Identifier: Apache-2.0
#include "plugin/crash_report.h"

#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

namespace ds {
namespace {

char report_path[4096] = "";  // read by the handler, where nothing may be allocated

const char* signal_name(int number) {
  switch (number) {
    case SIGSEGV:
      return "SIGSEGV";
    case SIGBUS:
      return "SIGBUS";
    case SIGILL:
      return "SIGILL";
    case SIGFPE:
      return "SIGFPE";
    default:
      return "SIGABRT";
  }
}

void put(int fd, const char* text) {
  if (write(fd, text, std::strlen(text)) < 0) return;  // nobody is left to tell
}

/// Only async-signal-safe calls. SA_RESETHAND: returning, or raising again, ends the process.
void on_crash(int number) {
  const char* who = on_behalf_of;
  if (who != nullptr) {
    put(STDERR_FILENO, "dsd: ");
    put(STDERR_FILENO, signal_name(number));
    put(STDERR_FILENO, " in plugin ");
    put(STDERR_FILENO, who);
    put(STDERR_FILENO, "; the next start leaves it out\n");
    const int file = open(report_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file >= 0) {
      put(file, who);
      put(file, " ");
      put(file, signal_name(number));
      put(file, "\n");
      fsync(file);
      close(file);
    }
  }
  raise(number);
}

}  // namespace

void report_plugin_crashes(const std::string& path) {
  if (path.size() >= sizeof report_path) return;
  std::memcpy(report_path, path.c_str(), path.size() + 1);
  struct sigaction action {};
  action.sa_handler = &on_crash;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_ONSTACK);
  sigemptyset(&action.sa_mask);
  for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
    sigaction(number, &action, nullptr);
}

}  // namespace ds
