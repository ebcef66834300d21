// SPDX-License-Identifier: Apache-2.0
// Row-wise and elementwise ops: RMSNorm, rotary embedding, activations.
#pragma once

#include "kernels/cpu/pack.h"

namespace ds::DS_ISA {

/// Elements per task: a few microseconds of arithmetic for each KiB touched.
constexpr int64_t kElementsPerTask = 32'768;
DS_INLINE int64_t rows_per_task(int64_t d) { return larger(1, kElementsPerTask / larger(1, d)); }

/// Sum of f(offset, lanes) over [0, n): four accumulators in turn, then a fixed tree.
template <typename F>
DS_INLINE float sum_lanes(int64_t n, const F& f) {
  F16 s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) s[j] = f(i + j * 16, int64_t{16}, s[j]);
  }
  for_lanes(i, n, [&](int64_t at, int64_t lanes) { s[0] = f(at, lanes, s[0]); });
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

/// `y` as prepare() gives it, where the caller wants that too.
inline void prepare_also(const OpContext& context, int64_t rows, int64_t d, const float* y,
                         const PreparedRows& prepared) {
  if (prepared.data != nullptr) prepare(context, rows, d, y, d, prepared);
}

inline void rmsnorm(const OpContext& context, int64_t rows, int64_t d, const float* x,
                    const float* w, float eps, float* y, float* rstd,
                    const PreparedRows& prepared) {
  parallel_blocks(context, rows, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* in = x + r * d;
      const float sum = sum_lanes(d, [&](int64_t i, int64_t n, F16 s) {
        const F16 v = load_n(in + i, n);
        return fma(v, v, s);
      });
      const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(d) + eps);
      for_lanes(0, d, [&](int64_t i, int64_t n) {
        store_n(y + r * d + i, load_n(in + i, n) * set(inverse) * load_n(w + i, n), n);
      });
      if (rstd != nullptr) rstd[r] = inverse;
    }
  });
  prepare_also(context, rows, d, y, prepared);
}

/// With h = x rstd: dx = rstd (w dy - h mean(w dy h)), dw = sum over rows of dy h.
inline void rmsnorm_backward(const OpContext& context, int64_t rows, int64_t d, const float* dy,
                             const float* x, const float* w, const float* rstd, float* dx,
                             void* dx_prepared, float* dw) {
  parallel_blocks(context, rows, rows_per_task(2 * d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *g = dy + r * d, *in = x + r * d;
      const float dot = sum_lanes(d, [&](int64_t i, int64_t n, F16 s) {
        return fma(load_n(g + i, n) * load_n(w + i, n), load_n(in + i, n), s);
      });
      const float scale = rstd[r];
      const F16 back = set(dot * scale * scale / static_cast<float>(d));
      for_lanes(0, d, [&](int64_t i, int64_t n) {
        const F16 part = load_n(g + i, n) * load_n(w + i, n) - load_n(in + i, n) * back;
        float* to = dx + r * d + i;
        store_n(to, fma(part, set(scale), load_n(to, n)), n);
      });
    }
  });
  prepare_also(context, rows, d, dx, {dx_prepared});
  if (dw == nullptr) return;
  parallel_blocks(context, d, 64, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t n) {
      F16 sum = zero();
      for (int64_t r = 0; r < rows; ++r) {
        sum = fma(load_n(dy + r * d + i, n) * set(rstd[r]), load_n(x + r * d + i, n), sum);
      }
      store_n(dw + i, load_n(dw + i, n) + sum, n);
    });
  });
}

/// One head by halves: (a, b) -> (a cos - b sin, b cos + a sin); inverse turns the other way.
DS_INLINE void rotate(int64_t half, const float* cos, const float* sin, bool inverse, float* x) {
  for_lanes(0, half, [&](int64_t i, int64_t n) {
    const F16 c = load_n(cos + i, n);
    const F16 raw = load_n(sin + i, n);
    const F16 s = inverse ? zero() - raw : raw;
    const F16 a = load_n(x + i, n), b = load_n(x + half + i, n);
    store_n(x + i, fma(a, c, zero() - b * s), n);
    store_n(x + half + i, fma(b, c, a * s), n);
  });
}

inline void rope(const OpContext& context, const RopeArgs& a) {
  const int64_t d = a.head_dim, half = d / 2, heads = a.n_heads + a.n_kv_heads;
  parallel_blocks(context, a.rows, rows_per_task(heads * d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = a.positions[r] * half;
      for (int64_t h = 0; h < heads; ++h) {
        float* x = h < a.n_heads ? a.q + (r * a.n_heads + h) * d
                                 : a.k + (r * a.n_kv_heads + h - a.n_heads) * d;
        rotate(half, a.cos + at, a.sin + at, a.inverse, x);
      }
    }
  });
  prepare_also(context, a.rows, a.n_heads * d, a.q, a.q_prepared);
  prepare_also(context, a.rows, a.n_kv_heads * d, a.k, a.k_prepared);
  prepare_also(context, a.rows, a.n_kv_heads * d, a.v, a.v_prepared);
}

inline void store_kv(const KvView& kv, int64_t page, int64_t head, int64_t slot, const float* k,
                     const float* v) {
  const int64_t d = kv.head_dim;
  const int64_t at = ((page * kv.n_kv_heads + head) * kKvPageTokens + slot) * d;
  for_lanes(0, d, [&](int64_t i, int64_t n) {
    if (kv.dtype == KvDtype::kF32) {
      store_n(static_cast<float*>(kv.k) + at + i, load_n(k + i, n), n);
      store_n(static_cast<float*>(kv.v) + at + i, load_n(v + i, n), n);
    } else {
      store_bf16_n(static_cast<uint16_t*>(kv.k) + at + i, load_n(k + i, n), n);
      store_bf16_n(static_cast<uint16_t*>(kv.v) + at + i, load_n(v + i, n), n);
    }
  });
}

inline void rope_append(const OpContext& context, const RopeAppendArgs& a) {
  const int64_t d = a.kv.head_dim, half = d / 2;
  parallel_blocks(context, a.rows, rows_per_task(a.n_heads * d), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *cos = a.cos + a.positions[row] * half, *sin = a.sin + a.positions[row] * half;
      for (int64_t h = 0; h < a.n_heads; ++h) {
        rotate(half, cos, sin, false, a.q + (row * a.n_heads + h) * d);
      }
      const int64_t page = a.slots[row] / kKvPageTokens, slot = a.slots[row] % kKvPageTokens;
      for (int64_t h = 0; h < a.kv.n_kv_heads; ++h) {
        const int64_t at = (row * a.kv.n_kv_heads + h) * d;
        rotate(half, cos, sin, false, a.k + at);
        store_kv(a.kv, page, h, slot, a.k + at, a.v + at);
      }
    }
  });
}

/// Rows of d from x to out, by index on the side that `scatter` says.
inline void move_rows(const OpContext& context, int64_t rows, int64_t d, const int32_t* index,
                      const float* x, float* out, bool scatter) {
  parallel_blocks(context, rows, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = x + (scatter ? r : index[r]) * d;
      float* to = out + (scatter ? index[r] : r) * d;
      for_lanes(0, d, [&](int64_t i, int64_t n) { store_n(to + i, load_n(from + i, n), n); });
    }
  });
}

inline void gather_rows(const OpContext& context, int64_t rows, int64_t d, const int32_t* index,
                        const float* x, float* out) {
  move_rows(context, rows, d, index, x, out, false);
}

inline void scatter_rows(const OpContext& context, int64_t rows, int64_t d, const int32_t* index,
                         const float* x, float* out) {
  move_rows(context, rows, d, index, x, out, true);
}

inline void swiglu(const OpContext& context, const SwigluArgs& a) {
  parallel_blocks(context, a.rows * a.d, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      store_n(a.y + i, silu_times(load_n(a.gate + i, m), load_n(a.up + i, m)), m);
    });
  });
  prepare_also(context, a.rows, a.d, a.y, a.y_prepared);
}

/// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
inline void swiglu_backward(const OpContext& context, const SwigluArgs& a) {
  parallel_blocks(context, a.rows * a.d, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      const F16 g = load_n(a.gate + i, m), u = load_n(a.up + i, m), back = load_n(a.dy + i, m);
      const F16 s = sigmoid(g);
      if (a.y != nullptr) store_n(a.y + i, silu_times(g, u), m);
      store_n(a.dgate + i, back * u * (s * fma(g, set(1.0f) - s, set(1.0f))), m);
      store_n(a.dup + i, back * (g * s), m);
    });
  });
  prepare_also(context, a.rows, a.d, a.y, a.y_prepared);
  prepare_also(context, a.rows, a.d, a.dgate, a.dgate_prepared);
  prepare_also(context, a.rows, a.d, a.dup, a.dup_prepared);
}

inline void relu(const OpContext& context, int64_t n, float* x) {
  parallel_blocks(context, n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      const F16 v = load_n(x + i, m);
      store_n(x + i, where_positive(v, v), m);
    });
  });
}

inline void relu_backward(const OpContext& context, int64_t n, const float* y, float* dy) {
  parallel_blocks(context, n, kElementsPerTask, [&](int64_t begin, int64_t end) {
    for_lanes(begin, end, [&](int64_t i, int64_t m) {
      store_n(dy + i, where_positive(load_n(y + i, m), load_n(dy + i, m)), m);
    });
  });
}

}  // namespace ds::DS_ISA
