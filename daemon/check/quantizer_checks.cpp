// SPDX-License-Identifier: Apache-2.0
// Quantizers: their operations, and level 2: the promised tolerance, linear against double
// precision on the weights that dequantize gives, rows on their own, fake_quant.
#include <algorithm>
#include <cmath>
#include <optional>
#include <random>

#include "check/check.h"

namespace ds::check {
namespace {

struct Weight {
  ds_qformat format{};
  const ds_qweight* handed = nullptr;
};

std::vector<float> values(int64_t n, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> value(0, 1);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = value(rng);
  return out;
}

/// format, then memory for [n, k]. Nothing = a call failed.
std::optional<Weight> room_for(Trial& t, int64_t n, int64_t k) {
  const auto table = table_of<ds_quantizer>(t.component);
  Weight out;
  ds_qformat* room = t.take<ds_qformat>("ds_qformat");
  if (!t.invoke("format", [&](ds_status* st) { return table.format(t.instance, n, k, room, st); }))
    return {};
  out.format = t.taken(room);
  if (t.room_was_cut()) return {};
  ds_qweight w{};
  w.n = n;
  w.k = k;
  w.format = t.give("ds_qformat", out.format);
  const auto part = [&](uint64_t bytes) { return bytes == 0 ? nullptr : t.buffer(bytes); };
  w.packed = part(out.format.packed_bytes);
  w.scales = part(out.format.scale_bytes);
  w.zeros = part(out.format.zero_bytes);
  out.handed = t.give("ds_qweight", w);
  return out;
}

/// After observe with inputs `x` [., k], if there are any.
std::optional<Weight> quantized(Trial& t, int64_t n, int64_t k, const std::vector<float>& w,
                                const std::vector<float>& x = {}) {
  const auto table = table_of<ds_quantizer>(t.component);
  auto out = room_for(t, n, k);
  if (!out) return {};
  const ds_call* call = t.call(0);
  const std::string text =
      "model.layers." + std::to_string(t.options.layer) + ".mlp.up_proj.weight";
  const ds_str name{text.data(), text.size()};
  if (table.observe != nullptr && !x.empty()) {
    const ds_tensor* inputs = t.of("x", kF32, {static_cast<int64_t>(x.size()) / k, k}, x);
    if (!t.invoke("observe",
                  [&](ds_status* st) { return table.observe(t.instance, call, name, inputs, st); }))
      return {};
  }
  const ds_tensor* from = t.of("w", kF32, {n, k}, w);
  if (!t.invoke("quantize", [&](ds_status* st) {
        return table.quantize(t.instance, call, name, from, out->handed, st);
      }))
    return {};
  t.add_output(out->handed->packed, out->format.packed_bytes);
  t.add_output(out->handed->scales, out->format.scale_bytes);
  return out;
}

/// [n, k], or empty.
std::vector<float> dequantized(Trial& t, const Weight& w, int64_t n, int64_t k) {
  const auto table = table_of<ds_quantizer>(t.component);
  const ds_call* call = t.call(0);
  const ds_tensor* to = t.tensor("w", kF32, {n, k}, nullptr, true);
  if (!t.invoke(
          "dequantize",
          [&](ds_status* st) { return table.dequantize(t.instance, call, w.handed, to, st); }) ||
      to == nullptr)
    return {};
  t.add_output(to);
  return floats_of(to);
}

/// y [rows, n] = x W^T by plan, prepare and linear; empty = a call failed.
std::vector<float> linear(Trial& t, const Weight& w, int64_t n, int64_t k, int64_t rows,
                          const std::vector<float>& x) {
  const auto table = table_of<ds_quantizer>(t.component);
  ds_plan plan{};
  const ds_qformat* format = t.give("ds_qformat", w.format);
  if (table.plan != nullptr) {
    ds_plan* room = t.take<ds_plan>("ds_plan");
    if (!t.invoke("plan",
                  [&](ds_status* st) { return table.plan(t.instance, format, rows, k, room, st); }))
      return {};
    plan = t.taken(room);
    if (t.room_was_cut()) return {};
  }
  auto* in = reinterpret_cast<float*>(t.buffer(x.size() * sizeof(float)));
  std::copy(x.begin(), x.end(), in);
  std::byte* prepared = plan.prepared_bytes != 0 ? t.buffer(plan.prepared_bytes) : nullptr;
  const ds_call* call = t.call(plan.workspace_bytes);
  if (prepared != nullptr && table.prepare != nullptr && !t.invoke("prepare", [&](ds_status* st) {
        return table.prepare(t.instance, call, format, rows, k, in, k, prepared, st);
      }))
    return {};
  auto* y = reinterpret_cast<float*>(t.buffer(static_cast<size_t>(rows * n) * sizeof(float)));
  float* const ys[1] = {y};
  const int64_t strides[1] = {n};
  const ds_qweight* const weights[1] = {w.handed};
  const float* const bias[1] = {nullptr};
  ds_linear_args a{};
  a.rows = rows;
  a.x = in;
  a.x_stride = k;
  a.x_prepared = prepared;
  a.weights = weights;
  a.bias = bias;
  a.y = ys;
  a.y_stride = strides;
  a.n_weights = 1;
  const ds_linear_args* args = t.give("ds_linear_args", a);
  if (!t.invoke("linear", [&](ds_status* st) { return table.linear(t.instance, call, args, st); }))
    return {};
  t.add_output(y, static_cast<size_t>(rows * n) * sizeof(float));
  return {y, y + rows * n};
}

std::vector<float> fake_quantized(Trial& t, int64_t n, int64_t k, const std::vector<float>& w) {
  const auto table = table_of<ds_quantizer>(t.component);
  const ds_call* call = t.call(0);
  const ds_tensor* from = t.of("w", kF32, {n, k}, w);
  const ds_tensor* to = t.tensor("wq", kF32, {n, k}, nullptr, true);
  if (!t.invoke("fake_quant",
                [&](ds_status* st) { return table.fake_quant(t.instance, call, from, to, st); }) ||
      to == nullptr)
    return {};
  t.add_output(to);
  return floats_of(to);
}

std::vector<float> fake_gradient(Trial& t, int64_t n, int64_t k, const std::vector<float>& w,
                                 float start) {
  const auto table = table_of<ds_quantizer>(t.component);
  const ds_call* call = t.call(0);
  const ds_tensor* from = t.of("w", kF32, {n, k}, w);
  const ds_tensor* dwq = t.of("dwq", kF32, {n, k}, values(n * k, t.options.content + 9));
  const ds_tensor* dw =
      t.tensor("dw", kF32, {n, k}, std::vector<float>(w.size(), start).data(), true);
  if (!t.invoke("fake_quant_backward",
                [&](ds_status* st) {
                  return table.fake_quant_backward(t.instance, call, from, dwq, dw, st);
                }) ||
      dw == nullptr)
    return {};
  t.add_output(dw);
  return floats_of(dw);
}

int64_t rows_of(const Trial& t) { return t.options.empty ? 0 : 40 * t.options.scale; }
constexpr int64_t kColumns = 128;

void quantize_all(Trial& t) {
  const int64_t n = rows_of(t);
  const std::vector<float> shown = values(3 * kColumns, t.options.content + 5);
  if (const auto w = quantized(t, n, kColumns, values(n * kColumns, t.options.content), shown))
    dequantized(t, *w, n, kColumns);
}
void linear_all(Trial& t) {
  const int64_t n = 40 * t.options.scale, rows = t.options.empty ? 0 : 5;
  if (const auto w = quantized(t, n, kColumns, values(n * kColumns, t.options.content)))
    linear(t, *w, n, kColumns, rows, values(rows * kColumns, t.options.content + 1));
}
void fake_all(Trial& t) {
  const int64_t n = rows_of(t);
  const std::vector<float> w = values(n * kColumns, t.options.content);
  if (!fake_quantized(t, n, kColumns, w).empty() &&
      table_of<ds_quantizer>(t.component).fake_quant_backward != nullptr)
    fake_gradient(t, n, kColumns, w, 0);
}

ds_quantizer quantizer(const ds_component& c) { return table_of<ds_quantizer>(c); }

// ---- Level 2 ----

/// Rows that are hard to scale: [16, kColumns].
std::vector<float> extreme_rows(uint64_t seed) {
  std::vector<float> w = values(16 * kColumns, seed);
  const auto row = [&](int64_t r) { return w.begin() + r * kColumns; };
  row(1)[7] = 300;                       // an outlier
  std::fill_n(row(2), kColumns, 0.0f);   // nothing
  std::fill_n(row(3), kColumns, -2.5f);  // one value
  std::for_each(row(4), row(5), [](float& x) { x *= 1e-20f; });
  std::for_each(row(5), row(6), [](float& x) { x *= 1e20f; });
  std::for_each(row(6), row(7), [](float& x) { x = std::abs(x); });
  std::for_each(row(7), row(8), [](float& x) { x = 100 + x; });
  std::fill_n(row(8), kColumns, 1e-42f);  // denormal
  return w;
}

Verdict tolerance(Bench& bench) {
  for (const bool extreme : {false, true}) {
    const int64_t n = extreme ? 16 : 64;
    const std::vector<float> w =
        extreme ? extreme_rows(bench.settings.seed) : values(n * kColumns, bench.settings.seed);
    float promised = 0;
    const std::vector<float> back = on_fresh(bench, [&](Trial& t) -> std::vector<float> {
      const auto q = quantized(t, n, kColumns, w);
      if (!q) return {};
      promised = q->format.rel_tol;
      return dequantized(t, *q, n, kColumns);
    });
    if (back.empty()) return failed(extreme ? "extreme rows were refused" : "quantize failed");
    if (!(promised > 0 && promised < 1))
      return failed("rel_tol " + std::to_string(promised) + ", expected between 0 and 1");
    for (int64_t r = 0; r < n; ++r) {
      double largest = 0, worst = 0;
      for (int64_t i = r * kColumns; i < (r + 1) * kColumns; ++i) {
        const auto at = static_cast<size_t>(i);
        largest = std::max(largest, std::abs(double{w[at]}));
        const double error = std::abs(double{w[at]} - back[at]);
        worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
      }
      // A row of denormals may vanish: one step of what a float's scale can hold.
      if (worst > promised * largest * (1 + 1e-5) + 1e-38)
        return failed("row " + std::to_string(r) + (extreme ? " of the extreme ones" : "") +
                      ": error " + std::to_string(worst / largest) + " of its largest, promised " +
                      std::to_string(promised));
    }
  }
  return pass();
}

Verdict not_a_number(Bench& bench) {
  for (const float bad : {std::nanf(""), INFINITY}) {
    std::vector<float> w = values(16 * kColumns, 3);
    w[200] = bad;
    bool taken = false;
    const std::vector<float> back = on_fresh(bench, [&](Trial& t) -> std::vector<float> {
      const auto q = quantized(t, 16, kColumns, w);
      taken = q.has_value();
      return taken ? dequantized(t, *q, 16, kColumns) : std::vector<float>{};
    });
    if (taken && !back.empty() && std::isfinite(back[200]))
      return failed(std::to_string(bad) + " became " + std::to_string(back[200]) +
                    " without a word, expected DS_E_NUMERIC");
  }
  return pass();
}

struct LinearCase {
  std::vector<float> w, x, back, y;
};
LinearCase linear_case(Bench& bench, int64_t n, int64_t rows) {
  LinearCase c;
  c.w = values(n * kColumns, bench.settings.seed);
  c.x = values(rows * kColumns, bench.settings.seed + 1);
  on_fresh(bench, [&](Trial& t) {
    if (const auto q = quantized(t, n, kColumns, c.w)) {
      c.back = dequantized(t, *q, n, kColumns);
      c.y = linear(t, *q, n, kColumns, rows, c.x);
    }
    return 0;
  });
  return c;
}

Verdict linear_matches(Bench& bench) {
  if (quantizer(bench.component).linear == nullptr) return skipped("no linear");
  const int64_t n = 48, rows = 7;
  const LinearCase c = linear_case(bench, n, rows);
  if (c.y.empty() || c.back.empty()) return failed("linear or dequantize failed");
  for (int64_t r = 0; r < rows; ++r) {
    double largest = 0;
    for (int64_t i = 0; i < kColumns; ++i)
      largest = std::max(largest, std::abs(double{c.x[static_cast<size_t>(r * kColumns + i)]}));
    for (int64_t o = 0; o < n; ++o) {
      double want = 0, weight = 0;
      for (int64_t i = 0; i < kColumns; ++i) {
        const double w = c.back[static_cast<size_t>(o * kColumns + i)];
        want += w * c.x[static_cast<size_t>(r * kColumns + i)];
        weight += std::abs(w);
      }
      // Activations may be rounded to 8 bits: half a step each, all in one direction.
      const double allowed = largest * weight / 240 + 1e-5,
                   got = c.y[static_cast<size_t>(r * n + o)];
      if (!(std::abs(got - want) <= allowed))
        return failed("y[" + std::to_string(r) + ", " + std::to_string(o) + "] is " +
                      std::to_string(got) + ", the dequantized weights give " +
                      std::to_string(want) + " (allowed " + std::to_string(allowed) + ")");
    }
  }
  return pass();
}

Verdict rows_alone(Bench& bench) {
  if (quantizer(bench.component).linear == nullptr) return skipped("no linear");
  const int64_t n = 48, rows = 37;
  const LinearCase c = linear_case(bench, n, rows);
  if (c.y.empty()) return failed("linear failed");
  for (const int64_t r : {0, 1, 16, 36}) {
    const std::vector<float> x(c.x.begin() + r * kColumns, c.x.begin() + (r + 1) * kColumns);
    const std::vector<float> alone = on_fresh(bench, [&](Trial& t) -> std::vector<float> {
      const auto q = quantized(t, n, kColumns, c.w);
      return q ? linear(t, *q, n, kColumns, 1, x) : std::vector<float>{};
    });
    if (alone.empty() ||
        std::memcmp(alone.data(), &c.y[static_cast<size_t>(r * n)], alone.size() * 4) != 0)
      return failed("row " + std::to_string(r) + " alone gives other bits than among 37");
  }
  return pass();
}

Verdict fake_matches(Bench& bench) {
  if (quantizer(bench.component).fake_quant == nullptr) return skipped("no fake_quant");
  const std::vector<float> w = values(32 * kColumns, bench.settings.seed);
  const auto fake = on_fresh(bench, [&](Trial& t) { return fake_quantized(t, 32, kColumns, w); });
  const auto real = on_fresh(bench, [&](Trial& t) -> std::vector<float> {
    const auto q = quantized(t, 32, kColumns, w);
    return q ? dequantized(t, *q, 32, kColumns) : std::vector<float>{};
  });
  if (fake.empty() || real.empty()) return failed("fake_quant or quantize failed");
  for (size_t i = 0; i < fake.size(); ++i) {
    if (!(std::abs(fake[i] - real[i]) <= 1e-6f * (1 + std::abs(real[i]))))
      return failed("fake_quant gives " + std::to_string(fake[i]) +
                    " where dequantize(quantize) gives " + std::to_string(real[i]));
  }
  if (quantizer(bench.component).fake_quant_backward == nullptr) return pass("no backward");
  const auto gradient = [&](float start) {
    return on_fresh(bench, [&](Trial& t) { return fake_gradient(t, 32, kColumns, w, start); });
  };
  const std::vector<float> from_zero = gradient(0), from_one = gradient(1);
  if (from_zero.empty() || from_one.empty()) return failed("fake_quant_backward failed");
  for (size_t i = 0; i < from_zero.size(); ++i) {
    if (!(std::abs(from_one[i] - from_zero[i] - 1) <= 1e-4f))
      return failed("fake_quant_backward does not add to dw");
  }
  return pass();
}

/// Inputs [kShown, kColumns] that go together: a few hidden causes, mixed, and some noise.
constexpr int64_t kShown = 256;
std::vector<float> related_inputs(uint64_t seed) {
  constexpr int64_t kCauses = 8;
  const std::vector<float> mix = values(kCauses * kColumns, seed),
                           causes = values(kShown * kCauses, seed + 1);
  std::vector<float> x = values(kShown * kColumns, seed + 2);
  for (int64_t i = 0; i < kShown * kColumns; ++i) {
    float& v = x[static_cast<size_t>(i)] *= 0.3f;
    for (int64_t c = 0; c < kCauses; ++c) {
      v += causes[static_cast<size_t>(i / kColumns * kCauses + c)] *
           mix[static_cast<size_t>(c * kColumns + i % kColumns)];
    }
  }
  return x;
}

/// Root mean square over the outputs of `x` of what is lost by weights `back` instead of `w`.
double output_loss(const std::vector<float>& x, const std::vector<float>& w,
                   const std::vector<float>& back) {
  double squares = 0;
  const int64_t n = static_cast<int64_t>(w.size()) / kColumns;
  for (int64_t r = 0; r < kShown; ++r) {
    for (int64_t o = 0; o < n; ++o) {
      double lost = 0;
      for (int64_t i = 0; i < kColumns; ++i) {
        const auto at = static_cast<size_t>(o * kColumns + i);
        lost += (double{w[at]} - double{back[at]}) * x[static_cast<size_t>(r * kColumns + i)];
      }
      squares += lost * lost;
    }
  }
  return std::sqrt(squares / static_cast<double>(kShown * n));
}

Verdict calibration(Bench& bench) {
  if (quantizer(bench.component).observe == nullptr) return skipped("no observe");
  const int64_t n = 48;
  const std::vector<float> w = values(n * kColumns, bench.settings.seed),
                           x = related_inputs(bench.settings.seed + 3);
  const auto loss = [&](const std::vector<float>& shown) {
    const auto back = on_fresh(bench, [&](Trial& t) -> std::vector<float> {
      const auto q = quantized(t, n, kColumns, w, shown);
      return q ? dequantized(t, *q, n, kColumns) : std::vector<float>{};
    });
    return back.empty() ? double{NAN} : output_loss(x, w, back);
  };
  const double before = loss({}), after = loss(x);
  if (!(after <= 1.001 * before))
    return failed("outputs of the inputs shown are off by " + std::to_string(after) +
                  " (root mean square), by " + std::to_string(before) + " when nothing was shown");
  return pass("error of the outputs " + std::to_string(after / before) + " of that without");
}

}  // namespace

std::vector<Operation> quantizer_operations() {
  return {
      {"quantize", [](const ds_component&) { return true; }, quantize_all},
      {"linear", [](const ds_component& c) { return quantizer(c).linear != nullptr; }, linear_all},
      {"fake-quant", [](const ds_component& c) { return quantizer(c).fake_quant != nullptr; },
       fake_all},
  };
}

std::vector<Check> quantizer_checks() {
  const uint32_t kind = DS_KIND_QUANTIZER;
  return {{"numerics.tolerance", 2, kind, {}, tolerance},
          {"numerics.nan", 2, kind, {}, not_a_number},
          {"numerics.linear", 2, kind, {}, linear_matches},
          {"numerics.rows", 2, kind, {}, rows_alone},
          {"numerics.fake-quant", 2, kind, {}, fake_matches},
          {"numerics.calibration", 2, kind, {}, calibration}};
}

}  // namespace ds::check
