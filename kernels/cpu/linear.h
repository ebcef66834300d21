// SPDX-License-Identifier: Apache-2.0
// Linear layers on packed panels, with low-rank parts and fused epilogues. Order of every output:
// k ascending in one lane (BF16 dot: pairs of k), then the 16 low-rank terms ascending, then bias,
// then residual or swiglu. Few rows stream the packed panels as they are; many rows expand a block
// of four panels to FP32 once and reuse it from L1: same operands, same order, same bits.
#pragma once

#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile.h"
#ifdef __AMX_BF16__
#include "kernels/cpu/amx.h"
#endif

namespace ds::DS_ISA {

constexpr int kGroup = 4;  // panels per work item; even, so that swiglu pairs stay whole
constexpr int64_t kGroupLanes = kGroup * 16;
constexpr int64_t kBlockK = 128;      // 128 x 64 floats = 32 KiB: an expanded block stays in L1
constexpr int64_t kStreamRows = 36;   // up to here expanding costs more than it saves
constexpr int64_t kRowsPerTask = 96;  // accumulators of a task: 96 x 64 floats = 24 KiB

#ifdef __AMX_BF16__
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

enum class Operand : uint8_t { kF32, kBF16, kDot };  // packed weights and how x meets them

/// All but BF16 is FP32 here.
DS_INLINE bool is_panel_f32(WeightFormat format) { return format != WeightFormat::kBF16; }

DS_INLINE Operand operand_of(WeightFormat format) {
#ifdef __AVX512BF16__
  return is_panel_f32(format) ? Operand::kF32 : Operand::kDot;
#else
  return is_panel_f32(format) ? Operand::kF32 : Operand::kBF16;
#endif
}

DS_INLINE int64_t panel_bytes(WeightFormat format, int64_t k) {
  return is_panel_f32(format) ? k * 64 : ceil_div(k, 2) * 64;
}
DS_INLINE const char* panel_of(const WeightView& w, int64_t panel) {
  return static_cast<const char*>(w.data) + panel * panel_bytes(w.format, w.k);
}

/// Rows of the shared input: FP32 [rows, k] or prepared pairs [rows, ceil(k / 2)] words.
struct Input {
  const float* x;
  const uint32_t* pairs;
  int64_t stride;  ///< of the one in use
};

/// One pass over whole panels: acc[r][16 p + lane] for R rows of x and P packed panels.
template <Operand kOperand, int R, int P>
DS_INLINE void stream_tile(const char* const* panels, const Input& in, int64_t row, int64_t k,
                           float* acc) {
  const float* x = in.x + row * in.stride;
  F16 c[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) c[r][p] = zero();
  }
  const int64_t steps = kOperand == Operand::kF32    ? k
                        : kOperand == Operand::kBF16 ? k / 2
                                                     : (k + 1) / 2;
  constexpr int64_t kAhead = 2048;  // bytes; the hardware prefetcher stops at 4 KiB pages
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const char* at = panels[p] + s * 64;
      prefetch(at + kAhead);
      if constexpr (kOperand == Operand::kF32) {
        const F16 w = load(reinterpret_cast<const float*>(at));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) c[r][p] = fma(w, set(x[r * in.stride + s]), c[r][p]);
      } else {
        const U16 w = load_u(reinterpret_cast<const uint32_t*>(at));
        if constexpr (kOperand == Operand::kBF16) {
          const F16 w0 = even(w), w1 = odd(w);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            c[r][p] = fma(w0, set(x[r * in.stride + 2 * s]), c[r][p]);
            c[r][p] = fma(w1, set(x[r * in.stride + 2 * s + 1]), c[r][p]);
          }
        } else {
#ifdef __AVX512BF16__
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            c[r][p] = dot_bf16(c[r][p], w, in.pairs[(row + r) * in.stride + s]);
          }
#endif
        }
      }
    }
  }
  if (kOperand == Operand::kBF16 && k % 2 != 0) {  // the high half of the last pair has no x
    for (int p = 0; p < P; ++p) {
      const F16 w = even(load_u(reinterpret_cast<const uint32_t*>(panels[p] + steps * 64)));
      for (int r = 0; r < R; ++r) c[r][p] = fma(w, set(x[r * in.stride + k - 1]), c[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(acc + r * kGroupLanes + p * 16, c[r][p]);
  }
}

template <Operand kOperand, int R>
inline void stream_panels(const char* const* panels, int count, const Input& in, int64_t row,
                          int64_t k, float* acc) {
  int p = 0;
  if constexpr (kTilePanels == 4) {
    if (p + 4 <= count) {
      stream_tile<kOperand, R, 4>(panels, in, row, k, acc);
      p += 4;
    }
    if (p + 2 <= count) {
      stream_tile<kOperand, R, 2>(panels + p, in, row, k, acc + p * 16);
      p += 2;
    }
  }
  for (; p < count; ++p) stream_tile<kOperand, R, 1>(panels + p, in, row, k, acc + p * 16);
}

/// acc [rows][kGroupLanes] of rows [row, row + rows) for up to kGroup panels.
template <Operand kOperand>
inline void stream_rows(const char* const* panels, int count, const Input& in, int64_t row,
                        int64_t rows, int64_t k, float* acc) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    stream_panels<kOperand, kTileRows>(panels, count, in, row + r, k, acc + r * kGroupLanes);
  }
  if constexpr (kTileRows > 4) {
    if (r + 4 <= rows) {
      stream_panels<kOperand, 4>(panels, count, in, row + r, k, acc + r * kGroupLanes);
      r += 4;
    }
  }
  if constexpr (kTileRows > 2) {
    if (r + 2 <= rows) {
      stream_panels<kOperand, 2>(panels, count, in, row + r, k, acc + r * kGroupLanes);
      r += 2;
    }
  }
  if (r < rows) stream_panels<kOperand, 1>(panels, count, in, row + r, k, acc + r * kGroupLanes);
}

/// Packed panels, k in [k0, k0 + n), as FP32 [n][kGroupLanes]; k0 even.
inline void expand_block(WeightFormat format, const char* const* panels, int count, int64_t k0,
                         int64_t n, float* out) {
  for (int p = 0; p < count; ++p) {
    float* to = out + p * 16;
    if (is_panel_f32(format)) {
      const auto* from = reinterpret_cast<const float*>(panels[p]) + k0 * 16;
      for (int64_t i = 0; i < n; ++i) store(to + i * kGroupLanes, load(from + i * 16));
      continue;
    }
    const auto* from = reinterpret_cast<const uint32_t*>(panels[p]) + k0 / 2 * 16;
    for (int64_t i = 0; i + 2 <= n; i += 2) {
      const U16 w = load_u(from + i / 2 * 16);
      store(to + i * kGroupLanes, even(w));
      store(to + (i + 1) * kGroupLanes, odd(w));
    }
    if (n % 2 != 0) store(to + (n - 1) * kGroupLanes, even(load_u(from + n / 2 * 16)));
  }
}

inline void expand_rows(WeightFormat format, const char* const* panels, int count, const Input& in,
                        int64_t row, int64_t rows, int64_t k, float* block, float* acc) {
  for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
    const int64_t n = smaller(kBlockK, k - k0);
    expand_block(format, panels, count, k0, n, block);
    multiply<true>({block, kGroupLanes, in.x + row * in.stride + k0, in.stride, 1, n, acc,
                    kGroupLanes, k0 == 0},
                   rows, count);
  }
}

/// acc [rows][kGroupLanes] = x W^T for up to kGroup panels, x in FP32. `block`: kBlockK *
/// kGroupLanes floats.
inline void multiply_exact(WeightFormat format, const char* const* panels, int count,
                           const Input& in, int64_t row, int64_t rows, int64_t k, float* block,
                           float* acc) {
  if (rows > kStreamRows) {
    expand_rows(format, panels, count, in, row, rows, k, block, acc);
  } else if (is_panel_f32(format)) {
    stream_rows<Operand::kF32>(panels, count, in, row, rows, k, acc);
  } else {
    stream_rows<Operand::kBF16>(panels, count, in, row, rows, k, acc);
  }
}

/// The same with x as this ISA meets this format.
inline void multiply_panels(WeightFormat format, const char* const* panels, int count,
                            const Input& in, int64_t row, int64_t rows, int64_t k, float* block,
                            float* acc) {
  if (k == 0) {
    for (int64_t i = 0; i < rows * kGroupLanes; ++i) acc[i] = 0.0f;
    return;
  }
  if (operand_of(format) == Operand::kDot) {
#if defined(__AMX_BF16__)
    tile_rows(panels, count, in.pairs + row * in.stride, in.stride, rows, ceil_div(k, 2), acc,
              kGroupLanes);
#elif defined(__AVX512BF16__)
    stream_rows<Operand::kDot>(panels, count, in, row, rows, k, acc);
#endif
  } else {
    multiply_exact(format, panels, count, in, row, rows, k, block, acc);
  }
}

/// t[w][row] = A x for rows [begin, end), each with its slot's A; zero where there is none.
template <typename Multiply>
inline void low_rank_inputs(const Multiply& multiply_with, const LinearArgs& a, const Input& in,
                            int64_t begin, int64_t end) {
  const LoraSlots& lora = *a.lora;
  float* block = task_scratch(static_cast<size_t>((kBlockK + kRowsPerTask) * kGroupLanes));
  float* acc = block + kBlockK * kGroupLanes;
  for (int w = 0; w < a.n_weights; ++w) {
    for (int64_t row = begin; row < end;) {
      const int32_t slot = lora.slot_of_row[row];
      int64_t stop = row + 1;
      while (stop < end && lora.slot_of_row[stop] == slot) ++stop;
      float* t = lora.t + (w * a.rows + row) * kLoraRank;
      const WeightView* low = slot < 0 ? nullptr : &lora.pair[slot][w].a;
      const bool present = low != nullptr && low->data != nullptr;
      if (present) {
        const char* panel = panel_of(*low, 0);
        multiply_with(low->format, &panel, 1, in, row, stop - row, low->k, block, acc);
      }
      for (int64_t r = 0; r < stop - row; ++r) {
        store(t + r * kLoraRank, present ? load(acc + r * kGroupLanes) : zero());
      }
      row = stop;
    }
  }
}

/// value + scale * B t for one panel of B: 16 terms ascending.
DS_INLINE F16 add_low_rank(F16 value, const LoraPair& pair, int64_t panel, const float* t) {
  const char* b = panel_of(pair.b, panel);
  alignas(64) float scaled[kLoraRank];
  store(scaled, load(t) * set(pair.scale));
  if (is_panel_f32(pair.b.format)) {
#pragma GCC unroll 16
    for (int j = 0; j < kLoraRank; ++j) {
      value = fma(load(reinterpret_cast<const float*>(b) + j * 16), set(scaled[j]), value);
    }
    return value;
  }
  const auto* words = reinterpret_cast<const uint32_t*>(b);
#ifdef __AVX512BF16__
  alignas(64) uint32_t rounded[kLoraRank];
  store_u(rounded, round_bf16(load(scaled)));
#pragma GCC unroll 8
  for (int j = 0; j < kLoraRank; j += 2) {
    const uint32_t x = (rounded[j] >> 16) | (rounded[j + 1] & 0xffff0000u);
    value = dot_bf16(value, load_u(words + j * 8), x);
  }
#else
#pragma GCC unroll 8
  for (int j = 0; j < kLoraRank; j += 2) {
    const U16 w = load_u(words + j * 8);
    value = fma(even(w), set(scaled[j]), value);
    value = fma(odd(w), set(scaled[j + 1]), value);
  }
#endif
  return value;
}

/// Where the columns of a call come from: panels of its weights in order, or gate/up alternating.
struct Columns {
  int64_t total = 0;
  int64_t panels[kMaxFusedWeights] = {0, 0, 0};
  bool paired = false;

  explicit Columns(const LinearArgs& a) : paired(a.epilogue == Epilogue::kSwiglu) {
    for (int w = 0; w < a.n_weights; ++w) total += panels[w] = ceil_div(a.w[w].n, 16);
  }
  DS_INLINE void find(int64_t column, int* weight, int64_t* panel) const {
    if (paired) {
      *weight = static_cast<int>(column % 2);
      *panel = column / 2;
      return;
    }
    int w = 0;
    for (; column >= panels[w]; ++w) column -= panels[w];
    *weight = w;
    *panel = column;
  }
};

/// Low-rank part and bias of one output panel of one row.
DS_INLINE F16 finish(const LinearArgs& a, int w, int64_t panel, int64_t row, F16 value, int64_t n) {
  if (a.lora != nullptr) {
    const int32_t slot = a.lora->slot_of_row[row];
    if (slot >= 0 && a.lora->pair[slot][w].b.data != nullptr) {
      const float* t = a.lora->t + (w * a.rows + row) * kLoraRank;
      value = add_low_rank(value, a.lora->pair[slot][w], panel, t);
    }
  }
  if (a.bias[w] != nullptr) value = value + load_n(a.bias[w] + panel * 16, n);
  return value;
}

inline void write_group(const LinearArgs& a, const Columns& columns, int64_t column, int count,
                        int64_t row, int64_t rows, const float* acc) {
  for (int c = 0; c < count; c += columns.paired ? 2 : 1) {
    int w;
    int64_t panel;
    columns.find(column + c, &w, &panel);
    const int64_t n = smaller(16, a.w[w].n - panel * 16);
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = acc + r * kGroupLanes + c * 16;
      F16 value = finish(a, w, panel, row + r, load(at), n);
      const int64_t to = (row + r) * a.y_stride[w] + panel * 16;
      if (columns.paired) {
        value = silu_times(value, finish(a, 1, panel, row + r, load(at + 16), n));
      } else if (a.epilogue == Epilogue::kResidual) {
        value = load_n(a.residual + to, n) + value;
      }
      store_n(a.y[w] + to, value, n);
    }
  }
}

inline void linear_task(const LinearArgs& a, const Columns& columns, const Input& in,
                        int64_t first_group, int64_t last_group, int64_t row, int64_t rows) {
  float* block = task_scratch(static_cast<size_t>((kBlockK + kRowsPerTask) * kGroupLanes));
  float* acc = block + kBlockK * kGroupLanes;
  for (int64_t g = first_group; g < last_group; ++g) {
    const int64_t column = g * kGroup;
    const int count = static_cast<int>(smaller(kGroup, columns.total - column));
    const char* panels[kGroup];
    for (int c = 0; c < count; ++c) {
      int w;
      int64_t panel;
      columns.find(column + c, &w, &panel);
      panels[c] = panel_of(a.w[w], panel);
    }
    multiply_panels(a.w[0].format, panels, count, in, row, rows, a.w[0].k, block, acc);
    write_group(a, columns, column, count, row, rows, acc);
  }
}

inline Input input_of(const LinearArgs& a) {
  const bool dot = operand_of(a.w[0].format) == Operand::kDot;
  return {a.x, static_cast<const uint32_t*>(a.x_prepared),
          dot ? ceil_div(a.w[0].k, 2) : a.x_stride};
}

inline void prepare(const OpContext& context, int64_t rows, int64_t k, const float* x,
                    int64_t x_stride, const PreparedRows& rounded);

inline void linear(const OpContext& context, const LinearArgs& a) {
  if (a.rows == 0 || a.n_weights == 0) return;
  const Input in = input_of(a);
  if (a.lora != nullptr) {
    parallel_blocks(context, a.rows, 24, [&](int64_t begin, int64_t end) {
      low_rank_inputs(multiply_panels, a, in, begin, end);
    });
  }
  const Columns columns(a);
  const int64_t groups = ceil_div(columns.total, kGroup);
  const int64_t row_blocks = ceil_div(a.rows, kRowsPerTask);
  const int64_t rows_each = ceil_div(ceil_div(a.rows, row_blocks), kTileRows) * kTileRows;
  // About 100 us per task: 64 lanes x rows at ~60 multiply-adds per ns (tiles: ~700), or bytes at
  // ~14 per ns.
  const int64_t k = larger(a.w[0].k, 1);
  const int64_t speed = kHasTiles && a.w[0].format == WeightFormat::kBF16 ? 12 : 1;
  const int64_t ns = k * larger(smaller(a.rows, rows_each) / speed, 9) + 500;
  const int64_t threads = context.parallel == nullptr ? 1 : context.parallel->threads;
  int64_t each = larger(1, smaller(100'000 / ns, ceil_div(groups, 4 * threads)));
  if (k * 128 * each < 16'384) each = larger(each, 16'384 / (k * 128));  // tiny layers: one task
  const int64_t group_blocks = ceil_div(groups, each);
  parallel_for(context, group_blocks * ceil_div(a.rows, rows_each), [&](int64_t i) {
    const int64_t row = i / group_blocks * rows_each;
    const int64_t group = i % group_blocks * each;
    linear_task(a, columns, in, group, smaller(groups, group + each), row,
                smaller(rows_each, a.rows - row));
  });
  if (a.y_prepared != nullptr)
    prepare(context, a.rows, a.w[0].n, a.y[0], a.y_stride[0],
            {a.y_prepared, a.w[0].format, nullptr});
}

}  // namespace ds::DS_ISA
