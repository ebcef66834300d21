// SPDX-License-Identifier: Apache-2.0
// A thread takes the weights of one scale. Every product and sum is rounded by itself (the compiler
// may not fuse them), in the CPU's order.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/quant_grid.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kRelTol4 = quant_rel_tol({4, 32});

__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float between(float a, float low, float high) {
  return fminf(fmaxf(a, low), high);
}
__device__ inline float as_stored(QuantFormat format, float a) {
  return format.group == 0 ? a : rounded_as<Bf16>(a);
}
__device__ inline float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }
__device__ inline float code_4(const QuantGrid& grid, float inverse, float w) {
  return between(rintf(mul(sub(w, grid.low), inverse)), 0.0f, 15.0f);
}
__device__ inline float code_8(float inverse, float w) {
  return between(rintf(mul(w, inverse)), -127.0f, 127.0f);
}
__device__ inline float rounded(QuantFormat format, const QuantGrid& grid, float inverse, float w) {
  if (format.bits == 4) return add(mul(code_4(grid, inverse, w), grid.scale), grid.low);
  return mul(code_8(inverse, w), grid.scale);
}

/// Weights that share a scale; a row beyond the last is zeros.
struct Span {
  const float* w;
  int64_t count;
  bool there;
  __device__ float at(int64_t j) const { return there ? w[j] : 0.0f; }
};

struct QuantError {
  float squared = 0.0f, worst = 0.0f;
};
__device__ inline QuantError error_of_grid(const Span& span, const QuantGrid& grid) {
  QuantError e;
  const float inverse = inverse_of(grid.scale);
  for (int64_t j = 0; j < span.count; ++j) {
    const float w = span.at(j);
    const float d = sub(w, add(mul(code_4(grid, inverse, w), grid.scale), grid.low));
    e.squared = add(e.squared, mul(d, d));
    e.worst = fmaxf(fabsf(d), e.worst);
  }
  return e;
}

/// The line of least squares through (u, w), u = codes of w for a first step of 1 / `inverse` from
/// `low`.
__device__ inline QuantGrid fitted_grid(QuantFormat format, const Span& span, float low,
                                        float inverse) {
  float su = 0.0f, suu = 0.0f, sw = 0.0f, swu = 0.0f;
  for (int64_t j = 0; j < span.count; ++j) {
    const float w = sub(span.at(j), low);
    const float u = between(rintf(mul(w, inverse)), 0.0f, 15.0f);
    su = add(su, u);
    suu = add(suu, mul(u, u));
    sw = add(sw, w);
    swu = add(swu, mul(w, u));
  }
  const auto n = static_cast<float>(span.count);
  const float scale =
      as_stored(format, sub(mul(n, swu), mul(sw, su)) / sub(mul(n, suu), mul(su, su)));
  return {scale, as_stored(format, add(low, sub(sw, mul(scale, su)) / n))};
}

__device__ inline QuantGrid choose_grid_4(QuantFormat format, const Span& span) {
  float low = span.at(0), high = low;
  for (int64_t j = 1; j < span.count; ++j) {
    low = fminf(span.at(j), low);
    high = fmaxf(span.at(j), high);
  }
  const float largest = fmaxf(fabsf(low), fabsf(high));
  const float limit = mul(largest, kRelTol4), range = sub(high, low);
  QuantGrid best{as_stored(format, range / 15.0f), as_stored(format, low)};
  float least = error_of_grid(span, best).squared;
  for (int i = -10; i <= 10; ++i) {
    const float first = add(15.0f, mul(0.1f, static_cast<float>(i))) / range;
    const QuantGrid grid = fitted_grid(format, span, low, first);
    const QuantError e = error_of_grid(span, grid);
    // What is no number is not better.
    if (!(sub(limit, e.worst) > 0.0f && sub(least, e.squared) > 0.0f)) continue;
    best = grid;
    least = e.squared;
  }
  return largest > kQuantZero ? best : QuantGrid();
}

__device__ inline QuantGrid choose_grid(QuantFormat format, const Span& span) {
  if (format.bits == 4) return choose_grid_4(format, span);
  float largest = 0.0f;
  for (int64_t j = 0; j < span.count; ++j) largest = fmaxf(fabsf(span.at(j)), largest);
  return {largest > kQuantZero ? as_stored(format, largest / 127.0f) : 0.0f, 0.0f};
}

/// What a thread of a grid over spans is about.
struct Place {
  int64_t panel, row, k0, span;  ///< row in the panel; the span's number in the row
  Span weights;
  __device__ static Place of(QuantFormat format, int64_t n, int64_t k, const float* w,
                             int64_t index) {
    const int64_t each = format.group == 0 ? k : kQuantGroup, spans = ceil_div(k, each);
    Place p;
    const int64_t row = index / spans;
    p.span = index % spans;
    p.panel = row / 16;
    p.row = row % 16;
    p.k0 = p.span * each;
    p.weights = {w + row * k + p.k0, smaller(each, k - p.k0), row < n};
    return p;
  }
};
int64_t spans_of(QuantFormat format, int64_t rows, int64_t k) {
  return rows * (format.group == 0 ? 1 : quant_groups(k));
}

/// Up to 32 weights of one row as the layout has them.
__device__ inline void store_codes(QuantFormat format, const QuantGrid& grid, const Span& span,
                                   int64_t first, uint32_t* to) {
  const float inverse = inverse_of(grid.scale);
  const bool four = format.bits == 4;
  const auto code = [&](int64_t j) -> uint32_t {
    if (first + j >= span.count) return four ? 0 : 128;
    const float w = span.at(first + j);
    return static_cast<uint32_t>(four ? code_4(grid, inverse, w) : code_8(inverse, w) + 128.0f);
  };
  const auto word = [&](int64_t j) {
    return code(j) | code(j + 1) << 8 | code(j + 2) << 16 | code(j + 3) << 24;
  };
  for (int b = 0; b < (four ? 4 : 8); ++b) {
    to[b * 16] = four ? word(4 * b) | word(16 + 4 * b) << 4 : word(4 * b);
  }
}

__global__ void __launch_bounds__(kThreads)
    quantize_spans(QuantFormat format, int64_t n, int64_t k, const float* w, int64_t spans,
                   char* packed, char* scales) {
  const int64_t index = loop_begin();
  if (index >= spans) return;
  const Place p = Place::of(format, n, k, w, index);
  const QuantGrid grid = choose_grid(format, p.weights);
  const bool four = format.bits == 4;
  if (format.group == 0) {
    auto* to = reinterpret_cast<float*>(scales) + p.panel * (four ? 32 : 16) + p.row;
    to[0] = grid.scale;
    if (four) to[16] = grid.low;
  } else {
    const int64_t at = (p.panel * ceil_div(k, kQuantGroup) + p.span) * 16 + p.row;
    const uint32_t scale = __float_as_uint(grid.scale) >> 16;
    if (four) {
      reinterpret_cast<uint32_t*>(scales)[at] = scale | (__float_as_uint(grid.low) & 0xffff0000u);
    } else {
      reinterpret_cast<uint16_t*>(scales)[at] = static_cast<uint16_t>(scale);
    }
  }
  for (int64_t j = 0; j < p.weights.count; j += kQuantGroup) {
    const int64_t g = p.panel * ceil_div(k, kQuantGroup) + (p.k0 + j) / kQuantGroup;
    auto* to = reinterpret_cast<uint32_t*>(packed + g * 64 * format.bits) + p.row;
    store_codes(format, grid, p.weights, j, to);
  }
}

__global__ void __launch_bounds__(kThreads)
    fake_spans(QuantFormat format, int64_t n, int64_t k, const float* w, int64_t spans, float* wq) {
  const int64_t index = loop_begin();
  if (index >= spans) return;
  const Place p = Place::of(format, n, k, w, index);
  const QuantGrid grid = choose_grid(format, p.weights);
  const float inverse = inverse_of(grid.scale);
  float* to = wq + (p.weights.w - w);
  for (int64_t j = 0; j < p.weights.count; ++j) {
    to[j] = rounded(format, grid, inverse, p.weights.at(j));
  }
}

__global__ void __launch_bounds__(kThreads)
    fake_gradient(QuantFormat format, int64_t n, int64_t k, const float* w, int64_t spans,
                  const float* dwq, float* dw) {
  const int64_t index = loop_begin();
  if (index >= spans) return;
  const Place p = Place::of(format, n, k, w, index);
  const QuantGrid grid = choose_grid(format, p.weights);
  const bool four = format.bits == 4;
  const float half = mul(0.5f, grid.scale), end = mul(grid.scale, four ? 15.0f : 127.0f);
  const float low = four ? sub(grid.low, half) : -add(end, half);
  const float high = four ? add(add(grid.low, end), half) : add(end, half);
  const int64_t first = p.weights.w - w;
  for (int64_t j = 0; j < p.weights.count; ++j) {
    const float at = p.weights.at(j);
    const bool outside = grid.scale > 0.0f && fmaxf(sub(low, at), sub(at, high)) > 0.0f;
    if (!outside) dw[first + j] = add(dw[first + j], dwq[first + j]);
  }
}

unsigned blocks_for(int64_t spans) { return static_cast<unsigned>(ceil_div(spans, kThreads)); }

}  // namespace

void quantize(const OpContext& context, QuantFormat format, int64_t n, int64_t k, const float* w,
              const float* feedback, void* packed, void* scales) {
  const StreamState* s = enter(context);
  if (s == nullptr || n * k == 0) return;
  if (feedback != nullptr) return fail("quantize: feedback is the CPU's");
  s->weights_change();
  const int64_t spans = spans_of(format, ceil_div(n, 16) * 16, k);
  quantize_spans<<<blocks_for(spans), kThreads, 0, s->stream()>>>(
      format, n, k, w, spans, static_cast<char*>(packed), static_cast<char*>(scales));
  launched("quantize");
}

void fake_quantize(const OpContext& context, QuantFormat format, int64_t n, int64_t k,
                   const float* w, float* wq) {
  const StreamState* s = enter(context);
  if (s == nullptr || n * k == 0) return;
  const int64_t spans = spans_of(format, n, k);
  fake_spans<<<blocks_for(spans), kThreads, 0, s->stream()>>>(format, n, k, w, spans, wq);
  launched("fake quantization");
}

void fake_quantize_backward(const OpContext& context, QuantFormat format, int64_t n, int64_t k,
                            const float* w, const float* dwq, float* dw) {
  const StreamState* s = enter(context);
  if (s == nullptr || n * k == 0) return;
  const int64_t spans = spans_of(format, n, k);
  fake_gradient<<<blocks_for(spans), kThreads, 0, s->stream()>>>(format, n, k, w, spans, dwq, dw);
  launched("gradient of fake quantization");
}

}  // namespace ds::cuda
