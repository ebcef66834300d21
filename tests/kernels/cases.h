// SPDX-License-Identifier: Apache-2.0
// One case per op and shape, used three ways: against the oracle on every ISA (ops_test), for the
// bits of one row alone and in company (bits_test), and timed (ops_bench). bind() packs and
// allocates once; the function it returns runs the op.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "kernels/quant.h"
#include "tests/kernels/reference.h"

namespace ds::test {

/// Where the data of cases lies: in the host's memory or, to test a GPU, in memory that both reach.
/// Set before the first case is made.
struct CaseMemory {
  void* (*allocate)(int64_t bytes);  ///< aligned to 64 bytes
  void (*release)(void*);
};
CaseMemory& case_memory();

template <typename T>
struct CaseAllocator {
  using value_type = T;
  CaseAllocator() = default;
  template <typename U>
  CaseAllocator(const CaseAllocator<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(case_memory().allocate(static_cast<int64_t>(n * sizeof(T))));
  }
  void deallocate(T* p, size_t) { case_memory().release(p); }
  friend bool operator==(const CaseAllocator&, const CaseAllocator&) { return true; }
};

using Floats = std::vector<float, CaseAllocator<float>>;
using Ints = std::vector<int32_t, CaseAllocator<int32_t>>;
using reference::Vec;

struct Case {
  std::string name;
  double tolerance = 1e-5;       ///< of max |got - expected| / rms(expected), FP32 arithmetic
  double tolerance_bf16 = 1e-5;  ///< the same where activations are rounded to 16 bits
  bool gpu_alone = false;        ///< a CPU's table does not have it
  double flops = 0, bytes = 0;
  std::function<std::function<void()>(const Ops&, const OpContext&, Floats* out)> bind;
  std::function<Vec()> expect;
};

/// Weights and memory of one linear call, packed for one table.
struct LinearShape {
  int64_t rows = 1, k = 64;
  std::vector<int64_t> n = {64};
  WeightFormat format = WeightFormat::kBF16;
  Epilogue epilogue = Epilogue::kNone;
  bool bias = false;
  int lora_slots = 0;  ///< rows cycle through -1, 0, .., lora_slots - 1
  uint32_t seed = 1;
  bool transposed = false;  ///< the pack of W^T, where Ops::reads_transposed
  bool norm = false;        ///< the input is `raw` after RMSNorm, where Ops::fuses_phases
  bool y_prepared = false;  ///< of kSwiglu, where there are such rows
};

struct LinearProblem {
  LinearShape shape;
  Floats x, residual;
  Floats raw, norm;                                 ///< with shape.norm: x = RMSNorm of raw
  std::vector<Floats> w, b;                         ///< representable in the format
  std::vector<std::vector<Floats>> lora_a, lora_b;  ///< [slot][weight]
  Ints slots;

  explicit LinearProblem(const LinearShape& shape);
  Vec expect() const;
  /// Packs for `ops`; the returned function computes the given rows (all if empty) into *out,
  /// packed [weights][rows][n].
  std::function<void()> bind(const Ops& ops, const OpContext& context, Floats* out,
                             std::vector<int64_t> rows = {}) const;
};

/// A value made on first use: a case of 100 MB costs nothing while it is only listed.
template <typename T>
std::function<const T&()> lazy(std::function<T()> make) {
  auto value = std::make_shared<std::unique_ptr<T>>();
  return [=]() -> const T& {
    if (*value == nullptr) *value = std::make_unique<T>(make());
    return **value;
  };
}

Floats random_floats(size_t n, uint32_t seed, float scale = 1.0f);
float as_bf16(float x);
float as_half(float x);
Floats as_bf16(Floats x);
Floats as_half(Floats x);
/// As memory of that format keeps it.
Floats rounded_to(WeightFormat format, Floats x);
/// "f32", "bf16", "f16", "tf32".
std::string format_name(WeightFormat format);
/// Of products whose activations are rounded so, where BF16 has 5e-2.
double rounding_tolerance(WeightFormat format);
Vec as_double(const Floats& x);

/// 64-byte aligned bytes of the cases' memory.
std::shared_ptr<char> aligned(int64_t bytes);

/// max |got - expected| / rms(expected).
double error_of(const Floats& got, const Vec& expected);

Case linear_case(const LinearShape& shape);
Case norm_range_case(int64_t rows, WeightFormat format);
void add_rope_linear_cases(WeightFormat format, std::vector<Case>* all);
/// Small and odd shapes of every op, for correctness.
std::vector<Case> all_cases();
/// The shapes of a 135M model (d 576, ff 1536, 9/3 heads of 64, vocab 49152), for timing.
std::vector<Case> model_cases();

std::vector<CpuIsa> supported_isas();
/// Every table that this machine can run, with the rest of the context of its calls: those of
/// supported_isas() and, where there is a GPU that it can use, CUDA's; from then on cases lie in
/// memory that both reach.
struct TestedBackend {
  const Ops* ops;
  OpContext context;
  const QuantOps* quant;

  /// Its calls on a pool; the CPU's without one if null.
  OpContext on(const ds_parallel* parallel) const {
    OpContext out = context;
    out.parallel = parallel;
    return out;
  }
};
const std::vector<TestedBackend>& tested_backends();
/// "cuda-sm90" in the lists of googletest.
std::string backend_label(const TestedBackend& backend);
/// "avx512-amx" and so on; ends the program where this machine cannot run it.
CpuIsa isa_named(const std::string& name);
/// Its products of BF16 weights round the input to BF16 too.
bool rounds_to_bf16(const Ops& ops);

}  // namespace ds::test
