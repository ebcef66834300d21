// SPDX-License-Identifier: Apache-2.0
// The table of ops on codes, and of them the shared input and the way back to FP32.
#include "kernels/cuda/quant.h"
#include "kernels/cuda/quant_grid.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;

/// x [rows, k] -> QuantInput [rows][groups]. A thread takes eight columns, four of them a group.
__global__ void __launch_bounds__(kThreads)
    code_rows(int64_t rows, int64_t k, const float* __restrict__ x, int64_t x_stride, bool whole,
              char* prepared, int64_t row_bytes) {
  begin_after_previous();
  const int64_t eights = ceil_div(k, kQuantGroup) * 4;
  const int64_t at = loop_begin();
  if (at >= rows * eights) return;  // whole fours
  const int64_t row = at / eights, i = at % eights;
  float v[8];
  load_eight(x + row * x_stride, i, k, whole, v);
  const CodedEight eight = code_eight(v);
  auto* to = reinterpret_cast<QuantInput*>(prepared + row * row_bytes) + i / 4;
  reinterpret_cast<uint2*>(to->q)[i % 4] = eight.codes;
  if (i % 4 != 0) return;
  const float2 steps = make_float2(eight.scale, eight.sum);
  *reinterpret_cast<float2*>(&to->scale) = steps;
}

void code_input(const OpContext& context, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                void* prepared) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows * k == 0) return;
  const bool whole = k % kQuantGroup == 0 && x_stride % 4 == 0 && is_aligned16(x);
  const auto blocks = static_cast<unsigned>(ceil_div(rows * quant_groups(k) * 4, kThreads));
  launch_next("input in 8 bits", code_rows, dim3(blocks), kThreads, 0, s->stream(), rows, k, x,
              x_stride, whole, static_cast<char*>(prepared), quant_prepared_bytes(1, k));
}

/// Columns of a row side by side, a thread each.
__global__ void __launch_bounds__(kThreads) dequantize_rows(QuantView q, float* out) {
  const int64_t panel_bytes = ceil_div(q.k, kQuantGroup) * 64 * q.format.bits;
  for (int64_t at = loop_begin(); at < q.n * q.k; at += loop_step()) {
    const int64_t row = at / q.k, j = at % q.k, g = j / kQuantGroup, panel = row / 16;
    const bool four = q.format.bits == 4;
    const int64_t in_half = four ? j % 16 : j % kQuantGroup;
    const auto* codes = static_cast<const uint8_t*>(q.packed) + panel * panel_bytes +
                        g * 64 * q.format.bits + in_half / 4 * 64 + row % 16 * 4 + in_half % 4;
    const QuantGrid grid = load_grid(q, panel, g, row % 16);
    const int u = four ? (*codes >> (j % kQuantGroup >= 16 ? 4 : 0) & 0xf) : *codes - 128;
    const float step = __fmul_rn(static_cast<float>(u), grid.scale);
    out[at] = four ? __fadd_rn(step, grid.low) : step;
  }
}

void decode_weights(const OpContext& context, const QuantView& q, float* out) {
  const StreamState* s = enter(context);
  if (s == nullptr || q.n * q.k == 0) return;
  s->weights_change();  // what it writes may become a pack that is asked for early
  dequantize_rows<<<loop_blocks(q.n * q.k, kThreads), kThreads, 0, s->stream()>>>(q, out);
  launched("dequantize");
}

/// The rotation and the pages in a call of their own: for heads whose halves are no whole blocks of
/// outputs. k and v wait in the scratch.
void linear_then_rope(const OpContext& context, const StreamState& s, QuantLinearArgs q) {
  RopeAppendArgs rope = *q.linear.rope;
  q.linear.rope = nullptr;
  float* room = s.scratch<float>();
  for (int w = 1; w < q.linear.n_weights; ++w) {
    q.linear.y[w] = room;
    q.linear.y_stride[w] = q.linear.w[w].n;
    room += q.linear.rows * q.linear.w[w].n;
  }
  quant_linear(context, q);
  rope.q = q.linear.y[0];
  rope.k = q.linear.y[1];
  rope.v = q.linear.y[2];
  rope_append(context, rope);
}

}  // namespace

QuantWeights quant_weights(const QuantLinearArgs& q) {
  QuantWeights out;
  out.k = q.linear.w[0].k;
  out.groups = quant_groups(out.k);
  out.panel_bytes = quant_packed_bytes(q.format, 1, out.k);
  out.scale_panel_bytes = quant_scale_bytes(q.format, 1, out.k);
  for (int w = 0; w < q.linear.n_weights; ++w) {
    out.codes[w] = static_cast<const char*>(q.linear.w[w].data);
    out.scales[w] = static_cast<const char*>(q.scales[w]);
    out.n[w] = q.linear.w[w].n;
  }
  return out;
}

WeightFormat low_rank_format(const LinearArgs& a) {
  if (a.lora == nullptr) return WeightFormat::kBF16;
  if (a.lora->table != nullptr) return a.lora->table_format;
  for (int slot = 0; slot < a.lora->n_slots; ++slot) {
    for (int w = 0; w < a.n_weights; ++w) {
      const LoraPair& pair = a.lora->pair[slot][w];
      if (pair.a.data != nullptr) return pair.a.format;
    }
  }
  return WeightFormat::kBF16;
}

void quant_linear(const OpContext& context, const QuantLinearArgs& q) {
  const StreamState* s = enter(context);
  const LinearArgs& a = q.linear;
  if (s == nullptr || a.rows == 0 || a.n_weights == 0 || a.w[0].k == 0) return;
  if (a.rope != nullptr && a.rope->kv.head_dim % 16 != 0) return linear_then_rope(context, *s, q);
  const int64_t each = few_quant_rows_at_once(a.w[0].k);
  const bool many = a.x_prepared != nullptr;
  if (many && (a.norm != nullptr || a.rope != nullptr))
    return fail("linear on codes: norm and rope go with an input that is not prepared");
  if (!many && (a.rows > kGemvRows || each == 0))
    return fail("linear on codes: its input is not prepared");
  if (a.lora != nullptr) {
    LinearArgs low = a;
    low.w[0].format = low_rank_format(a);
    low_rank_inputs(*s, low, 0, a.rows, nullptr);
  }
  if (many) return many_quant_rows(*s, q);
  for (int64_t row = 0; row < a.rows; row += each) {
    few_quant_rows(*s, q, row, smaller(each, a.rows - row));
  }
}

const QuantOps kQuantTable = {.fused_rows = kGemvRows,
                              .quantize = quantize,
                              .feedback_factor = nullptr,
                              .dequantize = decode_weights,
                              .prepare = code_input,
                              .linear = quant_linear,
                              .fake = fake_quantize,
                              .fake_backward = fake_quantize_backward};

}  // namespace ds::cuda
