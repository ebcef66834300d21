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
inline void outer_task(const OuterArgs& a, int64_t n0, int64_t n1, int64_t k0) {
  float* block = task_scratch(static_cast<size_t>((kOuterRows + kOuterOutputs) * kGroupLanes));
  float* acc = block + kOuterRows * kGroupLanes;
  const int64_t width = smaller(kGroupLanes, a.k - k0);
  const int panels = static_cast<int>(ceil_div(width, 16));
  for (int64_t r0 = 0; r0 < a.rows; r0 += kOuterRows) {
    const int64_t n_rows = smaller(kOuterRows, a.rows - r0);
    for (int64_t r = 0; r < n_rows; ++r) {
      const float* from = a.x + (r0 + r) * a.x_stride + k0;
      for_lanes(0, width, [&](int64_t i, int64_t n) {
        store(block + r * kGroupLanes + i, load_n(from + i, n));
      });
    }
    multiply<false>({block, kGroupLanes, a.dy + r0 * a.dy_stride + n0, 1, a.dy_stride, n_rows, acc,
                     kGroupLanes, r0 == 0},
                    n1 - n0, panels);
  }
  for (int64_t i = 0; i < n1 - n0; ++i) {
    float* to = a.out + (n0 + i) * a.k + k0;
    for_lanes(0, width, [&](int64_t j, int64_t n) {
      store_n(to + j, fma(set(a.scale), load(acc + i * kGroupLanes + j), load_n(to + j, n)), n);
    });
  }
}

inline void outer_accumulate_one(const OpContext& context, const OuterArgs& a) {
  if (a.rows == 0) return;
  const int64_t blocks = ceil_div(a.k, kGroupLanes);
  const int64_t wanted = larger(12, 200'000 / larger(1, a.rows));  // ~1 ns for an output's 64 lanes
  const int64_t each = smaller(kOuterOutputs, wanted / 12 * 12);
  parallel_for(context, blocks * ceil_div(a.n, each), [&](int64_t i) {
    const int64_t n0 = i / blocks * each;
    outer_task(a, n0, smaller(a.n, n0 + each), i % blocks * kGroupLanes);
  });
}

inline void outer_accumulate(const OpContext& context, int64_t count, const OuterArgs* a) {
  for (int64_t i = 0; i < count; ++i) outer_accumulate_one(context, a[i]);
}

inline void adamw(const OpContext& context, const AdamWArgs& a) {
  float factor = 1.0f;
  if (a.squares != nullptr) {
    const double norm = __builtin_sqrt(*a.squares);
    if (!__builtin_isfinite(norm)) return;
    if (a.clip > 0 && norm > a.clip) factor = static_cast<float>(a.clip / norm);
  }
  double power1 = 1.0, power2 = 1.0;
  power1 = __builtin_pow(static_cast<double>(a.beta1), static_cast<double>(a.step));
  power2 = __builtin_pow(static_cast<double>(a.beta2), static_cast<double>(a.step));
  const F16 correct1 = set(static_cast<float>(1.0 / (1.0 - power1)));
  const F16 correct2 = set(static_cast<float>(1.0 / (1.0 - power2)));
  const F16 beta1 = set(a.beta1), beta2 = set(a.beta2);
  const F16 rest1 = set(1.0f - a.beta1), rest2 = set(1.0f - a.beta2);
  parallel_blocks(context, a.n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t n) {
      const F16 g = load_n(a.gradient + i, n) * set(factor);
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
inline void dot(const OpContext& context, int64_t n, const float* x, const float* y, double* out) {
  const int64_t chunks = ceil_div(n, kElementsPerTask);
  auto* part = static_cast<double*>(call_scratch(static_cast<size_t>(chunks + 1) * sizeof(double)));
  parallel_blocks(context, n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    double lane[16] = {};
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      for (int j = 0; j < 16; ++j) {
        lane[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
      }
    }
    for (; i < end; ++i) lane[0] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    part[begin / kElementsPerTask] = lane[0];
  });
  double total = 0.0;
  for (int64_t c = 0; c < chunks; ++c) total += part[c];
  *out = total;
}

inline void axpby(const OpContext& context, int64_t n, float a, const float* x, float b, float* y) {
  parallel_blocks(context, n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      F16 sum = zero();
      if (b != 0.0f) sum = set(b) * load_n(y + i, m);
      if (a != 0.0f) sum = fma(set(a), load_n(x + i, m), sum);
      store_n(y + i, sum, m);
    });
  });
}

inline void multiply_add(const OpContext& context, int64_t n, float a, const float* x,
                         const float* z, float* y) {
  parallel_blocks(context, n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      const F16 product = set(a) * load_n(x + i, m);
      store_n(y + i, fma(product, load_n(z + i, m), load_n(y + i, m)), m);
    });
  });
}

}  // namespace ds::DS_ISA
