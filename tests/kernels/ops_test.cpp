// SPDX-License-Identifier: Apache-2.0
// Every op on every ISA and GPU of this machine against the double-precision oracle.
//
// DS_TEST_CASES=TEXT runs only the cases whose names contain that: for a sanitizer, which takes
// long.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <set>

#include "kernels/pool.h"
#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

class OpsTest : public testing::TestWithParam<TestedBackend> {};

/// The oracle takes longer than what it judges, and is the same for every table.
const Vec& expected_of(const Case& c) {
  static std::map<std::string, Vec> all;
  const auto [at, added] = all.try_emplace(c.name);
  if (added) at->second = c.expect();
  return at->second;
}

TEST_P(OpsTest, MatchesTheOracle) {
  const Ops& ops = *GetParam().ops;
  Pool pool(2);
  OpContext context = GetParam().context;
  context.parallel = pool.engine();
  const char* only = std::getenv("DS_TEST_CASES");
  std::set<std::string> names;
  int ran = 0;
  for (const Case& c : all_cases()) {
    EXPECT_TRUE(names.insert(c.name).second) << "two cases are called " << c.name;
    if (c.gpu_alone && ops.host_memory) continue;
    if (only != nullptr && c.name.find(only) == std::string::npos) continue;
    ++ran;
    Floats out;
    c.bind(ops, context, &out)();
    const char* failed = ops.finish(context);
    ASSERT_EQ(failed, nullptr) << ops.name << ": " << c.name << ": " << failed;
    const double tolerance = rounds_to_bf16(ops) ? c.tolerance_bf16 : c.tolerance;
    EXPECT_LE(error_of(out, expected_of(c)), tolerance) << ops.name << ": " << c.name;
  }
  EXPECT_GT(ran, 0) << "no case is called " << (only == nullptr ? "" : only);
}

TEST_P(OpsTest, FillsEveryEntry) {
  const Ops& ops = *GetParam().ops;
  const auto* entry = reinterpret_cast<const void* const*>(&ops.allocate);
  const auto* end = reinterpret_cast<const void* const*>(&ops + 1);
  for (; entry < end; ++entry) EXPECT_NE(*entry, nullptr) << end - entry << " before the end";
}

INSTANTIATE_TEST_SUITE_P(All, OpsTest, testing::ValuesIn(tested_backends()),
                         [](const auto& info) { return backend_label(info.param); });

TEST(BestIsa, IsSupported) { EXPECT_TRUE(cpu_supports(best_cpu_isa())); }

}  // namespace
}  // namespace ds::test
