// SPDX-License-Identifier: Apache-2.0
// Matrix products through cublasLt. What a product of given types and sizes needs there (layouts, a
// kernel) is looked up once and kept: cublasLt's own choice takes longer than a small product.
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <unordered_map>

namespace ds::cuda {

constexpr int64_t kBlasBytes = int64_t{32} << 20;  ///< workspace that cuBLAS recommends for Hopper

/// c [m, n] = alpha * a b + beta * c, row-major; what beta = 0 multiplies is not read. Sums are
/// FP32.
struct Product {
  struct Operand {
    const void* data = nullptr;
    int64_t stride = 0;       ///< elements between rows in memory
    bool transposed = false;  ///< a is [k, m], b is [n, k] in memory
  };
  cudaDataType_t type = CUDA_R_32F;  ///< of a and b
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  int64_t m = 0, n = 0, k = 0;
  Operand a, b;  ///< [m, k], [k, n]
  float alpha = 1.0f, beta = 0.0f;
  cudaDataType_t c_type = CUDA_R_32F;  ///< that, or the type of a and b
  void* c = nullptr;
  int64_t c_stride = 0;
  const void* add = nullptr;  ///< beta multiplies this instead, which lies like c; null: c
};

/// The products of one stream of the host's: not thread-safe, as the stream is not.
class Products {
 public:
  /// Once per process, before the first run().
  static cublasStatus_t open();
  /// Enqueues. `workspace` has kBlasBytes; the kernel suits `sms` SMs, 0: all. Does not allocate on
  /// the GPU, so a capture may contain it.
  cublasStatus_t run(const Product&, void* workspace, int sms, cudaStream_t stream);

 private:
  struct Plan {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
  };
  /// Whatever the choice of a kernel depends on.
  using Key = std::array<int64_t, 11>;
  struct Hash {
    size_t operator()(const Key& key) const;
  };
  static Key key_of(const Product&, int sms);
  static cublasStatus_t make(const Product&, int sms, int64_t alignment, Plan& plan);

  std::unordered_map<Key, Plan, Hash> plans_;
};

}  // namespace ds::cuda
