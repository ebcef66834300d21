// SPDX-License-Identifier: Apache-2.0
// Optimizer step and reductions over parameters.
#include <cmath>
#include <limits>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 32'768;  // elements of one block of sum_squares

/// Decoupled weight decay (Loshchilov and Hutter 2019), bias-corrected moments. One parameter a
/// thread.
__global__ void __launch_bounds__(kThreads)
    adamw_elements(const AdamWArgs a, float correct1, float correct2) {
  const float rest1 = 1.0f - a.beta1, rest2 = 1.0f - a.beta2;
  for (int64_t i = loop_begin(); i < a.n; i += loop_step()) {
    const float g = a.gradient[i] * a.gradient_scale;
    const float m = fmaf(a.beta1, a.m[i], rest1 * g);
    const float v = fmaf(a.beta2, a.v[i], rest2 * g * g);
    const float p = a.master[i];
    const float step = m * correct1 / (sqrtf(v * correct2) + a.eps);
    a.m[i] = m;
    a.v[i] = v;
    a.master[i] = p - a.lr * fmaf(a.weight_decay, p, step);
  }
}

/// part[b] = sum of squares of chunk b.
__global__ void __launch_bounds__(kThreads)
    sum_chunks(int64_t n, const float* __restrict__ x, double* part) {
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t end = begin + kChunk < n ? begin + kChunk : n;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    sum = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), sum);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

/// One block: *total = sum of part[0 .. n).
__global__ void __launch_bounds__(kThreads)
    sum_parts(int64_t n, const double* __restrict__ part, double* total) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += part[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = sum;
}

/// *bad becomes 1 if any element is not finite.
__global__ void __launch_bounds__(kThreads)
    find_not_finite(int64_t n, const float* __restrict__ x, int* bad) {
  bool here = false;
  for (int64_t i = loop_begin(); i < n; i += loop_step()) here |= !isfinite(x[i]);
  if (__syncthreads_or(here) && threadIdx.x == 0) atomicOr(bad, 1);
}

/// Waits for the first bytes at `from`; false after a failure.
template <typename T>
bool wait_for(const StreamState& s, const T* from, T* out) {
  if (!check(cudaMemcpyAsync(s.result<T>(), from, sizeof(T), cudaMemcpyDeviceToHost, s.stream()),
             "reading a result") ||
      !check(cudaStreamSynchronize(s.stream()), "waiting for a result")) {
    return false;
  }
  *out = *s.result<T>();
  return true;
}

}  // namespace

void adamw(const OpContext& context, const AdamWArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.n == 0) return;
  const double power1 = std::pow(static_cast<double>(a.beta1), static_cast<double>(a.step));
  const double power2 = std::pow(static_cast<double>(a.beta2), static_cast<double>(a.step));
  adamw_elements<<<loop_blocks(a.n, kThreads), kThreads, 0, s->stream()>>>(
      a, static_cast<float>(1.0 / (1.0 - power1)), static_cast<float>(1.0 / (1.0 - power2)));
  launched("adamw");
}

double sum_squares(const OpContext& context, int64_t n, const float* x) {
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  const StreamState* s = enter(context);
  if (s == nullptr) return kNone;
  const int64_t chunks = ceil_div(n, kChunk);
  if (chunks == 0) return 0.0;
  auto* total = s->scratch<double>();
  double* part = total + 1;
  sum_chunks<<<static_cast<unsigned>(chunks), kThreads, 0, s->stream()>>>(n, x, part);
  if (!launched("sum_squares")) return kNone;
  sum_parts<<<1, kThreads, 0, s->stream()>>>(chunks, part, total);
  double out = kNone;
  return launched("sum_squares") && wait_for(*s, total, &out) ? out : kNone;
}

bool all_finite(const OpContext& context, int64_t n, const float* x) {
  const StreamState* s = enter(context);
  if (s == nullptr) return false;
  if (n == 0) return true;
  int* bad = s->scratch<int>();
  if (!check(cudaMemsetAsync(bad, 0, sizeof(int), s->stream()), "all_finite")) return false;
  find_not_finite<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, x, bad);
  int out = 1;
  return launched("all_finite") && wait_for(*s, bad, &out) && out == 0;
}

}  // namespace ds::cuda
