// SPDX-License-Identifier: Apache-2.0
// Optimizer step and vectors of parameters.
#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 32'768;  // elements of one block of dot

/// One parameter of the step.
struct AdamWStep {
  const AdamWArgs& a;
  float factor, correct1, correct2;

  __device__ void one(float g, float& p, float& m, float& v) const {
    g *= factor;
    m = fmaf(a.beta1, m, (1.0f - a.beta1) * g);
    v = fmaf(a.beta2, v, (1.0f - a.beta2) * g * g);
    const float step = m * correct1 / (sqrtf(v * correct2) + a.eps);
    p = p - a.lr * fmaf(a.weight_decay, p, step);
  }
};

/// Four parameters a thread where the vectors are aligned, which is what bounds it: 28 bytes each.
__global__ void __launch_bounds__(kThreads)
    adamw_elements(const __grid_constant__ AdamWArgs a, float correct1, float correct2,
                   bool aligned) {
  AdamWStep step{a, 1.0f, correct1, correct2};
  if (a.squares != nullptr) {
    const double norm = sqrt(*a.squares);
    if (!isfinite(norm)) return;
    if (a.clip > 0 && norm > a.clip) step.factor = static_cast<float>(a.clip / norm);
  }
  const int64_t fours = aligned ? a.n / 4 : 0;
  for (int64_t i = loop_begin(); i < fours; i += loop_step()) {
    const float4 g = reinterpret_cast<const float4*>(a.gradient)[i];
    float4 p = reinterpret_cast<float4*>(a.master)[i], m = reinterpret_cast<float4*>(a.m)[i];
    float4 v = reinterpret_cast<float4*>(a.v)[i];
    step.one(g.x, p.x, m.x, v.x);
    step.one(g.y, p.y, m.y, v.y);
    step.one(g.z, p.z, m.z, v.z);
    step.one(g.w, p.w, m.w, v.w);
    reinterpret_cast<float4*>(a.master)[i] = p;
    reinterpret_cast<float4*>(a.m)[i] = m;
    reinterpret_cast<float4*>(a.v)[i] = v;
  }
  for (int64_t i = fours * 4 + loop_begin(); i < a.n; i += loop_step()) {
    step.one(a.gradient[i], a.master[i], a.m[i], a.v[i]);
  }
}

/// part[b] = sum of x y over chunk b.
__global__ void __launch_bounds__(kThreads)
    dot_chunks(int64_t n, const float* x, const float* y, double* part) {
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t end = begin + kChunk < n ? begin + kChunk : n;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    sum = fma(static_cast<double>(x[i]), static_cast<double>(y[i]), sum);
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

__global__ void __launch_bounds__(kThreads)
    axpby_elements(int64_t n, float a, const float* x, float b, float* y) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) {
    float sum = b != 0.0f ? b * y[i] : 0.0f;
    if (a != 0.0f) sum = fmaf(a, x[i], sum);
    y[i] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    multiply_add_elements(int64_t n, float a, const float* x, const float* z, float* y) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) y[i] = fmaf(a * x[i], z[i], y[i]);
}

}  // namespace

void adamw(const OpContext& context, const AdamWArgs& a) {
  StreamState* s = enter(context);
  if (s == nullptr || a.n == 0) return;
  const double power1 = std::pow(static_cast<double>(a.beta1), static_cast<double>(a.step));
  const double power2 = std::pow(static_cast<double>(a.beta2), static_cast<double>(a.step));
  const bool aligned =
      is_aligned16(a.master) && is_aligned16(a.m) && is_aligned16(a.v) && is_aligned16(a.gradient);
  s->in_chunks(a.n, 2 << 20, [&](int64_t from, int64_t count) {
    AdamWArgs part = a;
    part.n = count;
    part.master += from, part.m += from, part.v += from, part.gradient += from;
    adamw_elements<<<loop_blocks(part.n, kThreads), kThreads, 0, s->stream()>>>(
        part, static_cast<float>(1.0 / (1.0 - power1)), static_cast<float>(1.0 / (1.0 - power2)),
        aligned);
    return launched("adamw");
  });
}

void dot(const OpContext& context, int64_t n, const float* x, const float* y, double* out) {
  const StreamState* s = enter(context);
  if (s == nullptr) return;
  const int64_t chunks = ceil_div(n, kChunk);
  auto* part = s->scratch<double>();
  if (chunks > 0) {
    dot_chunks<<<static_cast<unsigned>(chunks), kThreads, 0, s->stream()>>>(n, x, y, part);
    if (!launched("dot")) return;
  }
  sum_parts<<<1, kThreads, 0, s->stream()>>>(chunks, part, out);
  launched("dot");
}

void axpby(const OpContext& context, int64_t n, float a, const float* x, float b, float* y) {
  const StreamState* s = enter(context);
  if (s == nullptr || n == 0) return;
  axpby_elements<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, a, x, b, y);
  launched("axpby");
}

void multiply_add(const OpContext& context, int64_t n, float a, const float* x, const float* z,
                  float* y) {
  const StreamState* s = enter(context);
  if (s == nullptr || n == 0) return;
  multiply_add_elements<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, a, x, z, y);
  launched("multiply_add");
}

}  // namespace ds::cuda
