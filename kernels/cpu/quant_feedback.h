// SPDX-License-Identifier: Apache-2.0
// Rounding with error feedback: what a weight lost is made up for by those after it in its row, as
// far as the inputs that were seen go together. GPTQ (Frantar et al. 2022) in the equal form LDLQ
// of QuIP (Chee et al. 2023, theorem 6), which needs no inverse. As in quant_weights.h every
// product and sum is rounded: equal bytes on every ISA, of equal inputs.
#pragma once

#include "kernels/cpu/quant_weights.h"

namespace ds::DS_ISA {

constexpr int64_t kFactorBlock = 48;     // columns that are eliminated together
constexpr int64_t kFactorLanes = 64;     // of a row of the rest, kept in registers meanwhile
constexpr float kFactorDamping = 0.01f;  // of the mean of the diagonal, added to it; GPTQ's

/// Rows of the factor, [k, k]: row i has U[j][i] at j < i and D[i] at i.
struct Factor {
  float* rows;
  int64_t k;
  float* row(int64_t i) const { return rows + i * k; }
};

/// row[begin, end) of `to` -= f * the same of `from`.
DS_INLINE void subtract(const float* from, float f, int64_t begin, int64_t end, float* to) {
  for_lanes(begin, end, [&](int64_t j, int64_t n) {
    store_n(to + j, load_n(to + j, n) - set(f) * load_n(from + j, n), n);
  });
}

/// Columns [begin, end) of rows [low, high), high first: what is left of each after those above,
/// over its D. Where the columns are the rows themselves, D comes of it.
inline void eliminate(const Factor& f, int64_t low, int64_t high, int64_t begin, int64_t end,
                      float least) {
  for (int64_t i = high - 1; i >= low; --i) {
    float* row = f.row(i);
    const int64_t last = smaller(end, i);  // U[j][i] only at j < i
    for (int64_t above = high - 1; above > i; --above) {
      const float* from = f.row(above);
      subtract(from, from[above] * from[i], begin, smaller(end, i + 1), row);
    }
    if (end > i) row[i] = row[i] > least ? row[i] : least;
    const F16 inverse = set(1.0f / row[i]);
    for_lanes(begin, last,
              [&](int64_t j, int64_t n) { store_n(row + j, load_n(row + j, n) * inverse, n); });
  }
}

/// Row r, entries up to r, -= sum over rows [low, high) of U[r] D U.
inline void update_row(const Factor& f, int64_t low, int64_t high, int64_t r) {
  float coefficients[kFactorBlock];
  for (int64_t i = low; i < high; ++i) coefficients[i - low] = f.row(i)[r] * f.row(i)[i];
  float* row = f.row(r);
  int64_t j = 0;
  for (; j + kFactorLanes <= r + 1; j += kFactorLanes) {
    F16 sum[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] = load(row + j + v * 16);
    for (int64_t i = high - 1; i >= low; --i) {
      const F16 c = set(coefficients[i - low]);
      const float* from = f.row(i) + j;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = sum[v] - c * load(from + v * 16);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(row + j + v * 16, sum[v]);
  }
  for (int64_t i = high - 1; i >= low; --i)
    subtract(f.row(i), coefficients[i - low], j, r + 1, row);
}

inline void feedback_factor(const OpContext& context, int64_t k, const float* gram,
                            float* feedback) {
  const Factor f{feedback, k};
  double mean = 0;
  for (int64_t i = 0; i < k; ++i) mean += static_cast<double>(gram[i * k + i]);
  mean /= static_cast<double>(k);
  const float damping = mean > 0 ? kFactorDamping * static_cast<float>(mean) : 1.0f;
  parallel_blocks(context, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for_lanes(0, i + 1, [&](int64_t j, int64_t n) {
        store_n(f.row(i) + j, load_n(gram + i * k + j, n), n);
      });
      f.row(i)[i] += damping;
    }
  });
  for (int64_t high = k; high > 0; high -= kFactorBlock) {
    const int64_t low = larger(0, high - kFactorBlock);
    eliminate(f, low, high, low, high, damping);
    parallel_blocks(context, low, 128, [&](int64_t begin, int64_t end) {
      eliminate(f, low, high, begin, end, damping);
    });
    parallel_blocks(context, low, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) update_row(f, low, high, r);
    });
  }
}

/// sums[j] += what columns [0, k0) lost, as column k0 + j feels it.
DS_INLINE void feel_losses(const float* lost, const float* feedback, int64_t k, int64_t k0,
                           int64_t columns, float* sums) {
  constexpr int kAtOnce = 8;
  for (int64_t j0 = 0; j0 < columns; j0 += kAtOnce) {
    F16 sum[kAtOnce];
    const float* row[kAtOnce];
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t column = smaller(j0 + j, columns - 1);
      row[j] = feedback + (k0 + column) * k;
      sum[j] = load(sums + column * 16);
    }
    for (int64_t l = 0; l < k0; ++l) {
      const F16 e = load(lost + l * 16);
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; ++j) sum[j] = sum[j] + e * set(row[j][l]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; ++j) {
      if (j0 + j < columns) store(sums + (j0 + j) * 16, sum[j]);
    }
  }
}

/// quantize_panel of quant_weights.h on what each weight is to be after the losses before it. The
/// grid of a group is chosen when its turn comes, that of a channel on the weights as they are.
inline void quantize_panel_with_feedback(QuantFormat format, int64_t n, int64_t k, const float* w,
                                         const float* feedback, int64_t panel, char* codes,
                                         char* scales) {
  float* lost = task_scratch(static_cast<size_t>((k + kQuantGroup) * 16));  // first the weights
  float* group = lost + k * 16;
  gather_panel(n, k, w, panel, 0, k, lost);
  QuantGrid grid{zero(), zero()};
  if (format.group == 0) grid = choose_grid(format, lost, k);
  if (format.group == 0) store_grid(format, grid, 0, scales);
  for (int64_t k0 = 0; k0 < k; k0 += kQuantGroup) {
    const int64_t count = smaller(kQuantGroup, k - k0), g = k0 / kQuantGroup;
    float* own = lost + k0 * 16;
    for (int64_t j = 0; j < count; ++j) store(group + j * 16, load(own + j * 16));
    feel_losses(lost, feedback, k, k0, count, group);
    if (format.group != 0) {
      grid = choose_grid(format, group, count);
      store_grid(format, grid, g, scales);
    }
    const F16 inverse = inverse_of(grid.scale);
    for (int64_t j = 0; j < count; ++j) {
      F16 wanted = load(group + j * 16);
      const float* row = feedback + (k0 + j) * k + k0;
      for (int64_t l = 0; l < j; ++l) wanted = wanted + load(own + l * 16) * set(row[l]);
      store(group + j * 16, wanted);
      store(own + j * 16, load(own + j * 16) - rounded(format, grid, inverse, wanted));
    }
    store_codes(format, grid, group, count,
                reinterpret_cast<uint32_t*>(codes + g * 64 * format.bits));
  }
}

inline void quantize(const OpContext& context, QuantFormat format, int64_t n, int64_t k,
                     const float* w, const float* feedback, void* packed, void* scales) {
  parallel_for(context, ceil_div(n, 16), [&](int64_t p) {
    char* codes = static_cast<char*>(packed) + p * quant_panel_bytes(format, k);
    char* of_panel = static_cast<char*>(scales) + p * quant_scale_panel_bytes(format, k);
    if (feedback == nullptr) {
      quantize_panel(format, n, k, w, p, codes, of_panel);
    } else {
      quantize_panel_with_feedback(format, n, k, w, feedback, p, codes, of_panel);
    }
  });
}

}  // namespace ds::DS_ISA
