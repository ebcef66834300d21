// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "tests/kernels/simple_case.h"

namespace ds::test {
namespace {

/// What ops leave for linear layers: `make` fills `prepared` with rows [rows, d], and a product
/// with the identity brings them back. Rounded where the backend does that.
Case prepared_case(WeightFormat format, const char* name, int64_t rows, int64_t d,
                   std::function<Floats()> in,
                   std::function<void(const Ops&, const OpContext&, const Floats& in, float* y,
                                      const PreparedRows& prepared)>
                       make,
                   std::function<Vec(const Floats& in)> expect) {
  Case c = simple(
      sized(name, rows, d) + " prepared " + format_name(format), 5e-5, std::move(in),
      Floats(rows * d),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Floats identity(d * d, 0.0f), y(rows * d);
        for (int64_t i = 0; i < d; ++i) identity[i * d + i] = 1.0f;
        auto weight = aligned(ops.packed_bytes(format, d, d));
        ops.pack(c, format, d, d, identity.data(), false, weight.get());
        const int64_t bytes = ops.prepared_bytes(format, rows, d);
        auto prepared = aligned(std::max<int64_t>(bytes, 16));
        const bool alone = !ops.host_memory && bytes > 0;
        make(ops, c, in, alone ? nullptr : y.data(),
             {bytes > 0 ? prepared.get() : nullptr, format});
        LinearArgs a;
        a.rows = rows;
        a.x = alone ? nullptr : y.data();
        a.x_stride = d;
        a.x_prepared = bytes > 0 ? prepared.get() : nullptr;
        a.n_weights = 1;
        a.w[0] = {format, d, d, weight.get()};
        a.y[0] = out->data();
        a.y_stride[0] = d;
        ops.linear(c, a);
        ops.finish(c);
      },
      std::move(expect));
  // Of BF16: 2^-9 of the largest element, which is up to 20 times the RMS.
  c.tolerance_bf16 = rounding_tolerance(format);
  return c;
}

constexpr int64_t kRows = 140, kWidth = 70;

Case prepared_rmsnorm(WeightFormat format) {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  return prepared_case(
      format, "rmsnorm", rows, d, normal(n + d, 31),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        ops.rmsnorm(c, rows, d, in.data(), in.data() + n, 1e-5f, y, nullptr, prepared);
      },
      [=](const Floats& in) {
        Vec rstd;
        return reference::rmsnorm(rows, d, slice(in, 0, n), slice(in, n, n + d), 1e-5, &rstd);
      });
}

Case prepared_swiglu(WeightFormat format) {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  return prepared_case(
      format, "swiglu", rows, d, normal(2 * n, 32),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        SwigluArgs a{.rows = rows, .d = d, .gate = in.data(), .up = in.data() + n, .y = y};
        a.y_prepared = prepared;
        ops.swiglu(c, a);
      },
      [=](const Floats& in) {
        Vec y;
        for (int64_t i = 0; i < n; ++i) y.push_back(reference::silu(in[i]) * double{in[n + i]});
        return y;
      });
}

Case prepared_swiglu_backward(bool gate) {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  return prepared_case(
      WeightFormat::kBF16, gate ? "swiglu_backward gate" : "swiglu_backward up", rows, d,
      normal(3 * n, 33),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        Floats other(n);
        const float *g = in.data(), *u = g + n, *dy = u + n;
        SwigluArgs a{.rows = rows, .d = d, .gate = g, .up = u, .dy = dy};
        a.dgate = gate ? y : other.data();
        a.dup = gate ? other.data() : y;
        (gate ? a.dgate_prepared : a.dup_prepared) = prepared;
        ops.swiglu_backward(c, a);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec y;
        for (int64_t i = 0; i < n; ++i) {
          const double g = in[i], u = in[n + i], dy = in[2 * n + i];
          y.push_back(gate ? dy * u * reference::silu_slope(g) : dy * reference::silu(g));
        }
        return y;
      });
}

Case prepared_rmsnorm_backward(int64_t d) {
  constexpr int64_t rows = kRows;
  const int64_t n = rows * d;
  return prepared_case(
      WeightFormat::kBF16, "rmsnorm_backward", rows, d, normal(2 * n + d, 34),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        Floats normed(n), rstd(rows), dx(n, 0.5f);
        const float *dy = in.data(), *x = dy + n, *w = x + n;
        ops.rmsnorm(c, rows, d, x, w, 1e-5f, normed.data(), rstd.data(), {});
        ops.rmsnorm_backward(c, rows, d, dy, x, w, rstd.data(), dx.data(), prepared.data, nullptr);
        ops.finish(c);
        if (y != nullptr) std::copy(dx.begin(), dx.end(), y);
      },
      [=](const Floats& in) {
        Vec dx = reference::rmsnorm_backward(rows, d, slice(in, 0, n), slice(in, n, 2 * n),
                                             slice(in, 2 * n, 2 * n + d), 1e-5)
                     .first;
        for (double& x : dx) x += 0.5;
        return dx;
      });
}

/// Queries or keys of `heads` heads, beside some of the others.
Case prepared_rope(int64_t heads, int64_t head_dim, bool keys) {
  constexpr int64_t rows = kRows;
  const int64_t d = heads * head_dim, n = rows * d, half = head_dim / 2;
  return prepared_case(
      WeightFormat::kBF16, keys ? "rope keys" : "rope queries", rows, d, normal(n + 2 * half, 35),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        Floats turned(in.begin(), in.begin() + n), others(rows * 2 * head_dim, 1.0f);
        const Ints positions(rows, 0);
        RopeArgs a{rows,          keys ? 2 : heads,    keys ? heads : 2, head_dim, positions.data(),
                   in.data() + n, in.data() + n + half};
        a.q = keys ? others.data() : turned.data();
        a.k = keys ? turned.data() : others.data();
        (keys ? a.k_prepared : a.q_prepared) = prepared;
        ops.rope(c, a);
        ops.finish(c);
        if (y != nullptr) std::copy(turned.begin(), turned.end(), y);
      },
      [=](const Floats& in) {
        Vec x = slice(in, 0, n);
        const Vec cos = slice(in, n, n + half), sin = slice(in, n + half, n + 2 * half);
        for (int64_t h = 0; h < rows * heads; ++h)
          reference::rotate(half, cos.data(), sin.data(), false, &x[h * head_dim]);
        return x;
      });
}

/// `beyond`: of the first row a gate that no half can hold meets an up of 0, which gives 0.
Case prepared_linear_swiglu(WeightFormat format, int64_t rows, int64_t d, bool beyond = false,
                            int64_t k = 24) {
  const int64_t n = rows * d;
  const auto gate_up = [=] {
    Floats in = random_floats(rows * k + 2 * d * k, 35);
    std::transform(in.begin(), in.begin() + rows * k, in.begin(),
                   [](float x) { return as_bf16(x); });
    std::transform(in.begin() + rows * k, in.end(), in.begin() + rows * k,
                   [](float w) { return as_bf16(0.2f * w); });
    if (beyond) {
      const auto gate = in.begin() + rows * k, up = gate + d * k;
      in[0] = 100.0f;
      for (int64_t i = 0; i < d; ++i) gate[i * k] = up[i * k] = 0.0f;
      gate[0] = 1000.0f;
      std::fill_n(up, k, 0.0f);
    }
    return in;
  };
  return prepared_case(
      format, beyond ? "linear swiglu, gates beyond halves" : "linear swiglu", rows, d, gate_up,
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        LinearArgs a;
        a.rows = rows;
        a.x = in.data();
        a.x_stride = k;
        const auto x = aligned(ops.prepared_bytes(format, rows, k) + 16);
        ops.prepare(c, rows, k, a.x, k, {x.get(), format});
        a.x_prepared = x.get();
        a.n_weights = 2;
        // Side by side, as a model has them.
        const int64_t bytes = ops.packed_bytes(format, d, k);
        const auto weights = aligned(2 * bytes);
        for (int w = 0; w < 2; ++w) {
          char* weight = weights.get() + w * bytes;
          ops.pack(c, format, d, k, in.data() + rows * k + w * d * k, false, weight);
          a.w[w] = {format, d, k, weight};
        }
        a.epilogue = Epilogue::kSwiglu;
        a.y[0] = y;
        a.y_stride[0] = d;
        a.y_prepared = prepared.data;
        ops.linear(c, a);
        ops.finish(c);
      },
      [=](const Floats& in) {
        const Vec x = slice(in, 0, rows * k);
        const Vec gate = reference::matmul(rows, d, k, x, slice(in, rows * k, rows * k + d * k));
        const Vec up =
            reference::matmul(rows, d, k, x, slice(in, rows * k + d * k, rows * k + 2 * d * k));
        Vec y;
        for (int64_t i = 0; i < n; ++i) y.push_back(reference::silu(gate[i]) * up[i]);
        return y;
      });
}

Case prepared_cross_entropy() {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  return prepared_case(
      WeightFormat::kBF16, "cross_entropy", rows, d, normal(n, 34, 3.0f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y,
          const PreparedRows& prepared) {
        Floats logits(in.begin(), in.end()), weight(rows, 1.0f), logprob(rows);
        Ints target;
        for (int64_t r = 0; r < rows; ++r) target.push_back(static_cast<int32_t>(r % d));
        ops.cross_entropy(c, {rows, d, d, logits.data(), target.data(), weight.data(),
                              logprob.data(), nullptr, true, prepared.data});
        ops.finish(c);
        if (y != nullptr) std::copy(logits.begin(), logits.end(), y);
      },
      [=](const Floats& in) {
        Vec all_rows;
        for (int64_t r = 0; r < rows; ++r) {
          Vec g = reference::softmax(slice(in, r * d, (r + 1) * d).data(), d);
          g[r % d] -= 1;
          all_rows = joined(all_rows, g);
        }
        return all_rows;
      });
}

/// Rows of halves by prepare(), rmsnorm and swiglu, some of whose values no half can hold: they
/// become the largest, and are counted.
Case saturation_case(int64_t d) {
  constexpr int64_t rows = 140;
  const int64_t n = rows * d;
  const auto large = [](int64_t i) { return i % 50 == 0; };
  Case c = simple(
      sized("saturation", rows, d), 0.0,
      [=] {
        Floats x = as_half(random_floats(n, 36));
        for (int64_t i = 0; i < n; ++i) {
          if (large(i)) x[i] = i % 3 == 0 ? -1e6f : 7e4f;
        }
        return x;
      },
      Floats(3 * n + 3),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        const int64_t bytes = ops.prepared_bytes(WeightFormat::kF16, rows, d);
        const Floats ones(n, 1.0f), much(n, 100.0f);
        Ints counts(3);
        const auto collect = [&](int i, const std::function<void(const PreparedRows&)>& make) {
          const auto memory = aligned(bytes);
          make({memory.get(), WeightFormat::kF16, &counts[i]});
          ops.unpack(c, {WeightFormat::kF16, rows, d, memory.get()}, out->data() + i * n);
          ops.finish(c);
          (*out)[3 * n + i] = static_cast<float>(counts[i]);
        };
        collect(0, [&](const PreparedRows& to) { ops.prepare(c, rows, d, in.data(), d, to); });
        collect(1, [&](const PreparedRows& to) {
          SwigluArgs a{.rows = rows, .d = d, .gate = much.data(), .up = in.data()};
          a.y_prepared = to;
          ops.swiglu(c, a);  // silu(100) = 100
        });
        collect(2, [&](const PreparedRows& to) {
          ops.rmsnorm(c, rows, d, ones.data(), in.data(), 0.0f, nullptr, nullptr, to);
        });
      },
      [=](const Floats& in) {
        Vec all, counts;
        const auto add = [&](const std::function<double(int64_t)>& value) {
          double count = 0;
          for (int64_t i = 0; i < n; ++i) {
            const double x = value(i);
            count += std::abs(x) > 65504;
            all.push_back(std::abs(x) > 65504 ? std::copysign(65504.0, x)
                                              : double{as_half(static_cast<float>(x))});
          }
          counts.push_back(count);
        };
        add([&](int64_t i) { return double{in[i]}; });
        add([&](int64_t i) { return 100.0 * double{in[i]}; });
        add([&](int64_t i) { return double{in[i % d]}; });  // the norm's weight is the first row
        return joined(all, counts);
      });
  c.gpu_alone = true;
  return c;
}

}  // namespace

void add_prepared_cases(std::vector<Case>* all) {
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16}) {
    all->push_back(prepared_rmsnorm(format));
    all->push_back(prepared_swiglu(format));
    for (const int64_t d : {kWidth, int64_t{48}}) {  // with zeros at the end of rows, and without
      for (const int64_t rows : {int64_t{20}, kRows})
        all->push_back(prepared_linear_swiglu(format, rows, d));
    }
    // More tiles than a GPU has SMs, and steps of k than a block has room for; large tiles.
    for (const int64_t d : {int64_t{1104}, int64_t{1048}}) {
      all->push_back(prepared_linear_swiglu(format, 1500, d, false, 456));
      all->back().gpu_alone = true;
    }
    all->push_back(prepared_linear_swiglu(format, kRows, 48, true));
  }
  all->push_back(saturation_case(64));
  all->push_back(saturation_case(70));
  all->push_back(prepared_swiglu_backward(true));
  all->push_back(prepared_swiglu_backward(false));
  for (const int64_t d : {int64_t{70}, int64_t{72}}) all->push_back(prepared_rmsnorm_backward(d));
  for (const bool keys : {false, true}) {
    all->push_back(prepared_rope(9, 8, keys));
    all->push_back(prepared_rope(5, 14, keys));
  }
  all->push_back(prepared_cross_entropy());
}

}  // namespace ds::test
