// SPDX-License-Identifier: Apache-2.0
// Recorded calls on an instance, and what tells two answers to one apart.
#pragma once

#include <memory>
#include <string>

#include "plugin/library.h"
#include "plugin/recorded_calls.h"

namespace ds {

/// A call set up on an instance: memory planned, weights quantized, earlier tokens known. What it
/// refers to outlives it. On the caller's thread, with no pool.
class ReplayedCall {
 public:
  /// `deadline_ns` (CLOCK_MONOTONIC) is what a tool is given.
  static Result<std::unique_ptr<ReplayedCall>> make(const PluginInstance& instance,
                                                    const CallInput& input, int64_t deadline_ns);
  virtual ~ReplayedCall() = default;
  /// The call itself, through the door, and nothing else. May be repeated.
  virtual Status run() = 0;
  virtual CallOutput take_output() = 0;  ///< of the last run
  /// Of what a quantizer promises (ds_qformat.rel_tol), else 0.
  virtual double promised() const { return 0; }

 protected:
  ReplayedCall() = default;
};

/// What the call gave. `promised`: of ReplayedCall, if wanted.
Result<CallOutput> replay(const PluginInstance& instance, const CallInput& input,
                          int64_t deadline_ns, double* promised = nullptr);

struct Difference {
  double largest = 0;  ///< of the values' differences, relative to the largest expected value
  double mean = 0;     ///< the same
  double allowed = 0;  ///< for `largest`
  double weights = 0, promised = 0;  ///< quantizers: of a weight, relative to its row's largest
  Json gone = Json::array(), added = Json::array();  ///< findings
  bool within() const {
    return largest <= allowed && weights <= promised && gone.empty() && added.empty();
  }
};

/// NaN or another number of values counts as infinitely far. `promised`: of the newer one.
Difference difference(const CallInput& input, const CallOutput& expected, const CallOutput& got,
                      double promised);

}  // namespace ds
