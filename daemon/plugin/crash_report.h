// SPDX-License-Identifier: Apache-2.0
// When plugin code crashes the process: which one it was is said at once and known at the next
// start.
#pragma once

#include <string>

#include "kernels/pool.h"

namespace ds {

/// What a crash is blamed on while it lives: constant text, e.g. "<sha256> org.acme.nf4/my-nf4",
/// also in tasks that the code gives to the pool. Nested ones stack.
class PluginRunning {
 public:
  explicit PluginRunning(const char* who) : before_(on_behalf_of) { on_behalf_of = who; }
  ~PluginRunning() { on_behalf_of = before_; }
  PluginRunning(const PluginRunning&) = delete;

 private:
  const char* const before_;
};

/// From now on SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGABRT inside a plugin write one line to stderr
/// and to `path` (replaced), then end the process as they would have. Once per process.
void report_plugin_crashes(const std::string& path);

}  // namespace ds
