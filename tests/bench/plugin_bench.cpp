// SPDX-License-Identifier: Apache-2.0
// plugin_bench: what the door costs. The same kernel called directly and through a module's table,
// as the engine calls it, taking turns; medians. Attention of one decoded row (SmolLM2's shape) and
// the gate/up product in 8 bits; then what that is of a decoded token: 30 layers, each with one
// attention call and four products.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>

#include "engine/kv_cache.h"
#include "engine/quantizer.h"
#include "kernels/quant.h"
#include "tests/daemon/reference_model.h"

namespace {

using namespace ds;

constexpr int kRounds = 301, kCalls = 200;
constexpr int64_t kHeads = 9, kKvHeads = 3, kDim = 64, kModel = 576, kFfn = 1536, kLayers = 30;

double ns_per_call(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) call();
  const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
  return took.count() / kCalls;
}

struct Pair {
  double direct = 0, table = 0, extra = 0;  ///< ns a call; extra: median of the differences
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

Pair compare(const std::function<void()>& direct, const std::function<void()>& table) {
  std::vector<double> a, b, difference;
  for (int round = 0; round < kRounds; ++round) {
    a.push_back(ns_per_call(direct));
    b.push_back(ns_per_call(table));
    difference.push_back(b.back() - a.back());
  }
  return {median(a), median(b), median(difference)};
}

std::vector<float> waves(int64_t n) {
  std::vector<float> out(static_cast<size_t>(n));
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::sin(0.37f * static_cast<float>(i + 1));
  return out;
}

Pair attention(const Ops& ops, const OpContext& context, int64_t keys) {
  const int64_t pages = pages_for(keys);
  std::vector<int32_t> ids(static_cast<size_t>(pages));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  Buffer k(static_cast<size_t>(pages * kKvHeads * kKvPageTokens * kDim * 2)), v(k.bytes());
  std::fill_n(k.as<uint16_t>(), k.bytes() / 2, uint16_t{0x3e00});
  std::fill_n(v.as<uint16_t>(), v.bytes() / 2, uint16_t{0x3e80});
  const KvView kv{KvDtype::kBF16, kKvHeads, kDim, k.data(), v.data()};
  const std::vector<float> q = waves(kHeads * kDim);
  std::vector<float> out(q.size());
  const SequenceSpan span{0, 1, keys - 1, ids.data()};
  const int32_t row = 0;
  StepTables tables;
  DS_CHECK(tables.set(ops, context, {&row, 1}, {&span, 1}, {&row, 1}, {}).ok());
  const AttentionArgs args{
      kHeads,           q.data(),       out.data(),           0.125f, 1, 1, keys, tables.starts(),
      tables.lengths(), tables.table(), tables.table_width(), kv};
  const auto module = test::attention_module("dense");
  ServingAttention serving;
  DS_CHECK(serving.begin(*module, ops, context, kHeads, 0.125f, tables, kv, pages).ok());
  return compare(
      [&] { ops.attention(context, args); },
      [&] { DS_CHECK(serving.layer(0, q.data(), out.data(), {}, kv, nullptr, 0).ok()); });
}

Pair product(const Ops& ops, const OpContext& context, int64_t n, int64_t model) {
  const Quantizer quantizer(test::module_of(DS_KIND_QUANTIZER, "int8"), 1);
  const std::vector<float> w = waves(n * model), x = waves(model);
  const auto gate = quantizer.quantize(context, "gate", n, model, w.data());
  const auto up = quantizer.quantize(context, "up", n, model, w.data());
  DS_CHECK(gate.ok() && up.ok());
  const std::array<const QuantWeight*, 2> weights = {gate->get(), up->get()};
  std::vector<float> y(static_cast<size_t>(n));
  LinearArgs args;
  args.rows = 1;
  args.x = x.data(), args.x_stride = model;
  args.n_weights = 2;
  args.y[0] = y.data();
  args.epilogue = Epilogue::kSwiglu;
  QuantLinearArgs own;
  for (int i = 0; i < 2; ++i) {
    args.w[i] = {WeightFormat::kBF16, n, model, nullptr};
    args.y_stride[i] = n;
    own.scales[i] = weights[static_cast<size_t>(i)]->view.scales;
  }
  own.linear = args;
  for (int i = 0; i < 2; ++i) own.linear.w[i].data = weights[static_cast<size_t>(i)]->view.packed;
  Buffer prepared(static_cast<size_t>(quant_prepared_bytes(1, model)));
  own.linear.x_prepared = prepared.data();
  const QuantOps& kernels = cpu_quant_ops(best_cpu_isa());
  LinearScratch scratch;
  return compare(
      [&] {
        kernels.prepare(context, 1, model, x.data(), model, prepared.data());
        kernels.linear(context, own);
      },
      [&] { DS_CHECK(quantizer.linear(ops, context, weights, args, scratch).ok()); });
}

void print(const char* name, const Pair& p) {
  std::printf("%-34s direct %9.0f ns | table %9.0f ns | the door %+5.0f ns\n", name, p.direct,
              p.table, p.extra);
}

}  // namespace

int main() {
  Pool pool(0);
  const Ops& ops = cpu_ops(best_cpu_isa());
  const OpContext context{pool.engine(), nullptr}, serial{serial_parallel(), nullptr};
  std::printf("%s, %d threads, medians of %d x %d calls\n", ops.name, pool.threads(), kRounds,
              kCalls);
  const Pair one = attention(ops, serial, 1);
  print("attention, 1 key, one thread", one);
  print("attention, 512 keys", attention(ops, context, 512));
  print("int8 gate/up + swiglu, one thread", product(ops, serial, kFfn, kModel));
  const Pair linear = product(ops, serial, 32, 32);  // small: what differs is the door
  print("int8 32 x 32 twice, one thread", linear);
  const double door_us = kLayers * (one.extra + 4 * std::max(0.0, linear.extra)) * 1e-3;
  std::printf("a decoded token passes the door %lld times: %.1f us\n",
              static_cast<long long>(kLayers * 5), door_us);
  return 0;
}
