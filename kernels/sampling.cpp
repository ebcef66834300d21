// SPDX-License-Identifier: Apache-2.0
#include "kernels/sampling.h"

#include <bit>
#include <cmath>
#include <limits>

namespace ds {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kBlock = 512;  // a multiple of kLanes

/// e^x for x <= 0 within 2 ulp, 0 below the normal numbers. Cephes' expf (Moshier): x = n ln 2 + r,
/// then a polynomial in r. Branchless, so that a loop over the vocabulary becomes SIMD; libm's does
/// not. cuda/sample.cu has the same steps.
inline float exp_below_one(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound) + 127;
  const float scaled = p * std::bit_cast<float>(exponent << 23);
  return x > -87.0f ? scaled : 0.0f;
}

void block_weights(const float* x, int64_t n, float best, float heat, float* weights) {
  for (int64_t i = 0; i < n; ++i) weights[i] = exp_below_one((x[i] - best) * heat);
}

}  // namespace

/// Lanes let the compiler use SIMD: this runs over the whole vocabulary for every token.
float largest_finite(const float* x, int64_t n) {
  float best[kLanes], poison[kLanes] = {};
  std::fill(best, best + kLanes, x[0]);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
      poison[j] += x[i + j] * 0.0f;  // NaN from NaN and infinity
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    best[0] = x[i] > best[0] ? x[i] : best[0];
    poison[0] += x[i] * 0.0f;
  }
  for (int64_t j = 1; j < kLanes; ++j) poison[0] += poison[j];
  return poison[0] == 0.0f ? *std::max_element(best, best + kLanes)
                           : std::numeric_limits<float>::quiet_NaN();
}

double softmax_weights(const float* x, int64_t n, float best, float heat, float* weights) {
  float block[kBlock];
  double sum[kLanes] = {};
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t count = std::min(kBlock, n - at), whole = count / kLanes * kLanes;
    float* w = weights == nullptr ? block : weights + at;
    block_weights(x + at, count, best, heat, w);
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) sum[j] += static_cast<double>(w[i + j]);
    }
    for (int64_t i = whole; i < count; ++i) sum[0] += static_cast<double>(w[i]);
  }
  double total = 0;
  for (const double lane : sum) total += lane;
  return total;
}

int32_t sample_row(const float* logits, int64_t vocab, float heat, double chance) {
  const float best = largest_finite(logits, vocab);
  if (std::isnan(best)) return -1;
  if (heat == 0) return static_cast<int32_t>(std::find(logits, logits + vocab, best) - logits);
  Walk walk(chance * softmax_weights(logits, vocab, best, heat, nullptr));
  float weights[kBlock];
  for (int64_t at = 0; at < vocab; at += kBlock) {
    const int64_t count = std::min(kBlock, vocab - at);
    block_weights(logits + at, count, best, heat, weights);
    for (int64_t i = 0; i < count; ++i) {
      if (walk.passes_at(at + i, weights[i])) return static_cast<int32_t>(at + i);
    }
  }
  return static_cast<int32_t>(walk.last());
}

void sample_rows(const OpContext& context, const SampleArgs& args) {
  const ds_task_fn one = [](void* user, int64_t row) {
    const SampleArgs& a = *static_cast<const SampleArgs*>(user);
    a.token[row] = sample_row(a.logits + row * a.stride, a.vocab, a.heat[row], a.chance[row]);
  };
  SampleArgs a = args;
  if (context.parallel != nullptr)
    return context.parallel->run(context.parallel->ctx, a.rows, one, &a);
  for (int64_t row = 0; row < a.rows; ++row) one(&a, row);
}

}  // namespace ds
