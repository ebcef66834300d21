// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>

#include "tests/kernels/simple_case.h"

namespace ds::test {
namespace {

constexpr float kLoraScale = 0.5f, kNormEps = 1e-5f;

struct Packed {
  std::vector<std::shared_ptr<char>> memory;

  WeightView add(const Ops& ops, const OpContext& context, WeightFormat format, int64_t n,
                 int64_t k, const Floats& w, bool turned = false) {
    // What is packed is [n, k], or its transpose from the same source.
    const int64_t rows = turned ? k : n, columns = turned ? n : k;
    memory.push_back(aligned(ops.packed_bytes(format, rows, columns)));
    ops.pack(context, format, rows, columns, w.data(), turned, memory.back().get());
    return {format, n, k, memory.back().get(), turned};
  }
};

std::vector<int64_t> first_rows(int64_t count) {
  std::vector<int64_t> rows(static_cast<size_t>(count));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

Floats rows_of(const Floats& all, int64_t width, const std::vector<int64_t>& rows) {
  Floats out;
  for (int64_t r : rows)
    out.insert(out.end(), all.begin() + r * width, all.begin() + (r + 1) * width);
  return out;
}

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
    return rounded_to(s.format, std::move(w));
  };
  x = random_floats(static_cast<size_t>(s.rows * s.k), ++seed);
  residual = random_floats(static_cast<size_t>(s.rows * s.n[0]), ++seed);
  if (s.norm) {
    raw = x;
    norm = random_floats(static_cast<size_t>(s.k), ++seed);
    Vec rstd;
    const Vec y =
        reference::rmsnorm(s.rows, s.k, as_double(raw), as_double(norm), double{kNormEps}, &rstd);
    std::transform(y.begin(), y.end(), x.begin(), [](double v) { return static_cast<float>(v); });
  }
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
    std::shared_ptr<char> prepared, y_prepared;
  };
  const LinearShape& s = shape;
  if (rows.empty()) rows = first_rows(s.rows);
  auto bound = std::make_shared<Bound>();
  const bool normed_there = s.norm && ops.fuses_phases;
  const Floats& input = normed_there ? raw : x;
  bound->x = rows_of(input, s.k, rows);
  bound->residual = rows_of(residual, s.n[0], rows);
  for (int64_t r : rows) bound->slots.push_back(slots[r]);
  LinearArgs& a = bound->args;
  a.rows = static_cast<int64_t>(rows.size());
  a.x = bound->x.data();
  a.x_stride = s.k;
  if (normed_there) {
    a.norm = norm.data();
    a.norm_eps = kNormEps;
  }
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
    a.w[i] = bound->packed.add(ops, context, s.format, s.n[i], s.k, w[i],
                               s.transposed && ops.reads_transposed);
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
  if (const int64_t bytes = ops.prepared_bytes(s.format, a.rows, s.k); bytes > 0 && !normed_there) {
    bound->prepared = aligned(bytes);
    a.x_prepared = bound->prepared.get();
  }
  if (const int64_t bytes = ops.prepared_bytes(s.format, a.rows, s.n[0]);
      bytes > 0 && s.y_prepared && !ops.host_memory) {
    bound->y_prepared = aligned(bytes);
    a.y_prepared = bound->y_prepared.get();
  }
  return [&ops, context, bound, s, to = out->data()] {
    if (bound->prepared) {
      ops.prepare(context, bound->args.rows, s.k, bound->args.x, bound->args.x_stride,
                  {bound->prepared.get(), s.format});
    }
    ops.linear(context, bound->args);
    if (bound->y_prepared)
      ops.unpack(context, {s.format, bound->args.rows, s.n[0], bound->y_prepared.get()}, to);
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
  c.name += " " + format_name(s.format);
  if (s.bias) c.name += " bias";
  if (s.epilogue == Epilogue::kResidual) c.name += " residual";
  if (s.epilogue == Epilogue::kSwiglu) c.name += " swiglu";
  if (s.lora_slots > 0) c.name += " lora" + std::to_string(s.lora_slots);
  if (s.transposed) c.name += " transposed";
  if (s.norm) c.name += " norm";
  if (s.y_prepared) c.name += " to rows";
  c.tolerance = 2e-5;
  c.tolerance_bf16 = rounding_tolerance(s.format);
  c.flops = 2.0 * static_cast<double>(s.rows * s.k) * outputs;
  c.bytes = static_cast<double>(s.k) * outputs * (is_f32(s.format) ? 4 : 2);
  c.bind = [problem](const Ops& ops, const OpContext& context, Floats* out) {
    return problem().bind(ops, context, out);
  };
  c.expect = [problem] { return problem().expect(); };
  return c;
}

/// Rows with a value that halves cannot hold until a norm has divided it, by a call that norms them
/// where the backend takes that.
Case norm_range_case(int64_t rows, WeightFormat format) {
  constexpr int64_t k = 96, n = 40;
  const auto in = [=] {
    Floats all = random_floats(rows * k + k + n * k, 61);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < k; ++i) all[r * k + i] *= 1e3f;
      all[r * k + r % k] = 3e5f;
    }
    std::fill_n(all.begin() + rows * k, k, 1.0f);
    std::transform(all.begin() + rows * k + k, all.end(), all.begin() + rows * k + k,
                   [](float w) { return as_half(as_bf16(0.1f * w)); });
    return all;
  };
  Case c = simple(
      "linear norm range " + std::to_string(rows) + " " + format_name(format), 2e-5, in,
      Floats(rows * n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        const float *x = in.data(), *norm = x + rows * k, *w = norm + k;
        Packed packed;
        Floats normed(rows * k);
        LinearArgs a;
        a.rows = rows;
        a.x = x;
        a.x_stride = k;
        a.n_weights = 1;
        a.w[0] = packed.add(ops, c, format, n, k, Floats(w, w + n * k));
        a.y[0] = out->data();
        a.y_stride[0] = n;
        std::shared_ptr<char> prepared;
        if (ops.fuses_phases) {
          a.norm = norm;
          a.norm_eps = kNormEps;
        } else {
          const int64_t bytes = ops.prepared_bytes(format, rows, k);
          a.x_prepared = bytes > 0 ? (prepared = aligned(bytes)).get() : nullptr;
          ops.rmsnorm(c, rows, k, x, norm, kNormEps, normed.data(), nullptr,
                      {prepared.get(), format});
          a.x = normed.data();
        }
        ops.linear(c, a);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec rstd;
        const Vec x =
            reference::rmsnorm(rows, k, slice(in, 0, rows * k), slice(in, rows * k, rows * k + k),
                               double{kNormEps}, &rstd);
        return reference::matmul(rows, n, k, x, slice(in, rows * k + k, rows * k + k + n * k));
      });
  c.tolerance_bf16 = rounding_tolerance(format);
  return c;
}

namespace {

/// Sizes and places of rope_linear_case().
struct RopeLinear {
  static constexpr int64_t kHeads = 3, kKv = 1, kIn = 20, kPositions = 50, kSlots = 8192;
  static constexpr float kScale = 0.5f;
  WeightFormat format;
  int64_t rows, dim;
  bool low_rank;  ///< every third row has slot 0, every third slot 1

  int64_t half() const { return dim / 2; }
  int64_t n(int w) const { return (w == 0 ? kHeads : kKv) * dim; }
  int64_t outputs() const { return (kHeads + 2 * kKv) * dim; }
  int64_t weights() const { return outputs() * kIn; }
  /// Behind the weights: of each slot and weight A, then B.
  int64_t factors() const { return low_rank ? 2 * kLoraRank * (3 * kIn + outputs()) : 0; }
  /// f(slot, w, A, B)
  void for_factors(const float* at,
                   const std::function<void(int, int, const float*, const float*)>& f) const {
    for (int slot = 0; low_rank && slot < 2; ++slot) {
      for (int w = 0; w < 3; ++w) {
        f(slot, w, at, at + kLoraRank * kIn);
        at += kLoraRank * (kIn + n(w));
      }
    }
  }
  static int32_t slot_of(int64_t r) { return static_cast<int32_t>(r % 3) - 1; }

  static int32_t position(int64_t r) { return static_cast<int32_t>(r * 7 % kPositions); }
  static int32_t slot(int64_t r) { return static_cast<int32_t>((r * 11 + 3) % kSlots); }
  static float angle(int64_t i) { return 0.1f * static_cast<float>(i); }

  /// In one call where the backend takes that, else in two.
  void run(const Ops& ops, const OpContext& c, const Floats& in, const RopeAppendArgs& rope) const {
    LinearArgs a;
    a.rows = rows;
    a.x = in.data();
    a.x_stride = kIn;
    a.n_weights = 3;
    // Side by side, as a model has them.
    const auto packed =
        aligned(ops.packed_bytes(format, n(0), kIn) + 2 * ops.packed_bytes(format, n(1), kIn));
    std::shared_ptr<char> prepared;
    const float* source = in.data() + rows * kIn;
    char* weight = packed.get();
    float* to[] = {rope.q, rope.k, const_cast<float*>(rope.v)};
    for (int w = 0; w < 3; ++w) {
      ops.pack(c, format, n(w), kIn, source, false, weight);
      a.w[w] = {format, n(w), kIn, weight};
      source += n(w) * kIn;
      weight += ops.packed_bytes(format, n(w), kIn);
      a.y[w] = to[w];
      a.y_stride[w] = n(w);
    }
    if (const int64_t bytes = ops.prepared_bytes(format, rows, kIn); bytes > 0) {
      a.x_prepared = (prepared = aligned(bytes)).get();
      ops.prepare(c, rows, kIn, a.x, kIn, {prepared.get(), format});
    }
    Packed factors_packed;
    Floats t(3 * rows * kLoraRank);
    Ints slots;
    for (int64_t r = 0; r < rows; ++r) slots.push_back(slot_of(r));
    LoraSlots lora;
    lora.slot_of_row = slots.data();
    lora.n_slots = 2;
    lora.t = t.data();
    for_factors(source, [&](int slot, int w, const float* low_a, const float* low_b) {
      const auto factor = [&](int64_t n, int64_t k, const float* of) {
        return factors_packed.add(ops, c, format, n, k, Floats(of, of + n * k));
      };
      lora.pair[slot][w] = {factor(kLoraRank, kIn, low_a), factor(n(w), kLoraRank, low_b), kScale};
    });
    if (low_rank) a.lora = &lora;
    if (ops.fuses_phases) a.rope = &rope;
    ops.linear(c, a);
    if (a.rope == nullptr) ops.rope_append(c, rope);
    ops.finish(c);
  }

  /// q of all rows, then k and v of each.
  void results(const Ops& ops, const OpContext& c, const Floats& in, Floats* out) const {
    Floats cos(kPositions * half()), sin(kPositions * half()), k(rows * kKv * dim), v(k);
    for (int64_t i = 0; i < kPositions * half(); ++i)
      cos[i] = std::cos(angle(i)), sin[i] = std::sin(angle(i));
    Ints positions, slots;
    for (int64_t r = 0; r < rows; ++r) {
      positions.push_back(position(r));
      slots.push_back(slot(r));
    }
    Floats pages_k(kSlots * kKv * dim), pages_v(pages_k);
    const KvView kv{KvDtype::kF32, kKv, dim, pages_k.data(), pages_v.data()};
    run(ops, c, in,
        {rows, kHeads, out->data(), k.data(), v.data(), cos.data(), sin.data(), positions.data(),
         slots.data(), kv});
    for (int64_t r = 0; r < rows; ++r) {
      float* at = out->data() + rows * kHeads * dim + r * 2 * dim;
      std::copy_n(pages_k.begin() + slot(r) * dim, dim, at);
      std::copy_n(pages_v.begin() + slot(r) * dim, dim, at + dim);
    }
  }

  Vec expect(const Floats& in) const {
    const Vec x = slice(in, 0, rows * kIn);
    Vec y[3];
    int64_t at = rows * kIn;
    for (int w = 0; w < 3; ++w) {
      y[w] = reference::matmul(rows, n(w), kIn, x, slice(in, at, at + n(w) * kIn));
      at += n(w) * kIn;
    }
    for_factors(in.data() + at, [&](int slot, int w, const float* low_a, const float* low_b) {
      const Vec t = reference::matmul(rows, kLoraRank, kIn, x, Vec(low_a, low_a + kLoraRank * kIn));
      const Vec low =
          reference::matmul(rows, n(w), kLoraRank, t, Vec(low_b, low_b + n(w) * kLoraRank));
      for (int64_t i = 0; i < rows * n(w); ++i)
        if (slot_of(i / n(w)) == slot) y[w][i] += double{kScale} * low[i];
    });
    Vec kv;
    for (int64_t r = 0; r < rows; ++r) {
      Vec cos, sin;
      for (int64_t i = 0; i < half(); ++i) {
        cos.push_back(std::cos(angle(position(r) * half() + i)));
        sin.push_back(std::sin(angle(position(r) * half() + i)));
      }
      for (int64_t h = 0; h < kHeads; ++h)
        reference::rotate(half(), cos.data(), sin.data(), false, &y[0][(r * kHeads + h) * dim]);
      reference::rotate(half(), cos.data(), sin.data(), false, &y[1][r * dim]);
      kv.insert(kv.end(), y[1].begin() + r * dim, y[1].begin() + (r + 1) * dim);
      kv.insert(kv.end(), y[2].begin() + r * dim, y[2].begin() + (r + 1) * dim);
    }
    return joined(y[0], kv);
  }
};

/// q, k and v, turned and put into their pages.
Case rope_linear_case(WeightFormat format, int64_t rows, int64_t head_dim, bool low_rank) {
  const RopeLinear of{format, rows, head_dim, low_rank};
  Case c = simple(
      sized("linear rope", rows, head_dim) + " " + format_name(format) + (low_rank ? " lora" : ""),
      2e-5,
      [=] {
        return as_bf16(random_floats(rows * RopeLinear::kIn + of.weights() + of.factors(), 51));
      },
      Floats(rows * of.outputs()),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        of.results(ops, c, in, out);
      },
      [=](const Floats& in) { return of.expect(in); });
  if (low_rank) c.tolerance_bf16 = rounding_tolerance(format);  // A x is rounded
  return c;
}

}  // namespace

void add_rope_linear_cases(WeightFormat format, std::vector<Case>* all) {
  for (int64_t rows : {1, 2, 7, 12, 30, 40, 70}) {
    for (int64_t head_dim : {12, 32})
      all->push_back(rope_linear_case(format, rows, head_dim, false));
  }
  // On a GPU in one launch, by tiles of three sizes.
  for (int64_t rows : {100, 2000, 7000}) all->push_back(rope_linear_case(format, rows, 64, false));
  for (int64_t rows : {5, 40, 100}) {
    for (int64_t head_dim : {32, 64})
      all->push_back(rope_linear_case(format, rows, head_dim, true));
  }
}

}  // namespace ds::test
