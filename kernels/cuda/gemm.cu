// SPDX-License-Identifier: Apache-2.0
// Row-major c = a b is what cublasLt, column-major, calls c^T = b^T a^T: its first operand is b.
#include <algorithm>

#include "kernels/cuda/gemm.h"

namespace ds::cuda {
namespace {

constexpr size_t kMostPlans = 4096;  // of 700 bytes

cublasLtHandle_t handle = nullptr;  // one serves all streams and threads

/// The largest power of two, at most 16, that divides all addresses.
int64_t alignment_of(const Product& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.a.data) | reinterpret_cast<uintptr_t>(p.b.data) |
                    reinterpret_cast<uintptr_t>(p.c) | reinterpret_cast<uintptr_t>(p.add) | 16;
  return static_cast<int64_t>(bits & (~bits + 1));
}

cublasStatus_t layout(cublasLtMatrixLayoutOpaque_t& out, cudaDataType_t type, int64_t rows,
                      int64_t columns, int64_t stride) {
  return cublasLtMatrixLayoutInit(&out, type, static_cast<uint64_t>(columns),
                                  static_cast<uint64_t>(rows), std::max(stride, columns));
}

template <typename T>
cublasStatus_t set(cublasLtMatmulDescOpaque_t& product, cublasLtMatmulDescAttributes_t what,
                   T value) {
  return cublasLtMatmulDescSetAttribute(&product, what, &value, sizeof value);
}

}  // namespace

cublasStatus_t Products::open() {
  return handle != nullptr ? CUBLAS_STATUS_SUCCESS : cublasLtCreate(&handle);
}

size_t Products::Hash::operator()(const Key& key) const {
  uint64_t hash = 0;
  for (const int64_t part : key) {
    hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  }
  return hash;
}

Products::Key Products::key_of(const Product& p, int sms) {
  return {p.type * 4 + p.a.transposed * 2 + p.b.transposed,
          p.c_type,
          p.compute,
          p.m,
          p.n,
          p.k,
          p.a.stride,
          p.b.stride,
          p.c_stride,
          alignment_of(p),
          sms};
}

cublasStatus_t Products::make(const Product& p, int sms, int64_t alignment, Plan& plan) {
  const auto align = static_cast<uint32_t>(alignment);
  const auto bytes = static_cast<uint64_t>(kBlasBytes);
  cublasLtMatmulPreferenceOpaque_t wish;
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
    return cublasLtMatmulPreferenceSetAttribute(&wish, what, &value, sizeof value);
  };
  const auto operand = [&](cublasLtMatrixLayoutOpaque_t& out, const Product::Operand& o,
                           int64_t rows, int64_t columns) {
    return layout(out, p.type, o.transposed ? columns : rows, o.transposed ? rows : columns,
                  o.stride);
  };
  const auto op = [](const Product::Operand& o) {
    return o.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  };
  cublasStatus_t status = cublasLtMatmulDescInit(&plan.product, p.compute, CUDA_R_32F);
  const auto then = [&](auto step) {
    if (status == CUBLAS_STATUS_SUCCESS) status = step();
  };
  then([&] { return set(plan.product, CUBLASLT_MATMUL_DESC_TRANSA, op(p.b)); });
  then([&] { return set(plan.product, CUBLASLT_MATMUL_DESC_TRANSB, op(p.a)); });
  then([&] { return set(plan.product, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, int32_t{sms}); });
  then([&] { return operand(plan.a, p.a, p.m, p.k); });
  then([&] { return operand(plan.b, p.b, p.k, p.n); });
  then([&] { return layout(plan.c, p.c_type, p.m, p.n, p.c_stride); });
  then([&] { return cublasLtMatmulPreferenceInit(&wish); });
  then([&] { return prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes); });
  for (const auto what :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    then([&] { return prefer(what, align); });
  }
  then([&] {
    return cublasLtMatmulAlgoGetHeuristic(handle, &plan.product, &plan.b, &plan.a, &plan.c, &plan.c,
                                          &wish, 1, &found, &count);
  });
  then([&] { return count > 0 ? found.state : CUBLAS_STATUS_NOT_SUPPORTED; });
  plan.algorithm = found.algo;
  return status;
}

cublasStatus_t Products::run(const Product& p, void* workspace, int sms, cudaStream_t stream) {
  const Key key = key_of(p, sms);
  auto at = plans_.find(key);
  if (at == plans_.end()) {
    Plan plan{};
    const cublasStatus_t status = make(p, sms, alignment_of(p), plan);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (plans_.size() == kMostPlans) plans_.clear();
    at = plans_.emplace(key, plan).first;
  }
  Plan& plan = at->second;  // cublasLt wants it writable
  return cublasLtMatmul(handle, &plan.product, &p.alpha, p.b.data, &plan.b, p.a.data, &plan.a,
                        &p.beta, p.add != nullptr ? p.add : p.c, &plan.c, p.c, &plan.c,
                        &plan.algorithm, workspace, static_cast<size_t>(kBlasBytes), stream);
}

}  // namespace ds::cuda
