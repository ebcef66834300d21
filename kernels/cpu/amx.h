// SPDX-License-Identifier: Apache-2.0
// Rows of BF16 pairs times packed BF16 panels on AMX tiles (Intel SDM, TDPBF16PS): up to 16 rows x
// 4 panels at a time. A panel's 16 pairs of k are one tile as they lie in memory. Tiles of one row
// and of sixteen add in the same order, so the number of rows leaves an output's bits unchanged.
#pragma once

#include "kernels/cpu/vector_math.h"

namespace ds::DS_ISA {

constexpr int64_t kTileM = 16;      // rows of a tile
constexpr int64_t kTilePairs = 16;  // pairs of k of a tile

/// Tiles 0..3 accumulate [rows, 16], tile 4 holds x [rows, 16 pairs], tiles 5..7 take turns with
/// the panels [16 pairs, 16].
DS_INLINE void configure_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t >= 5 ? kTilePairs : rows);
  }
  _tile_loadconfig(&config);
}

/// acc[r][16 p + lane] for the configured rows of x and P panels; pairs past the last whole tile
/// one by one.
template <int P>
DS_INLINE void tile_panels(const char* const* panels, const uint32_t* x, int64_t x_stride,
                           int64_t rows, int64_t pairs, float* acc, int64_t acc_stride) {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (P > 2) _tile_zero(2);
  if constexpr (P > 3) _tile_zero(3);
  constexpr int64_t kAhead = 2048;  // bytes; tiles outrun the hardware prefetcher
  const int64_t whole = pairs / kTilePairs * kTilePairs;
  for (int64_t s = 0; s < whole; s += kTilePairs) {
    _tile_loadd(4, x + s, static_cast<size_t>(x_stride * 4));
    for (int p = 0; p < P; ++p) {
      for (int64_t line = 0; line < 1024; line += 64) prefetch(panels[p] + s * 64 + kAhead + line);
    }
    _tile_loadd(5, panels[0] + s * 64, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (P > 1) {
      _tile_loadd(6, panels[1] + s * 64, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (P > 2) {
      _tile_loadd(7, panels[2] + s * 64, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (P > 3) {
      _tile_loadd(5, panels[3] + s * 64, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  const auto stride = static_cast<size_t>(acc_stride * 4);
  _tile_stored(0, acc, stride);
  if constexpr (P > 1) _tile_stored(1, acc + 16, stride);
  if constexpr (P > 2) _tile_stored(2, acc + 32, stride);
  if constexpr (P > 3) _tile_stored(3, acc + 48, stride);
  for (int64_t s = whole; s < pairs; ++s) {
    for (int p = 0; p < P; ++p) {
      const U16 w = load_u(reinterpret_cast<const uint32_t*>(panels[p] + s * 64));
      for (int64_t r = 0; r < rows; ++r) {
        float* at = acc + r * acc_stride + p * 16;
        store(at, dot_bf16(load(at), w, x[r * x_stride + s]));
      }
    }
  }
}

/// One row, by the tile's arithmetic on vectors: in each 16 pairs the low and the high products add
/// up apart from zero, then their sum joins the total. Streams memory 4 % faster than tiles do.
template <int P>
DS_INLINE void vector_panels(const char* const* panels, const uint32_t* x, int64_t pairs,
                             float* acc) {
  constexpr int64_t kAhead = 2048;
  F16 total[P];
  for (int p = 0; p < P; ++p) total[p] = zero();
  int64_t s = 0;
  for (; s + kTilePairs <= pairs; s += kTilePairs) {
    F16 low[P], high[P];
    for (int p = 0; p < P; ++p) low[p] = high[p] = zero();
#pragma GCC unroll 4
    for (int64_t i = s; i < s + kTilePairs; ++i) {
      const U16 both = {_mm512_set1_epi32(static_cast<int>(x[i]))};
      const F16 x0 = even(both), x1 = odd(both);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const char* at = panels[p] + i * 64;
        prefetch(at + kAhead);
        const U16 w = load_u(reinterpret_cast<const uint32_t*>(at));
        low[p] = fma(x0, even(w), low[p]);
        high[p] = fma(x1, odd(w), high[p]);
      }
    }
    for (int p = 0; p < P; ++p) total[p] = total[p] + (low[p] + high[p]);
  }
  for (; s < pairs; ++s) {
    for (int p = 0; p < P; ++p) {
      total[p] =
          dot_bf16(total[p], load_u(reinterpret_cast<const uint32_t*>(panels[p] + s * 64)), x[s]);
    }
  }
  for (int p = 0; p < P; ++p) store(acc + p * 16, total[p]);
}

template <int P>
struct Count {
  static constexpr int value = P;
};

/// f with a number of panels, 1 to 4, as a constant.
template <typename F>
DS_INLINE void with_count(int count, const F& f) {
  switch (count) {
    case 1:
      return f(Count<1>{});
    case 2:
      return f(Count<2>{});
    case 3:
      return f(Count<3>{});
    default:
      return f(Count<4>{});
  }
}

inline void vector_row(const char* const* panels, int count, const uint32_t* x, int64_t pairs,
                       float* acc) {
  const unsigned state = _mm_getcsr();
  constexpr unsigned kFlushDenormals = 0x8040;  // as tiles do: results and operands
  _mm_setcsr(state | kFlushDenormals);
  with_count(count, [&](auto n) { vector_panels<n.value>(panels, x, pairs, acc); });
  _mm_setcsr(state);
}

/// acc [rows][acc_stride] = x W^T for 1 to 4 panels; x [rows, x_stride] words of two BF16.
inline void tile_rows(const char* const* panels, int count, const uint32_t* x, int64_t x_stride,
                      int64_t rows, int64_t pairs, float* acc, int64_t acc_stride) {
  if (rows == 1) return vector_row(panels, count, x, pairs, acc);
  int64_t configured = 0;
  for (int64_t r = 0; r < rows; r += kTileM) {
    const int64_t m = smaller(kTileM, rows - r);
    if (m != configured) configure_tiles(configured = m);
    const uint32_t* from = x + r * x_stride;
    float* to = acc + r * acc_stride;
    with_count(count, [&](auto n) {
      tile_panels<n.value>(panels, from, x_stride, m, pairs, to, acc_stride);
    });
  }
  _tile_release();  // idle tiles would make every switch of threads save 8 KiB
}

}  // namespace ds::DS_ISA
