// SPDX-License-Identifier: Apache-2.0
#include "engine/mlp.h"

#include <gtest/gtest.h>

#include <cmath>

#include "reference_model.h"

namespace ds {
namespace {

TEST(Mlp, GradientMatchesFiniteDifferences) {
  test::Machine machine;
  const Mlp start({7, 5, 6, 3}, 9);
  Rng rng(4);
  std::vector<float> x(4 * 7);
  for (float& v : x) v = static_cast<float>(rng.uniform() - 0.5);
  const std::vector<int32_t> y = {0, 2, 1, 2};
  const std::vector<float> weight = {0.1f, 0.5f, 0.25f, 2.0f};
  std::vector<float> gradient(start.parameters().size()), logprob(4);
  start.loss(machine.compute, 4, x.data(), y.data(), weight, logprob, gradient);
  for (size_t i = 0; i < gradient.size(); ++i) {
    Mlp moved = start;
    const float h = 1e-3f;  // small: a step across a ReLU kink is no derivative
    moved.parameters()[i] = start.parameters()[i] + h;
    const double above = moved.loss(machine.compute, 4, x.data(), y.data(), weight, logprob, {});
    moved.parameters()[i] = start.parameters()[i] - h;
    const double below = moved.loss(machine.compute, 4, x.data(), y.data(), weight, logprob, {});
    EXPECT_NEAR((above - below) / (2 * h), gradient[i], 2e-3) << "parameter " << i;
  }
}

TEST(Mlp, TensorsRoundTripAndWrongOnesAreRefused) {
  test::Machine machine;
  Mlp a({4, 3, 2}, 1), b({4, 3, 2}, 2), c({4, 2}, 1);
  ASSERT_TRUE(b.set_tensors(a.tensors()).ok());
  EXPECT_TRUE(std::equal(a.parameters().begin(), a.parameters().end(), b.parameters().begin()));
  EXPECT_FALSE(c.set_tensors(a.tensors()).ok());
}

}  // namespace
}  // namespace ds
