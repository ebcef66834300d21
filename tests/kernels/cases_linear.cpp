// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

constexpr float kLoraScale = 0.5f;

struct Packed {
  std::vector<std::shared_ptr<char>> memory;

  WeightView add(const Ops& ops, const OpContext& context, WeightFormat format, int64_t n,
                 int64_t k, const Floats& w) {
    memory.push_back(aligned(ops.packed_bytes(format, n, k)));
    ops.pack(context, format, n, k, w.data(), false, memory.back().get());
    return {format, n, k, memory.back().get()};
  }
};

int64_t total_outputs(const LinearShape& s) {
  if (s.epilogue == Epilogue::kSwiglu) return s.n[0];
  int64_t total = 0;
  for (int64_t n : s.n) total += n;
  return total;
}

}  // namespace

LinearProblem::LinearProblem(const LinearShape& s) : shape(s) {
  uint32_t seed = s.seed * 1000;
  const auto matrix = [&](int64_t n, int64_t k, float scale) {
    Floats w = random_floats(static_cast<size_t>(n * k), ++seed, scale);
    return s.format == WeightFormat::kBF16 ? as_bf16(std::move(w)) : w;
  };
  x = random_floats(static_cast<size_t>(s.rows * s.k), ++seed);
  residual = random_floats(static_cast<size_t>(s.rows * s.n[0]), ++seed);
  const float scale = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(s.k, 1)));
  for (int64_t n : s.n) {
    w.push_back(matrix(n, s.k, scale));
    b.push_back(random_floats(static_cast<size_t>(n), ++seed));
  }
  for (int slot = 0; slot < s.lora_slots; ++slot) {
    lora_a.emplace_back();
    lora_b.emplace_back();
    for (int64_t n : s.n) {
      lora_a.back().push_back(matrix(kLoraRank, s.k, scale));
      lora_b.back().push_back(matrix(n, kLoraRank, 0.25f));
    }
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    slots.push_back(static_cast<int32_t>(r % (s.lora_slots + 1)) - 1);
  }
}

Vec LinearProblem::expect() const {
  const LinearShape& s = shape;
  std::vector<Vec> y;
  for (size_t i = 0; i < s.n.size(); ++i) {
    const int64_t n = s.n[i];
    y.push_back(reference::matmul(s.rows, n, s.k, as_double(x), as_double(w[i])));
    for (int64_t r = 0; r < s.rows; ++r) {
      if (slots[r] >= 0) {
        const Floats row(x.begin() + r * s.k, x.begin() + (r + 1) * s.k);
        const Vec t =
            reference::matmul(1, kLoraRank, s.k, as_double(row), as_double(lora_a[slots[r]][i]));
        const Vec low = reference::matmul(1, n, kLoraRank, t, as_double(lora_b[slots[r]][i]));
        for (int64_t j = 0; j < n; ++j) y[i][r * n + j] += double{kLoraScale} * low[j];
      }
      for (int64_t j = 0; s.bias && j < n; ++j) y[i][r * n + j] += double{b[i][j]};
    }
  }
  if (s.epilogue == Epilogue::kResidual) {
    for (size_t j = 0; j < y[0].size(); ++j) y[0][j] += double{residual[j]};
  }
  if (s.epilogue == Epilogue::kSwiglu) {
    for (size_t j = 0; j < y[0].size(); ++j) y[0][j] = reference::silu(y[0][j]) * y[1][j];
    y.resize(1);
  }
  Vec all;
  for (const Vec& part : y) all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::function<void()> LinearProblem::bind(const Ops& ops, const OpContext& context, Floats* out,
                                          std::vector<int64_t> rows) const {
  struct Bound {
    LinearArgs args;
    LoraSlots lora;
    Packed packed;
    Floats x, residual, t;
    Ints slots;
    std::shared_ptr<char> prepared;
  };
  const LinearShape& s = shape;
  if (rows.empty()) {
    for (int64_t r = 0; r < s.rows; ++r) rows.push_back(r);
  }
  auto bound = std::make_shared<Bound>();
  for (int64_t r : rows) {
    bound->x.insert(bound->x.end(), x.begin() + r * s.k, x.begin() + (r + 1) * s.k);
    bound->residual.insert(bound->residual.end(), residual.begin() + r * s.n[0],
                           residual.begin() + (r + 1) * s.n[0]);
    bound->slots.push_back(slots[r]);
  }
  LinearArgs& a = bound->args;
  a.rows = static_cast<int64_t>(rows.size());
  a.x = bound->x.data();
  a.x_stride = s.k;
  a.n_weights = static_cast<int>(s.n.size());
  a.epilogue = s.epilogue;
  if (s.epilogue == Epilogue::kResidual) a.residual = bound->residual.data();
  out->assign(static_cast<size_t>(a.rows * total_outputs(s)), 0.0f);
  bound->t.assign(static_cast<size_t>(a.n_weights * a.rows * kLoraRank), 0.0f);
  bound->lora.slot_of_row = bound->slots.data();
  bound->lora.n_slots = s.lora_slots;
  bound->lora.t = bound->t.data();
  float* y = out->data();
  for (int i = 0; i < a.n_weights; ++i) {
    a.w[i] = bound->packed.add(ops, context, s.format, s.n[i], s.k, w[i]);
    a.y[i] = y;
    a.y_stride[i] = s.n[i];
    if (s.epilogue != Epilogue::kSwiglu) y += a.rows * s.n[i];
    if (s.bias) a.bias[i] = b[i].data();
    for (int slot = 0; slot < s.lora_slots; ++slot) {
      LoraPair& pair = bound->lora.pair[slot][i];
      pair.a = bound->packed.add(ops, context, s.format, kLoraRank, s.k, lora_a[slot][i]);
      pair.b = bound->packed.add(ops, context, s.format, s.n[i], kLoraRank, lora_b[slot][i]);
      pair.scale = kLoraScale;
    }
  }
  if (s.lora_slots > 0) a.lora = &bound->lora;
  if (const int64_t bytes = ops.prepared_bytes(s.format, a.rows, s.k); bytes > 0) {
    bound->prepared = aligned(bytes);
    a.x_prepared = bound->prepared.get();
  }
  return [&ops, context, bound, s] {
    if (bound->prepared) {
      ops.prepare(context, s.format, bound->args.rows, s.k, bound->args.x, bound->args.x_stride,
                  bound->prepared.get());
    }
    ops.linear(context, bound->args);
  };
}

Case linear_case(const LinearShape& s) {
  auto problem = lazy<LinearProblem>([s] { return LinearProblem(s); });
  Case c;
  c.name = "linear r" + std::to_string(s.rows) + " k" + std::to_string(s.k) + " n";
  double outputs = 0;
  for (int64_t n : s.n) {
    c.name += std::to_string(n) + (n == s.n.back() ? "" : "+");
    outputs += static_cast<double>(n);
  }
  c.name += s.format == WeightFormat::kF32 ? " f32" : " bf16";
  if (s.bias) c.name += " bias";
  if (s.epilogue == Epilogue::kResidual) c.name += " residual";
  if (s.epilogue == Epilogue::kSwiglu) c.name += " swiglu";
  if (s.lora_slots > 0) c.name += " lora" + std::to_string(s.lora_slots);
  c.tolerance = 2e-5;
  c.tolerance_bf16 = s.format == WeightFormat::kF32 ? 2e-5 : 5e-2;
  c.flops = 2.0 * static_cast<double>(s.rows * s.k) * outputs;
  c.bytes = static_cast<double>(s.k) * outputs * (s.format == WeightFormat::kF32 ? 4 : 2);
  c.bind = [problem](const Ops& ops, const OpContext& context, Floats* out) {
    return problem().bind(ops, context, out);
  };
  c.expect = [problem] { return problem().expect(); };
  return c;
}

}  // namespace ds::test
