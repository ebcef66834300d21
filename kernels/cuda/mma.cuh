// SPDX-License-Identifier: Apache-2.0
// Instructions of the tensor cores and of copies to shared memory, as the PTX ISA names and defines
// them (9.7.14.5, "Matrix multiply-accumulate operation using mma instruction", m16n8k16 and
// ldmatrix). With g = lane / 4 and t = lane % 4 a lane holds of
//   A [16][16]   {row g, row g + 8} at columns {2t, 2t + 1}, then both at columns {2t + 8, 2t + 9}
//   B [16][8]    column g at rows {2t, 2t + 1}, then at rows {2t + 8, 2t + 9}
//   C [16][8]    row g at columns 2t, 2t + 1, then row g + 8 at the same
// two elements of 16 bits to a register, FP32 sums.
#pragma once

#include "kernels/cuda/device.cuh"

namespace ds::cuda {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

/// Four 8x8 matrices of 16 bits: lanes 8i..8i+7 point to the rows of matrix i, 16 bytes each. A
/// lane gets row g at columns 2t, 2t + 1 of each.
__device__ inline void load_matrices(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
/// The same of the transposed matrices: a lane gets column g at rows 2t, 2t + 1 of each.
__device__ inline void load_transposed(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

/// sum += A B, of elements T.
template <typename T>
__device__ inline void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    float (&sum)[4]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

constexpr float kLog2E = 1.44269504088896340736f;
/// 2^x to 2 ulp; 0 for -inf.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 16 or 8 bytes to shared memory behind the thread's back; zeros unless `there`, and then `from`
/// is not read.
__device__ inline void copy_16(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void copy_8(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 8 : 0)
               : "memory");
}
/// Until the thread's own copies are there.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Barrier of `threads` threads, whole warps; 0 is that of __syncthreads().
__device__ inline void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ds::cuda
