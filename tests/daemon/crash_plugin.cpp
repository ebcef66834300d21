// SPDX-License-Identifier: Apache-2.0
// A quantizer that changes nothing, and crashes on one of the pool's threads once the file
// $DS_CRASH_NOW is there.
#include <unistd.h>

#include <cstdlib>

#include "ds/plugin.hpp"

namespace {

struct Crash {
  static constexpr std::string_view name = "crash";
  explicit Crash(ds::sdk::context) {}

  ds_qformat format(std::int64_t n, std::int64_t k) const {
    ds_qformat out{};
    out.size = sizeof out;
    out.layout_id = DS_PACK_OWN + 7;
    out.bits = 32;
    out.packed_bytes = static_cast<std::uint64_t>(n * k) * sizeof(float);
    return out;
  }
  void quantize(const ds_call& call, std::string_view, const ds_tensor& w,
                const ds_qweight& out) const {
    const auto from = ds::sdk::flat<const float>(w, "w");
    ds::sdk::parallel_for(call, out.n, [&](std::int64_t row) {
      const char* now = std::getenv("DS_CRASH_NOW");
      if (now != nullptr && access(now, F_OK) == 0) std::abort();
      std::copy_n(from.data() + row * out.k, out.k, static_cast<float*>(out.packed) + row * out.k);
    });
  }
  void dequantize(const ds_call&, const ds_qweight& q, const ds_tensor& w) const {
    const auto to = ds::sdk::flat<float>(w, "w");
    std::copy_n(static_cast<const float*>(q.packed), to.size(), to.data());
  }
};

}  // namespace

DS_PLUGIN("org.driftstone.crash", "1.0.0", "Apache-2.0", Crash)
