// SPDX-License-Identifier: Apache-2.0
// Packed panels: FP32 matrix -> panels and back, rows of a panel by id, activations as BF16 pairs.
//
#pragma once

#include "kernels/cpu/linear.h"

namespace ds::DS_ISA {

inline int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return ceil_div(n, 16) * panel_bytes(format, k);
}

/// Columns k0 .. k0 + count of 16 rows from row n0, as columns[j] lane = row; absent ones are zero.
inline void gather_columns(int64_t n, int64_t k, const float* source, bool transposed, int64_t n0,
                           int64_t k0, int64_t count, F16 (&columns)[16]) {
  const int64_t rows = smaller(16, n - n0);
  if (transposed) {
    for (int j = 0; j < 16; ++j) {
      columns[j] = j < count ? load_n(source + (k0 + j) * n + n0, rows) : zero();
    }
    return;
  }
  U16 m[16];
  for (int i = 0; i < 16; ++i) {
    m[i] = i < rows ? bits(load_n(source + (n0 + i) * k + k0, count)) : zero_u();
  }
  transpose(m);
  for (int j = 0; j < 16; ++j) columns[j] = as_float(m[j]);
}

inline void pack_panel(WeightFormat format, int64_t n, int64_t k, const float* source,
                       bool transposed, int64_t panel, void* packed) {
  char* base = static_cast<char*>(packed) + panel * panel_bytes(format, k);
  for (int64_t k0 = 0; k0 < k; k0 += 16) {
    const int64_t count = smaller(16, k - k0);
    F16 columns[16];
    gather_columns(n, k, source, transposed, panel * 16, k0, count, columns);
    if (is_panel_f32(format)) {
      auto* to = reinterpret_cast<float*>(base) + k0 * 16;
      for (int64_t j = 0; j < count; ++j) store(to + j * 16, columns[j]);
    } else {
      auto* to = reinterpret_cast<uint32_t*>(base) + k0 / 2 * 16;
      for (int64_t j = 0; j < count; j += 2) {
        store_u(to + j / 2 * 16, pair_bf16(columns[j], columns[j + 1]));
      }
    }
  }
}

inline int64_t panels_per_task(int64_t k) { return larger(1, 262'144 / larger(1, k * 16)); }

inline void pack(const OpContext& context, WeightFormat format, int64_t n, int64_t k,
                 const float* source, bool transposed, void* packed) {
  parallel_blocks(context, ceil_div(n, 16), panels_per_task(k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panel(format, n, k, source, transposed, p, packed);
    }
  });
}

inline void pack_all(const OpContext& context, int64_t count, const PackItem* items) {
  for (int64_t i = 0; i < count; ++i) {
    const PackItem& it = items[i];
    pack(context, it.format, it.n, it.k, it.source, it.transposed, it.packed);
  }
}

/// Panel `panel` of a pack [n, k] whose source has fewer columns: `given` of them, [given, n]
/// row-major. The rest is zero.
inline void pack_panel_padded(WeightFormat format, int64_t n, int64_t k, int64_t given,
                              const float* source, int64_t panel, void* packed) {
  char* base = static_cast<char*>(packed) + panel * panel_bytes(format, k);
  __builtin_memset(base, 0, static_cast<size_t>(panel_bytes(format, k)));
  F16 columns[16];
  gather_columns(n, given, source, true, panel * 16, 0, given, columns);
  if (is_panel_f32(format)) {
    for (int64_t j = 0; j < given; ++j) store(reinterpret_cast<float*>(base) + j * 16, columns[j]);
    return;
  }
  for (int64_t j = 0; j < given; j += 2) {
    store_u(reinterpret_cast<uint32_t*>(base) + j / 2 * 16, pair_bf16(columns[j], columns[j + 1]));
  }
}

/// A [rank, k] and B^T [rank, n] have one panel each, which is zero beyond `rank` rows; B and A^T
/// are their transposes with 16 columns.
inline void pack_factors(const OpContext& context, int64_t rank, int64_t count,
                         const FactorPack* factors) {
  parallel_for(context, count, [&](int64_t i) {
    const FactorPack& f = factors[i];
    const WeightFormat back = backward_format(f.format);
    pack_panel(f.format, rank, f.k, f.a, false, 0, f.a_packed);
    pack_panel(back, rank, f.n, f.bt, false, 0, f.bt_packed);
    for (int64_t p = 0; p < ceil_div(f.n, 16); ++p)
      pack_panel_padded(f.format, f.n, kLoraRank, rank, f.bt, p, f.b_packed);
    for (int64_t p = 0; p < ceil_div(f.k, 16); ++p)
      pack_panel_padded(back, f.k, kLoraRank, rank, f.a, p, f.at_packed);
  });
}

inline void unpack_panel(const WeightView& w, int64_t panel, float* out) {
  const char* base = panel_of(w, panel);
  const int64_t rows = smaller(16, w.n - panel * 16);
  for (int64_t k0 = 0; k0 < w.k; k0 += 16) {
    const int64_t count = smaller(16, w.k - k0);
    U16 m[16];
    for (int64_t j = 0; j < 16; ++j) {
      if (j >= count) {
        m[j] = zero_u();
      } else if (is_panel_f32(w.format)) {
        m[j] = load_u(reinterpret_cast<const uint32_t*>(base) + (k0 + j) * 16);
      } else {
        const U16 pair = load_u(reinterpret_cast<const uint32_t*>(base) + (k0 + j) / 2 * 16);
        m[j] = bits(j % 2 == 0 ? even(pair) : odd(pair));
      }
    }
    transpose(m);
    for (int64_t i = 0; i < rows; ++i) {
      store_n(out + (panel * 16 + i) * w.k + k0, as_float(m[i]), count);
    }
  }
}

inline void unpack(const OpContext& context, const WeightView& w, float* out) {
  parallel_blocks(context, ceil_div(w.n, 16), panels_per_task(w.k),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t p = begin; p < end; ++p) unpack_panel(w, p, out);
                  });
}

inline int64_t prepared_bytes(WeightFormat format, int64_t rows, int64_t k) {
  return operand_of(format) == Operand::kDot ? rows * ceil_div(k, 2) * 4 : 0;
}

/// x rounded to BF16, neighbouring k in one word (only where BF16 dot products are used).
inline void prepare(const OpContext& context, int64_t rows, int64_t k, const float* x,
                    int64_t x_stride, const PreparedRows& rounded) {
  if (operand_of(rounded.format) != Operand::kDot) return;
  const int64_t words = ceil_div(k, 2);
  parallel_blocks(context, rows, larger(1, 65'536 / larger(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      auto* to = reinterpret_cast<uint16_t*>(static_cast<uint32_t*>(rounded.data) + r * words);
      for_lanes(0, k, [&](int64_t i, int64_t n) {
        store_bf16_n(to + i, load_n(x + r * x_stride + i, n), n);
      });
      if (k % 2 != 0) to[k] = 0;
    }
  });
}

inline void embed(const OpContext& context, const WeightView& table, int64_t rows,
                  const int32_t* ids, float* out) {
  parallel_blocks(context, rows, 32, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* panel = panel_of(table, ids[r] / 16);
      const int64_t lane = ids[r] % 16;
      float* to = out + r * table.k;
      for (int64_t i = 0; i < table.k; ++i) {
        if (is_panel_f32(table.format)) {
          to[i] = reinterpret_cast<const float*>(panel)[i * 16 + lane];
        } else {
          const auto* halves = reinterpret_cast<const uint16_t*>(panel);
          const uint32_t word = uint32_t{halves[i / 2 * 32 + lane * 2 + i % 2]} << 16;
          __builtin_memcpy(to + i, &word, sizeof(word));
        }
      }
    }
  });
}

/// Columns are split, rows are not: repeated ids add up in row order.
inline void embed_backward(const OpContext& context, int64_t rows, int64_t d, const int32_t* ids,
                           const float* dy, float* out) {
  parallel_blocks(context, d, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + ids[r] * d;
      for_lanes(begin, end, [&](int64_t i, int64_t n) {
        store_n(to + i, load_n(to + i, n) + load_n(dy + r * d + i, n), n);
      });
    }
  });
}

}  // namespace ds::DS_ISA
