// SPDX-License-Identifier: Apache-2.0
// What the quantizers int8 and int4 share: from the structs of the plugin ABI to kernels/quant.h,
// checked.
#pragma once

#include <cmath>
#include <optional>
#include <span>

#include "ds/plugin.hpp"
#include "kernels/quant.h"
#include "modules/device_ops.h"
#include "modules/quantizers/calibration.h"

namespace ds::modules {

[[noreturn]] inline void misfit(ds_code code, std::string_view what, std::int64_t got,
                                const std::string& expected) {
  throw sdk::error(code, std::string(what) + ": " + std::to_string(got) + ", expected " + expected);
}

/// Every value a number of at most `largest` in size; "NAME: weight 3 is nan, ..." otherwise.
inline void check_sizes(std::string_view name, const char* what, std::span<const float> values,
                        float largest, const char* largest_text) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::fabs(values[i]) <= largest) continue;
    throw sdk::error(DS_E_NUMERIC, std::string(name) + ": " + what + " " + std::to_string(i) +
                                       " is " + std::to_string(values[i]) + ", expected at most " +
                                       largest_text + " in size");
  }
}

/// The same number = the same bytes, in every version.
inline std::uint32_t layout_of(QuantFormat f) {
  return DS_PACK_OWN + static_cast<std::uint32_t>(f.bits * 0x100 + f.group);
}

/// A weight of a call, in full and checked; `formats(n, k)` is what the instance says of its shape.
template <typename Formats>
ds_qweight checked_weight(const ds_qweight* from, const Formats& formats) {
  if (from == nullptr) throw sdk::error(DS_E_ARG, "weight: missing");
  const ds_qweight w = sdk::widened(from);
  if (w.n <= 0 || w.k <= 0) misfit(DS_E_SHAPE, "weight: n or k", std::min(w.n, w.k), "more than 0");
  if (w.format == nullptr) throw sdk::error(DS_E_ARG, "weight: no format");
  const std::uint32_t layout = sdk::widened(w.format).layout_id;
  const std::uint32_t own = layout_of(formats(w.n, w.k));
  if (layout != own) misfit(DS_E_UNSUPPORTED, "weight: layout", layout, std::to_string(own));
  if (w.packed == nullptr || w.scales == nullptr)
    throw sdk::error(DS_E_ARG, w.packed == nullptr ? "weight: no packed" : "weight: no scales");
  return w;
}

/// Of factors in rows.
inline WeightFormat factor_format(ds_dtype dtype, std::string_view name) {
  const bool f32 = dtype.code == DS_FLOAT;
  if (dtype.bits != (f32 ? 32 : 16) || (!f32 && dtype.code != DS_BFLOAT))
    misfit(DS_E_DTYPE, std::string(name) + ": bits", dtype.bits, "FP32 or BF16");
  return f32 ? WeightFormat::kF32 : WeightFormat::kBF16;
}

/// One factor of a low-rank pair, [n, k] in packed panels, or rows of `ops` on a GPU.
inline WeightView low_rank_view(const Ops& ops, const ds_tensor& t, std::string_view name,
                                std::int64_t n, std::int64_t k) {
  const bool rows = !ops.host_memory && t.packing == 0 && t.device.type == DS_DEV_CUDA;
  if (!rows && t.packing != DS_PACK_PANEL_F32 && t.packing != DS_PACK_PANEL_BF16)
    misfit(DS_E_UNSUPPORTED, std::string(name) + ": packing", t.packing, "panels, 1 or 2");
  const auto panels = t.packing == DS_PACK_PANEL_F32 ? WeightFormat::kF32 : WeightFormat::kBF16;
  const WeightFormat format = rows ? factor_format(t.dtype, name) : panels;
  if (sdk::dim(&t, name, 2, 0) != n || t.shape[1] != k)
    throw sdk::error(DS_E_SHAPE, std::string(name) + ": " + sdk::shape_text(t.shape, 2) +
                                     ", expected [" + std::to_string(n) + ", " + std::to_string(k) +
                                     "]");
  const auto need = static_cast<std::uint64_t>(ops.packed_bytes(format, n, k));
  if (t.data == nullptr || t.byte_offset > t.bytes || t.bytes - t.byte_offset < need)
    misfit(DS_E_SHAPE, std::string(name) + ": bytes", static_cast<std::int64_t>(t.bytes),
           std::to_string(need));
  return {format, n, k, static_cast<const char*>(t.data) + t.byte_offset};
}

inline void fill_slots(const Ops& ops, const ds_linear_args& a, const LinearArgs& base,
                       LoraSlots& out) {
  const ds_lora_slots lora = sdk::widened(a.lora);
  if (lora.n_slots > kMaxLoraSlots)
    misfit(DS_E_ARG, "lora: slots", lora.n_slots, "at most " + std::to_string(kMaxLoraSlots));
  if (lora.slot_of_row == nullptr || lora.t == nullptr || (lora.n_slots > 0 && !lora.pairs))
    throw sdk::error(DS_E_ARG, "lora: slot_of_row, t or pairs is missing");
  if (a.x == nullptr) throw sdk::error(DS_E_ARG, "x: missing, low-rank parts need it");
  for (std::int64_t r = 0; ops.host_memory && r < a.rows; ++r) {
    const std::int32_t slot = lora.slot_of_row[r];
    if (slot < -1 || slot >= static_cast<std::int32_t>(lora.n_slots))
      misfit(DS_E_ARG, "lora: slot of row " + std::to_string(r), slot,
             "-1 to " + std::to_string(static_cast<std::int32_t>(lora.n_slots) - 1));
  }
  out.slot_of_row = lora.slot_of_row;
  out.n_slots = static_cast<int>(lora.n_slots);
  out.t = lora.t;
  if (lora.table != nullptr) {
    out.table = reinterpret_cast<const LoraEntry*>(lora.table);
    out.table_format = factor_format(lora.table_dtype, "lora table");
  }
  for (std::uint32_t s = 0; s < lora.n_slots; ++s) {
    for (std::uint32_t w = 0; w < a.n_weights; ++w) {
      const ds_lora_pair pair = sdk::widened(lora.pairs[s * a.n_weights + w]);
      if (pair.a == nullptr || pair.b == nullptr) continue;
      out.pair[s][w] = {low_rank_view(ops, *pair.a, "lora a", kLoraRank, base.w[w].k),
                        low_rank_view(ops, *pair.b, "lora b", base.w[w].n, kLoraRank), pair.scale};
    }
  }
}

/// What a step's q, k and v go on to, checked against the weights of the call.
inline RopeAppendArgs rope_args(const ds_linear_args& a, const LinearArgs& to) {
  const ds_linear_rope r = sdk::widened(a.rope);
  if (a.n_weights != 3 || a.epilogue != 0)
    misfit(DS_E_ARG, "rope: n_weights", a.n_weights, "3 without epilogue");
  const std::int64_t dim = r.head_dim, q = r.heads * dim, kv = r.kv_heads * dim;
  if (q <= 0 || kv <= 0 || dim % 2 != 0 || to.w[0].n != q || to.w[1].n != kv || to.w[2].n != kv)
    misfit(DS_E_SHAPE, "rope: n of q", to.w[0].n, std::to_string(q));
  if (!r.cos || !r.sin || !r.positions || !r.slots || !r.k_pages || !r.v_pages)
    throw sdk::error(DS_E_ARG, "rope: a pointer is missing");
  const bool f32 = r.kv_dtype.code == DS_FLOAT && r.kv_dtype.bits == 32;
  const bool f16 = r.kv_dtype.code == DS_FLOAT && r.kv_dtype.bits == 16;
  if (!f32 && !f16 && r.kv_dtype.code != DS_BFLOAT)
    throw sdk::error(DS_E_DTYPE, "rope: dtype of the pages");
  const KvDtype half = f16 ? KvDtype::kF16 : KvDtype::kBF16;
  RopeAppendArgs out;
  out.rows = a.rows, out.n_heads = r.heads;
  out.q = to.y[0], out.k = to.y[1], out.v = to.y[2];
  out.cos = r.cos, out.sin = r.sin;
  out.positions = r.positions, out.slots = r.slots;
  out.kv = {f32 ? KvDtype::kF32 : half, r.kv_heads, dim, r.k_pages, r.v_pages};
  return out;
}

/// A model's head has many more rows than columns; an FFN has at most eight times as many.
inline constexpr std::int64_t kHeadRatio = 12;

template <std::int32_t kBits>
class CodeQuantizer {
 public:
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC | DS_CAP_OUT_OF_PROCESS;

  explicit CodeQuantizer(sdk::context c) : calibration_(ops_.cpu(), ops_.cpu_quant()) {
    const std::int64_t group = c.get("group", std::int64_t{kQuantGroup});
    if (group != 0 && group != kQuantGroup) misfit(DS_E_CONFIG, "group", group, "0 or 32");
    group_ = static_cast<std::int32_t>(group);
    if (kBits == 8) return;
    const std::int64_t head = c.get("head_bits", std::int64_t{8});
    if (head != 4 && head != 8) misfit(DS_E_CONFIG, "head_bits", head, "4 or 8");
    head_bits_ = static_cast<std::int32_t>(head);
  }

  ds_qformat format(std::int64_t n, std::int64_t k) const {
    const QuantFormat f = format_of(n, k);
    ds_qformat out{};
    out.size = sizeof out;
    out.layout_id = layout_of(f);
    out.bits = static_cast<std::uint32_t>(f.bits);
    out.group = static_cast<std::uint32_t>(f.group);
    out.scale_dtype = f.group == 0 ? sdk::dtype_of<float>() : sdk::dtype_of<sdk::bf16>();
    out.symmetric = f.bits == 8 ? 1 : 0;
    out.packed_bytes = static_cast<std::uint64_t>(quant_packed_bytes(f, n, k));
    out.scale_bytes = static_cast<std::uint64_t>(quant_scale_bytes(f, n, k));
    out.rel_tol = quant_rel_tol(f);
    out.fused = DS_LINEAR_RESIDUAL | DS_LINEAR_SWIGLU | DS_LINEAR_LORA | DS_LINEAR_BIAS |
                DS_LINEAR_NORM | DS_LINEAR_ROPE | DS_LINEAR_TABLE;
    return out;
  }

  /// 8 bits lose nothing that would be worth the time.
  void observe(const ds_call& call, std::string_view name,
               const ds_tensor& x) requires(kBits == 4) {
    const std::int64_t rows = sdk::dim(&x, "x", 2, 0), k = sdk::dim(&x, "x", 2, 1);
    const auto from = sdk::flat<const float>(&x, "x");
    check_sizes(name, "input", from, Calibration::kLargest, "1e15");
    calibration_.observe({call.parallel, nullptr}, name, rows, k, from.data());
  }

  void quantize(const ds_call& call, std::string_view name, const ds_tensor& w,
                const ds_qweight& out) {
    sdk::check_cancelled(call);
    const ds_qweight to = checked(&out);
    const auto from = sdk::flat<const float>(&w, name.empty() ? "w" : name, {to.n, to.k});
    check_sizes(name, "weight", from, kQuantLargest, "1e37");
    const OpContext context{call.parallel, nullptr};
    calibration_.use(context, name, to.k, [&](const float* feedback) {
      ops_.cpu_quant().quantize(context, format_of(to.n, to.k), to.n, to.k, from.data(), feedback,
                                to.packed, to.scales);
    });
  }

  void dequantize(const ds_call& call, const ds_qweight& q, const ds_tensor& w) const {
    const ds_qweight from = checked(&q);
    const auto to = sdk::flat<float>(&w, "w", {from.n, from.k}, device_type(call));
    ops_.quant(call).dequantize(
        op_context(call), {format_of(from.n, from.k), from.n, from.k, from.packed, from.scales},
        to.data());
  }

  ds_plan plan(const ds_qformat&, std::int64_t rows, std::int64_t k) const {
    ds_plan out{};
    out.size = sizeof out;
    if (rows < 0 || k <= 0) misfit(DS_E_SHAPE, "plan: rows or k", std::min(rows, k), "a size");
    out.prepared_bytes = static_cast<std::uint64_t>(quant_prepared_bytes(rows, k));
    return out;
  }

  void prepare(const ds_call& call, const ds_qformat&, std::int64_t rows, std::int64_t k,
               const float* x, std::int64_t x_stride, void* prepared) const {
    if (rows < 0 || k <= 0) misfit(DS_E_SHAPE, "prepare: rows or k", std::min(rows, k), "a size");
    if (rows == 0) return;
    if (x == nullptr || prepared == nullptr)
      throw sdk::error(DS_E_ARG, x == nullptr ? "x: missing" : "prepared: missing");
    if (x_stride < k) misfit(DS_E_SHAPE, "x: stride", x_stride, "at least " + std::to_string(k));
    if (!rounds_itself(call, rows))
      ops_.quant(call).prepare(op_context(call), rows, k, x, x_stride, prepared);
  }

  void linear(const ds_call& call, const ds_linear_args& a) const {
    if (a.rows == 0) return;
    check_call(call, a);
    QuantLinearArgs q;
    fill_weights(a, q);
    if (rounds_itself(call, a.rows)) q.linear.x_prepared = nullptr;
    q.linear.norm = a.norm;
    q.linear.norm_eps = a.norm_eps;
    RopeAppendArgs rope;
    if (a.rope != nullptr) {
      rope = rope_args(a, q.linear);
      q.linear.rope = &rope;
    }
    std::optional<LoraSlots> slots;  // 2 KB, seldom needed
    if (a.lora != nullptr) {
      fill_slots(ops_.of(call), a, q.linear, slots.emplace());
      q.linear.lora = &*slots;
    }
    ops_.quant(call).linear(op_context(call), q);
  }

  void fake_quant(const ds_call& call, const ds_tensor& w, const ds_tensor& wq) const {
    const std::int64_t n = sdk::dim(&w, "w", 2, 0), k = sdk::dim(&w, "w", 2, 1);
    const std::int32_t device = device_type(call);
    const auto from = sdk::flat<const float>(&w, "w", {}, device);
    const auto to = sdk::flat<float>(&wq, "wq", {n, k}, device);
    ops_.quant(call).fake(op_context(call), format_of(n, k), n, k, from.data(), to.data());
  }

  /// Straight through: dw += dwq, except where w lies more than half a step outside its grid.
  void fake_quant_backward(const ds_call& call, const ds_tensor& w, const ds_tensor& dwq,
                           const ds_tensor& dw) const {
    const std::int64_t n = sdk::dim(&w, "w", 2, 0), k = sdk::dim(&w, "w", 2, 1);
    const std::int32_t device = device_type(call);
    const auto from = sdk::flat<const float>(&w, "w", {}, device);
    const auto gradient = sdk::flat<const float>(&dwq, "dwq", {n, k}, device);
    const auto to = sdk::flat<float>(&dw, "dw", {n, k}, device);
    ops_.quant(call).fake_backward(op_context(call), format_of(n, k), n, k, from.data(),
                                   gradient.data(), to.data());
  }

 private:
  QuantFormat format_of(std::int64_t n, std::int64_t k) const {
    return {n > kHeadRatio * k ? head_bits_ : kBits, group_};
  }
  ds_qweight checked(const ds_qweight* w) const {
    return checked_weight(w, [&](std::int64_t n, std::int64_t k) { return format_of(n, k); });
  }

  /// Few rows are rounded by the product itself on a GPU: prepare() leaves them to it.
  bool rounds_itself(const ds_call& call, std::int64_t rows) const {
    return rows <= ops_.quant(call).fused_rows;
  }

  void check_call(const ds_call& call, const ds_linear_args& a) const {
    if (a.rows < 0) misfit(DS_E_SHAPE, "rows", a.rows, "0 or more");
    if (a.n_weights < 1 || a.n_weights > kMaxFusedWeights)
      misfit(DS_E_ARG, "n_weights", a.n_weights, "1 to 3");
    const bool swiglu = a.epilogue == DS_LINEAR_SWIGLU, residual = a.epilogue == DS_LINEAR_RESIDUAL;
    if (a.epilogue != 0 && !swiglu && !residual)
      misfit(DS_E_UNSUPPORTED, "epilogue", a.epilogue, "0, 1 or 2");
    if (swiglu && a.n_weights != 2) misfit(DS_E_ARG, "swiglu: n_weights", a.n_weights, "2");
    if (residual && a.n_weights != 1) misfit(DS_E_ARG, "residual: n_weights", a.n_weights, "1");
    if (residual && a.residual == nullptr) throw sdk::error(DS_E_ARG, "residual: missing");
    const bool itself = rounds_itself(call, a.rows);
    if ((a.norm != nullptr || a.rope != nullptr) && !itself)
      misfit(DS_E_UNSUPPORTED, "norm or rope: rows", a.rows, "at most 8, on a GPU");
    if (itself ? a.x == nullptr : a.x_prepared == nullptr)
      throw sdk::error(DS_E_ARG, itself ? "x: missing" : "x_prepared: missing");
    if (a.weights == nullptr || a.y == nullptr || a.y_stride == nullptr)
      throw sdk::error(DS_E_ARG, "weights, y or y_stride: missing");
  }

  void fill_weights(const ds_linear_args& a, QuantLinearArgs& q) const {
    LinearArgs& to = q.linear;
    const bool swiglu = a.epilogue == DS_LINEAR_SWIGLU;
    to.rows = a.rows;
    to.x = a.x;
    to.x_stride = a.x_stride;
    to.x_prepared = a.x_prepared;
    to.n_weights = static_cast<int>(a.n_weights);
    to.residual = a.residual;
    to.epilogue = swiglu                             ? Epilogue::kSwiglu
                  : a.epilogue == DS_LINEAR_RESIDUAL ? Epilogue::kResidual
                                                     : Epilogue::kNone;
    for (std::uint32_t i = 0; i < a.n_weights; ++i) {
      const ds_qweight w = checked(a.weights[i]);
      const QuantFormat f = format_of(w.n, w.k);
      if (i == 0) q.format = f;
      if (i > 0 && w.k != to.w[0].k)
        misfit(DS_E_SHAPE, "weight: k", w.k, std::to_string(to.w[0].k));
      if (f.bits != q.format.bits)
        misfit(DS_E_ARG, "weights of one call: bits", f.bits, std::to_string(q.format.bits));
      to.w[i] = {WeightFormat::kBF16, w.n, w.k, w.packed};
      q.scales[i] = w.scales;
      to.bias[i] = a.bias == nullptr ? nullptr : a.bias[i];
      if (swiglu && i == 1) {
        if (w.n != to.w[0].n) misfit(DS_E_SHAPE, "swiglu: n", w.n, std::to_string(to.w[0].n));
        continue;
      }
      to.y[i] = a.y[i];
      to.y_stride[i] = a.y_stride[i];
      if (a.rope != nullptr && i > 0) continue;
      if (to.y[i] == nullptr) throw sdk::error(DS_E_ARG, "y: missing");
      if (to.y_stride[i] < w.n)
        misfit(DS_E_SHAPE, "y: stride", to.y_stride[i], "at least " + std::to_string(w.n));
    }
    if (a.lora != nullptr && a.x_stride < to.w[0].k)
      misfit(DS_E_SHAPE, "x: stride", a.x_stride, "at least " + std::to_string(to.w[0].k));
  }

  DeviceOps ops_;
  Calibration calibration_;
  std::int32_t group_ = kQuantGroup;
  std::int32_t head_bits_ = 8;
};

}  // namespace ds::modules
