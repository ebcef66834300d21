// SPDX-License-Identifier: Apache-2.0
// The register tile: R rows x P panels of 16 outputs, one accumulator lane per output, k ascending.
// Accumulators live in memory between calls (FP32, so nothing is rounded by that): blocking over k,
// the tile shape and the number of rows leave the bits of an output unchanged.
//
#pragma once

#include "kernels/cpu/vector_math.h"

namespace ds::DS_ISA {

/// acc[r][16 p + lane] (+)= sum over k of x[r * row_step + k * k_step] * w[k * w_step + 16 p +
/// lane].
template <int R, int P>
DS_INLINE void tile(const float* w, int64_t w_step, const float* x, int64_t row_step,
                    int64_t k_step, int64_t k_count, float* acc, int64_t acc_step, bool first) {
  F16 c[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) c[r][p] = first ? zero() : load(acc + r * acc_step + p * 16);
  }
  for (int64_t k = 0; k < k_count; ++k) {
    F16 b[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) b[p] = load(w + k * w_step + p * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 a = set(x[r * row_step + k * k_step]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) c[r][p] = fma(b[p], a, c[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(acc + r * acc_step + p * 16, c[r][p]);
  }
}

struct TileArgs {
  const float* w;  ///< [k_count][w_step]
  int64_t w_step;
  const float* x;  ///< element (r, k) at r * row_step + k * k_step
  int64_t row_step, k_step;
  int64_t k_count;
  float* acc;  ///< [rows][acc_step]
  int64_t acc_step;
  bool first;  ///< overwrite acc instead of adding to it
};

template <int R, bool kContiguous>
inline void tile_panels(const TileArgs& t, int64_t row, int panels) {
  const float* x = t.x + row * t.row_step;
  float* acc = t.acc + row * t.acc_step;
  const int64_t k_step = kContiguous ? 1 : t.k_step;
  int p = 0;
  if constexpr (kTilePanels == 4) {
    for (; p + 4 <= panels; p += 4) {
      tile<R, 4>(t.w + p * 16, t.w_step, x, t.row_step, k_step, t.k_count, acc + p * 16, t.acc_step,
                 t.first);
    }
    for (; p + 2 <= panels; p += 2) {
      tile<R, 2>(t.w + p * 16, t.w_step, x, t.row_step, k_step, t.k_count, acc + p * 16, t.acc_step,
                 t.first);
    }
  }
  for (; p < panels; ++p) {
    tile<R, 1>(t.w + p * 16, t.w_step, x, t.row_step, k_step, t.k_count, acc + p * 16, t.acc_step,
               t.first);
  }
}

/// All rows and panels: [rows, k] x [k, 16 * panels].
template <bool kContiguous>
inline void multiply(const TileArgs& t, int64_t rows, int panels) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) tile_panels<kTileRows, kContiguous>(t, r, panels);
  if constexpr (kTileRows > 4) {
    if (r + 4 <= rows) {
      tile_panels<4, kContiguous>(t, r, panels);
      r += 4;
    }
  }
  if constexpr (kTileRows > 2) {
    if (r + 2 <= rows) {
      tile_panels<2, kContiguous>(t, r, panels);
      r += 2;
    }
  }
  if (r < rows) tile_panels<1, kContiguous>(t, r, panels);
}

}  // namespace ds::DS_ISA
