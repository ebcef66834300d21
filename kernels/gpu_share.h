// SPDX-License-Identifier: Apache-2.0
// The two masters on a GPU: which part of it training may use, by what serving does. The engine
// tells when its steps begin and end; before each op the trainer asks. On a CPU the pool shares by
// tasks instead (pool.h), and nobody asks here.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels/cuda/backend.h"

namespace ds {

struct ServingLoad {
  bool in_step = false;  ///< an engine step waits or runs
  double busy = 0;       ///< about the part of the last 100 ms in which one ran
  int64_t waiting = 0;   ///< requests that found no place in the last step
};

/// `min_share`: training has fallen behind and is owed this much of the GPU, 0 = it has not. Pure.
GpuPart training_part(const ServingLoad& load, double min_share);

/// Of the GPU's SMs, about.
double share_of(GpuPart part);

/// One engine thread tells, any thread asks. Times are of a monotonic clock.
class GpuShare {
 public:
  void begin_step(int64_t now_ns, int64_t waiting);
  void end_step(int64_t now_ns);
  void set_min_share(double share);
  /// For benches and tests: this part whatever the load is; kNone in steps, the whole between them.
  void hold(GpuPart part);

  ServingLoad load(int64_t now_ns) const;
  GpuPart part(int64_t now_ns) const;  ///< kNone only within a step

  /// The part that holds now; waits while it is kNone.
  GpuPart pass() const;
  /// The same, as the backend asks it.
  StreamGate gate();

 private:
  void changed();

  // Written by the engine thread alone. A reader that sees a step's end half told decides by an
  // old load once.
  std::atomic<bool> in_step_{false};
  std::atomic<int64_t> since_ns_{0};  ///< the last begin or end
  std::atomic<double> busy_{0};       ///< then
  std::atomic<int64_t> waiting_{0};
  std::atomic<double> min_share_{0};
  std::atomic<int> held_{-1};
  std::atomic<uint32_t> changes_{0};
};

}  // namespace ds
