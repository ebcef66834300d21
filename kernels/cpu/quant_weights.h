// SPDX-License-Identifier: Apache-2.0
// FP32 weights to codes and back, a panel of 16 rows in the 16 lanes. Products and sums are rounded
// one by one (no fused multiply-adds), so every ISA chooses the same codes and gives the same
// weights.
#pragma once

#include "kernels/cpu/pack.h"
#include "kernels/cpu/quant_linear.h"

namespace ds::DS_ISA {

/// w = low + scale * u with 0 <= u <= 15, or w = scale * (u - 128) with 1 <= u <= 255 (low unused).
struct QuantGrid {
  F16 scale, low;
};

DS_INLINE F16 absolute(F16 a) { return max(a, zero() - a); }
DS_INLINE F16 between(F16 a, float low, float high) { return min(max(a, set(low)), set(high)); }

/// As the layout holds it: BF16 for a group, FP32 for a channel.
DS_INLINE F16 as_stored(QuantFormat format, F16 a) {
  return format.group == 0 ? a : odd(round_bf16(a));
}
DS_INLINE F16 inverse_of(F16 scale) { return where_positive(scale, set(1.0f) / scale); }

DS_INLINE F16 code_4(const QuantGrid& grid, F16 inverse, F16 w) {
  return between(round_nearest((w - grid.low) * inverse), 0.0f, 15.0f);
}
DS_INLINE F16 code_8(F16 inverse, F16 w) {
  return between(round_nearest(w * inverse), -127.0f, 127.0f);
}

struct QuantError {
  F16 squared, worst;
};

DS_INLINE QuantError error_of_grid(const float* columns, int64_t count, const QuantGrid& grid) {
  QuantError e{zero(), zero()};
  const F16 inverse = inverse_of(grid.scale);
  for (int64_t j = 0; j < count; ++j) {
    const F16 w = load(columns + j * 16);
    const F16 d = w - (code_4(grid, inverse, w) * grid.scale + grid.low);
    e.squared = e.squared + d * d;
    e.worst = max(absolute(d), e.worst);
  }
  return e;
}

/// The line of least squares through (u, w), u = codes of w for a first step of 1 / `inverse` from
/// `low`.
DS_INLINE QuantGrid fitted_grid(QuantFormat format, const float* columns, int64_t count, F16 low,
                                F16 inverse) {
  F16 su = zero(), suu = zero(), sw = zero(), swu = zero();
  for (int64_t j = 0; j < count; ++j) {
    const F16 w = load(columns + j * 16) - low;
    const F16 u = between(round_nearest(w * inverse), 0.0f, 15.0f);
    su = su + u;
    suu = suu + u * u;
    sw = sw + w;
    swu = swu + w * u;
  }
  const F16 n = set(static_cast<float>(count));
  const F16 scale = as_stored(format, (n * swu - sw * su) / (n * suu - su * su));
  return {scale, as_stored(format, low + (sw - scale * su) / n)};
}

/// 4 bits: first steps of 14 to 16 parts of the range and finer yet for outliers to be cut off; the
/// best fit that keeps the promise of quant_rel_tol for the group. After llama.cpp's
/// make_qkx2_quants.
inline QuantGrid choose_grid_4(QuantFormat format, const float* columns, int64_t count) {
  F16 low = load(columns), high = low;
  for (int64_t j = 1; j < count; ++j) {
    low = min(load(columns + j * 16), low);
    high = max(load(columns + j * 16), high);
  }
  const F16 largest = max(absolute(low), absolute(high));
  const F16 limit = largest * set(quant_rel_tol(format));
  const F16 range = high - low;
  QuantGrid best{as_stored(format, range / set(15.0f)), as_stored(format, low)};
  QuantError least = error_of_grid(columns, count, best);
  for (int i = -10; i <= 10; ++i) {
    const F16 inverse = set(15.0f + 0.1f * static_cast<float>(i)) / range;
    const QuantGrid grid = fitted_grid(format, columns, count, low, inverse);
    const QuantError e = error_of_grid(columns, count, grid);
    const F16 better = min(limit - e.worst, least.squared - e.squared);  // no number: not better
    best = {select(better, grid.scale, best.scale), select(better, grid.low, best.low)};
    least.squared = select(better, e.squared, least.squared);
  }
  const F16 large_enough = largest - set(kQuantZero);
  return {where_positive(large_enough, best.scale), where_positive(large_enough, best.low)};
}

DS_INLINE QuantGrid choose_grid_8(QuantFormat format, const float* columns, int64_t count) {
  F16 largest = zero();
  for (int64_t j = 0; j < count; ++j) largest = max(absolute(load(columns + j * 16)), largest);
  const F16 scale = as_stored(format, largest / set(127.0f));
  return {where_positive(largest - set(kQuantZero), scale), zero()};
}

DS_INLINE QuantGrid choose_grid(QuantFormat format, const float* columns, int64_t count) {
  return format.bits == 4 ? choose_grid_4(format, columns, count)
                          : choose_grid_8(format, columns, count);
}

/// The value that a weight becomes.
DS_INLINE F16 rounded(QuantFormat format, const QuantGrid& grid, F16 inverse, F16 w) {
  if (format.bits == 4) return code_4(grid, inverse, w) * grid.scale + grid.low;
  return code_8(inverse, w) * grid.scale;
}

/// Weights of one scale.
DS_INLINE int64_t span_of(QuantFormat format, int64_t k) {
  return format.group == 0 ? k : kQuantGroup;
}

/// [count][16] columns of a panel from k0 on.
inline void gather_panel(int64_t n, int64_t k, const float* w, int64_t panel, int64_t k0,
                         int64_t count, float* columns) {
  for (int64_t j0 = 0; j0 < count; j0 += 16) {
    const int64_t m = smaller(16, count - j0);
    F16 block[16];
    gather_columns(n, k, w, false, panel * 16, k0 + j0, m, block);
    for (int64_t j = 0; j < m; ++j) store(columns + (j0 + j) * 16, block[j]);
  }
}

/// The other way: columns [count][16] into rows of out [n, k].
inline void scatter_panel(int64_t n, int64_t k, float* out, int64_t panel, int64_t k0,
                          int64_t count, const float* columns) {
  const int64_t rows = smaller(16, n - panel * 16);
  for (int64_t j0 = 0; j0 < count; j0 += 16) {
    const int64_t m = smaller(16, count - j0);
    U16 block[16];
    for (int64_t j = 0; j < 16; ++j) {
      block[j] = j < m ? bits(load(columns + (j0 + j) * 16)) : zero_u();
    }
    transpose(block);
    for (int64_t i = 0; i < rows; ++i) {
      store_n(out + (panel * 16 + i) * k + k0 + j0, as_float(block[i]), m);
    }
  }
}

/// Codes of up to 32 columns as the layout has them.
DS_INLINE void store_codes(QuantFormat format, const QuantGrid& grid, const float* columns,
                           int64_t count, uint32_t* to) {
  const F16 inverse = inverse_of(grid.scale);
  const bool four = format.bits == 4;
  const auto code = [&](int64_t j) {
    if (j >= count) return four ? zero_u() : set_u(128);
    const F16 w = load(columns + j * 16);
    return to_int(four ? code_4(grid, inverse, w) : code_8(inverse, w) + set(128.0f));
  };
  const auto word = [&](int64_t j) {
    return code(j) | shift_left<8>(code(j + 1)) | shift_left<16>(code(j + 2)) |
           shift_left<24>(code(j + 3));
  };
  for (int64_t b = 0; b < (four ? 4 : 8); ++b) {
    store_u(to + b * 16, four ? word(4 * b) | shift_left<4>(word(16 + 4 * b)) : word(4 * b));
  }
}

/// Grid of group g (0 for a channel) into a panel's scales.
DS_INLINE void store_grid(QuantFormat format, const QuantGrid& grid, int64_t g, char* scales) {
  if (format.group == 0) {
    store(reinterpret_cast<float*>(scales), grid.scale);
    if (format.bits == 4) store(reinterpret_cast<float*>(scales) + 16, grid.low);
  } else if (format.bits == 4) {
    store_u(reinterpret_cast<uint32_t*>(scales) + g * 16, pair_bf16(grid.scale, grid.low));
  } else {
    store_bf16_n(reinterpret_cast<uint16_t*>(scales) + g * 16, grid.scale, 16);
  }
}

DS_INLINE QuantGrid load_grid(QuantFormat format, int64_t g, const char* scales) {
  if (format.group == 0) {
    const auto* at = reinterpret_cast<const float*>(scales);
    return {load(at), format.bits == 4 ? load(at + 16) : zero()};
  }
  if (format.bits == 4) {
    const U16 both = load_u(reinterpret_cast<const uint32_t*>(scales) + g * 16);
    return {even(both), odd(both)};
  }
  return {load_bf16(reinterpret_cast<const uint16_t*>(scales) + g * 16), zero()};
}

inline void quantize_panel(QuantFormat format, int64_t n, int64_t k, const float* w, int64_t panel,
                           char* codes, char* scales) {
  const int64_t span = span_of(format, k);
  float* columns = task_scratch(static_cast<size_t>(span * 16));
  for (int64_t k0 = 0; k0 < k; k0 += span) {
    const int64_t count = smaller(span, k - k0);
    gather_panel(n, k, w, panel, k0, count, columns);
    const QuantGrid grid = choose_grid(format, columns, count);
    store_grid(format, grid, k0 / span, scales);
    for (int64_t j = 0; j < count; j += kQuantGroup) {
      const int64_t g = (k0 + j) / kQuantGroup;
      store_codes(format, grid, columns + j * 16, smaller(kQuantGroup, count - j),
                  reinterpret_cast<uint32_t*>(codes + g * 64 * format.bits));
    }
  }
}

/// Weight j of a group, of its codes.
DS_INLINE F16 weight_at(QuantFormat format, const QuantGrid& grid, const uint32_t* codes,
                        int64_t j) {
  const bool four = format.bits == 4;
  const int64_t in_half = four ? j % 16 : j;
  U16 word = load_u(codes + in_half / 4 * 16);
  if (four && j >= 16) word = shift_right<4>(word);
  if (in_half % 4 >= 2) word = shift_right<16>(word);
  if (in_half % 2 == 1) word = shift_right<8>(word);
  const F16 u = float_of(word & set_u(four ? 0x0f : 0xff));
  return four ? u * grid.scale + grid.low : (u - set(128.0f)) * grid.scale;
}

inline void dequantize(const OpContext& context, const QuantView& q, float* out) {
  parallel_for(context, ceil_div(q.n, 16), [&](int64_t p) {
    const char* codes = static_cast<const char*>(q.packed) + p * quant_panel_bytes(q.format, q.k);
    const char* scales =
        static_cast<const char*>(q.scales) + p * quant_scale_panel_bytes(q.format, q.k);
    alignas(64) float columns[kQuantGroup * 16];
    for (int64_t k0 = 0; k0 < q.k; k0 += kQuantGroup) {
      const int64_t count = smaller(kQuantGroup, q.k - k0), g = k0 / kQuantGroup;
      const QuantGrid grid = load_grid(q.format, g, scales);
      const auto* from = reinterpret_cast<const uint32_t*>(codes + g * 64 * q.format.bits);
      for (int64_t j = 0; j < count; ++j) {
        store(columns + j * 16, weight_at(q.format, grid, from, j));
      }
      scatter_panel(q.n, q.k, out, p, k0, count, columns);
    }
  });
}

/// f(panel, k0, count, grid, columns [count][16]) for the weights of every scale.
template <typename F>
inline void for_grids(const OpContext& context, QuantFormat format, int64_t n, int64_t k,
                      const float* w, const F& f) {
  parallel_for(context, ceil_div(n, 16), [&](int64_t p) {
    const int64_t span = span_of(format, k);
    float* columns = task_scratch(static_cast<size_t>(span * 32));
    for (int64_t k0 = 0; k0 < k; k0 += span) {
      const int64_t count = smaller(span, k - k0);
      gather_panel(n, k, w, p, k0, count, columns);
      f(p, k0, count, choose_grid(format, columns, count), columns);
    }
  });
}

inline void fake_quantize(const OpContext& context, QuantFormat format, int64_t n, int64_t k,
                          const float* w, float* wq) {
  for_grids(context, format, n, k, w,
            [&](int64_t p, int64_t k0, int64_t count, const QuantGrid& grid, float* columns) {
              const F16 inverse = inverse_of(grid.scale);
              for (int64_t j = 0; j < count; ++j) {
                float* at = columns + j * 16;
                store(at, rounded(format, grid, inverse, load(at)));
              }
              scatter_panel(n, k, wq, p, k0, count, columns);
            });
}

inline void fake_quantize_backward(const OpContext& context, QuantFormat format, int64_t n,
                                   int64_t k, const float* w, const float* dwq, float* dw) {
  const auto add = [&](int64_t p, int64_t k0, int64_t count, const QuantGrid& grid,
                       float* columns) {
    const bool four = format.bits == 4;
    const F16 half = set(0.5f) * grid.scale;
    const F16 end = grid.scale * set(four ? 15.0f : 127.0f);
    const F16 low = four ? grid.low - half : zero() - (end + half);
    const F16 high = four ? grid.low + end + half : end + half;
    float* sum = columns + count * 16;
    gather_panel(n, k, dw, p, k0, count, sum);
    alignas(64) float gradient[16 * 16];
    for (int64_t j0 = 0; j0 < count; j0 += 16) {
      const int64_t m = smaller(16, count - j0);
      gather_panel(n, k, dwq, p, k0 + j0, m, gradient);
      for (int64_t j = 0; j < m; ++j) {
        const F16 w_j = load(columns + (j0 + j) * 16);
        const F16 outside = where_positive(grid.scale, max(low - w_j, w_j - high));
        float* at = sum + (j0 + j) * 16;
        store(at, select(outside, load(at), load(at) + load(gradient + j * 16)));
      }
    }
    scatter_panel(n, k, dw, p, k0, count, sum);
  };
  for_grids(context, format, n, k, w, add);
}

}  // namespace ds::DS_ISA
