// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/cases_update.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/kernels/simple_case.h"

namespace ds::test {

/// A rounded product errs by up to 2^-8 of itself, and rows of them add up like a random walk: 3e-2
/// of the result's RMS, far from what a wrong operand gives.
Case outer_case(int64_t rows, int64_t n, int64_t k, bool rounded) {
  Case c = simple(
      sized(rounded ? "outer_accumulate rounded" : "outer_accumulate", n, k) + " r" +
          std::to_string(rows),
      1e-5, normal(rows * (n + k), 5), Floats(n * k, 1.0f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        OuterArgs a;
        a.rows = rows;
        a.n = a.dy_stride = n;
        a.dy = in.data();
        a.k = a.x_stride = k;
        a.x = in.data() + rows * n;
        a.scale = 0.5f;
        a.out = out->data();
        const auto prepare = [&](int64_t columns, const float* x) {
          auto memory = aligned(ops.prepared_bytes(WeightFormat::kBF16, rows, columns) + 16);
          ops.prepare(c, rows, columns, x, columns, {memory.get()});
          return memory;
        };
        std::shared_ptr<char> dy, x;
        if (rounded && ops.prepared_bytes(WeightFormat::kBF16, rows, k) > 0) {
          a.dy_prepared = (dy = prepare(n, a.dy)).get();
          a.x_prepared = (x = prepare(k, a.x)).get();
        }
        ops.outer_accumulate(c, 1, &a);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec g = reference::outer(rows, n, k, slice(in, 0, rows * n),
                                 slice(in, rows * n, rows * (n + k)));
        for (double& x : g) x = 1.0 + 0.5 * x;
        return g;
      });
  if (rounded) c.tolerance_bf16 = 3e-2;
  c.flops = 2.0 * static_cast<double>(rows) * static_cast<double>(n) * static_cast<double>(k);
  c.bytes = 8.0 * static_cast<double>(n) * static_cast<double>(k);
  return c;
}

/// More in one call than a launch takes, of factors and of weights, over unequal rows.
Case outers_case() {
  struct One {
    int64_t rows, n, k, in, out;
  };
  std::vector<One> all;
  int64_t in = 0, out = 0;
  for (int64_t i = 0; i < 29; ++i) {
    const One one{1 + i * 41 % 700, i % 7 == 3 ? 40 : 1 + i * 5 % 16, 1 + i * 37 % 200, in, out};
    in += one.rows * (one.n + one.k);
    out += one.n * one.k;
    all.push_back(one);
  }
  return simple(
      "outer_accumulate of 29", 1e-5, normal(in, 5), Floats(out, 1.0f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        std::vector<OuterArgs> args;
        for (const One& one : all) {
          OuterArgs& a = args.emplace_back();
          a.rows = one.rows;
          a.n = a.dy_stride = one.n;
          a.dy = in.data() + one.in;
          a.k = a.x_stride = one.k;
          a.x = a.dy + one.rows * one.n;
          a.scale = 0.5f;
          a.out = out->data() + one.out;
        }
        ops.outer_accumulate(c, std::ssize(args), args.data());
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec want;
        for (const One& one : all) {
          const int64_t x = one.in + one.rows * one.n;
          for (const double g : reference::outer(one.rows, one.n, one.k, slice(in, one.in, x),
                                                 slice(in, x, x + one.rows * one.k)))
            want.push_back(1.0 + 0.5 * g);
        }
        return want;
      });
}

/// All four packs of two weights' factors, read back; what is beyond the rank is zero.
Case factors_case(WeightFormat format, int64_t rank) {
  constexpr int64_t kN[] = {37, 16}, kK[] = {24, 51};
  int64_t given = 0, packed = 0;
  for (int i = 0; i < 2; ++i) {
    given += rank * (kN[i] + kK[i]);
    packed += 2 * kLoraRank * (kN[i] + kK[i]);
  }
  return simple(
      "pack_factors " + std::to_string(rank) + " " + format_name(format), 0.0,
      [=] { return as_half(as_bf16(random_floats(given, 23))); }, Floats(packed),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        std::vector<FactorPack, CaseAllocator<FactorPack>> list(2);
        std::vector<std::shared_ptr<char>> memory;
        std::vector<WeightView> views;
        const float* next = in.data();
        const auto place = [&](WeightFormat format, int64_t n, int64_t k) {
          memory.push_back(aligned(ops.packed_bytes(format, n, k)));
          views.push_back({format, n, k, memory.back().get()});
          return static_cast<void*>(memory.back().get());
        };
        for (int i = 0; i < 2; ++i) {
          FactorPack& f = list[i];
          f.format = format;
          f.n = kN[i], f.k = kK[i];
          f.a = next;
          f.bt = f.a + rank * f.k;
          next = f.bt + rank * f.n;
          f.a_packed = place(format, kLoraRank, f.k);
          f.b_packed = place(format, f.n, kLoraRank);
          f.bt_packed = place(backward_format(format), kLoraRank, f.n);
          f.at_packed = place(backward_format(format), f.k, kLoraRank);
        }
        ops.pack_factors(c, rank, 2, list.data());
        float* to = out->data();
        for (const WeightView& v : views) {
          ops.unpack(c, v, to);
          to += v.n * v.k;
        }
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec all;
        int64_t at = 0;
        const auto both = [&](int64_t columns, bool tall_first) {
          Vec wide(kLoraRank * columns, 0.0), tall(kLoraRank * columns, 0.0);
          for (int64_t i = 0; i < rank; ++i) {
            for (int64_t j = 0; j < columns; ++j, ++at)
              wide[i * columns + j] = tall[j * kLoraRank + i] = in[at];
          }
          return tall_first ? std::pair(tall, wide) : std::pair(wide, tall);
        };
        for (int i = 0; i < 2; ++i) {
          const auto [a, at_] = both(kK[i], false);
          const auto [b, bt] = both(kN[i], true);
          all = joined(joined(joined(joined(all, a), b), bt), at_);
        }
        return all;
      });
}

Case adamw_case(int64_t n) {
  return simple(
      sized("adamw", n, 1), 2e-6, normal(3 * n, 17), Floats(3 * n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        std::copy(in.begin(), in.begin() + 2 * n, out->begin());
        for (int64_t i = 0; i < n; ++i) (*out)[2 * n + i] = in[n + i] * in[n + i];
        const auto squares = aligned(sizeof(double));
        const double norm = 10.0;
        *reinterpret_cast<double*>(squares.get()) = norm * norm;
        AdamWArgs a;
        a.n = n;
        a.master = out->data();
        a.m = a.master + n;
        a.v = a.m + n;
        a.gradient = in.data() + 2 * n;
        a.squares = reinterpret_cast<const double*>(squares.get());
        a.clip = 7.0f;
        a.lr = 0.01f;
        a.weight_decay = 0.1f;
        a.step = 3;
        ops.adamw(c, a);
        ops.finish(c);
        *reinterpret_cast<double*>(squares.get()) = NAN;
        ops.adamw(c, a);  // changes nothing
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec p, ms, vs;
        const double b1 = double{0.9f}, b2 = double{0.999f};
        for (int64_t i = 0; i < n; ++i) {
          const double g = double{0.7f} * in[2 * n + i];
          const double m = b1 * in[n + i] + (1 - b1) * g;
          const double v = b2 * double{in[n + i] * in[n + i]} + (1 - b2) * g * g;
          const double step =
              m / (1 - std::pow(b1, 3)) / (std::sqrt(v / (1 - std::pow(b2, 3))) + double{1e-8f});
          p.push_back(in[i] - double{0.01f} * (step + double{0.1f} * in[i]));
          ms.push_back(m);
          vs.push_back(v);
        }
        return joined(joined(p, ms), vs);
      });
}

Case vectors_case(int64_t n) {
  return simple(
      sized("dot, axpby, multiply_add", n, 1), 1e-6, normal(3 * n, 19), Floats(3 * n + 1),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        const float *x = in.data(), *y = x + n, *z = y + n;
        const auto sum = aligned(sizeof(double));
        ops.dot(c, n, x, y, reinterpret_cast<double*>(sum.get()));
        float* to = out->data();
        ops.copy(c, to, y, 4 * n);
        ops.axpby(c, n, 2.0f, x, -0.5f, to);
        std::fill_n(to + n, n, NAN);
        ops.axpby(c, n, 3.0f, x, 0.0f, to + n);  // what was there is not read
        ops.multiply_add(c, n, 0.5f, y, z, to + n);
        ops.copy(c, to + 2 * n, y, 4 * n);
        ops.axpby(c, n, 0.0f, nullptr, 4.0f, to + 2 * n);
        ops.finish(c);
        to[3 * n] = static_cast<float>(*reinterpret_cast<double*>(sum.get()));
      },
      [=](const Floats& in) {
        const Vec x = slice(in, 0, n), y = slice(in, n, 2 * n), z = slice(in, 2 * n, 3 * n);
        Vec a, b, c;
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
          a.push_back(2 * x[i] - 0.5 * y[i]);
          b.push_back(3 * x[i] + 0.5 * y[i] * z[i]);
          c.push_back(4 * y[i]);
          sum += x[i] * y[i];
        }
        return joined(joined(joined(a, b), c), Vec{sum});
      });
}

/// Matrices of several shapes, as they are and turned, packed in one call and read back.
Case pack_all_case() {
  struct Shape {
    WeightFormat format;
    bool transposed;
    int64_t n, k;
  };
  constexpr Shape kShapes[] = {
      {WeightFormat::kBF16, false, 33, 24}, {WeightFormat::kBF16, false, 20, 37},
      {WeightFormat::kBF16, true, 17, 40},  {WeightFormat::kF32, false, 5, 64},
      {WeightFormat::kF16, false, 9, 40},   {WeightFormat::kF16, true, 12, 31},
      {WeightFormat::kF32, true, 35, 9}};
  int64_t total = 0;
  for (const Shape& s : kShapes) total += s.n * s.k;
  return simple(
      "pack_all", 0.0, [=] { return as_half(as_bf16(random_floats(total, 41))); }, Floats(total),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        std::vector<PackItem, CaseAllocator<PackItem>> items;
        std::vector<std::shared_ptr<char>> memory;
        const float* source = in.data();
        for (const Shape& s : kShapes) {
          memory.push_back(aligned(ops.packed_bytes(s.format, s.n, s.k)));
          items.push_back({s.format, s.transposed, s.n, s.k, source, memory.back().get()});
          source += s.n * s.k;
        }
        ops.pack_all(c, std::ssize(items), items.data());
        float* to = out->data();
        for (const PackItem& i : items) {
          ops.unpack(c, {i.format, i.n, i.k, i.packed}, to);
          to += i.n * i.k;
        }
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec all;
        int64_t at = 0;
        for (const Shape& s : kShapes) {
          for (int64_t i = 0; i < s.n; ++i) {
            for (int64_t j = 0; j < s.k; ++j)
              all.push_back(in[at + (s.transposed ? j * s.n + i : i * s.k + j)]);
          }
          at += s.n * s.k;
        }
        return all;
      });
}

}  // namespace ds::test
