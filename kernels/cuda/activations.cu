// SPDX-License-Identifier: Apache-2.0
// Elementwise ops: swiglu, relu, and their gradients.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/rows_out.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;

/// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
struct SwigluGradient {
  float gate, up;
  __device__ SwigluGradient(float dy, float g, float u) {
    const float s = sigmoid(g);
    gate = dy * u * (s * fmaf(g, 1.0f - s, 1.0f));
    up = dy * (g * s);
  }
};

/// A block takes a row at a time, a thread every 256th element of it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_rows(const __grid_constant__ SwigluArgs a, RowsOut<T> out) {
  begin_after_previous();
  int saturated = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < a.d; i += kThreads) {
      const int64_t at = row * a.d + i;
      saturated += out.set(row, i, silu_times(a.gate[at], a.up[at]));
    }
    out.pad(row, threadIdx.x, kThreads);
  }
  out.count(saturated);
}

/// Where a gradient's rows go; y may be of no interest.
struct SwigluOut {
  RowsOut<Bf16> gate, up, y;
};

/// Outputs but y may be the inputs' memory.
__global__ void __launch_bounds__(kThreads)
    swiglu_gradient(const __grid_constant__ SwigluArgs a, const __grid_constant__ SwigluOut out) {
  begin_after_previous();
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < a.d; i += kThreads) {
      const int64_t at = row * a.d + i;
      const float gate = a.gate[at], up = a.up[at];
      const SwigluGradient of(a.dy[at], gate, up);
      out.gate.set(row, i, of.gate);
      out.up.set(row, i, of.up);
      out.y.set(row, i, silu_times(gate, up));
    }
    out.gate.pad(row, threadIdx.x, kThreads);
    out.up.pad(row, threadIdx.x, kThreads);
    out.y.pad(row, threadIdx.x, kThreads);
  }
}

// The same in fours, where rows need no padding: memory bounds them. A block takes kFours columns
// of every so many rows.
constexpr int kFours = 128;

/// Gates and ups in FP32, or in FP16 side by side.
struct GatesUps {
  const float *gate, *up;
  const Half* both;
  int64_t d;

  /// Of columns i .. i + 3 of a row; returns how many were infinite.
  template <bool kHalves>
  __device__ int load(int64_t row, int64_t i, float4* g, float4* u) const {
    if constexpr (!kHalves) {
      *g = *reinterpret_cast<const float4*>(gate + row * d + i);
      *u = *reinterpret_cast<const float4*>(up + row * d + i);
      return 0;
    } else {
      const Half* at = both + row * 2 * d + i;
      const uint2 first = *reinterpret_cast<const uint2*>(at);
      const uint2 second = *reinterpret_cast<const uint2*>(at + d);
      *g = unpack_four<Half>(first);
      *u = unpack_four<Half>(second);
      return bound(&g->x) + bound(&g->y) + bound(&g->z) + bound(&g->w) + bound(&u->x) +
             bound(&u->y) + bound(&u->z) + bound(&u->w);
    }
  }

 private:
  static __device__ int bound(float* x) {
    if (!saturates(*x)) return 0;
    *x = copysignf(kLargestHalf, *x);
    return 1;
  }
};

template <typename T, bool kHalves>
__global__ void __launch_bounds__(kFours)
    swiglu_fours(int64_t rows, const __grid_constant__ GatesUps in, RowsOut<T> out) {
  begin_after_previous();
  const int64_t i = 4 * (int64_t{blockIdx.x} * kFours + threadIdx.x);
  int saturated = 0;
  for (int64_t row = blockIdx.y; i < in.d && row < rows; row += gridDim.y) {
    float4 g, u;
    saturated += in.load<kHalves>(row, i, &g, &u);
    saturated += out.set_four(row, i,
                              make_float4(silu_times(g.x, u.x), silu_times(g.y, u.y),
                                          silu_times(g.z, u.z), silu_times(g.w, u.w)));
  }
  out.count(saturated);
}

template <bool kHalves, bool kNarrowDy>
__global__ void __launch_bounds__(kFours)
    swiglu_gradient_fours(int64_t rows, const __grid_constant__ GatesUps in, const void* dy,
                          const __grid_constant__ SwigluOut out) {
  begin_after_previous();
  const int64_t i = 4 * (int64_t{blockIdx.x} * kFours + threadIdx.x);
  for (int64_t row = blockIdx.y; i < in.d && row < rows; row += gridDim.y) {
    const int64_t at = row * in.d + i;
    float4 d, g, u;
    if constexpr (kNarrowDy) {
      d = unpack_four<Bf16>(*reinterpret_cast<const uint2*>(static_cast<const Bf16*>(dy) + at));
    } else {
      d = *reinterpret_cast<const float4*>(static_cast<const float*>(dy) + at);
    }
    in.load<kHalves>(row, i, &g, &u);
    const SwigluGradient x(d.x, g.x, u.x), y(d.y, g.y, u.y), z(d.z, g.z, u.z), w(d.w, g.w, u.w);
    out.gate.set_four(row, i, make_float4(x.gate, y.gate, z.gate, w.gate));
    out.up.set_four(row, i, make_float4(x.up, y.up, z.up, w.up));
    out.y.set_four(row, i,
                   make_float4(silu_times(g.x, u.x), silu_times(g.y, u.y), silu_times(g.z, u.z),
                               silu_times(g.w, u.w)));
  }
}

/// Blocks of the two above.
dim3 fours_grid(int64_t rows, int64_t d) {
  const int64_t columns = ceil_div(d / 4, kFours);
  const int64_t most = larger(1, kSms * 2048 / kFours / columns);
  return {static_cast<unsigned>(columns), static_cast<unsigned>(smaller(rows, most))};
}

/// to = sign > 0 ? to : 0; relu where both are the same.
__global__ void __launch_bounds__(kThreads)
    keep_where_positive(int64_t n, const float* sign, float* to) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) to[i] = sign[i] > 0.0f ? to[i] : 0.0f;
}

bool reads_fours(const SwigluArgs& a) {
  return a.gate_up_f16 != nullptr ? a.d % 8 == 0 && is_aligned16(a.gate_up_f16)
                                  : a.d % 4 == 0 && is_aligned16(a.gate) && is_aligned16(a.up);
}

}  // namespace

void swiglu(const OpContext& context, const SwigluArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows * a.d == 0) return;
  const bool halves = a.gate_up_f16 != nullptr;
  with_rows_out(a.y_prepared, [&]<typename T>(T) {
    const auto out = rows_out<T>(a.y, a.y_prepared, a.d);
    if (out.by_fours() && reads_fours(a)) {
      const GatesUps in{a.gate, a.up, static_cast<const Half*>(a.gate_up_f16), a.d};
      launch_next("swiglu", halves ? swiglu_fours<T, true> : swiglu_fours<T, false>,
                  fours_grid(a.rows, a.d), kFours, 0, s->stream(), a.rows, in, out);
    } else if (halves) {
      fail("swiglu: rows of halves want columns in eights");
    } else {
      launch_next("swiglu", swiglu_rows<T>, dim3(loop_blocks(a.rows, 1)), kThreads, 0, s->stream(),
                  a, out);
    }
  });
}

void swiglu_backward(const OpContext& context, const SwigluArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows * a.d == 0) return;
  const SwigluOut out{rows_out<Bf16>(a.dgate, a.dgate_prepared, a.d),
                      rows_out<Bf16>(a.dup, a.dup_prepared, a.d),
                      rows_out<Bf16>(a.y, a.y_prepared, a.d)};
  const bool halves = a.gate_up_f16 != nullptr, narrow = a.dy_bf16 != nullptr;
  const void* dy = narrow ? a.dy_bf16 : a.dy;
  if (out.gate.by_fours() && out.up.by_fours() && out.y.by_fours() && is_aligned16(dy) &&
      reads_fours(a)) {
    const GatesUps in{a.gate, a.up, static_cast<const Half*>(a.gate_up_f16), a.d};
    auto kernel = swiglu_gradient_fours<false, false>;
    if (halves) kernel = swiglu_gradient_fours<true, false>;
    if (narrow) kernel = swiglu_gradient_fours<false, true>;
    if (halves && narrow) kernel = swiglu_gradient_fours<true, true>;
    launch_next("swiglu_backward", kernel, fours_grid(a.rows, a.d), kFours, 0, s->stream(), a.rows,
                in, dy, out);
  } else if (halves || narrow) {
    fail("swiglu_backward: rows of 16 bits want columns in eights");
  } else {
    launch_next("swiglu_backward", swiglu_gradient, dim3(loop_blocks(a.rows, 1)), kThreads, 0,
                s->stream(), a, out);
  }
}

void relu(const OpContext& context, int64_t n, float* x) { relu_backward(context, n, x, x); }

void relu_backward(const OpContext& context, int64_t n, const float* y, float* dy) {
  const StreamState* s = enter(context);
  if (s == nullptr || n == 0) return;
  keep_where_positive<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, y, dy);
  launched("relu");
}

}  // namespace ds::cuda
