// SPDX-License-Identifier: Apache-2.0
// Pieces of kernels: elements of 16 bits in 16-byte chunks, sums and maxima over warps and blocks
// in a fixed order, the activation functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/ops.h"

namespace ds::cuda {

using Bf16 = __nv_bfloat16;
using Half = __half;

constexpr float kLargestHalf = 65504.0f;

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Half x) { return __half2float(x); }
/// Halves saturate, NaN stays.
template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return __float2bfloat16_rn(x);
  } else {
    __half_raw half;
    asm("cvt.rn.satfinite.f16.f32 %0, %1;" : "=h"(half.x) : "f"(x));
    return half;
  }
}

/// Whether a half cannot be as large.
__device__ inline bool saturates(float x) { return fabsf(x) > kLargestHalf; }

/// Two neighbours in a register, the first in the low half.
template <typename T>
__device__ inline uint32_t pack_pair(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

/// Eight neighbours of 16 bits.
template <typename T>
__device__ inline uint4 pack_eight(const float4& a, const float4& b) {
  return make_uint4(pack_pair<T>(a.x, a.y), pack_pair<T>(a.z, a.w), pack_pair<T>(b.x, b.y),
                    pack_pair<T>(b.z, b.w));
}

/// Four or eight neighbours at once; `to` is aligned for it.
template <typename T>
__device__ inline void store_four(T* to, float4 v) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(to) = v;
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(v.x, v.y), pack_pair<T>(v.z, v.w));
  }
}
template <typename T>
__device__ inline void store_eight(T* to, float4 a, float4 b) {
  if constexpr (std::is_same_v<T, float>) {
    store_four(to, a);
    store_four(to + 4, b);
  } else {
    *reinterpret_cast<uint4*>(to) = pack_eight<T>(a, b);
  }
}

/// Four neighbours of 16 bits, as they were loaded.
template <typename T>
__device__ inline float4 unpack_four(uint2 raw) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
            __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u)};
  } else {
    const float2 first = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 second = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    return {first.x, first.y, second.x, second.y};
  }
}

/// f(T()) with the element type of a format.
template <typename F>
auto with_element(WeightFormat format, const F& f) {
  if (format == WeightFormat::kBF16) return f(Bf16());
  if (format == WeightFormat::kF16) return f(Half());
  return f(float());
}
/// x as the products of this weight type see it.
template <typename T>
__device__ inline float rounded_as(float x) {
  return to_float(from_float<T>(x));
}

/// The next kernel may be set up meanwhile.
__device__ inline void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
/// From here on everything that was enqueued before is done.
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// First in every kernel that launch_next() starts: both. All threads call it.
__device__ inline void begin_after_previous() {
  let_next_begin();
  wait_for_previous();
}

/// 16 bytes of elements in FP32: 8 of 16 bits, 4 of FP32.
template <typename T>
struct Chunk {
  static constexpr int kElements = 16 / sizeof(T);
  float v[kElements];
};
__device__ inline Chunk<Bf16> unpack_chunk(uint4 raw, Bf16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Chunk<Bf16> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[2 * i] = __uint_as_float(words[i] << 16);
    out.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return out;
}
__device__ inline Chunk<Half> unpack_chunk(uint4 raw, Half) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Chunk<Half> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    out.v[2 * i] = two.x;
    out.v[2 * i + 1] = two.y;
  }
  return out;
}
__device__ inline Chunk<float> unpack_chunk(uint4 raw, float) {
  return {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
          __uint_as_float(raw.w)};
}

__host__ __device__ inline bool is_aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

__host__ __device__ inline bool is_aligned8(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 8 == 0;
}

/// The same sum in every lane.
template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
/// The sum over the lanes up to and with this one.
template <typename T>
__device__ inline T warp_sum_up_to(T x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}
/// NaN is passed over, as the CPU does.
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

/// The same sum in every thread of a block of whole warps; all threads must call.
template <typename T>
__device__ inline T block_sum(T x) {
  __shared__ T of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  __syncthreads();  // of an earlier call
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : T(0));
}
__device__ inline float block_max(float x) {
  __shared__ float of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  return warp_max(lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : -INFINITY);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float silu_times(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

/// This thread's first element of a loop over all of a grid, and the step of the loop.
__device__ inline int64_t loop_begin() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t loop_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace ds::cuda
