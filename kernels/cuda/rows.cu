// SPDX-License-Identifier: Apache-2.0
// Row-wise ops: RMSNorm and rotary embedding.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/rope.cuh"
#include "kernels/cuda/rows_out.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;

/// x, y [rows, d]. One block a row: threads sum every 256th element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_rows(int64_t d, const float* x, int64_t stride, const float* __restrict__ w, float eps,
                 RowsOut<T> out, float* rstd) {
  begin_after_previous();
  const float* in = x + blockIdx.x * stride;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) sum = fmaf(in[i], in[i], sum);
  sum = block_sum(sum);
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(d) + eps);
  int saturated = 0;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) {
    saturated += out.set(blockIdx.x, i, in[i] * inverse * w[i]);
  }
  out.count(saturated);
  out.pad(blockIdx.x, threadIdx.x, kThreads);
  if (rstd != nullptr && threadIdx.x == 0) rstd[blockIdx.x] = inverse;
}

constexpr int kWarps = kThreads / 32;
constexpr int kPerLane = 32;               // columns that a lane of the kernels by warps keeps
constexpr int kGradientBlocks = 4 * kSms;  // partial sums of dw

/// As rmsnorm_rows with a warp to a row, d up to 32 kPerLane, for many rows.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_warps(int64_t rows, int64_t d, const float* __restrict__ x, int64_t stride,
                  const float* __restrict__ w, float eps, RowsOut<T> out, float* rstd) {
  begin_after_previous();
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  float v[kColumns], sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t i = lane + 32 * c;
    v[c] = i < d ? x[row * stride + i] : 0.0f;
    sum = fmaf(v[c], v[c], sum);
  }
  const float inverse = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(d) + eps);
  int saturated = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t i = lane + 32 * c;
    if (i < d) saturated += out.set(row, i, v[c] * inverse * w[i]);
  }
  out.count(saturated);
  out.pad(row, lane, 32);
  if (rstd != nullptr && lane == 0) rstd[row] = inverse;
}

/// The same by pairs of columns, where rows need no padding: memory bounds it.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_pairs(int64_t rows, int d, const float* __restrict__ x, int64_t stride,
                  const float* __restrict__ w, float eps, RowsOut<T> out, float* rstd) {
  begin_after_previous();
  constexpr int kPairs = kColumns / 2;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const auto* in = reinterpret_cast<const float2*>(x + row * stride);
  float2 v[kPairs];
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kPairs; ++c) {
    const int i = lane + 32 * c;
    v[c] = 2 * i < d ? in[i] : make_float2(0.0f, 0.0f);
    sum = fmaf(v[c].x, v[c].x, fmaf(v[c].y, v[c].y, sum));
  }
  const float inverse = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(d) + eps);
  int saturated = 0;
#pragma unroll
  for (int c = 0; c < kPairs; ++c) {
    const int i = lane + 32 * c;
    if (2 * i >= d) continue;
    const float2 weight = reinterpret_cast<const float2*>(w)[i];
    const float2 y = make_float2(v[c].x * inverse * weight.x, v[c].y * inverse * weight.y);
    saturated += out.set_two(row, 2 * i, y);
  }
  out.count(saturated);
  if (rstd != nullptr && lane == 0) rstd[row] = inverse;
}

/// With h = x rstd: dx += rstd (w dy - h mean(w dy h)), and part[block] [d] = sum over the block's
/// rows of dy h. A warp takes every (blocks * kWarps)-th row, a lane every 32nd pair of columns:
/// memory bounds it, so a row is asked for at once.
template <int kColumns>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_gradient(int64_t rows, int d, const float* __restrict__ dy, const float* __restrict__ x,
                     const float* __restrict__ w, const float* __restrict__ rstd, const float* dx,
                     RowsOut<Bf16> out, float* part) {
  begin_after_previous();
  constexpr int kPairs = kColumns / 2;
  __shared__ float2 of_warp[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float2 dw[kPairs] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    float2 h[kPairs], back[kPairs], to[kPairs];
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      const int i = 2 * (lane + 32 * c);
      const auto pair = [&](const float* rows_of) {
        return i < d ? *reinterpret_cast<const float2*>(rows_of + row * d + i) : make_float2(0, 0);
      };
      h[c] = pair(x), back[c] = pair(dy), to[c] = pair(dx);
    }
    const float scale = rstd[row];
    float dot = 0.0f;
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      const int i = 2 * (lane + 32 * c);
      if (i >= d) continue;
      const float2 weight = *reinterpret_cast<const float2*>(w + i);
      h[c].x *= scale, h[c].y *= scale;
      dw[c].x = fmaf(back[c].x, h[c].x, dw[c].x), dw[c].y = fmaf(back[c].y, h[c].y, dw[c].y);
      back[c].x *= weight.x, back[c].y *= weight.y;
      dot = fmaf(back[c].x, h[c].x, fmaf(back[c].y, h[c].y, dot));
    }
    dot = warp_sum(dot) / static_cast<float>(d);
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      const int i = 2 * (lane + 32 * c);
      if (i >= d) continue;
      out.set_two(row, i,
                  make_float2(fmaf(back[c].x - h[c].x * dot, scale, to[c].x),
                              fmaf(back[c].y - h[c].y * dot, scale, to[c].y)));
    }
  }
  if (part == nullptr) return;
#pragma unroll
  for (int c = 0; c < kPairs; ++c) {
    of_warp[warp][lane] = dw[c];
    __syncthreads();
    const int i = 2 * (lane + 32 * c);
    if (warp == c % kWarps && i < d) {
      float2 total = make_float2(0.0f, 0.0f);
      for (int n = 0; n < kWarps; ++n) total.x += of_warp[n][lane].x, total.y += of_warp[n][lane].y;
      *reinterpret_cast<float2*>(part + static_cast<int64_t>(blockIdx.x) * d + i) = total;
    }
    __syncthreads();
  }
}

/// The same for any d, one block a row, dx alone.
__global__ void __launch_bounds__(kThreads)
    rmsnorm_input_gradient(int64_t d, const float* __restrict__ dy, const float* __restrict__ x,
                           const float* __restrict__ w, const float* __restrict__ rstd,
                           const float* dx, RowsOut<Bf16> out) {
  begin_after_previous();
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
    out.set(blockIdx.x, i, fmaf(part, scale, dx[at + i]));
  }
  out.pad(blockIdx.x, threadIdx.x, kThreads);
}

/// dw += sum over rows of dy h. A block takes 32 columns; its warp j sums rows j, j + 32, .. and
/// the 32 sums are added in order. Without dy: the rows of x are summed as they are.
__global__ void __launch_bounds__(1024)
    rmsnorm_weight_gradient(int64_t rows, int64_t d, const float* __restrict__ dy,
                            const float* __restrict__ x, const float* __restrict__ rstd,
                            float* dw) {
  begin_after_previous();
  __shared__ float part[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (column < d) {
#pragma unroll 4
    for (int64_t r = warp; r < rows; r += 32) {
      const float factor = dy == nullptr ? 1.0f : dy[r * d + column] * rstd[r];
      sum = fmaf(factor, x[r * d + column], sum);
    }
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= d) return;
  float total = 0.0f;
  for (int j = 0; j < 32; ++j) total += part[j][lane];
  dw[column] += total;
}

/// Calls f.operator()<columns of a lane>() for a kernel by warps; false where d is too large.
template <typename F>
bool by_warps(int64_t d, const F& f) {
  if (d <= 32 * 8) {
    f.template operator()<8>();
  } else if (d <= 32 * 18) {
    f.template operator()<18>();
  } else if (d <= 32 * kPerLane) {
    f.template operator()<kPerLane>();
  } else {
    return false;
  }
  return true;
}

constexpr int kRopeThreads = 128;

/// Where each matrix of a RopeArgs goes.
struct RopeOut {
  RowsOut<Bf16> q, k, v;
};

/// A thread takes kEach neighbouring pairs of one head, in every so many rows: heads of queries, of
/// keys, then of values where these are asked for.
template <int kEach>
__global__ void __launch_bounds__(kRopeThreads)
    rope_rows(const __grid_constant__ RopeArgs a, const __grid_constant__ RopeOut out) {
  static_assert(kEach == 1 || kEach == 4);
  begin_after_previous();
  const int half = static_cast<int>(a.head_dim) / 2, units_of_head = half / kEach;
  const int n_heads = static_cast<int>(a.n_heads), n_kv_heads = static_cast<int>(a.n_kv_heads);
  const int keys = n_heads + n_kv_heads,
            heads = keys + (out.v.prepared == nullptr ? 0 : n_kv_heads);
  for (int unit = threadIdx.x; unit < heads * units_of_head; unit += kRopeThreads) {
    const int head = unit / units_of_head, i = unit % units_of_head * kEach;
    const bool is_query = head < n_heads, turns = head < keys;
    const RowsOut<Bf16> to = is_query ? out.q : turns ? out.k : out.v;
    const float* from = is_query ? a.q : turns ? a.k : a.v;
    const int at = (head - (is_query ? 0 : turns ? n_heads : keys)) * 2 * half + i;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
      const int64_t angle = turns ? int64_t{a.positions[row]} * half + i : 0;
      if constexpr (kEach == 4) {
        float4 x = *reinterpret_cast<const float4*>(from + row * to.d + at);
        float4 y = *reinterpret_cast<const float4*>(from + row * to.d + at + half);
        if (turns) {
          const float4 cos = *reinterpret_cast<const float4*>(a.cos + angle);
          float4 sin = *reinterpret_cast<const float4*>(a.sin + angle);
          if (a.inverse) sin = make_float4(-sin.x, -sin.y, -sin.z, -sin.w);
          rotate(cos.x, sin.x, &x.x, &y.x);
          rotate(cos.y, sin.y, &x.y, &y.y);
          rotate(cos.z, sin.z, &x.z, &y.z);
          rotate(cos.w, sin.w, &x.w, &y.w);
        }
        to.set_four(row, at, x);
        to.set_four(row, at + half, y);
      } else {
        float x = from[row * to.d + at], y = from[row * to.d + at + half];
        if (turns) rotate(a.cos[angle], a.inverse ? -a.sin[angle] : a.sin[angle], &x, &y);
        to.set(row, at, x);
        to.set(row, at + half, y);
        if (at == 0) to.pad(row, 0, 1);
      }
    }
  }
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
    const int64_t to = page_offset(a.kv, a.slots[row], head) + i;
    if (is_key) {
      rotate(a.cos[angle], a.sin[angle], a.k + from, a.k + from + half);
      store_pair<T>(a.kv.k, to, half, a.k[from], a.k[from + half]);
    } else {
      store_pair<T>(a.kv.v, to, half, a.v[from], a.v[from + half]);
    }
  }
}

template <typename T>
void norm_rows_of(const StreamState& s, int64_t rows, int64_t d, const float* x, int64_t x_stride,
                  const float* w, float eps, const RowsOut<T>& out, float* rstd) {
  constexpr int64_t kManyRows = 8;
  const bool pairs =
      d % 2 == 0 && x_stride % 2 == 0 && out.by_fours() && is_aligned16(x) && is_aligned16(w);
  const dim3 warps(static_cast<unsigned>(ceil_div(rows, kWarps)));
  const int threads = rows <= kWarps * kSms ? 64 : kThreads;  // of pairs: blocks for all SMs
  const dim3 pair_blocks(static_cast<unsigned>(ceil_div(rows, threads / 32)));
  const bool done =
      rows > kManyRows && by_warps(d, [&]<int kColumns>() {
        if (pairs) {
          launch_next("rmsnorm", rmsnorm_pairs<T, kColumns>, pair_blocks, threads, 0, s.stream(),
                      rows, static_cast<int>(d), x, x_stride, w, eps, out, rstd);
        } else {
          launch_next("rmsnorm", rmsnorm_warps<T, kColumns>, warps, kThreads, 0, s.stream(), rows,
                      d, x, x_stride, w, eps, out, rstd);
        }
      });
  if (done) return;
  launch_next("rmsnorm", rmsnorm_rows<T>, dim3(static_cast<unsigned>(rows)), kThreads, 0,
              s.stream(), d, x, x_stride, w, eps, out, rstd);
}

}  // namespace

void norm_rows(const StreamState& s, int64_t rows, int64_t d, const float* x, int64_t x_stride,
               const float* w, float eps, float* y, const PreparedRows& rounded, float* rstd) {
  with_rows_out(rounded, [&]<typename T>(T) {
    norm_rows_of(s, rows, d, x, x_stride, w, eps, rows_out<T>(y, rounded, d), rstd);
  });
}

void rmsnorm(const OpContext& context, int64_t rows, int64_t d, const float* x, const float* w,
             float eps, float* y, float* rstd, const PreparedRows& prepared) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows == 0) return;
  norm_rows(*s, rows, d, x, d, w, eps, y, prepared, rstd);
}

void rmsnorm_backward(const OpContext& context, int64_t rows, int64_t d, const float* dy,
                      const float* x, const float* w, const float* rstd, float* dx,
                      void* dx_prepared, float* dw) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows == 0 || d == 0) return;
  const auto blocks = static_cast<unsigned>(smaller(ceil_div(rows, kWarps), kGradientBlocks));
  float* part = dw == nullptr ? nullptr : s->scratch<float>();
  const auto out = rows_out<Bf16>(dx, {dx_prepared}, d);
  const bool pairs = d % 2 == 0 && (dx_prepared == nullptr || out.padded == d) && is_aligned8(dy) &&
                     is_aligned8(x) && is_aligned8(w) && is_aligned8(dx);
  const bool done =
      pairs && by_warps(d, [&]<int kColumns>() {
        launch_next("rmsnorm_backward", rmsnorm_gradient<kColumns>, dim3(blocks), kThreads, 0,
                    s->stream(), rows, static_cast<int>(d), dy, x, w, rstd, dx, out, part);
      });
  if (!done) {
    launch_next("rmsnorm_backward", rmsnorm_input_gradient, dim3(static_cast<unsigned>(rows)),
                kThreads, 0, s->stream(), d, dy, x, w, rstd, dx, out);
  }
  if (dw == nullptr) return;
  const dim3 columns(static_cast<unsigned>(ceil_div(d, 32)));
  const int64_t sums = done ? blocks : rows;
  launch_next("rmsnorm_backward", rmsnorm_weight_gradient, columns, 1024, 0, s->stream(), sums, d,
              done ? nullptr : dy, done ? part : x, rstd, dw);
}

void rope(const OpContext& context, const RopeArgs& a) {
  const StreamState* s = enter(context);
  const int64_t q = a.n_heads * a.head_dim, k = a.n_kv_heads * a.head_dim;
  if (s == nullptr || a.rows * (q + k) == 0) return;
  const auto rows = [](float* in_place, const PreparedRows& to, int64_t d) {
    return rows_out<Bf16>(to.data == nullptr ? in_place : nullptr, to, d);
  };
  const RopeOut out{rows(a.q, a.q_prepared, q), rows(a.k, a.k_prepared, k),
                    rows(nullptr, a.v_prepared, k)};
  bool fours = a.head_dim % 8 == 0 && out.q.by_fours() && out.k.by_fours() && out.v.by_fours();
  for (const float* from :
       {static_cast<const float*>(a.q), static_cast<const float*>(a.k), a.v, a.cos, a.sin})
    fours = fours && is_aligned16(from);
  constexpr int64_t kMostBlocks = kSms * 2048 / kRopeThreads;
  launch_next("rope", fours ? rope_rows<4> : rope_rows<1>,
              dim3(static_cast<unsigned>(smaller(a.rows, kMostBlocks))), kRopeThreads, 0,
              s->stream(), a, out);
}

void rope_append(const OpContext& context, const RopeAppendArgs& a) {
  const StreamState* s = enter(context);
  const int64_t n = a.rows * (a.n_heads + 2 * a.kv.n_kv_heads) * (a.kv.head_dim / 2);
  if (s == nullptr || n == 0) return;
  auto kernel = rope_append_rows<Bf16>;
  if (a.kv.dtype == KvDtype::kF32) kernel = rope_append_rows<float>;
  if (a.kv.dtype == KvDtype::kF16) kernel = rope_append_rows<Half>;
  launch_next("rope_append", kernel, dim3(loop_blocks(n, kThreads)), kThreads, 0, s->stream(), a);
}

}  // namespace ds::cuda
