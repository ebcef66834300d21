// SPDX-License-Identifier: Apache-2.0
// Times every op at the shapes of a 135M model: ops_bench [isa] [threads] [part of a case's name].
// isa: scalar, avx2, avx512, avx512-bf16, avx512-amx (default: this machine's best). The result is
// checked against the scalar table first. Calls that are bound by memory rotate through copies of
// their weights, as a model's layers do, so that caches do not flatter them.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "ds/status.h"
#include "kernels/pool.h"
#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

constexpr double kRotatedBytes = 300e6;  // a BF16 model's weights; more than the last-level cache

/// One thread is timed by its CPU time, so that a busy machine disturbs it less.
double now_s(const Pool& pool) {
  timespec t;
  clock_gettime(pool.threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

bool check(const Case& c, const Ops& ops, const OpContext& context) {
  Floats got, expected;
  c.bind(ops, context, &got)();
  c.bind(cpu_ops(CpuIsa::kScalar), context, &expected)();
  const bool rounds = rounds_to_bf16(ops);
  const double error = error_of(got, as_double(expected));
  if (error <= 2 * (rounds ? c.tolerance_bf16 : c.tolerance)) return true;
  std::printf("%-64s WRONG: error %.3g\n", c.name.c_str(), error);
  return false;
}

void time_case(const Case& c, const Ops& ops, const Pool& pool, const OpContext& context) {
  const bool streams = c.flops > 0 && c.flops < 20 * c.bytes && c.name.find("linear") == 0;
  const auto copies = static_cast<size_t>(streams ? std::max(1.0, kRotatedBytes / c.bytes) : 1.0);
  std::vector<Floats> outs(copies);
  std::vector<std::function<void()>> runs;
  for (Floats& out : outs) runs.push_back(c.bind(ops, context, &out));
  double best = 1e9;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const double start = now_s(pool);
    int64_t calls = 0;
    do {
      for (const auto& run : runs) run();
      calls += static_cast<int64_t>(copies);
    } while (now_s(pool) - start < 0.02);
    best = std::min(best, (now_s(pool) - start) / static_cast<double>(calls));
  }
  std::printf("%-64s %9.1f us %8.1f GFLOP/s %7.1f GB/s\n", c.name.c_str(), best * 1e6,
              c.flops / best * 1e-9, c.bytes / best * 1e-9);
}

int run(int argc, char** argv) {
  const CpuIsa isa = argc > 1 ? isa_named(argv[1]) : best_cpu_isa();
  Pool pool(argc > 2 ? std::atoi(argv[2]) : 0);
  const std::string part = argc > 3 ? argv[3] : "";
  const Ops& ops = cpu_ops(isa);
  const OpContext context{pool.engine()};
  std::printf("%s, %d threads\n", ops.name, pool.threads());
  bool right = true;
  std::vector<Case> cases = model_cases();
  for (Case& listed : cases) {
    const Case c = std::exchange(listed, {});  // its data goes when it is done
    if (c.name.find(part) == std::string::npos) continue;
    if (!check(c, ops, context)) {
      right = false;
      continue;
    }
    pool.begin_engine_step();
    time_case(c, ops, pool, context);
    pool.end_engine_step();
    std::fflush(stdout);
  }
  return right ? 0 : 1;
}

}  // namespace
}  // namespace ds::test

int main(int argc, char** argv) { return ds::test::run(argc, argv); }
