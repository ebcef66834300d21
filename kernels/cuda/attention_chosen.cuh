// SPDX-License-Identifier: Apache-2.0
// The forward pass over chosen keys on tensor cores, for prompts over pages and for training over
// packed rows. Neighbouring rows choose much the same keys: a block of 64 units takes all keys that
// any of its rows reads, ascending, in tiles of 64 gathered rows, and hides from each row what it
// did not choose. Those keys are the set bits of a map of positions; where a key is among them is a
// count of the bits before.
#pragma once

#include "kernels/cuda/attention_mma.cuh"

namespace ds::cuda {

constexpr int kUnits = kBlockUnits<1>;
constexpr int kRoundKeys = 512;  // whose places and masks are in shared memory at once
constexpr int kMaskWords = kRoundKeys / 32;
/// Blocks of an SM, as far as registers go.
template <int kD>
constexpr int kChosenBlocks = kD <= 64 ? 4 : 2;

/// Shared memory beside two tiles of keys and values.
struct MapMemory {
  uint32_t *map, *before;  ///< [map_words]: bits of positions, how many are set in words before
  uint32_t* masks;         ///< [kUnits][kMaskWords] by row: which keys of the round it reads
  int32_t* positions;      ///< [kRoundKeys]

  template <int kD>
  __host__ __device__ static int64_t bytes(int64_t map_words) {
    return 4 * kTileElements<kD> * 2 + (2 * map_words + kUnits * kMaskWords + kRoundKeys) * 4;
  }
  __device__ MapMemory(void* behind_tiles, int map_words) {
    map = static_cast<uint32_t*>(behind_tiles);
    before = map + map_words;
    masks = before + map_words;
    positions = reinterpret_cast<int32_t*>(masks + kUnits * kMaskWords);
  }
};

/// The block's rows and their keys.
struct ChosenRows {
  const KeySelection& chosen;
  int64_t row0, n_kv_heads, head;  ///< first row in the call
  int count;

  /// The keys of every row, 32 at a time: run(row, first, count) where they are neighbours, else
  /// one(row, position) in each lane that has one. A warp for each row.
  template <typename Run, typename One>
  __device__ void for_keys(const Run& run, const One& one) const {
    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < count; r += kGroupWarps) {
      const int64_t list = (row0 + r) * n_kv_heads + head;
      const int32_t* keys = chosen.keys + list * chosen.stride;
      const int n = chosen.counts[list];
      for (int begin = 0; begin < n; begin += 32) {
        const int here = min(32, n - begin);
        const int position = lane < here ? keys[begin + lane] : 0;
        const int first = __shfl_sync(kAllLanes, position, 0);
        const int last = __shfl_sync(kAllLanes, position, here - 1);
        if (last - first == here - 1) {
          run(r, first, here);
        } else if (lane < here) {
          one(r, position);
        }
      }
    }
  }
};

/// The lowest n bits, n clamped to [0, 32].
__device__ inline uint32_t bits_below(int n) {
  return n <= 0 ? 0u : n >= 32 ? kAllLanes : (1u << n) - 1;
}

/// Sets bits [begin, end), 32 at most: a word each by the warp's first two lanes.
__device__ inline void set_run(uint32_t* map, int begin, int end) {
  const int lane = threadIdx.x % 32, from = (begin / 32 + lane) * 32;
  const uint32_t bits = bits_below(end - from) & ~bits_below(begin - from);
  if (lane < 2 && bits != 0) atomicOr(&map[from / 32], bits);
}
__device__ inline void set_bit(uint32_t* map, int at) { atomicOr(&map[at / 32], 1u << at % 32); }

/// Fills map and before; returns how many keys there are. All threads of the block.
__device__ inline int map_keys(const ChosenRows& rows, const MapMemory& m, int words) {
  __shared__ int of_warp[kGroupWarps];
  for (int i = threadIdx.x; i < words; i += kGroupThreads) m.map[i] = 0;
  __syncthreads();
  rows.for_keys([&](int, int first, int count) { set_run(m.map, first, first + count); },
                [&](int, int position) { set_bit(m.map, position); });
  __syncthreads();
  const int each = (words + kGroupThreads - 1) / kGroupThreads, lane = threadIdx.x % 32;
  const int begin = static_cast<int>(threadIdx.x) * each, end = min(words, begin + each);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += __popc(m.map[i]);
  int up_to = warp_sum_up_to(mine);
  if (lane == 31) of_warp[threadIdx.x / 32] = up_to;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int w = 0; w < kGroupWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x) / 32) up_to += of_warp[w];
    total += of_warp[w];
  }
  int before = up_to - mine;
  for (int i = begin; i < end; ++i) {
    m.before[i] = static_cast<uint32_t>(before);
    before += __popc(m.map[i]);
  }
  __syncthreads();
  return total;
}

/// Places and masks of the keys from `first` on. All threads of the block.
__device__ inline void begin_round(const ChosenRows& rows, const MapMemory& m, int words,
                                   int first) {
  __syncthreads();  // all are done with the round before
  for (int i = threadIdx.x; i < kUnits * kMaskWords; i += kGroupThreads) m.masks[i] = 0;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < words; i += kGroupWarps) {  // a lane for each bit
    const uint32_t bits = m.map[i];
    const int at = static_cast<int>(m.before[i]) + __popc(bits & bits_below(lane)) - first;
    if ((bits >> lane & 1u) != 0 && at >= 0 && at < kRoundKeys) m.positions[at] = i * 32 + lane;
  }
  __syncthreads();
  const auto place_of = [&](int position) {
    const uint32_t below = m.map[position / 32] & bits_below(position % 32);
    return static_cast<int>(m.before[position / 32]) + __popc(below) - first;
  };
  rows.for_keys(
      [&](int row, int position, int count) {  // neighbours are neighbours here, too
        const int at = place_of(position), begin = max(at, 0), end = min(at + count, kRoundKeys);
        if (begin < end) set_run(m.masks + row * kMaskWords, begin, end);
      },
      [&](int row, int position) {
        const int at = place_of(position);
        if (at >= 0 && at < kRoundKeys) set_bit(m.masks + row * kMaskWords, at);
      });
  __syncthreads();
}

/// Begins to copy `count` keys and their values, 64 at most; zeros beyond.
template <int kD, typename Keys, typename T>
__device__ inline void copy_chosen(const Keys& keys, const int32_t* positions, int count, T* to) {
  constexpr int kChunks = kD / 8, kRound = kGroupThreads / kChunks;
  const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
#pragma unroll
  for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kPassingRows; row += kRound) {
    const bool there = row < count && column < keys.units.d;
    const int64_t from = there ? keys.offset(positions[row]) + column : 0;
    copy_16(to + row * kRowStep<kD> + column, keys.k + from, there);
    copy_16(to + kTileElements<kD> + row * kRowStep<kD> + column, keys.v + from, there);
  }
}

/// The warp's units over the keys of one round, from two tiles in turn.
template <int kD, typename Keys, typename T>
__device__ inline void attend_round(const MapMemory& m, const Keys& all, float scale, int keys,
                                    const int (&mask_row)[2],
                                    const uint32_t (&queries)[1][kD / 16][4], T* tiles,
                                    Attended<1, kD / 8>& state) {
  const auto copy_keys = [&](int from, int buffer) {
    copy_chosen<kD>(all, m.positions + from, keys - from, tiles + buffer * 2 * kTileElements<kD>);
  };
  copy_keys(0, 0);
  for (int from = 0, buffer = 0; from < keys; from += kPassingRows, buffer ^= 1) {
    wait_for_copies();
    __syncthreads();  // all copies are there, and the other tile is done with
    if (from + kPassingRows < keys) copy_keys(from + kPassingRows, buffer ^ 1);
    const T* tile = tiles + buffer * 2 * kTileElements<kD>;
    float score[1][kPassingRows / 8][4];
    multiply_rows(queries, tile, score);
    uint32_t reads[1][2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* masks = m.masks + mask_row[half] * kMaskWords + from / 32;
      reads[0][half][0] = masks[0];
      reads[0][half][1] = masks[1];
    }
    hide_unchosen(reads, score);
    softmax_step(scale, score, state);
    add_weighted_rows(score, tile + kTileElements<kD>, state.out);
  }
}

/// Grid: kv heads, sequences, tiles of kUnits units. Source as attend_units has it; its keys also
/// say where one is:
///   int64_t offset(position)  in elements of k and v
template <typename Source, int kD>
__global__ void __launch_bounds__(kGroupThreads, kChosenBlocks<kD>)
    attend_chosen(const __grid_constant__ Source source, const __grid_constant__ Attend a,
                  const __grid_constant__ KeySelection chosen, int map_words) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  const auto keys = source.keys(blockIdx.y, blockIdx.x);
  const QueryUnits& units = keys.units;
  const int first = static_cast<int>(blockIdx.z) * kUnits;
  if (first >= units.count) return;
  const int first_row = units.row(first), last_row = units.row(first + kUnits - 1);
  using T = typename Source::Element;
  auto* tiles = reinterpret_cast<T*>(shared);
  const MapMemory m(tiles + 4 * kTileElements<kD>, map_words);
  const ChosenRows rows{chosen, units.row0 + first_row, gridDim.x, blockIdx.x,
                        last_row - first_row + 1};
  const int words = (units.before + last_row) / 32 + 1;
  const int n_keys = map_keys(rows, m, words);
  const int lane = threadIdx.x % 32, mine = first + static_cast<int>(threadIdx.x) / 32 * 16;
  const float* row_at[2];
  int mask_row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int unit = mine + half * 8 + lane / 4;
    row_at[half] = a.q + units.index(unit) * units.d;
    mask_row[half] = units.row(unit) - first_row;
  }
  uint32_t queries[1][kD / 16][4];
  load_operand<T>(row_at, units.d, queries[0]);
  Attended<1, kD / 8> state{};
  state.max[0][0] = state.max[0][1] = -INFINITY;
  for (int round = 0; round < n_keys; round += kRoundKeys) {
    begin_round(rows, m, words, round);
    attend_round<kD>(m, keys, a.scale * kLog2E, min(kRoundKeys, n_keys - round), mask_row, queries,
                     tiles, state);
  }
  store_attended(a, units, mine, state);
}

/// Whether positions up to max_keys have room.
inline bool map_fits(int64_t max_keys) {
  return MapMemory::bytes<128>(ceil_div(max_keys, 32)) <= kMaxSharedBytes;
}

/// max_units, max_keys: at least those of any sequence and kv head.
template <typename Source>
void attend_chosen_on_tensor_cores(const StreamState& s, const Source& source,
                                   const KeySelection& chosen, int64_t n_kv_heads,
                                   int64_t sequences, int64_t max_units, int64_t max_keys,
                                   int64_t d, const Attend& a) {
  const int64_t map_words = ceil_div(max_keys, 32);
  const dim3 grid(static_cast<unsigned>(n_kv_heads), static_cast<unsigned>(sequences),
                  static_cast<unsigned>(ceil_div(max_units, kUnits)));
  for_padded_head(d, [&]<int kD>() {
    const int64_t bytes = MapMemory::bytes<kD>(map_words);
    const auto kernel = attend_chosen<Source, kD>;
    if (!allow_shared(kernel, bytes)) return;
    launch_next("attention of chosen keys", kernel, grid, kGroupThreads, static_cast<size_t>(bytes),
                s.stream(), source, a, chosen, static_cast<int>(map_words));
  });
}

}  // namespace ds::cuda
