// SPDX-License-Identifier: Apache-2.0
// Weights of 8 and 4 bits: how they are laid out, and the ops on them, beside those of ops.h. The
// same rules hold: pure, memory and pool come with the call, one order of accumulation per output.
//
// W [n, k] in panels of 16 rows, k in groups of 32, zero-padded in both; u = code of a weight:
//   8 bits  [ceil(n/16)][ceil(k/32)][8][16][4] bytes: u of k = 32 g + 4 b + i at [g][b][row][i];
//           w = scale * (u - 128), 1 <= u <= 255
//   4 bits  [ceil(n/16)][ceil(k/32)][4][16][4] bytes: low half u of k = 32 g + 4 b + i, high half u
//   of
//           k = 32 g + 16 + 4 b + i; w = low + scale * u, 0 <= u <= 15
// Scales by group 32: [panel][group][16] bfloat16, with 4 bits words {scale, low} of two bfloat16
// (the scale in the low half). By channel: [panel][16] float, with 4 bits [panel][2][16]: scales,
// then lows.
//
// linear() multiplies codes by activations of 8 bits (per row and group of 32, symmetric: scale =
// largest / 127), sums each group exactly in integers, and adds the groups up in FP32, k ascending.
// Low-rank parts see the FP32 activations.
#pragma once

#include "kernels/ops.h"

namespace ds {

constexpr int64_t kQuantGroup = 32;

struct QuantFormat {
  int32_t bits = 8;    ///< 8 or 4
  int32_t group = 32;  ///< weights of a row that share a scale: 32, or 0 = the whole row
};

/// Largest |w - dequantized w| over the largest |w| of its row, kept by quantize() for rows whose
/// largest |w| is 1e-30 to 1e37. Groups below kQuantZero become zeros.
constexpr float quant_rel_tol(QuantFormat format) { return format.bits == 8 ? 0.004f : 0.1f; }
constexpr float kQuantZero = 7.7e-34f;    // scales stay normal numbers above it
constexpr float kQuantLargest = 1.0e37f;  // beyond it sums of the search for a grid may overflow

constexpr int64_t quant_groups(int64_t k) { return (k + kQuantGroup - 1) / kQuantGroup; }
constexpr int64_t quant_packed_bytes(QuantFormat format, int64_t n, int64_t k) {
  return (n + 15) / 16 * quant_groups(k) * 64 * format.bits;
}
constexpr int64_t quant_scale_bytes(QuantFormat format, int64_t n, int64_t k) {
  const int64_t each = format.group == 0 ? 64 : 32 * quant_groups(k);
  return (n + 15) / 16 * each * (format.bits == 4 ? 2 : 1);
}

struct QuantView {
  QuantFormat format;
  int64_t n = 0, k = 0;
  const void* packed = nullptr;  ///< 64-byte aligned
  const void* scales = nullptr;  ///< 64-byte aligned
};

/// The shared input of linear(), the same for all formats: per row [ceil(k/32)] of these, then 16
/// bytes that begin with the float sum of `sum` (the CPU's: a GPU fills neither them nor
/// `shifted`). A value that is not finite makes its group's scale NaN; groups below kQuantZero
/// count as zeros.
struct QuantInput {
  int8_t q[kQuantGroup];
  float scale;
  float sum;        ///< scale * sum of q: what the lows of 4-bit weights meet
  int32_t shifted;  ///< -128 * sum of q: takes codes of 8 bits back to signed
  int32_t unused;
};
static_assert(sizeof(QuantInput) == 48);
constexpr int64_t quant_prepared_bytes(int64_t rows, int64_t k) {
  return rows * (quant_groups(k) * static_cast<int64_t>(sizeof(QuantInput)) + 16);
}

/// As ops.h has it, except: w[i].data = packed (w[i].format is not looked at), x_prepared from
/// prepare() of this table, or null for up to QuantOps::fused_rows rows, whose x it rounds itself:
/// only then norm and rope may be there. Else x is read only where there are low-rank parts.
struct QuantLinearArgs {
  QuantFormat format;
  LinearArgs linear;
  const void* scales[kMaxFusedWeights] = {nullptr, nullptr, nullptr};
};

struct QuantOps {
  int64_t fused_rows;  ///< 0: linear() wants a prepared input, neither norm nor rope

  /// w [n, k] finite, |w| <= kQuantLargest. 8 bits: scale = largest / 127. 4 bits: the grid of
  /// least squared error among 22, each fitted by least squares. Equal bytes on every table.
  /// With `feedback` of feedback_factor (else null) weight j is rounded after adding what its row
  /// lost before it, times feedback[j]: least error of the outputs on the inputs seen, without the
  /// promise of quant_rel_tol (GPTQ): on a CPU alone.
  void (*quantize)(const OpContext&, QuantFormat, int64_t n, int64_t k, const float* w,
                   const float* feedback, void* packed, void* scales);
  /// gram [k, k] = x^T x of inputs x [rows, k], finite, read at j <= i only. With 1 % of its
  /// diagonal's mean added to the diagonal it is (I + U) D (I + U)^T, U strictly upper: feedback
  /// [k, k] gets U[j][i] at [i][j], j < i, and D at [i][i]; what is right of the diagonal is left
  /// alone. Null on a GPU.
  void (*feedback_factor)(const OpContext&, int64_t k, const float* gram, float* feedback);
  void (*dequantize)(const OpContext&, const QuantView&, float* out);  ///< [n, k]

  void (*prepare)(const OpContext&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                  void* prepared);
  void (*linear)(const OpContext&, const QuantLinearArgs&);

  /// wq = dequantize(quantize(w)); wq may be w.
  void (*fake)(const OpContext&, QuantFormat, int64_t n, int64_t k, const float* w, float* wq);
  /// dw += dwq where w lies within half a step of its grid's range, or its grid has no steps.
  void (*fake_backward)(const OpContext&, QuantFormat, int64_t n, int64_t k, const float* w,
                        const float* dwq, float* dw);
};

const QuantOps& cpu_quant_ops(CpuIsa isa);

}  // namespace ds
