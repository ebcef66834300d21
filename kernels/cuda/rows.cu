// SPDX-License-Identifier: Apache-2.0
// Row-wise and elementwise ops: RMSNorm, rotary embedding, activations.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;

/// x, y [rows, d]. One block a row, whatever the number of rows: threads sum every 256th element.
__global__ void __launch_bounds__(kThreads)
    rmsnorm_rows(int64_t d, const float* x, const float* __restrict__ w, float eps, float* y,
                 float* rstd) {
  begin_after_previous();
  const float* in = x + blockIdx.x * d;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) sum = fmaf(in[i], in[i], sum);
  sum = block_sum(sum);
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(d) + eps);
  float* out = y + blockIdx.x * d;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) out[i] = in[i] * inverse * w[i];
  if (rstd != nullptr && threadIdx.x == 0) rstd[blockIdx.x] = inverse;
}

/// With h = x rstd: dx += rstd (w dy - h mean(w dy h)). One block a row.
__global__ void __launch_bounds__(kThreads)
    rmsnorm_input_gradient(int64_t d, const float* __restrict__ dy, const float* __restrict__ x,
                           const float* __restrict__ w, const float* __restrict__ rstd, float* dx) {
  const int64_t at = blockIdx.x * d;
  float dot = 0.0f;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) {
    dot = fmaf(dy[at + i] * w[i], x[at + i], dot);
  }
  dot = block_sum(dot);
  const float scale = rstd[blockIdx.x];
  const float back = dot * scale * scale / static_cast<float>(d);
  for (int64_t i = threadIdx.x; i < d; i += kThreads) {
    const float part = dy[at + i] * w[i] - x[at + i] * back;
    dx[at + i] = fmaf(part, scale, dx[at + i]);
  }
}

/// dw += sum over rows of dy h. A block takes 32 columns; its warp j sums rows j, j + 32, .. and
/// the 32 sums are added in order.
__global__ void __launch_bounds__(1024)
    rmsnorm_weight_gradient(int64_t rows, int64_t d, const float* __restrict__ dy,
                            const float* __restrict__ x, const float* __restrict__ rstd,
                            float* dw) {
  __shared__ float part[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (column < d) {
#pragma unroll 4
    for (int64_t r = warp; r < rows; r += 32) {
      sum = fmaf(dy[r * d + column] * rstd[r], x[r * d + column], sum);
    }
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= d) return;
  float total = 0.0f;
  for (int j = 0; j < 32; ++j) total += part[j][lane];
  dw[column] += total;
}

/// (a, b) -> (a cos - b sin, b cos + a sin).
__device__ inline void rotate(float cos, float sin, float* a, float* b) {
  const float x = *a, y = *b;
  *a = fmaf(x, cos, -(y * sin));
  *b = fmaf(y, cos, x * sin);
}

/// x [rows, heads, 2 half]: a thread takes one pair of one head of one row.
__global__ void __launch_bounds__(kThreads)
    rope_rows(int64_t pairs, int64_t heads, int64_t half, const int32_t* __restrict__ positions,
              const float* __restrict__ cos, const float* __restrict__ sin, float direction,
              float* x) {
  for (int64_t n = loop_begin(); n < pairs; n += loop_step()) {
    const int64_t i = n % half, unit = n / half;
    const int64_t angle = positions[unit / heads] * half + i;
    float* at = x + unit * 2 * half + i;
    rotate(cos[angle], direction * sin[angle], at, at + half);
  }
}

template <typename T>
__device__ inline void store_pair(void* base, int64_t at, int64_t half, float a, float b) {
  T* to = static_cast<T*>(base) + at;
  to[0] = from_float<T>(a);
  to[half] = from_float<T>(b);
}

/// Per row n_heads query, then n_kv key, then n_kv value heads of `half` pairs: a thread takes one
/// pair. Keys and values go to [page][kv_head][32][head_dim].
template <typename T>
__global__ void __launch_bounds__(kThreads) rope_append_rows(const RopeAppendArgs a) {
  begin_after_previous();
  const int64_t half = a.kv.head_dim / 2, d = a.kv.head_dim, n_kv = a.kv.n_kv_heads;
  const int64_t each = (a.n_heads + 2 * n_kv) * half;
  for (int64_t n = loop_begin(); n < a.rows * each; n += loop_step()) {
    const int64_t row = n / each, unit = n % each / half, i = n % half;
    const int64_t angle = a.positions[row] * half + i;
    if (unit < a.n_heads) {
      float* at = a.q + (row * a.n_heads + unit) * d + i;
      rotate(a.cos[angle], a.sin[angle], at, at + half);
      continue;
    }
    const bool is_key = unit < a.n_heads + n_kv;
    const int64_t head = unit - a.n_heads - (is_key ? 0 : n_kv);
    const int64_t from = (row * n_kv + head) * d + i;
    const int64_t slot = a.slots[row];
    const int64_t to =
        ((slot / kKvPageTokens * n_kv + head) * kKvPageTokens + slot % kKvPageTokens) * d + i;
    if (is_key) {
      rotate(a.cos[angle], a.sin[angle], a.k + from, a.k + from + half);
      store_pair<T>(a.kv.k, to, half, a.k[from], a.k[from + half]);
    } else {
      store_pair<T>(a.kv.v, to, half, a.v[from], a.v[from + half]);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    swiglu_elements(int64_t n, const float* gate, const float* up, float* y) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) y[i] = silu_times(gate[i], up[i]);
}

/// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g). Outputs may be the inputs' memory.
__global__ void __launch_bounds__(kThreads)
    swiglu_gradient(int64_t n, const float* dy, const float* gate, const float* up, float* dgate,
                    float* dup) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) {
    const float g = gate[i], u = up[i], d = dy[i], s = sigmoid(g);
    dgate[i] = d * u * (s * fmaf(g, 1.0f - s, 1.0f));
    dup[i] = d * (g * s);
  }
}

/// to = sign > 0 ? to : 0; relu where both are the same.
__global__ void __launch_bounds__(kThreads)
    keep_where_positive(int64_t n, const float* sign, float* to) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) to[i] = sign[i] > 0.0f ? to[i] : 0.0f;
}

}  // namespace

void rmsnorm(const OpContext& context, int64_t rows, int64_t d, const float* x, const float* w,
             float eps, float* y, float* rstd) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows == 0) return;
  launch_next("rmsnorm", rmsnorm_rows, dim3(static_cast<unsigned>(rows)), kThreads, 0, s->stream(),
              d, x, w, eps, y, rstd);
}

void rmsnorm_backward(const OpContext& context, int64_t rows, int64_t d, const float* dy,
                      const float* x, const float* w, const float* rstd, float* dx, float* dw) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows == 0 || d == 0) return;
  rmsnorm_input_gradient<<<static_cast<unsigned>(rows), kThreads, 0, s->stream()>>>(d, dy, x, w,
                                                                                    rstd, dx);
  if (!launched("rmsnorm_backward") || dw == nullptr) return;
  rmsnorm_weight_gradient<<<static_cast<unsigned>(ceil_div(d, 32)), 1024, 0, s->stream()>>>(
      rows, d, dy, x, rstd, dw);
  launched("rmsnorm_backward");
}

void rope(const OpContext& context, int64_t rows, int64_t heads, int64_t head_dim,
          const int32_t* positions, const float* cos, const float* sin, bool inverse, float* x) {
  const StreamState* s = enter(context);
  const int64_t pairs = rows * heads * (head_dim / 2);
  if (s == nullptr || pairs == 0) return;
  rope_rows<<<loop_blocks(pairs, kThreads), kThreads, 0, s->stream()>>>(
      pairs, heads, head_dim / 2, positions, cos, sin, inverse ? -1.0f : 1.0f, x);
  launched("rope");
}

void rope_append(const OpContext& context, const RopeAppendArgs& a) {
  const StreamState* s = enter(context);
  const int64_t n = a.rows * (a.n_heads + 2 * a.kv.n_kv_heads) * (a.kv.head_dim / 2);
  if (s == nullptr || n == 0) return;
  launch_next("rope_append",
              a.kv.dtype == KvDtype::kF32 ? rope_append_rows<float> : rope_append_rows<Bf16>,
              dim3(loop_blocks(n, kThreads)), kThreads, 0, s->stream(), a);
}

void swiglu(const OpContext& context, int64_t n, const float* gate, const float* up, float* y) {
  const StreamState* s = enter(context);
  if (s == nullptr || n == 0) return;
  swiglu_elements<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, gate, up, y);
  launched("swiglu");
}

void swiglu_backward(const OpContext& context, int64_t n, const float* dy, const float* gate,
                     const float* up, float* dgate, float* dup) {
  const StreamState* s = enter(context);
  if (s == nullptr || n == 0) return;
  swiglu_gradient<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, dy, gate, up, dgate,
                                                                          dup);
  launched("swiglu_backward");
}

void relu(const OpContext& context, int64_t n, float* x) { relu_backward(context, n, x, x); }

void relu_backward(const OpContext& context, int64_t n, const float* y, float* dy) {
  const StreamState* s = enter(context);
  if (s == nullptr || n == 0) return;
  keep_where_positive<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, y, dy);
  launched("relu");
}

}  // namespace ds::cuda
