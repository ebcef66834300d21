// SPDX-License-Identifier: Apache-2.0
// Linear layers on codes of 8 and 4 bits (layouts: kernels/quant.h). Order of every output: groups
// of 32 k ascending, each an exact integer sum times the two scales; then as in linear.h.
#pragma once

#include "kernels/cpu/linear.h"
#include "kernels/cpu/vnni.h"
#include "kernels/quant.h"

namespace ds::DS_ISA {

DS_INLINE int64_t quant_row_bytes(int64_t k) { return quant_prepared_bytes(1, k); }

/// One group of a row, n <= 32 values. A value that is not finite makes the scale NaN.
DS_INLINE void prepare_group(const float* x, int64_t n, QuantInput* to) {
  const F16 a = load_n(x, smaller(n, 16));
  const F16 b = n > 16 ? load_n(x + 16, n - 16) : zero();
  const float largest = reduce_max(max(max(a, zero() - a), max(b, zero() - b)));
  const float poison = reduce_add((a - a) + (b - b));
  const float inverse = largest > kQuantZero ? 127.0f / largest : 0.0f;
  alignas(64) int32_t q[kQuantGroup];
  const auto round = [&](F16 v) {
    return to_int(min(max(v * set(inverse), set(-127.0f)), set(127.0f)));
  };
  store_u(reinterpret_cast<uint32_t*>(q), round(a));
  store_u(reinterpret_cast<uint32_t*>(q) + 16, round(b));
  int32_t sum = 0;
  for (int i = 0; i < kQuantGroup; ++i) {
    to->q[i] = static_cast<int8_t>(q[i]);
    sum += to->q[i];
  }
  to->scale = (largest > kQuantZero ? largest / 127.0f : 0.0f) + poison;
  to->sum = to->scale * static_cast<float>(sum);
  to->shifted = -128 * sum;
  to->unused = 0;
}

inline void quant_prepare(const OpContext& context, int64_t rows, int64_t k, const float* x,
                          int64_t x_stride, void* prepared) {
  parallel_blocks(context, rows, larger(1, 16'384 / larger(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* row = static_cast<char*>(prepared) + r * quant_row_bytes(k);
      auto* to = reinterpret_cast<QuantInput*>(row);
      float total[4] = {0, 0, 0, 0};
      for (int64_t k0 = 0; k0 < k; k0 += kQuantGroup, ++to) {
        prepare_group(x + r * x_stride + k0, smaller(kQuantGroup, k - k0), to);
        total[0] += to->sum;
      }
      __builtin_memcpy(to, total, sizeof(total));
    }
  });
}

/// Where one panel's codes and scales lie.
struct QuantPanel {
  const char* codes;
  const char* scales;
};

DS_INLINE int64_t quant_panel_bytes(QuantFormat format, int64_t k) {
  return quant_packed_bytes(format, 1, k);
}
DS_INLINE int64_t quant_scale_panel_bytes(QuantFormat format, int64_t k) {
  return quant_scale_bytes(format, 1, k);
}

/// Integer products of one group: dot[r][p] for R rows and P panels.
template <bool kFour, bool kVnni, int R, int P>
DS_INLINE void group_products(const QuantPanel* panels, const QuantInput* const* x, int64_t g,
                              U16 (&dot)[R][P]) {
  constexpr int kVectors = kFour ? 4 : 8;
  constexpr int64_t kAhead = 2048;  // bytes; the hardware prefetcher stops at 4 KiB pages
  const U16 nibble = set_u(0x0f0f0f0fu);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const U16 start = kFour ? zero_u() : set_u(static_cast<uint32_t>(x[r][g].shifted));
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) dot[r][p] = start;
  }
#pragma GCC unroll 8
  for (int b = 0; b < kVectors; ++b) {
    U16 w[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const char* at = panels[p].codes + (g * kVectors + b) * 64;
      prefetch(at + kAhead);
      w[p] = load_u(reinterpret_cast<const uint32_t*>(at));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint32_t word;
      __builtin_memcpy(&word, x[r][g].q + 4 * b, 4);
      const U16 low = set_u(word);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        dot[r][p] = dot_bytes<kVnni>(dot[r][p], kFour ? w[p] & nibble : w[p], low);
      }
      if constexpr (kFour) {
        __builtin_memcpy(&word, x[r][g].q + 16 + 4 * b, 4);
        const U16 high = set_u(word);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          dot[r][p] = dot_bytes<kVnni>(dot[r][p], shift_right<4>(w[p]) & nibble, high);
        }
      }
    }
  }
}

/// acc[r][16 p + lane] for R prepared rows and P panels. kGrouped: scales by group, else by
/// channel.
template <bool kFour, bool kGrouped, bool kVnni, int R, int P>
inline void quant_tile(const QuantPanel* panels, const char* rows, int64_t k, float* acc) {
  const int64_t groups = quant_groups(k);
  const QuantInput* x[R];
  F16 sum[R][P];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    x[r] = reinterpret_cast<const QuantInput*>(rows + r * quant_row_bytes(k));
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[r][p] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    U16 dot[R][P];
    group_products<kFour, kVnni, R, P>(panels, x, g, dot);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      F16 scale = set(1.0f), low = zero();
      if constexpr (kGrouped && kFour) {
        const U16 both = load_u(reinterpret_cast<const uint32_t*>(panels[p].scales) + g * 16);
        scale = even(both);
        low = odd(both);
      } else if constexpr (kGrouped) {
        scale = load_bf16(reinterpret_cast<const uint16_t*>(panels[p].scales) + g * 16);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F16 step = set(x[r][g].scale);
        sum[r][p] = fma(float_of(dot[r][p]), kGrouped ? scale * step : step, sum[r][p]);
        if constexpr (kGrouped && kFour) sum[r][p] = fma(low, set(x[r][g].sum), sum[r][p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if constexpr (!kGrouped) {
        const auto* scales = reinterpret_cast<const float*>(panels[p].scales);
        sum[r][p] = sum[r][p] * load(scales);
        if constexpr (kFour) {
          float total;
          __builtin_memcpy(&total, x[r] + groups, sizeof(total));
          sum[r][p] = fma(load(scales + 16), set(total), sum[r][p]);
        }
      }
      store(acc + r * kGroupLanes + p * 16, sum[r][p]);
    }
  }
}

template <bool kFour, bool kGrouped, bool kVnni, int P>
inline void quant_rows(const QuantPanel* panels, const char* x, int64_t rows, int64_t k,
                       float* acc) {
  const int64_t step = quant_row_bytes(k);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    quant_tile<kFour, kGrouped, kVnni, 4, P>(panels, x + r * step, k, acc + r * kGroupLanes);
  }
  if (r + 2 <= rows) {
    quant_tile<kFour, kGrouped, kVnni, 2, P>(panels, x + r * step, k, acc + r * kGroupLanes);
    r += 2;
  }
  if (r < rows) {
    quant_tile<kFour, kGrouped, kVnni, 1, P>(panels, x + r * step, k, acc + r * kGroupLanes);
  }
}

/// acc [rows][kGroupLanes] for 1 to kGroup panels.
template <bool kFour, bool kGrouped, bool kVnni>
inline void quant_panels(const QuantPanel* panels, int count, const char* x, int64_t rows,
                         int64_t k, float* acc) {
  int p = 0;
  if constexpr (kTilePanels == 4) {
    for (; p + 2 <= count; p += 2) {
      quant_rows<kFour, kGrouped, kVnni, 2>(panels + p, x, rows, k, acc + p * 16);
    }
  }
  for (; p < count; ++p) {
    quant_rows<kFour, kGrouped, kVnni, 1>(panels + p, x, rows, k, acc + p * 16);
  }
}

using QuantPanels = void (*)(const QuantPanel*, int, const char*, int64_t, int64_t, float*);

template <bool kVnni>
DS_INLINE QuantPanels quant_panels_of(QuantFormat format) {
  if (format.bits == 4) {
    return format.group == 0 ? quant_panels<true, false, kVnni> : quant_panels<true, true, kVnni>;
  }
  return format.group == 0 ? quant_panels<false, false, kVnni> : quant_panels<false, true, kVnni>;
}

inline void quant_task(const QuantLinearArgs& q, QuantPanels multiply, const Columns& columns,
                       int64_t first_group, int64_t last_group, int64_t row, int64_t rows) {
  const LinearArgs& a = q.linear;
  const int64_t k = a.w[0].k;
  float* acc = task_scratch(static_cast<size_t>(kRowsPerTask * kGroupLanes));
  const char* x = static_cast<const char*>(a.x_prepared) + row * quant_row_bytes(k);
  for (int64_t g = first_group; g < last_group; ++g) {
    const int64_t column = g * kGroup;
    const int count = static_cast<int>(smaller(kGroup, columns.total - column));
    QuantPanel panels[kGroup];
    for (int c = 0; c < count; ++c) {
      int w;
      int64_t panel;
      columns.find(column + c, &w, &panel);
      panels[c] = {
          static_cast<const char*>(a.w[w].data) + panel * quant_panel_bytes(q.format, k),
          static_cast<const char*>(q.scales[w]) + panel * quant_scale_panel_bytes(q.format, k)};
    }
    multiply(panels, count, x, rows, k, acc);
    write_group(a, columns, column, count, row, rows, acc);
  }
}

inline void quant_linear(const OpContext& context, const QuantLinearArgs& q) {
  const LinearArgs& a = q.linear;
  if (a.rows == 0 || a.n_weights == 0) return;
  if (a.lora != nullptr) {
    const Input in{a.x, nullptr, a.x_stride};
    parallel_blocks(context, a.rows, 24, [&](int64_t begin, int64_t end) {
      low_rank_inputs(multiply_exact, a, in, begin, end);
    });
  }
  const Columns columns(a);
  const QuantPanels multiply = kHasVnni && cpu_has_vnni() ? quant_panels_of<kHasVnni>(q.format)
                                                          : quant_panels_of<false>(q.format);
  const int64_t groups = ceil_div(columns.total, kGroup);
  const int64_t row_blocks = ceil_div(a.rows, kRowsPerTask);
  const int64_t rows_each = ceil_div(ceil_div(a.rows, row_blocks), 4) * 4;
  // About 100 us per task: a row times 64 lanes at ~250 multiply-adds per ns, or bytes at ~14 per
  // ns.
  const int64_t k = larger(a.w[0].k, 1);
  const int64_t ns = k * larger(smaller(a.rows, rows_each) / 4, q.format.bits / 2) + 500;
  const int64_t threads = context.parallel == nullptr ? 1 : context.parallel->threads;
  int64_t each = larger(1, smaller(100'000 / ns, ceil_div(groups, 4 * threads)));
  if (k * 64 * each < 16'384) each = larger(each, 16'384 / (k * 64));  // tiny layers: one task
  const int64_t group_blocks = ceil_div(groups, each);
  parallel_for(context, group_blocks * ceil_div(a.rows, rows_each), [&](int64_t i) {
    const int64_t row = i / group_blocks * rows_each;
    const int64_t group = i % group_blocks * each;
    quant_task(q, multiply, columns, group, smaller(groups, group + each), row,
               smaller(rows_each, a.rows - row));
  });
}

}  // namespace ds::DS_ISA
