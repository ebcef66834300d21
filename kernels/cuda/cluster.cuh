// SPDX-License-Identifier: Apache-2.0
// Clusters: blocks that run at the same time and read each other's shared memory (PTX ISA, "Cluster
// of Cooperative Thread Arrays"; launch()).
#pragma once

#include "kernels/cuda/mma.cuh"

namespace ds::cuda {

/// All threads of all blocks of the cluster; what they wrote before is seen after it.
__device__ inline void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

/// What lies where `at` is in this block's shared memory, in that of the cluster's block `rank`.
__device__ inline float load_of_block(const float* at, int rank) {
  uint32_t there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(at)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}

}  // namespace ds::cuda
