// SPDX-License-Identifier: Apache-2.0
// Instructions that sm_90 brought, as the PTX ISA names and defines them: barriers in shared memory
// (mbarrier), copies of boxes of a matrix (cp.async.bulk.tensor), products of a warpgroup, four
// warps, whose operands are in shared memory (wgmma). A sum of wgmma lies in the warpgroup as C of
// mma.cuh does, the warps below each other and eights of columns beside each other.
#pragma once

#include <cuda.h>

#include "kernels/cuda/mma.cuh"

namespace ds::cuda {

constexpr int kWarpgroupThreads = 128;
constexpr int kBoxColumns = 64;  ///< elements of 16 bits of a row in shared memory: 128 bytes

__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// What init_barrier() wrote becomes known to copies.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// An arrival, and bytes that copies have yet to bring.
__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Until the phase of this parity is complete.
__device__ inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra.uni over;\n\t"
      "bra.uni again;\n\t"
      "over:\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// The map's box from that column and row on, to shared memory, with zeros for what the matrix does
/// not have; its bytes count at `barrier`.
__device__ inline void copy_box(void* to, const CUtensorMap& map, int column, int row,
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

/// Registers of each thread of a warpgroup from here on.
template <int kRegisters>
__device__ inline void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Rows of kBoxColumns elements as copy_box() leaves them (swizzled by 128 bytes, `at` a multiple
/// of 1,024), described to wgmma. 16 columns further on are kNextColumns more, eight rows
/// kNextEightRows.
__device__ inline uint64_t describe_rows(const void* at) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | ((shared_address(at) & 0x3ffff) >> 4);
}
constexpr uint64_t kNextColumns = 2, kNextEightRows = 1024 / 16;

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until at most so many of the committed groups are left.
template <int kLeft>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// clang-format off
#define DS_SUMS_0_15 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DS_SUMS_16_31 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DS_SUMS_32_47 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DS_FOUR(v, i) "+f"((v)[i]), "+f"((v)[(i) + 1]), "+f"((v)[(i) + 2]), "+f"((v)[(i) + 3])
#define DS_SIXTEEN(v, i) DS_FOUR(v, i), DS_FOUR(v, (i) + 4), DS_FOUR(v, (i) + 8), DS_FOUR(v, (i) + 12)
#define DS_WGMMA(n, type, sums, a, b, add, ...)                                                   \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " add ", 0;\n\t"                              \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" sums "}, " a    \
               ", " b ", p, 1, 1, 0, 0;\n\t}"                                                      \
               : __VA_ARGS__                                                                      \
               : "l"(rows), "l"(columns), "r"(static_cast<int>(keep)))
// clang-format on

/// sum [64, 64 or 96] = rows [64, 16] times columns^T, + sum if `keep`; elements T.
template <typename T>
__device__ inline void multiply_rows(uint64_t rows, uint64_t columns, bool keep, float (&sum)[32]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    DS_WGMMA("64", "bf16", DS_SUMS_0_15 DS_SUMS_16_31, "%32", "%33", "%34", DS_SIXTEEN(sum, 0),
             DS_SIXTEEN(sum, 16));
  } else {
    DS_WGMMA("64", "f16", DS_SUMS_0_15 DS_SUMS_16_31, "%32", "%33", "%34", DS_SIXTEEN(sum, 0),
             DS_SIXTEEN(sum, 16));
  }
}
template <typename T>
__device__ inline void multiply_rows(uint64_t rows, uint64_t columns, bool keep, float (&sum)[48]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    DS_WGMMA("96", "bf16", DS_SUMS_0_15 DS_SUMS_16_31 DS_SUMS_32_47, "%48", "%49", "%50",
             DS_SIXTEEN(sum, 0), DS_SIXTEEN(sum, 16), DS_SIXTEEN(sum, 32));
  } else {
    DS_WGMMA("96", "f16", DS_SUMS_0_15 DS_SUMS_16_31 DS_SUMS_32_47, "%48", "%49", "%50",
             DS_SIXTEEN(sum, 0), DS_SIXTEEN(sum, 16), DS_SIXTEEN(sum, 32));
  }
}

#undef DS_WGMMA
#undef DS_SIXTEEN
#undef DS_FOUR
#undef DS_SUMS_32_47
#undef DS_SUMS_16_31
#undef DS_SUMS_0_15

}  // namespace ds::cuda
