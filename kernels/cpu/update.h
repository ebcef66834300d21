// SPDX-License-Identifier: Apache-2.0
// Weight gradients, optimizer step and reductions over parameters.
#pragma once

#include "kernels/cpu/linear.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scratch.h"

namespace ds::DS_ISA {

constexpr int64_t kOuterRows = 128;     // rows of x packed at a time: 128 x 64 floats stay in L1
constexpr int64_t kOuterOutputs = 240;  // outputs n of one task: accumulators 240 x 64 floats in L2

/// out[n0 .. n1)[k0 .. k0 + 64): rows ascending in one lane, then scaled and added once.
inline void outer_task(int64_t rows, int64_t k, const float* dy, int64_t dy_stride, const float* x,
                       int64_t x_stride, float scale, int64_t n0, int64_t n1, int64_t k0,
                       float* out) {
  float* block = task_scratch(static_cast<size_t>((kOuterRows + kOuterOutputs) * kGroupLanes));
  float* acc = block + kOuterRows * kGroupLanes;
  const int64_t width = smaller(kGroupLanes, k - k0);
  const int panels = static_cast<int>(ceil_div(width, 16));
  for (int64_t r0 = 0; r0 < rows; r0 += kOuterRows) {
    const int64_t n_rows = smaller(kOuterRows, rows - r0);
    for (int64_t r = 0; r < n_rows; ++r) {
      const float* from = x + (r0 + r) * x_stride + k0;
      for_lanes(0, width, [&](int64_t i, int64_t n) {
        store(block + r * kGroupLanes + i, load_n(from + i, n));
      });
    }
    multiply<false>({block, kGroupLanes, dy + r0 * dy_stride + n0, 1, dy_stride, n_rows, acc,
                     kGroupLanes, r0 == 0},
                    n1 - n0, panels);
  }
  for (int64_t i = 0; i < n1 - n0; ++i) {
    float* to = out + (n0 + i) * k + k0;
    for_lanes(0, width, [&](int64_t j, int64_t n) {
      store_n(to + j, fma(set(scale), load(acc + i * kGroupLanes + j), load_n(to + j, n)), n);
    });
  }
}

inline void outer_accumulate(const OpContext& context, int64_t rows, int64_t n, int64_t k,
                             const float* dy, int64_t dy_stride, const float* x, int64_t x_stride,
                             float scale, float* out) {
  if (rows == 0) return;
  const int64_t blocks = ceil_div(k, kGroupLanes);
  const int64_t wanted = larger(12, 200'000 / larger(1, rows));  // ~1 ns for an output's 64 lanes
  const int64_t each = smaller(kOuterOutputs, wanted / 12 * 12);
  parallel_for(context, blocks * ceil_div(n, each), [&](int64_t i) {
    const int64_t n0 = i / blocks * each;
    outer_task(rows, k, dy, dy_stride, x, x_stride, scale, n0, smaller(n, n0 + each),
               i % blocks * kGroupLanes, out);
  });
}

/// Decoupled weight decay (Loshchilov and Hutter 2019), bias-corrected moments.
inline void adamw(const OpContext& context, const AdamWArgs& a) {
  double power1 = 1.0, power2 = 1.0;
  power1 = __builtin_pow(static_cast<double>(a.beta1), static_cast<double>(a.step));
  power2 = __builtin_pow(static_cast<double>(a.beta2), static_cast<double>(a.step));
  const F16 correct1 = set(static_cast<float>(1.0 / (1.0 - power1)));
  const F16 correct2 = set(static_cast<float>(1.0 / (1.0 - power2)));
  const F16 beta1 = set(a.beta1), beta2 = set(a.beta2);
  const F16 rest1 = set(1.0f - a.beta1), rest2 = set(1.0f - a.beta2);
  parallel_blocks(context, a.n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t n) {
      const F16 g = load_n(a.gradient + i, n) * set(a.gradient_scale);
      const F16 m = fma(beta1, load_n(a.m + i, n), rest1 * g);
      const F16 v = fma(beta2, load_n(a.v + i, n), rest2 * g * g);
      const F16 p = load_n(a.master + i, n);
      const F16 step = m * correct1 / (sqrt(v * correct2) + set(a.eps));
      store_n(a.m + i, m, n);
      store_n(a.v + i, v, n);
      store_n(a.master + i, p - set(a.lr) * fma(set(a.weight_decay), p, step), n);
    });
  });
}

/// Chunks of 32768: 16 double lanes in turn, a fixed tree, then the chunks in order.
inline double sum_squares(const OpContext& context, int64_t n, const float* x) {
  const int64_t chunks = ceil_div(n, kElementsPerTask);
  auto* part = static_cast<double*>(call_scratch(static_cast<size_t>(chunks + 1) * sizeof(double)));
  parallel_blocks(context, n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    double lane[16] = {};
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      for (int j = 0; j < 16; ++j) {
        lane[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
      }
    }
    for (; i < end; ++i) lane[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    part[begin / kElementsPerTask] = lane[0];
  });
  double total = 0.0;
  for (int64_t c = 0; c < chunks; ++c) total += part[c];
  return total;
}

inline bool all_finite(const OpContext& context, int64_t n, const float* x) {
  bool finite = true;
  parallel_blocks(context, n, 4 * kElementsPerTask, [&](int64_t begin, int64_t end) {
    F16 sum = zero();  // x - x is 0 for a finite x and NaN otherwise; NaN sticks
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      const F16 v = load_n(x + i, m);
      sum = sum + (v - v);
    });
    const float total = reduce_add(sum);
    if (total != total) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return __atomic_load_n(&finite, __ATOMIC_RELAXED);
}

}  // namespace ds::DS_ISA
