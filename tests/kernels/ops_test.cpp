// SPDX-License-Identifier: Apache-2.0
// Every op on every ISA of this machine against the double-precision oracle.
#include <gtest/gtest.h>

#include "kernels/pool.h"
#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

class OpsTest : public testing::TestWithParam<CpuIsa> {};

TEST_P(OpsTest, MatchesTheOracle) {
  const Ops& ops = cpu_ops(GetParam());
  Pool pool(2);
  for (const Case& c : all_cases()) {
    Floats out;
    c.bind(ops, {pool.engine()}, &out)();
    const double tolerance = rounds_to_bf16(ops) ? c.tolerance_bf16 : c.tolerance;
    EXPECT_LE(error_of(out, c.expect()), tolerance) << ops.name << ": " << c.name;
  }
}

TEST_P(OpsTest, FillsEveryEntry) {
  const auto* entry = reinterpret_cast<const void* const*>(&cpu_ops(GetParam()));
  for (size_t i = 0; i < sizeof(Ops) / sizeof(void*); ++i) EXPECT_NE(entry[i], nullptr) << i;
}

INSTANTIATE_TEST_SUITE_P(Isa, OpsTest, testing::ValuesIn(supported_isas()), [](const auto& info) {
  return std::to_string(static_cast<int>(info.param));
});

TEST(BestIsa, IsSupported) { EXPECT_TRUE(cpu_supports(best_cpu_isa())); }

}  // namespace
}  // namespace ds::test
