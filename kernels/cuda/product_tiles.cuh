// SPDX-License-Identifier: Apache-2.0
// Products of many rows by tiles, on wgmma. One warpgroup of a block copies boxes of both operands
// into stages of shared memory, those of the weights before it waits for the kernel that makes the
// rows; the others multiply what has arrived, and do with the sums what comes next, so that these
// never wait in memory. A block takes tile after tile: the copies of the next one begin while the
// last one's sums are finished.
#pragma once

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/state.h"

namespace ds::cuda {

/// 64 rows for each of kWarpgroups, times kParts instructions of kWidth columns.
template <int kWarpgroups_, int kParts_, int kWidth_>
struct Tile {
  static constexpr int kWarpgroups = kWarpgroups_, kParts = kParts_, kWidth = kWidth_;
  static constexpr int kRows = 64 * kWarpgroups, kColumns = kParts * kWidth;
  static constexpr int kThreads = kWarpgroupThreads * (kWarpgroups + 1);
  static constexpr int kRowElements = kRows * kBoxColumns;
  static constexpr int kStageElements = kRowElements + kColumns * kBoxColumns;
  static constexpr int64_t kBarrierBytes = 1024 + 256;  ///< and up to the first multiple of 1,024
  static constexpr int kStages =
      static_cast<int>(smaller(9, (kMaxSharedBytes - kBarrierBytes) / (2 * kStageElements)));
  static constexpr int64_t kBytes = kStages * kStageElements * 2 + kBarrierBytes;

  /// Cycles for 64 of k, as measured: the tensor cores' own time, but not less than what it takes
  /// from one step to the next; and those around a tile.
  static constexpr int64_t kStepCycles = larger(280, 2 * kWarpgroups * kColumns);
  static constexpr int kEndCycles = 700 + kWarpgroups * kColumns * 4;
};

/// A lane's place in a tile: its sums are those of `row` and row + 8 at columns `column` + 8 c and
/// the one after, c from 0.
struct TilePlace {
  int rows, columns;  ///< of the result
  int row, column;

  __device__ bool has_row(int half) const { return row + 8 * half < rows; }
};

struct TileArgs {
  CUtensorMap x, w[2];
  int rows, columns, steps;  ///< columns of one matrix; steps of kBoxColumns of k
};

/// Sums of a warpgroup's 64 rows.
template <typename Tile>
struct TileSums {
  static constexpr int kEights = Tile::kWidth / 8;  ///< of a part
  float v[Tile::kParts][kEights][4];

  __device__ float (&of_part(int p))[Tile::kWidth / 2] {
    return reinterpret_cast<float(&)[Tile::kWidth / 2]>(v[p]);
  }
  /// Those of eight c of columns: a C of mma.cuh.
  __device__ float (&eight(int c))[4] { return v[c / kEights][c % kEights]; }
  /// Column e of the lane's two, in its upper or lower row.
  __device__ float& at(int c, int half, int e) { return eight(c)[half * 2 + e]; }
};

/// The tiles in the order in which blocks take them.
template <typename Tile, int kMatrices>
struct TileWalk {
  static constexpr int kOutputs = Tile::kColumns / kMatrices;  ///< of a matrix in a tile
  int across, count;

  __device__ explicit TileWalk(const TileArgs& a)
      : across((a.columns + kOutputs - 1) / kOutputs),
        count(across * ((a.rows + Tile::kRows - 1) / Tile::kRows)) {}
  __device__ int row(int tile) const { return tile / across * Tile::kRows; }
  __device__ int column(int tile) const { return tile % across * kOutputs; }
};

/// The stages that tiles pass through, in a circle.
template <typename Tile, typename T>
struct TileStages {
  T* memory;
  uint64_t *full, *empty;
  int at = 0;
  uint32_t parity = 0;

  __device__ explicit TileStages(char* shared)
      : memory(reinterpret_cast<T*>(shared + (1024 - (shared_address(shared) & 1023)) % 1024)),
        full(reinterpret_cast<uint64_t*>(memory + Tile::kStages * Tile::kStageElements)),
        empty(full + Tile::kStages) {}
  __device__ void open() const {
    for (int s = 0; s < Tile::kStages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(empty + s, Tile::kWarpgroups);
    }
    publish_barriers();
  }
  __device__ T* rows() const { return memory + at * Tile::kStageElements; }
  __device__ T* weights() const { return rows() + Tile::kRowElements; }
  __device__ void next() {
    if (++at == Tile::kStages) {
      at = 0;
      parity ^= 1;
    }
  }
};

/// By one thread: all boxes of the block's tiles.
template <typename Tile, int kMatrices, typename T>
__device__ inline void copy_tiles(const TileArgs& a, TileStages<Tile, T> to) {
  using Walk = TileWalk<Tile, kMatrices>;
  const Walk walk(a);
  const auto copy_weights = [&](int step, int tile) {
    expect_bytes(to.full + to.at, Tile::kStageElements * 2);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      copy_box(to.weights() + m * Walk::kOutputs * kBoxColumns, a.w[m], step * kBoxColumns,
               walk.column(tile), to.full + to.at);
    }
  };
  let_next_begin();
  const TileStages<Tile, T> begin = to;
  const int first = static_cast<int>(blockIdx.x);
  const int early = min(a.steps, Tile::kStages);
  for (int step = 0; step < early; ++step, to.next()) copy_weights(step, first);
  wait_for_previous();
  to = begin;
  for (int tile = first; tile < walk.count; tile += static_cast<int>(gridDim.x)) {
    for (int step = 0; step < a.steps; ++step, to.next()) {
      if (tile != first || step >= early) {
        wait_for_phase(to.empty + to.at, to.parity ^ 1);
        copy_weights(step, tile);
      }
      copy_box(to.rows(), a.x, step * kBoxColumns, walk.row(tile), to.full + to.at);
    }
  }
}

/// The warpgroup's sums of one tile.
template <typename Tile, typename T>
__device__ inline void multiply_tile(const TileArgs& a, int warpgroup, TileStages<Tile, T>& from,
                                     TileSums<Tile>& sums) {
  const bool tells = threadIdx.x % kWarpgroupThreads == 0;
  int before = 0;
  for (int step = 0; step < a.steps; ++step) {
    wait_for_phase(from.full + from.at, from.parity);
    const uint64_t x = describe_rows(from.rows() + warpgroup * 64 * kBoxColumns);
    const uint64_t w = describe_rows(from.weights());
    begin_products();
#pragma unroll
    for (int i = 0; i < kBoxColumns / 16; ++i) {
#pragma unroll
      for (int p = 0; p < Tile::kParts; ++p) {
        multiply_rows<T>(x + i * kNextColumns,
                         w + i * kNextColumns + p * (Tile::kWidth / 8) * kNextEightRows,
                         step > 0 || i > 0, sums.of_part(p));
      }
    }
    commit_products();
    wait_for_products<1>();
    if (step > 0 && tells) arrive(from.empty + before);  // its products are done
    before = from.at;
    from.next();
  }
  wait_for_products<0>();
  if (tells) arrive(from.empty + before);
}

/// End says what becomes of sums:
///   static constexpr int kMatrices: 1, or 2 whose outputs of the same numbers are in one tile;
///   look_up<Tile>(TilePlace): what it wants to know, asked for while products are made;
///   store<T, Tile>(TilePlace, TileSums<Tile>&, that).
template <typename T, typename Tile, typename End>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    multiply_tiles(const __grid_constant__ TileArgs a, const __grid_constant__ End end) {
  extern __shared__ char shared[];
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  TileStages<Tile, T> stages(shared);
  if (threadIdx.x == 0) stages.open();
  __syncthreads();
  if (warpgroup == Tile::kWarpgroups) {
    if constexpr (Tile::kWarpgroups == 2) give_registers_back<24>();
    if (threadIdx.x % kWarpgroupThreads == 0) copy_tiles<Tile, End::kMatrices>(a, stages);
    return;
  }
  if constexpr (Tile::kWarpgroups == 2) take_registers<240>();
  wait_for_previous();
  const TileWalk<Tile, End::kMatrices> walk(a);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int tile = static_cast<int>(blockIdx.x); tile < walk.count;
       tile += static_cast<int>(gridDim.x)) {
    const TilePlace place{a.rows, a.columns, walk.row(tile) + warp * 16 + lane / 4,
                          walk.column(tile) + lane % 4 * 2};
    const auto ahead = end.template look_up<Tile>(place);
    TileSums<Tile> sums;
    multiply_tile<Tile, T>(a, warpgroup, stages, sums);
    end.template store<T, Tile>(place, sums, ahead);
  }
}

}  // namespace ds::cuda
