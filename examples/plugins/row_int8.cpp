// SPDX-License-Identifier: Apache-2.0
// Quantizer: symmetric INT8, one scale for each row of the weight.
#include <cmath>

#include "ds/plugin.hpp"

struct row_int8 {
  static constexpr std::string_view name = "row-int8";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  explicit row_int8(ds::sdk::context) {}

  ds_qformat format(std::int64_t n, std::int64_t k) const {
    ds_qformat f{};
    f.layout_id = DS_PACK_OWN + 1;  // of this plugin's own; a new one if the bytes ever change
    f.bits = 8;
    f.scale_dtype = ds::sdk::dtype_of<float>();
    f.symmetric = 1;
    f.packed_bytes = static_cast<std::uint64_t>(n * k);
    f.scale_bytes = static_cast<std::uint64_t>(n) * sizeof(float);
    f.rel_tol = 0.004f;  // half a step: 0.5 / 127, and rounding
    return f;
  }

  void quantize(const ds_call& call, std::string_view, const ds_tensor& w, const ds_qweight& q) {
    const auto from = ds::sdk::flat<const float>(w, "w", {q.n, q.k});
    const auto to = ds::sdk::packed<std::int8_t>(q, q.n * q.k);
    const auto scale = ds::sdk::scales<float>(q, q.n);
    ds::sdk::parallel_for(call, q.n, [&](std::int64_t row) {
      float top = 0;
      for (auto i = row * q.k; i < (row + 1) * q.k; ++i) {
        if (!std::isfinite(from[i])) throw ds::sdk::error(DS_E_NUMERIC, "w: NaN or infinity");
        top = std::max(top, std::fabs(from[i]));
      }
      scale[row] = top / 127;
      for (auto i = row * q.k; i < (row + 1) * q.k; ++i)
        to[i] = static_cast<std::int8_t>(top > 0 ? std::lround(from[i] / top * 127) : 0);
    });
  }

  void dequantize(const ds_call&, const ds_qweight& q, const ds_tensor& w) const {
    const auto from = ds::sdk::packed<const std::int8_t>(q, q.n * q.k);
    const auto scale = ds::sdk::scales<const float>(q, q.n);
    const auto to = ds::sdk::flat<float>(w, "w", {q.n, q.k});
    for (std::int64_t i = 0; i < q.n * q.k; ++i)
      to[i] = static_cast<float>(from[i]) * scale[i / q.k];
  }
};

DS_PLUGIN("org.driftstone.example.row-int8", "1.0.0", "Apache-2.0", row_int8)
