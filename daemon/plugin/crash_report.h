// SPDX-License-Identifier: Apache-2.0
// When plugin code crashes the process: which one it was is said at once and known at the next
// start.
#pragma once

#include <string>

#include "ds/parallel.h"
#include "ds/status.h"

namespace ds {

/// What a crash is blamed on: constant text, e.g. "<sha256> org.acme.nf4/my-nf4 generation 2".
class PluginRunning {
 public:
  /// `who` outlives it. Nested ones stack.
  explicit PluginRunning(const char* who);
  ~PluginRunning();
  PluginRunning(const PluginRunning&) = delete;

 private:
  const char* before_;
};

/// The pool as a plugin gets it: tasks run on other threads, where the blame follows them.
class BlamedParallel {
 public:
  BlamedParallel(const ds_parallel* pool, const char* who);
  BlamedParallel(const BlamedParallel&) = delete;
  const ds_parallel* get() const { return &parallel_; }

 private:
  static void run(void* ctx, int64_t count, ds_task_fn task, void* user);
  const ds_parallel* pool_;
  const char* who_;
  ds_parallel parallel_;
};

/// From now on SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGABRT inside a plugin write one line to stderr
/// and to `path` (replaced), then end the process as they would have. Once per process.
void report_plugin_crashes(const std::string& path);

}  // namespace ds
