// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "tests/kernels/simple_case.h"

namespace ds::test {
namespace {

/// What ops leave for linear layers: `make` fills `prepared` with rows [rows, d], and a product
/// with the identity brings them back. Rounded to BF16 where the backend does that.
Case prepared_case(
    const char* name, int64_t rows, int64_t d, std::function<Floats()> in,
    std::function<void(const Ops&, const OpContext&, const Floats& in, float* y, void* prepared)>
        make,
    std::function<Vec(const Floats& in)> expect) {
  Case c = simple(
      sized(name, rows, d) + " prepared", 5e-5, std::move(in), Floats(rows * d),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Floats identity(d * d, 0.0f), y(rows * d);
        for (int64_t i = 0; i < d; ++i) identity[i * d + i] = 1.0f;
        auto weight = aligned(ops.packed_bytes(WeightFormat::kBF16, d, d));
        ops.pack(c, WeightFormat::kBF16, d, d, identity.data(), false, weight.get());
        const int64_t bytes = ops.prepared_bytes(WeightFormat::kBF16, rows, d);
        auto prepared = aligned(std::max<int64_t>(bytes, 16));
        const bool alone = !ops.host_memory && bytes > 0;
        make(ops, c, in, alone ? nullptr : y.data(), bytes > 0 ? prepared.get() : nullptr);
        LinearArgs a;
        a.rows = rows;
        a.x = alone ? nullptr : y.data();
        a.x_stride = d;
        a.x_prepared = bytes > 0 ? prepared.get() : nullptr;
        a.n_weights = 1;
        a.w[0] = {WeightFormat::kBF16, d, d, weight.get()};
        a.y[0] = out->data();
        a.y_stride[0] = d;
        ops.linear(c, a);
        ops.finish(c);
      },
      std::move(expect));
  c.tolerance_bf16 = 5e-2;  // 2^-9 of the largest element, which is up to 20 times the RMS
  return c;
}

constexpr int64_t kRows = 140, kWidth = 70;

Case prepared_rmsnorm() {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  return prepared_case(
      "rmsnorm", rows, d, normal(n + d, 31),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y, void* prepared) {
        ops.rmsnorm(c, rows, d, in.data(), in.data() + n, 1e-5f, y, nullptr, prepared);
      },
      [=](const Floats& in) {
        Vec rstd;
        return reference::rmsnorm(rows, d, slice(in, 0, n), slice(in, n, n + d), 1e-5, &rstd);
      });
}

Case prepared_swiglu() {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  return prepared_case(
      "swiglu", rows, d, normal(2 * n, 32),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y, void* prepared) {
        ops.swiglu(c, rows, d, in.data(), in.data() + n, y, prepared);
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
      gate ? "swiglu_backward gate" : "swiglu_backward up", rows, d, normal(3 * n, 33),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y, void* prepared) {
        Floats other(n);
        const float *g = in.data(), *u = g + n, *dy = u + n;
        ops.swiglu_backward(c, rows, d, dy, g, u, gate ? y : other.data(), gate ? other.data() : y,
                            gate ? prepared : nullptr, gate ? nullptr : prepared);
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

Case prepared_linear_swiglu() {
  constexpr int64_t rows = kRows, d = kWidth, n = rows * d;
  const int64_t k = 24;
  const auto gate_up = [=] {
    Floats in = random_floats(rows * k + 2 * d * k, 35);
    std::transform(in.begin(), in.begin() + rows * k, in.begin(),
                   [](float x) { return as_bf16(x); });
    std::transform(in.begin() + rows * k, in.end(), in.begin() + rows * k,
                   [](float w) { return as_bf16(0.2f * w); });
    return in;
  };
  return prepared_case(
      "linear swiglu", rows, d, gate_up,
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y, void* prepared) {
        LinearArgs a;
        a.rows = rows;
        a.x = in.data();
        a.x_stride = k;
        const auto x = aligned(ops.prepared_bytes(WeightFormat::kBF16, rows, k) + 16);
        ops.prepare(c, WeightFormat::kBF16, rows, k, a.x, k, x.get());
        a.x_prepared = x.get();
        a.n_weights = 2;
        std::shared_ptr<char> weight[2];
        for (int w = 0; w < 2; ++w) {
          weight[w] = aligned(ops.packed_bytes(WeightFormat::kBF16, d, k));
          ops.pack(c, WeightFormat::kBF16, d, k, in.data() + rows * k + w * d * k, false,
                   weight[w].get());
          a.w[w] = {WeightFormat::kBF16, d, k, weight[w].get()};
        }
        a.epilogue = Epilogue::kSwiglu;
        a.y[0] = y;
        a.y_stride[0] = d;
        a.y_prepared = prepared;
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
      "cross_entropy", rows, d, normal(n, 34, 3.0f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, float* y, void* prepared) {
        Floats logits(in.begin(), in.end()), weight(rows, 1.0f), logprob(rows);
        Ints target;
        for (int64_t r = 0; r < rows; ++r) target.push_back(static_cast<int32_t>(r % d));
        ops.cross_entropy(c, {rows, d, d, logits.data(), target.data(), weight.data(),
                              logprob.data(), nullptr, true, prepared});
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

}  // namespace

void add_prepared_cases(std::vector<Case>* all) {
  all->push_back(prepared_rmsnorm());
  all->push_back(prepared_swiglu());
  all->push_back(prepared_swiglu_backward(true));
  all->push_back(prepared_swiglu_backward(false));
  all->push_back(prepared_linear_swiglu());
  all->push_back(prepared_cross_entropy());
}

}  // namespace ds::test
