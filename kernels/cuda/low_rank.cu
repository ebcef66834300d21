// SPDX-License-Identifier: Apache-2.0
// The first half of low-rank parts, t = A x, and what the second half is told.
#include "kernels/cuda/linear.h"
#include "kernels/cuda/low_rank.cuh"

namespace ds::cuda {
namespace {

/// t [weights][t_rows][16] = A x. A block takes kRows rows of one weight, its warp j the rank j;
/// rows of one slot share the loads of A.
struct LowInputs {
  InputRows in;
  int64_t rows = 0, t_rows = 0;
  const int32_t* slot_of_row = nullptr;
  LowPairs pairs;
  float* t = nullptr;
};

template <typename T, bool kRounded, int kRows>
__global__ void __launch_bounds__(kLoraRank * 32)
    low_rank_rows(const __grid_constant__ LowInputs a) {
  begin_after_previous();
  const int lane = threadIdx.x % 32, rank = threadIdx.x / 32, w = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto chunks = static_cast<int>(a.in.padded / Chunk<T>::kElements);
  for (int64_t row = first; row < a.rows && row < first + kRows;) {
    const int32_t slot = a.slot_of_row[row];
    int count = 1;
    while (row + count < a.rows && row + count < first + kRows &&
           a.slot_of_row[row + count] == slot) {
      ++count;
    }
    float sum[kRows] = {}, squares[kRows] = {};
    const void* low = slot < 0 ? nullptr : a.pairs.at(w, slot).a;
    if (low != nullptr) {
      const auto* matrix = static_cast<const T*>(low) + rank * a.in.padded;
#pragma unroll 2
      for (int c = lane; c < chunks; c += 32) {
        const Chunk<T> weights = unpack_chunk(reinterpret_cast<const uint4*>(matrix)[c], T());
        for (int r = 0; r < kRows; ++r) {
          if (r >= count) break;
          const Chunk<T> x = input_chunk<T, kRounded>(a.in, row + r, c, squares[r]);
#pragma unroll
          for (int e = 0; e < Chunk<T>::kElements; ++e) sum[r] = fmaf(weights.v[e], x.v[e], sum[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float total = warp_sum(sum[r]);
      if (a.in.norm != nullptr)
        total *= norm_factor<T>(warp_sum(squares[r]), static_cast<float>(a.in.k), a.in.eps);
      if (r < count && lane == 0) a.t[(w * a.t_rows + row + r) * kLoraRank + rank] = total;
    }
    row += count;
  }
}

constexpr int kTileRows = 16, kTileWarps = 8;

/// The same of rounded rows, on tensor cores: a block takes 16 rows of one weight, a warp every 8th
/// step of 32 columns, and the warps' sums are added in order. Of a step a lane reads 8 neighbours
/// of each of its rows, x and A alike, so that these need not be the columns that the instruction
/// says.
template <typename T>
__global__ void __launch_bounds__(kTileWarps * 32)
    low_rank_tiles(const __grid_constant__ LowInputs a) {
  __shared__ float of_warp[kTileWarps][kTileRows][kLoraRank + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, w = blockIdx.y, group = lane / 4;
  const auto padded = static_cast<int>(a.in.padded);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const auto* rows = static_cast<const T*>(a.in.rounded);
  // Rows beyond the last: as that one, and not stored.
  const T* const x[2] = {rows + smaller(first + group, a.rows - 1) * padded,
                         rows + smaller(first + group + 8, a.rows - 1) * padded};
  const int row = threadIdx.x / kLoraRank, rank = threadIdx.x % kLoraRank;  // that it stores
  const int of_row = first + row < a.rows ? a.slot_of_row[first + row] : -1;
  WarpSlots slots;
  slots.look_up(a.slot_of_row, first + group, a.rows);
  const int slot0 = slots.next();
  const auto* low0 = slot0 < 0 ? nullptr : static_cast<const T*>(a.pairs.at(w, slot0).a);
  begin_after_previous();  // slots and factors do not wait for kernels (LoraSlots)
  for (int slot = slot0; slot >= 0; slot = slots.next()) {
    slots.done(slot);
    const auto* low = slot == slot0 ? low0 : static_cast<const T*>(a.pairs.at(w, slot).a);
    if (low == nullptr) continue;
    const T* const ranks[2] = {low + group * padded, low + (group + 8) * padded};
    float sum[2][4] = {};
#pragma unroll 3
    for (int column = warp * 32 + lane % 4 * 8; column - lane % 4 * 8 < padded;
         column += kTileWarps * 32) {
      uint4 of_x[2] = {}, of_a[2] = {};
      if (column < padded) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          of_x[half] = __ldg(reinterpret_cast<const uint4*>(x[half] + column));
          of_a[half] = __ldg(reinterpret_cast<const uint4*>(ranks[half] + column));
        }
      }
      const uint32_t lower[4] = {of_x[0].x, of_x[1].x, of_x[0].y, of_x[1].y};
      const uint32_t upper[4] = {of_x[0].z, of_x[1].z, of_x[0].w, of_x[1].w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add<T>(lower, of_a[half].x, of_a[half].y, sum[half]);
        multiply_add<T>(upper, of_a[half].z, of_a[half].w, sum[half]);
      }
    }
    const int pair = lane % 4 * 2;
    __syncthreads();  // what was left for the slot before has been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        of_warp[warp][group + e / 2 * 8][half * 8 + pair + e % 2] = sum[half][e];
    }
    __syncthreads();
    if (of_row != slot) continue;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kTileWarps; ++i) total += of_warp[i][row][rank];
    a.t[(w * a.t_rows + first + row) * kLoraRank + rank] = total;
  }
}

template <typename T, bool kRounded, int kRows>
void launch_rows(const StreamState& s, const LowInputs& a, int n_weights) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kRows)), static_cast<unsigned>(n_weights));
  launch_next("low-rank inputs", low_rank_rows<T, kRounded, kRows>, grid, kLoraRank * 32, 0,
              s.stream(), a);
}

template <typename T>
void launch_tiles(const StreamState& s, const LowInputs& a, int n_weights) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kTileRows)),
                  static_cast<unsigned>(n_weights));
  launch_next("low-rank inputs", low_rank_tiles<T>, grid, kTileWarps * 32, 0, s.stream(), a);
}

}  // namespace

LowPairs low_pairs(const LinearArgs& a) {
  LowPairs out;
  out.table = a.lora->table;
  for (int slot = 0; slot < a.lora->n_slots && out.table == nullptr; ++slot) {
    for (int w = 0; w < a.n_weights; ++w) {
      const LoraPair& pair = a.lora->pair[slot][w];
      out.value[w][slot] = {pair.a.data, pair.b.data, pair.scale};
    }
  }
  return out;
}

Additions additions_of(const LinearArgs& a, int64_t row) {
  Additions out;
  for (int w = 0; w < a.n_weights; ++w) out.bias[w] = a.bias[w];
  if (a.lora == nullptr) return out;
  out.slot_of_row = a.lora->slot_of_row + row;
  out.t = a.lora->t + row * kLoraRank;
  out.t_rows = a.rows;
  out.low = low_pairs(a);
  return out;
}

void low_rank_inputs(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows,
                     const void* rounded) {
  LowInputs low{};
  low.in = input_rows(a, row, rounded);
  low.rows = rows;
  low.t_rows = a.rows;
  low.slot_of_row = a.lora->slot_of_row + row;
  low.t = a.lora->t + row * kLoraRank;
  low.pairs = low_pairs(a);
  const bool many = rows > kFewRows;
  with_element(a.w[0].format, [&]<typename T>(T) {
    if constexpr (sizeof(T) == 2) {
      if (rounded != nullptr)
        return many ? launch_tiles<T>(s, low, a.n_weights)
                    : launch_rows<T, true, 1>(s, low, a.n_weights);
    }
    many ? launch_rows<T, false, 4>(s, low, a.n_weights)
         : launch_rows<T, false, 1>(s, low, a.n_weights);
  });
}

}  // namespace ds::cuda
