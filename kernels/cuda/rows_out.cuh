// SPDX-License-Identifier: Apache-2.0
// Where ops on rows put what they make.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"

namespace ds::cuda {

/// Results in FP32, in rows of T padded with zeros as prepare() gives them, or both. What sets them
/// returns how many saturated; a thread counts those once, at its end: an atomic between two loads
/// keeps the compiler from issuing them together, and these kernels wait for memory.
template <typename T>
struct RowsOut {
  float* y;
  T* prepared;
  int32_t* saturated;
  int64_t d, padded, stride;  ///< of prepared rows: with padding, and from one to the next

  __device__ int set(int64_t row, int64_t i, float value) const {
    if (y != nullptr) y[row * d + i] = value;
    if (prepared == nullptr) return 0;
    prepared[row * stride + i] = from_float<T>(value);
    return saturated_of(value);
  }
  /// Columns i .. i + 3, i a multiple of 4 and padded == d.
  __device__ int set_four(int64_t row, int64_t i, float4 v) const {
    if (y != nullptr) store_four(y + row * d + i, v);
    if (prepared == nullptr) return 0;
    store_four(prepared + row * stride + i, v);
    return saturated_of(v.x, v.y, v.z, v.w);
  }
  __host__ bool by_fours() const {
    return padded == d && stride % 8 == 0 && is_aligned16(y) && is_aligned16(prepared);
  }
  /// Columns i and i + 1, i even and padded == d.
  __device__ int set_two(int64_t row, int64_t i, float2 v) const {
    if (y != nullptr) *reinterpret_cast<float2*>(y + row * d + i) = v;
    if (prepared == nullptr) return 0;
    *reinterpret_cast<uint32_t*>(prepared + row * stride + i) = pack_pair<T>(v.x, v.y);
    return saturated_of(v.x, v.y);
  }
  /// Threads i, i + step, .. of a row's.
  __device__ void pad(int64_t row, int64_t i, int64_t step) const {
    if (prepared == nullptr) return;
    for (i += d; i < padded; i += step) prepared[row * stride + i] = from_float<T>(0.0f);
  }

  __device__ void count(int n) const {
    if (n != 0 && saturated != nullptr) atomicAdd(saturated, n);
  }

 private:
  template <typename... F>
  static __device__ int saturated_of(F... values) {
    if constexpr (!std::is_same_v<T, Half>) return 0;
    return (static_cast<int>(saturates(values)) + ...);
  }
};
template <typename T>
RowsOut<T> rows_out(float* y, const PreparedRows& to, int64_t d) {
  const int64_t padded = padded_k(WeightFormat::kBF16, d);
  return {y,      static_cast<T*>(to.data),           to.saturated, d,
          padded, to.stride != 0 ? to.stride : padded};
}
/// f(T()) with the element of rows that go `to`.
template <typename F>
void with_rows_out(const PreparedRows& to, const F& f) {
  if (to.format == WeightFormat::kF16) {
    f(Half());
  } else {
    f(Bf16());
  }
}

/// Results of attention: FP32, or in its place rows of 16 bits that need no padding.
struct AttendedRows {
  float* out;
  void* rows;  ///< null: FP32
  bool is_half;

  __host__ __device__ explicit AttendedRows(float* fp32)
      : out(fp32), rows(nullptr), is_half(false) {}
  __host__ __device__ explicit AttendedRows(const AttentionArgs& a)
      : out(a.out), rows(a.out_16.data), is_half(a.out_16.format == WeightFormat::kF16) {}

  __device__ void set(int64_t at, float value) const {
    if (rows == nullptr) {
      out[at] = value;
    } else if (is_half) {
      static_cast<Half*>(rows)[at] = from_float<Half>(value);
    } else {
      static_cast<Bf16*>(rows)[at] = from_float<Bf16>(value);
    }
  }
  /// at and at + 1, at even.
  __device__ void set_two(int64_t at, float2 v) const {
    if (rows == nullptr) {
      *reinterpret_cast<float2*>(out + at) = v;
    } else {
      static_cast<uint32_t*>(rows)[at / 2] =
          is_half ? pack_pair<Half>(v.x, v.y) : pack_pair<Bf16>(v.x, v.y);
    }
  }
};

}  // namespace ds::cuda
