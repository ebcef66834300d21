// SPDX-License-Identifier: Apache-2.0
// exp, silu and the loop over the pool, written once over F16. Include after a simd_*.h.
#pragma once

#include "kernels/ops.h"

namespace ds::DS_ISA {

DS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
DS_INLINE double at_least(double x, double low) { return x > low ? x : low; }

/// e^x within 2 ulp (measured: 1), gradual underflow, exp(0) == 1, exp(-inf) == 0, NaN passes.
/// Range reduction x = n ln 2 + r in two constants, then the degree-7 polynomial of Cephes expf.
DS_INLINE F16 exp(F16 x) {
  x = min(set(89.0f), max(set(-104.0f), x));
  const F16 n = round_nearest(x * set(1.44269504088896341f));
  F16 r = fma(n, set(-0.693145751953125f), x);
  r = fma(n, set(-1.42860682030941723e-6f), r);
  F16 p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r) + set(1.0f);
  return scale_by_power(p, n);
}

DS_INLINE float exp_1(float x) {
  float out[16];
  store(out, exp(set(x)));
  return out[0];
}

DS_INLINE F16 sigmoid(F16 x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }
DS_INLINE F16 silu_times(F16 gate, F16 up) { return gate / (set(1.0f) + exp(zero() - gate)) * up; }

/// f(i) for i in [0, count) on the pool of the call.
template <typename F>
void parallel_for(const OpContext& context, int64_t count, const F& f) {
  const ds_parallel* pool = context.parallel;
  if (pool == nullptr) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  const auto task = [](void* user, int64_t i) { (*static_cast<const F*>(user))(i); };
  pool->run(pool->ctx, count, task, const_cast<F*>(&f));
}

/// [0, n) in blocks of `block`: f(begin, end).
template <typename F>
void parallel_blocks(const OpContext& context, int64_t n, int64_t block, const F& f) {
  parallel_for(context, ceil_div(n, block),
               [&](int64_t i) { f(i * block, smaller(n, (i + 1) * block)); });
}

/// f(offset, lanes) over [begin, end) in steps of 16; the last step may have fewer lanes.
template <typename F>
DS_INLINE void for_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, int64_t{kLanes});
  if (i < end) f(i, end - i);
}

}  // namespace ds::DS_ISA
