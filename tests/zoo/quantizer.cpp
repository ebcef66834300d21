// SPDX-License-Identifier: Apache-2.0
// Quantizers that break one rule each: INT8 by row, computed in FP32.
#include <cmath>

#include "tests/zoo/zoo.h"

namespace {

enum fault {
  sound,
  breaks_tolerance,
  swallows_nan,
  wrong_linear,
  row_dependent,
  wrong_fake_quant,
  worse_when_shown
};
constexpr std::string_view names[] = {"sound",           "breaks_tolerance", "swallows_nan",
                                      "wrong_linear",    "row_dependent",    "wrong_fake_quant",
                                      "worse_when_shown"};

template <fault F>
struct quantizer {
  static constexpr std::string_view name = names[F];
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_DETERMINISTIC | (F == worse_when_shown ? 0 : DS_CAP_REENTRANT);
  explicit quantizer(ds::sdk::context) {}

  ds_qformat format(std::int64_t n, std::int64_t k) const {
    ds_qformat f{};
    f.layout_id = DS_PACK_OWN + 77;
    f.bits = 8;
    f.scale_dtype = ds::sdk::dtype_of<float>();
    f.symmetric = 1;
    f.packed_bytes = static_cast<std::uint64_t>(n * k);
    f.scale_bytes = static_cast<std::uint64_t>(n) * sizeof(float);
    f.rel_tol = F == breaks_tolerance ? 0.001f : 0.004f;
    return f;
  }

  void observe(const ds_call&, std::string_view,
               const ds_tensor& x) requires(F == worse_when_shown) {
    (void)ds::sdk::dim(&x, "x", 2, 1);
    (void)ds::sdk::flat<const float>(x, "x");
    coarser = true;
  }

  void quantize(const ds_call&, std::string_view, const ds_tensor& w, const ds_qweight& q) const {
    const auto from = ds::sdk::flat<const float>(w, "w", {q.n, q.k});
    const auto to = ds::sdk::packed<std::int8_t>(q, q.n * q.k);
    const auto scale = ds::sdk::scales<float>(q, q.n);
    for (std::int64_t row = 0; row < q.n; ++row) {
      scale[row] = step_of(from.subspan(row * q.k, q.k)) * (coarser ? 4.0f : 1.0f);
      for (std::int64_t i = row * q.k; i < (row + 1) * q.k; ++i)
        to[i] = static_cast<std::int8_t>(code_of(from[i], scale[row]));
    }
  }

  void dequantize(const ds_call&, const ds_qweight& q, const ds_tensor& w) const {
    const auto from = ds::sdk::packed<const std::int8_t>(q, q.n * q.k);
    const auto scale = ds::sdk::scales<const float>(q, q.n);
    const auto to = ds::sdk::flat<float>(w, "w", {q.n, q.k});
    for (std::int64_t i = 0; i < q.n * q.k; ++i)
      to[i] = static_cast<float>(from[i]) * scale[i / q.k];
  }

  void linear(const ds_call&, const ds_linear_args& a) const {
    if (a.weights == nullptr || a.y == nullptr || a.y_stride == nullptr || a.x == nullptr)
      throw ds::sdk::error(DS_E_ARG, "weights, x or y: missing");
    for (std::uint32_t i = 0; i < a.n_weights; ++i) one(a, ds::sdk::widened(a.weights[i]), i);
  }

  void fake_quant(const ds_call&, const ds_tensor& w, const ds_tensor& wq) const {
    const std::int64_t n = ds::sdk::dim(&w, "w", 2, 0), k = ds::sdk::dim(&w, "w", 2, 1);
    const auto from = ds::sdk::flat<const float>(w, "w");
    const auto to = ds::sdk::flat<float>(wq, "wq", {n, k});
    for (std::int64_t row = 0; row < n; ++row) {
      const float scale = step_of(from.subspan(row * k, k));
      for (std::int64_t i = row * k; i < (row + 1) * k; ++i)
        to[i] =
            F == wrong_fake_quant ? from[i] : static_cast<float>(code_of(from[i], scale)) * scale;
    }
  }
  void fake_quant_backward(const ds_call&, const ds_tensor& w, const ds_tensor& dwq,
                           const ds_tensor& dw) const {
    const std::int64_t n = ds::sdk::dim(&w, "w", 2, 0), k = ds::sdk::dim(&w, "w", 2, 1);
    (void)ds::sdk::flat<const float>(w, "w");
    const auto from = ds::sdk::flat<const float>(dwq, "dwq", {n, k});
    const auto to = ds::sdk::flat<float>(dw, "dw", {n, k});
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  }

 private:
  static float step_of(std::span<const float> row) {
    float top = 0;
    for (const float x : row) {
      if (F != swallows_nan && !std::isfinite(x))
        throw ds::sdk::error(DS_E_NUMERIC, "w: NaN or infinity");
      if (std::isfinite(x)) top = std::max(top, std::fabs(x));
    }
    return top / 127;
  }
  static long code_of(float x, float step) {
    if (!(step > 0) || !std::isfinite(x)) return 0;
    return std::clamp(std::lround(x / step), -127l, 127l);
  }

  static void one(const ds_linear_args& a, const ds_qweight& q, std::uint32_t index) {
    const auto from = ds::sdk::packed<const std::int8_t>(q, q.n * q.k);
    const auto scale = ds::sdk::scales<const float>(q, q.n);
    float* const y = a.y[index];
    if (y == nullptr) throw ds::sdk::error(DS_E_ARG, "y: missing");
    for (std::int64_t r = 0; r < a.rows; ++r) {
      for (std::int64_t o = 0; o < q.n; ++o) {
        float sum = 0;
        for (std::int64_t i = 0; i < q.k; ++i)
          sum += a.x[r * a.x_stride + i] * static_cast<float>(from[o * q.k + i]);
        sum *= scale[o];
        if (F == wrong_linear) sum *= 1.2f;
        if (F == row_dependent && a.rows > 8) sum *= zoo::kOneBitMore;
        y[r * a.y_stride[index] + o] = sum;
      }
    }
  }

  bool coarser = false;
};

}  // namespace

DS_PLUGIN("org.driftstone.zoo.quantizer", "1.0.0", "Apache-2.0", quantizer<sound>,
          quantizer<breaks_tolerance>, quantizer<swallows_nan>, quantizer<wrong_linear>,
          quantizer<row_dependent>, quantizer<wrong_fake_quant>, quantizer<worse_when_shown>)
