// SPDX-License-Identifier: Apache-2.0
// One numerics: a row's bits depend neither on its company, nor on the threads, nor on how a prompt
// is cut into chunks.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "kernels/pool.h"
#include "tests/kernels/cases_attention.h"

namespace ds::test {
namespace {

class BitsTest : public testing::TestWithParam<CpuIsa> {};

bool same_bits(const float* a, const float* b, int64_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

/// Output rows of a call on `rows`: row r of weight w at [w][r][n].
void expect_rows_equal(const LinearProblem& p, const Ops& ops, const OpContext& context,
                       const Floats& all, const std::vector<int64_t>& rows) {
  Floats some;
  p.bind(ops, context, &some, rows)();
  const LinearShape& s = p.shape;
  const auto count = static_cast<int64_t>(rows.size());
  int64_t at_all = 0, at_some = 0;
  for (size_t w = 0; w < (s.epilogue == Epilogue::kSwiglu ? 1 : s.n.size()); ++w) {
    for (int64_t i = 0; i < count; ++i) {
      EXPECT_TRUE(same_bits(&all[at_all + rows[i] * s.n[w]], &some[at_some + i * s.n[w]], s.n[w]))
          << ops.name << " weight " << w << " row " << rows[i] << " among " << count;
    }
    at_all += s.rows * s.n[w];
    at_some += count * s.n[w];
  }
}

TEST_P(BitsTest, LinearRowsDoNotSeeEachOther) {
  const Ops& ops = cpu_ops(GetParam());
  Pool one(1), two(2);
  const LinearShape shapes[] = {
      {200, 131, {37, 70, 16}, WeightFormat::kBF16, Epilogue::kNone, true, 3},
      {200, 576, {100, 100}, WeightFormat::kBF16, Epilogue::kSwiglu, false, 2},
      {200, 300, {96}, WeightFormat::kF32, Epilogue::kResidual, true, 1},
      {200, 64, {257}, WeightFormat::kBF16, Epilogue::kResidual, false, 0},
  };
  for (const LinearShape& shape : shapes) {
    const LinearProblem p(shape);
    Floats all, single_thread, no_pool;
    p.bind(ops, {two.engine()}, &all)();
    p.bind(ops, {one.engine()}, &single_thread)();
    p.bind(ops, {}, &no_pool)();
    EXPECT_EQ(all, single_thread) << ops.name;
    EXPECT_EQ(all, no_pool) << ops.name;
    for (int64_t row : {0, 1, 7, 95, 96, 199}) {
      expect_rows_equal(p, ops, {two.engine()}, all, {row});
    }
    for (int64_t count : {2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 64}) {
      std::vector<int64_t> rows(static_cast<size_t>(count));
      std::iota(rows.begin(), rows.end(), count);
      expect_rows_equal(p, ops, {two.engine()}, all, rows);
      for (int64_t& r : rows) r = r * 37 % 200;  // another company, and other slots side by side
      expect_rows_equal(p, ops, {one.engine()}, all, rows);
    }
  }
}

using Parts = std::vector<std::vector<AttentionProblem::Part>>;

/// Runs the batches one after the other on a fresh cache; outputs by sequence and position.
Floats outputs_of(const AttentionProblem& p, const Ops& ops, const OpContext& context,
                  const Parts& batches) {
  const int64_t width = p.shape.n_heads * p.shape.d;
  Floats all(static_cast<size_t>(p.total * width));
  AttentionProblem::Cache cache(p);
  for (const auto& parts : batches) {
    Floats out;
    cache.step(ops, context, parts, &out);
    int64_t from = 0;
    for (const auto& part : parts) {
      int64_t row = part.begin;
      for (size_t i = 0; i < part.sequence; ++i) row += p.shape.sequences[i].second;
      const int64_t n = (part.end - part.begin) * width;
      std::copy_n(out.begin() + from, n, all.begin() + row * width);
      from += n;
    }
  }
  return all;
}

TEST_P(BitsTest, AttentionIsTheSameWholeInChunksAndTokenByToken) {
  const Ops& ops = cpu_ops(GetParam());
  Pool pool(2);
  for (int variant = 0; variant < 8; ++variant) {
    const KvDtype dtype = variant % 2 == 0 ? KvDtype::kBF16 : KvDtype::kF32;
    const int64_t d = variant / 2 % 2 == 0 ? 16 : 64;
    const bool selected = variant >= 4;
    const AttentionProblem p({9, 3, d, dtype, {{0, 150}, {0, 70}}, selected});
    const Floats whole = outputs_of(p, ops, {pool.engine()}, {{{0, 0, 150}, {1, 0, 70}}});
    const Floats alone = outputs_of(p, ops, {}, {{{0, 0, 150}}, {{1, 0, 70}}});
    EXPECT_EQ(whole, alone) << ops.name;
    const Floats chunks = outputs_of(p, ops, {pool.engine()},
                                     {{{0, 0, 1}},
                                      {{0, 1, 40}, {1, 0, 32}},
                                      {{1, 32, 33}, {0, 40, 64}},
                                      {{0, 64, 150}},
                                      {{1, 33, 70}}});
    EXPECT_EQ(whole, chunks) << ops.name;
    Parts tokens;
    for (int64_t i = 0; i < 150; ++i) {
      tokens.push_back({{0, i, i + 1}});
      if (i < 70) tokens.back().push_back({1, i, i + 1});
    }
    EXPECT_EQ(whole, outputs_of(p, ops, {pool.engine()}, tokens)) << ops.name;
  }
}

/// A prompt's rows must not be touched by what follows: not even NaN in a later row's value.
TEST_P(BitsTest, LaterRowsAddExactlyNothing) {
  const Ops& ops = cpu_ops(GetParam());
  AttentionProblem p({3, 1, 64, KvDtype::kF32, {{0, 40}}});
  const Floats clean = outputs_of(p, ops, {}, {{{0, 0, 40}}});
  for (int64_t i = 0; i < 64; ++i) p.v[39 * 64 + i] = NAN;
  for (int64_t i = 0; i < 64; ++i) p.k[39 * 64 + i] = NAN;
  const Floats poisoned = outputs_of(p, ops, {}, {{{0, 0, 40}}});
  EXPECT_TRUE(same_bits(clean.data(), poisoned.data(), 39 * 3 * 64)) << ops.name;
  EXPECT_NE(poisoned[39 * 3 * 64], poisoned[39 * 3 * 64]);
}

TEST_P(BitsTest, EveryOpIsTheSameOnOneThreadAndMany) {
  const Ops& ops = cpu_ops(GetParam());
  Pool three(3);
  for (const Case& c : all_cases()) {
    if (c.gpu_alone) continue;
    Floats one, many;
    c.bind(ops, {}, &one)();
    c.bind(ops, {three.engine()}, &many)();
    EXPECT_TRUE(same_bits(one.data(), many.data(), static_cast<int64_t>(one.size())))
        << ops.name << ": " << c.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, BitsTest, testing::ValuesIn(supported_isas()), [](const auto& info) {
  return std::to_string(static_cast<int>(info.param));
});

}  // namespace
}  // namespace ds::test
