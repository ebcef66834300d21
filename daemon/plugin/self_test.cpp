// SPDX-License-Identifier: Apache-2.0
#include "plugin/self_test.h"

#include <cmath>
#include <vector>

#include "kernels/pool.h"
#include "plugin/tensor_view.h"

namespace ds {
namespace {

std::vector<float> waves(size_t n, float step) {
  std::vector<float> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = std::sin(step * static_cast<float>(i + 1));
  return out;
}

Status all_finite(const std::vector<float>& values, std::string_view what) {
  for (const float v : values) {
    if (!std::isfinite(v))
      return Status(Code::kPlugin, std::string(what) + ": NaN or infinity from a small input");
  }
  return {};
}

/// Three rows of one sequence on one page of an FP32 cache.
Status test_attention(const PluginInstance& plugin) {
  constexpr int64_t kRows = 3, kHeads = 2, kDim = 16, kPage = 32;
  std::vector<float> q = waves(kRows * kHeads * kDim, 0.3f), k = waves(kPage * kDim, 0.7f),
                     v = waves(kPage * kDim, 1.1f), out(q.size(), NAN);
  int32_t rows[2] = {0, kRows}, length = kRows, page = 0;
  const TensorView q_t(q.data(), kAbiF32, {kRows, kHeads, kDim}),
      out_t(out.data(), kAbiF32, {kRows, kHeads, kDim}),
      k_t(k.data(), kAbiF32, {1, 1, kPage, kDim}), v_t(v.data(), kAbiF32, {1, 1, kPage, kDim}),
      rows_t(rows, kAbiI32, {2}), length_t(&length, kAbiI32, {1}), table_t(&page, kAbiI32, {1, 1});
  ds_kv_view kv{};
  kv.size = sizeof kv;
  kv.page_tokens = kPage;
  kv.k_pages = k_t.get(), kv.v_pages = v_t.get();
  kv.block_table = table_t.get(), kv.lengths = length_t.get();
  ds_attn_args args{};
  args.size = sizeof args;
  args.batch = 1, args.max_rows = kRows, args.max_keys = kRows;
  args.q = q_t.get(), args.out = out_t.get(), args.rows = rows_t.get();
  args.kv = &kv;
  args.scale = 0.25f;
  const auto table = plugin.table<ds_attention>();
  ds_status st{};
  ds_plan plan{};
  plan.size = sizeof plan;
  DS_TRY(plugin_status(plugin.name(), table.plan(plugin.handle(), &args, &plan, &st), st));
  std::vector<std::byte> extra(full_struct(&plan).page_extra_bytes);
  const TensorView extra_t(extra.data(), kAbiU8, {1, std::ssize(extra)});
  if (!extra.empty()) kv.page_extra = extra_t.get();
  std::vector<double> workspace(full_struct(&plan).workspace_bytes / sizeof(double) + 9);
  ds_call call{};
  call.size = sizeof call;
  call.parallel = serial_parallel();
  const auto at = reinterpret_cast<uintptr_t>(workspace.data());
  call.workspace = reinterpret_cast<void*>((at + 63) / 64 * 64);
  call.workspace_bytes = full_struct(&plan).workspace_bytes;
  DS_TRY(plugin_status(plugin.name(), table.prefill(plugin.handle(), &call, &args, &st), st));
  return all_finite(out, plugin.name());
}

/// Quantize and dequantize a small matrix; the promised tolerance is the check of ds-plugin-check.
Status test_quantizer(const PluginInstance& plugin) {
  constexpr int64_t kN = 16, kK = 64;
  std::vector<float> w = waves(kN * kK, 0.9f), back(w.size(), NAN);
  const TensorView w_t(w.data(), kAbiF32, {kN, kK}), back_t(back.data(), kAbiF32, {kN, kK});
  const auto table = plugin.table<ds_quantizer>();
  ds_status st{};
  ds_qformat format{};
  format.size = sizeof format;
  DS_TRY(plugin_status(plugin.name(), table.format(plugin.handle(), kN, kK, &format, &st), st));
  const ds_qformat f = full_struct(&format);
  constexpr uint64_t kLimit = kN * kK * 64;
  if (f.packed_bytes > kLimit || f.scale_bytes > kLimit || f.zero_bytes > kLimit)
    return Status(Code::kPlugin, std::string(plugin.name()) + ": " +
                                     std::to_string(f.packed_bytes) +
                                     " bytes for a matrix of 16 x 64");
  const auto words = [](uint64_t bytes) { return std::vector<double>(bytes / 8 + 8); };
  std::vector<double> packed = words(f.packed_bytes), scales = words(f.scale_bytes),
                      zeros = words(f.zero_bytes);
  ds_qweight weight{};
  weight.size = sizeof weight;
  weight.n = kN, weight.k = kK;
  weight.format = &f;
  weight.packed = packed.data(), weight.scales = scales.data(), weight.zeros = zeros.data();
  ds_call call{};
  call.size = sizeof call;
  call.parallel = serial_parallel();
  DS_TRY(plugin_status(
      plugin.name(),
      table.quantize(plugin.handle(), &call, abi_str("self-test"), w_t.get(), &weight, &st), st));
  DS_TRY(plugin_status(plugin.name(),
                       table.dequantize(plugin.handle(), &call, &weight, back_t.get(), &st), st));
  return all_finite(back, plugin.name());
}

}  // namespace

Status self_test(const PluginInstance& instance) {
  const PluginRunning running(instance.who());
  DS_TRY(instance.health());
  switch (instance.component().kind) {
    case DS_KIND_ATTENTION:
      return test_attention(instance);
    case DS_KIND_QUANTIZER:
      return test_quantizer(instance);
    default:
      return {};
  }
}

}  // namespace ds
