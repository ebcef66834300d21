// SPDX-License-Identifier: Apache-2.0
// Finite differences of every backward. The oracle's gradients are checked here against differences
// of the oracle's forward, in double; ops_test checks the kernels' gradients against the oracle's.
#include <gtest/gtest.h>

#include <functional>

#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

Vec random_doubles(size_t n, uint32_t seed) { return as_double(random_floats(n, seed)); }

double dot(const Vec& a, const Vec& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// d loss / d x by central differences, at every coordinate.
void expect_gradient(Vec x, const Vec& gradient, const std::function<double(const Vec&)>& loss) {
  ASSERT_EQ(x.size(), gradient.size());
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < x.size(); ++i) {
    const double kept = x[i];
    x[i] = kept + kStep;
    const double above = loss(x);
    x[i] = kept - kStep;
    const double below = loss(x);
    x[i] = kept;
    EXPECT_NEAR((above - below) / (2 * kStep), gradient[i], 1e-7 * (1 + std::abs(gradient[i])))
        << i;
  }
}

TEST(Gradients, Linear) {
  const Vec x = random_doubles(3 * 7, 1), w = random_doubles(5 * 7, 2), dy = random_doubles(15, 3);
  // The input's gradient is the same op on the transposed weight.
  expect_gradient(x, reference::matmul(3, 7, 5, dy, reference::transposed(5, 7, w)),
                  [&](const Vec& v) { return dot(dy, reference::matmul(3, 5, 7, v, w)); });
  expect_gradient(w, reference::outer(3, 5, 7, dy, x),
                  [&](const Vec& v) { return dot(dy, reference::matmul(3, 5, 7, x, v)); });
}

TEST(Gradients, Rmsnorm) {
  const Vec x = random_doubles(3 * 9, 4), w = random_doubles(9, 5), dy = random_doubles(27, 6);
  const auto [dx, dw] = reference::rmsnorm_backward(3, 9, dy, x, w, 1e-5);
  expect_gradient(x, dx,
                  [&](const Vec& v) { return dot(dy, reference::rmsnorm(3, 9, v, w, 1e-5)); });
  expect_gradient(w, dw,
                  [&](const Vec& v) { return dot(dy, reference::rmsnorm(3, 9, x, v, 1e-5)); });
}

TEST(Gradients, Silu) {
  for (double g : {-20.0, -1.5, 0.0, 0.3, 4.0}) {
    expect_gradient({g}, {reference::silu_slope(g)},
                    [](const Vec& v) { return reference::silu(v[0]); });
  }
}

TEST(Gradients, Rope) {
  const Vec x = random_doubles(8, 7), dy = random_doubles(8, 8);
  const Vec cos = {0.5, 0.1, -0.3, 0.9}, sin = {0.4, 0.99, 0.2, -0.1};
  Vec dx = dy;
  reference::rotate(4, cos.data(), sin.data(), true, dx.data());
  expect_gradient(x, dx, [&](Vec v) {
    reference::rotate(4, cos.data(), sin.data(), false, v.data());
    return dot(dy, v);
  });
}

TEST(Gradients, AttentionBehindAPrefix) {
  const reference::Heads heads{4, 2, 6, 0.4};
  const int64_t rows = 5, prefix = 3;
  const Vec q = random_doubles(rows * 24, 9), dout = random_doubles(rows * 24, 10);
  const Vec k = random_doubles((prefix + rows) * 12, 11);
  const Vec v = random_doubles((prefix + rows) * 12, 12);
  const auto g = reference::attention_backward(heads, rows, prefix, q, k, v, dout);
  const auto loss = [&](const Vec& a, const Vec& b, const Vec& c) {
    return dot(dout, reference::attention(heads, rows, prefix, a, b, c));
  };
  expect_gradient(q, g.dq, [&](const Vec& x) { return loss(x, k, v); });
  expect_gradient(k, g.dk, [&](const Vec& x) { return loss(q, x, v); });
  expect_gradient(v, g.dv, [&](const Vec& x) { return loss(q, k, x); });
}

TEST(Gradients, CrossEntropy) {
  const Vec x = random_doubles(11, 13);
  Vec g = reference::softmax(x.data(), 11);
  g[4] -= 1;
  expect_gradient(x, g, [](const Vec& v) { return reference::cross_entropy(v, 4); });
}

TEST(Gradients, KlOfTopK) {
  const Vec x = random_doubles(11, 14), stored = {std::log(0.5), std::log(0.2), std::log(0.1)};
  const std::vector<int32_t> index = {3, 10, 0};
  expect_gradient(x, reference::kl_topk_gradient(x, index, stored),
                  [&](const Vec& v) { return reference::kl_topk(v, index, stored); });
}

/// The kernel itself: linear on the transposed pack, and outer_accumulate, against differences of
/// linear in FP32 with a step its precision allows.
TEST(Gradients, KernelLinear) {
  for (CpuIsa isa : supported_isas()) {
    const Ops& ops = cpu_ops(isa);
    const int64_t n = 21, k = 13;
    const Floats w = random_floats(n * k, 15), dy = random_floats(n, 16);
    auto forward = aligned(ops.packed_bytes(WeightFormat::kF32, n, k));
    auto backward = aligned(ops.packed_bytes(WeightFormat::kF32, k, n));
    ops.pack({}, WeightFormat::kF32, n, k, w.data(), false, forward.get());
    ops.pack({}, WeightFormat::kF32, k, n, w.data(), true, backward.get());
    const auto apply = [&](void* data, int64_t outputs, int64_t inputs, const Floats& x) {
      Floats y(static_cast<size_t>(outputs));
      LinearArgs a;
      a.rows = a.n_weights = 1;
      a.x = x.data();
      a.x_stride = inputs;
      a.w[0] = {WeightFormat::kF32, outputs, inputs, data};
      a.y[0] = y.data();
      a.y_stride[0] = outputs;
      ops.linear({}, a);
      return y;
    };
    Floats x = random_floats(k, 17);
    const Floats dx = apply(backward.get(), k, n, dy);
    const Floats y = apply(forward.get(), n, k, x);
    Floats dw(n * k, 0.0f);
    OuterArgs outer;
    outer.rows = 1;
    outer.n = outer.dy_stride = n;
    outer.dy = dy.data();
    outer.k = outer.x_stride = k;
    outer.x = x.data();
    outer.out = dw.data();
    ops.outer_accumulate({}, 1, &outer);
    for (int64_t i = 0; i < k; ++i) {
      Floats moved = x;
      moved[i] += 1.0f;  // linear: any step is exact up to rounding
      const Floats y1 = apply(forward.get(), n, k, moved);
      double slope = 0;
      for (int64_t j = 0; j < n; ++j) slope += double{dy[j]} * (double{y1[j]} - double{y[j]});
      EXPECT_NEAR(slope, dx[i], 1e-4) << ops.name;
      EXPECT_FLOAT_EQ(dw[3 * k + i], dy[3] * x[i]) << ops.name;
    }
  }
}

}  // namespace
}  // namespace ds::test
