// SPDX-License-Identifier: Apache-2.0
// Rows of 16 bits side by side, as full training keeps gate and up and the gradients of one input:
// a GPU's alone.
#include <algorithm>
#include <cmath>

#include "tests/kernels/simple_case.h"

namespace ds::test {
namespace {

constexpr int64_t kBesideRows = 150,
                  kBesideWidth = 72;  // more rows than a tile has, in no multiple of 4

/// Rows [rows, width] of a format, as linear layers read and leave them where nothing is padded.
class Rows16 {
 public:
  Rows16(const Ops& ops, const OpContext& context, WeightFormat format, int64_t rows, int64_t width)
      : ops_(ops),
        context_(context),
        view_{format, rows, width},
        memory_(aligned(ops.packed_bytes(format, rows, width))) {
    view_.data = memory_.get();
  }
  uint16_t* at(int64_t column) { return reinterpret_cast<uint16_t*>(memory_.get()) + column; }
  void set(const float* from) {
    ops_.pack(context_, view_.format, view_.n, view_.k, from, false, memory_.get());
    ops_.finish(context_);
  }
  void read(float* to) {
    ops_.unpack(context_, view_, to);
    ops_.finish(context_);
  }
  PreparedRows columns(int64_t first) { return {at(first), view_.format, nullptr, view_.k}; }
  const WeightView& view() const { return view_; }

 private:
  const Ops& ops_;
  const OpContext& context_;
  WeightView view_;
  std::shared_ptr<char> memory_;
};

/// x W^T of two weights, one behind the other or not, in 16 bits.
Case products_beside(WeightFormat format, bool adjacent, int64_t rows) {
  constexpr int64_t k = 48, n[] = {kBesideWidth, 40}, total = n[0] + n[1];
  Case c = simple(
      sized("linear side by side", rows, total) + " " + format_name(format) +
          (adjacent ? " adjacent" : ""),
      0.0, [=] { return rounded_to(format, random_floats(rows * k + total * k, 61)); },
      Floats(rows * total),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Rows16 x(ops, c, format, rows, k), w(ops, c, format, total, k),
            apart(ops, c, format, n[1], k), y(ops, c, format, rows, total);
        x.set(in.data());
        w.set(in.data() + rows * k);
        apart.set(in.data() + (rows + n[0]) * k);
        LinearArgs a;
        a.rows = rows;
        a.x_stride = k;
        a.x_prepared = x.at(0);
        a.n_weights = 2;
        a.w[0] = {format, n[0], k, w.at(0)};
        a.w[1] = adjacent ? WeightView{format, n[1], k, w.at(n[0] * k)} : apart.view();
        a.y_16 = y.at(0);
        ops.linear(c, a);
        y.read(out->data());
      },
      [=](const Floats& in) {
        Vec y;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < total; ++i) {
            double sum = 0;
            for (int64_t j = 0; j < k; ++j)
              sum += double{in[r * k + j]} * double{in[(rows + i) * k + j]};
            y.push_back(sum);
          }
        }
        return y;
      });
  c.tolerance_bf16 = rounding_tolerance(format);
  c.gpu_alone = true;
  return c;
}

/// silu(gate) * up of halves, some of which are infinite: these count, and are the largest.
Case swiglu_of_halves() {
  constexpr int64_t rows = kBesideRows, d = kBesideWidth, n = rows * d;
  const auto beyond = [](int64_t i) { return i % 70 == 0; };  // gates and ups by turns
  Case c = simple(
      sized("swiglu of halves", rows, d), 5e-6,
      [=] {
        Floats x = rounded_to(WeightFormat::kF16, random_floats(2 * n, 62));
        for (int64_t i = 0; i < n; ++i) {
          if (!beyond(i)) continue;
          x[2 * i] = i % 140 == 0 ? 65504.0f : -65504.0f;
          x[2 * i + 1] = 0.5f;
        }
        return x;
      },
      Floats(n + 1),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Rows16 both(ops, c, WeightFormat::kF16, rows, 2 * d),
            y16(ops, c, WeightFormat::kF16, rows, d);
        Floats apart(2 * n);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t up = 0; up < 2; ++up) apart[i / d * 2 * d + up * d + i % d] = in[2 * i + up];
        }
        both.set(apart.data());
        for (int64_t i = 0; i < n; ++i) {
          if (beyond(i)) *both.at(i / d * 2 * d + i % d) = i % 140 == 0 ? 0x7c00 : 0xfc00;
        }
        Ints count(1);
        SwigluArgs a{.rows = rows, .d = d, .gate_up_f16 = both.at(0), .y = out->data()};
        a.y_prepared = {y16.at(0), WeightFormat::kF16, count.data()};
        ops.swiglu(c, a);
        ops.finish(c);
        (*out)[n] = static_cast<float>(count[0]);
      },
      [=](const Floats& in) {
        Vec y;
        double count = 0;
        for (int64_t i = 0; i < n; ++i) {
          y.push_back(reference::silu(in[2 * i]) * double{in[2 * i + 1]});
          count += beyond(i);
        }
        y.push_back(count);
        return y;
      });
  c.tolerance_bf16 = c.tolerance;
  c.gpu_alone = true;
  return c;
}

/// Both gradients side by side, and swiglu's result again, of halves and a BF16 dy, or of FP32.
Case gradients_beside(bool halves, bool narrow_dy) {
  constexpr int64_t rows = kBesideRows, d = kBesideWidth, n = rows * d;
  constexpr auto kGateUp = WeightFormat::kF16, kDy = WeightFormat::kBF16;
  Case c = simple(
      sized("swiglu_backward side by side", rows, d) + (halves ? " of halves" : "") +
          (narrow_dy ? " BF16 dy" : ""),
      0.0,
      [=] {
        Floats in = rounded_to(kGateUp, random_floats(2 * n, 63));
        const Floats dy = rounded_to(kDy, random_floats(n, 64));
        in.insert(in.end(), dy.begin(), dy.end());
        return in;
      },
      Floats(3 * n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Rows16 both(ops, c, kGateUp, rows, 2 * d), dy(ops, c, kDy, rows, d),
            to(ops, c, kDy, rows, 2 * d), y(ops, c, kDy, rows, d);
        both.set(in.data());
        dy.set(in.data() + 2 * n);
        Floats gate, up;
        for (int64_t r = 0; r < rows; ++r) {
          const auto row = in.begin() + r * 2 * d;
          gate.insert(gate.end(), row, row + d);
          up.insert(up.end(), row + d, row + 2 * d);
        }
        SwigluArgs a{.rows = rows, .d = d};
        if (halves) {
          a.gate_up_f16 = both.at(0);
        } else {
          a.gate = gate.data(), a.up = up.data();
        }
        if (narrow_dy) {
          a.dy_bf16 = dy.at(0);
        } else {
          a.dy = in.data() + 2 * n;
        }
        a.dgate_prepared = to.columns(0);
        a.dup_prepared = to.columns(d);
        a.y_prepared = y.columns(0);
        ops.swiglu_backward(c, a);
        to.read(out->data());
        y.read(out->data() + 2 * n);
      },
      [=](const Floats& in) {
        Vec to(3 * n);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < d; ++i) {
            const double g = in[r * 2 * d + i], u = in[r * 2 * d + d + i],
                         dy = in[2 * n + r * d + i];
            to[r * 2 * d + i] = dy * u * reference::silu_slope(g);
            to[r * 2 * d + d + i] = dy * reference::silu(g);
            to[2 * n + r * d + i] = reference::silu(g) * u;
          }
        }
        return to;
      });
  c.tolerance_bf16 = rounding_tolerance(kDy);
  c.gpu_alone = true;
  return c;
}

/// Queries and keys turned back, and values as they are, side by side.
Case rope_beside(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  constexpr int64_t rows = kBesideRows;
  const int64_t q = heads * head_dim, kv = kv_heads * head_dim, total = q + 2 * kv,
                half = head_dim / 2;
  Case c = simple(
      sized("rope side by side", rows, total), 0.0, normal(rows * total + 2 * half, 65),
      Floats(rows * total),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        const auto begin = in.begin();
        Floats all_q(begin, begin + rows * q), all_k(begin + rows * q, begin + rows * (q + kv));
        const Ints positions(rows, 0);
        Rows16 to(ops, c, WeightFormat::kBF16, rows, total);
        RopeArgs a{rows, heads, kv_heads, head_dim, positions.data()};
        a.cos = in.data() + rows * total;
        a.sin = a.cos + half;
        a.inverse = true;
        a.q = all_q.data(), a.k = all_k.data(), a.v = in.data() + rows * (q + kv);
        a.q_prepared = to.columns(0);
        a.k_prepared = to.columns(q);
        a.v_prepared = to.columns(q + kv);
        ops.rope(c, a);
        to.read(out->data());
      },
      [=](const Floats& in) {
        const Vec cos = slice(in, rows * total, rows * total + half),
                  sin = slice(in, rows * total + half, rows * total + 2 * half);
        Vec out;
        for (int64_t r = 0; r < rows; ++r) {
          Vec row = joined(slice(in, r * q, (r + 1) * q),
                           slice(in, rows * q + r * kv, rows * q + (r + 1) * kv));
          for (int64_t h = 0; h < heads + kv_heads; ++h)
            reference::rotate(half, cos.data(), sin.data(), true, &row[h * head_dim]);
          const int64_t v = rows * (q + kv) + r * kv;
          out = joined(joined(out, row), slice(in, v, v + kv));
        }
        return out;
      });
  c.tolerance_bf16 = rounding_tolerance(WeightFormat::kBF16);
  c.gpu_alone = true;
  return c;
}

/// The gradient of a weight, of the middle columns of rows that lie side by side.
Case outer_beside() {
  constexpr int64_t rows = kBesideRows, n = 40, k = kBesideWidth, all = 24 + n + 16;
  Case c = simple(
      sized("outer_accumulate side by side", n, k), 0.0,
      [] { return rounded_to(WeightFormat::kBF16, random_floats(rows * (all + k), 66)); },
      Floats(n * k, 0.5f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Rows16 dy(ops, c, WeightFormat::kBF16, rows, all), x(ops, c, WeightFormat::kBF16, rows, k);
        dy.set(in.data());
        x.set(in.data() + rows * all);
        OuterArgs a;
        a.rows = rows, a.n = n, a.k = k, a.scale = 2.0f;
        a.dy_prepared = dy.at(24), a.dy_prepared_stride = all;
        a.x_prepared = x.at(0);
        a.out = out->data();
        ops.outer_accumulate(c, 1, &a);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec out(n * k, 0.5);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < n * k; ++i)
            out[i] +=
                2.0 * double{in[r * all + 24 + i / k]} * double{in[rows * all + r * k + i % k]};
        }
        return out;
      });
  c.tolerance_bf16 = 1e-5;
  c.gpu_alone = true;
  return c;
}

}  // namespace

void add_side_by_side_cases(std::vector<Case>* all) {
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16}) {
    for (const int64_t rows : {int64_t{7}, kBesideRows}) {
      for (const bool adjacent : {false, true})
        all->push_back(products_beside(format, adjacent, rows));
    }
  }
  all->push_back(swiglu_of_halves());
  for (const bool halves : {false, true}) {
    for (const bool narrow_dy : {false, true}) all->push_back(gradients_beside(halves, narrow_dy));
  }
  all->push_back(rope_beside(9, 3, 8));
  all->push_back(outer_beside());
}

}  // namespace ds::test
