// SPDX-License-Identifier: Apache-2.0
// The one compute pool: pinned threads that spin briefly, then park. Two masters share it. The
// engine runs at once; the trainer's run() gives the pool up between tasks while the engine waits,
// and takes back up to `background_share` of the time when it has fallen behind (no starvation).
#pragma once

#include <cstdint>
#include <memory>

#include "ds/parallel.h"

namespace ds {

class GpuShare;

class Pool {
 public:
  /// `threads` includes the calling thread; 0 = one per core this process may use.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;

  int threads() const;
  const ds_parallel* engine();      ///< for the engine thread (one caller at a time)
  const ds_parallel* background();  ///< for the trainer (one caller at a time)

  /// Brackets of an engine step: background tasks in flight finish (<= 1 ms each), none starts
  /// until end_engine_step(). With a background share set, begin_engine_step() first lets waiting
  /// background work run until it has had its share since the last step. `waiting`: requests that
  /// the step has no place for.
  void begin_engine_step(int64_t waiting = 0);
  void end_engine_step();

  /// 0 = background yields always; 0.5 = at least half of the time while it has work.
  void set_background_share(double share);

  /// The same two masters' shares of a GPU; told by the calls above.
  GpuShare& gpu_share();

  struct Times {
    int64_t engine_ns = 0;      ///< spent inside engine steps
    int64_t background_ns = 0;  ///< background tasks running
    int64_t background_tasks = 0;
    int64_t yields = 0;       ///< times a background run() stopped for an engine step
    int64_t wait_ns_max = 0;  ///< longest begin_engine_step() wait caused by a running task
  };
  Times times() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Whose code this thread runs, for the report of a crash; null = the daemon's own. The tasks of a
/// run() inherit it from their caller, on whatever thread.
extern constinit thread_local const char* on_behalf_of;

/// Runs all tasks on the calling thread, any number of callers at a time: for small work away from
/// the two masters, such as packing a loaded version.
const ds_parallel* serial_parallel();

}  // namespace ds
