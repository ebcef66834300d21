// SPDX-License-Identifier: Apache-2.0
// What linear() on codes takes along on a GPU: the norm before it, rotation and pages behind it;
// and that its calls can be recorded.
#include "tests/kernels/quant_case.h"

namespace ds::test {
namespace {

class QuantCallsTest : public testing::TestWithParam<TestedBackend> {
 protected:
  const TestedBackend& at = GetParam();
  const QuantOps& quant = *at.quant;
};

/// One step's q, k and v of `rows` rows: normed, multiplied, turned and put into their pages, by
/// one call or by one for each.
struct Step {
  static constexpr int64_t kHeads = 3, kKv = 2, kIn = 160, kPositions = 40;
  int64_t rows, dim;
  Floats x = random_floats(static_cast<size_t>(rows * kIn), 61);
  Floats norm = random_floats(kIn, 62);
  Floats angles = random_floats(static_cast<size_t>(kPositions * dim / 2), 63);
  Ints positions, slots;

  Step(int64_t rows_of_it, int64_t head_dim) : rows(rows_of_it), dim(head_dim) {
    for (int64_t r = 0; r < rows; ++r) {
      positions.push_back(static_cast<int32_t>(r * 7 % kPositions));
      slots.push_back(static_cast<int32_t>((r * 11 + 3) % 64));
    }
  }
  Floats run(const TestedBackend& at, QuantFormat format, bool fused) const {
    const int64_t n[] = {kHeads * dim, kKv * dim, kKv * dim};
    const int64_t page_floats = 64 * kKv * dim;
    Floats out(static_cast<size_t>(rows * n[0] + 2 * page_floats)), k(rows * n[1]), v(k), normed(x);
    float* pages = out.data() + rows * n[0];
    const RopeAppendArgs rope{rows,          kHeads,
                              out.data(),    k.data(),
                              v.data(),      angles.data(),
                              angles.data(), positions.data(),
                              slots.data(),  {KvDtype::kF32, kKv, dim, pages, pages + page_floats}};
    const std::shared_ptr<char> prepared = aligned(quant_prepared_bytes(rows, kIn));
    std::vector<Quantized> weights;
    QuantLinearArgs q{format, {}, {}};
    LinearArgs& a = q.linear;
    a.rows = rows;
    a.x = x.data(), a.x_stride = kIn;
    a.n_weights = 3;
    for (int w = 0; w < 3; ++w) {
      weights.emplace_back(at, nullptr, format, n[w], kIn, random_floats(n[w] * kIn, 64 + w));
      a.w[w] = {WeightFormat::kBF16, n[w], kIn, weights.back().packed.get()};
      q.scales[w] = weights.back().scales.get();
      a.y[w] = w == 0 ? out.data() : w == 1 ? k.data() : v.data();
      a.y_stride[w] = n[w];
    }
    if (fused) {
      a.norm = norm.data(), a.norm_eps = 1e-5f;
      a.rope = &rope;
      a.y[1] = a.y[2] = nullptr;
    } else {
      at.ops->rmsnorm(at.context, rows, kIn, x.data(), norm.data(), 1e-5f, normed.data(), nullptr,
                      {});
      at.quant->prepare(at.context, rows, kIn, normed.data(), kIn, prepared.get());
      a.x_prepared = prepared.get();
    }
    at.quant->linear(at.context, q);
    if (!fused) at.ops->rope_append(at.context, rope);
    finish(at);
    return out;
  }
};

TEST_P(QuantCallsTest, FewRowsAreNormedTurnedAndStoredByTheProduct) {
  if (quant.fused_rows == 0) GTEST_SKIP() << at.ops->name << " does that in calls of their own";
  for (const QuantFormat f : kFormats) {
    for (const int64_t dim : {16, 64, 8}) {  // the last one's halves are no whole blocks
      for (const int64_t rows : {1, 2, 3, 8}) {
        const Step step(rows, dim);
        const Floats apart = step.run(at, f, false);
        // A code may fall either way: x is rounded before its norm's factor.
        EXPECT_LT(error_of(step.run(at, f, true), as_double(apart)), 1e-2)
            << named(f) << " heads of " << dim << ", " << rows << " rows";
      }
    }
  }
}

/// A recording shows what a call is made of: whatever the host does in it is not repeated.
TEST_P(QuantCallsTest, CallsThatAreRecordedComputeAnew) {
  if (at.ops->host_memory) GTEST_SKIP() << at.ops->name << " records nothing";
  for (const QuantFormat f : kFormats) {
    for (const int64_t rows : {1, 8, 70}) {
      const int64_t n = 70, k = 160;
      const Quantized w(at, nullptr, f, n, k, random_floats(n * k, 71));
      Floats x = random_floats(rows * k, 72), y(rows * n), first, second;
      const auto prepared = aligned(quant_prepared_bytes(rows, k));
      QuantLinearArgs q{f, {}, {}};
      q.linear.rows = rows;
      q.linear.x = x.data(), q.linear.x_stride = k;
      if (rows > quant.fused_rows) q.linear.x_prepared = prepared.get();
      q.linear.n_weights = 1;
      q.linear.w[0] = {WeightFormat::kBF16, n, k, w.packed.get()};
      q.scales[0] = w.scales.get();
      q.linear.y[0] = y.data(), q.linear.y_stride[0] = n;
      const auto call = [&] {
        if (rows > quant.fused_rows)
          quant.prepare(at.context, rows, k, x.data(), k, prepared.get());
        quant.linear(at.context, q);
      };
      call();
      finish(at);
      first = y;
      ASSERT_TRUE(at.ops->begin_recording(at.context));
      call();
      void* recording = at.ops->end_recording(at.context);
      ASSERT_NE(recording, nullptr);
      for (float& v : x) v = -v;
      at.ops->replay(at.context, recording);
      finish(at);
      second = y;
      at.ops->release_recording(recording);
      for (size_t i = 0; i < y.size(); ++i) ASSERT_EQ(second[i], -first[i]) << named(f);
      EXPECT_NE(first[0], 0.0f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, QuantCallsTest, testing::ValuesIn(tested_backends()),
                         [](const auto& info) { return backend_label(info.param); });

}  // namespace
}  // namespace ds::test
