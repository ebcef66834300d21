// SPDX-License-Identifier: Apache-2.0
// What the tests of weights in codes share.
#pragma once

#include <gtest/gtest.h>

#include <cstring>

#include "tests/kernels/cases.h"

namespace ds::test {

inline constexpr QuantFormat kFormats[] = {{8, 32}, {8, 0}, {4, 32}, {4, 0}};

inline std::string named(QuantFormat f) {
  return "int" + std::to_string(f.bits) + (f.group == 0 ? " per channel" : " group 32");
}

inline void finish(const TestedBackend& at) {
  const char* failed = at.ops->finish(at.context);
  EXPECT_EQ(failed, nullptr) << failed;
}

inline const TestedBackend kScalar{&cpu_ops(CpuIsa::kScalar), {}, &cpu_quant_ops(CpuIsa::kScalar)};

struct Quantized {
  QuantFormat format;
  int64_t n, k;
  std::shared_ptr<char> packed, scales;

  /// `at` is the backend, or another one whose codes these shall be.
  Quantized(const TestedBackend& at, const ds_parallel* parallel, QuantFormat f, int64_t n,
            int64_t k, const Floats& w, const float* feedback = nullptr)
      : format(f),
        n(n),
        k(k),
        packed(aligned(quant_packed_bytes(f, n, k))),
        scales(aligned(quant_scale_bytes(f, n, k))) {
    at.quant->quantize(at.on(parallel), f, n, k, w.data(), feedback, packed.get(), scales.get());
    finish(at);
  }
  Floats weights(const TestedBackend& at) const {
    Floats out(static_cast<size_t>(n * k), NAN);
    at.quant->dequantize(at.context, {format, n, k, packed.get(), scales.get()}, out.data());
    finish(at);
    return out;
  }
  bool equals(const Quantized& o) const {
    return std::memcmp(packed.get(), o.packed.get(), quant_packed_bytes(format, n, k)) == 0 &&
           std::memcmp(scales.get(), o.scales.get(), quant_scale_bytes(format, n, k)) == 0;
  }
};

}  // namespace ds::test
