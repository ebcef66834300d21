// SPDX-License-Identifier: Apache-2.0
// Level 2: what DS_CAP_DETERMINISTIC claims.
#include "check/check.h"

namespace ds::check {
namespace {

Verdict deterministic(Bench& bench) {
  if ((bench.component.caps & DS_CAP_DETERMINISTIC) == 0) return skipped("it does not claim it");
  for (const Operation& operation : operations_of(bench.component)) {
    TrialOptions options;
    options.scale = 3;
    const Trace first = trace_of(bench, operation, options);
    for (const int threads : {1, 4, 4, 3}) {
      options.threads = threads;
      if (!first.same_as(trace_of(bench, operation, options)))
        return failed(std::string(operation.name) + ": other bytes on " + std::to_string(threads) +
                      " threads than before");
    }
  }
  return pass();
}

}  // namespace

std::vector<Check> determinism_checks() {
  return {{"numerics.determinism", 2, 0, {}, deterministic}};
}

}  // namespace ds::check
