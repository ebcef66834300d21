// SPDX-License-Identifier: Apache-2.0
// Paged attention of prompts over chosen keys, over pages of BF16 or FP16 on tensor cores.
// Neighbouring rows choose much the same keys: a block of 64 units takes all keys that any of its
// rows reads, ascending, in tiles of 64 gathered rows, and hides from each row what it did not
// choose. Those keys are the set bits of a map of positions; where a key is among them is a count
// of the bits before.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"

namespace ds::cuda {
namespace {

constexpr int kUnits = kBlockUnits<1>;
constexpr int kRoundKeys = 512;  // whose places and masks are in shared memory at once
constexpr int kMaskWords = kRoundKeys / 32;
/// Blocks of an SM, as far as registers go.
template <int kD>
constexpr int kChosenBlocks = kD <= 64 ? 4 : 2;

struct Chosen {
  AttentionArgs a;
  KeySelection chosen;
  int map_words;  ///< for positions up to max_keys
};

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

  /// f(row of the block, position) for every key that a row reads; a warp for each row.
  template <typename F>
  __device__ void for_keys(const F& f) const {
    for (int r = threadIdx.x / 32; r < count; r += kGroupWarps) {
      const int64_t list = (row0 + r) * n_kv_heads + head;
      const int32_t* keys = chosen.keys + list * chosen.stride;
      const int n = chosen.counts[list];
      for (int i = threadIdx.x % 32; i < n; i += 32) f(r, keys[i]);
    }
  }
};

/// Fills map and before; returns how many keys there are. All threads of the block.
__device__ inline int map_keys(const ChosenRows& rows, const MapMemory& m, int words) {
  __shared__ int of_warp[kGroupWarps];
  for (int i = threadIdx.x; i < words; i += kGroupThreads) m.map[i] = 0;
  __syncthreads();
  rows.for_keys(
      [&](int, int32_t position) { atomicOr(&m.map[position / 32], 1u << position % 32); });
  __syncthreads();
  const int each = (words + kGroupThreads - 1) / kGroupThreads, lane = threadIdx.x % 32;
  const int begin = static_cast<int>(threadIdx.x) * each, end = min(words, begin + each);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += __popc(m.map[i]);
  int up_to = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += other;
  }
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
  for (int i = threadIdx.x; i < words; i += kGroupThreads) {
    int at = static_cast<int>(m.before[i]) - first;
    if (at >= kRoundKeys) continue;
    for (uint32_t bits = m.map[i]; bits != 0; bits &= bits - 1, ++at) {
      if (at >= 0 && at < kRoundKeys) m.positions[at] = i * 32 + __ffs(static_cast<int>(bits)) - 1;
    }
  }
  __syncthreads();
  rows.for_keys([&](int row, int32_t position) {
    const uint32_t below = m.map[position / 32] & ((1u << position % 32) - 1);
    const int at = static_cast<int>(m.before[position / 32]) + __popc(below) - first;
    if (at >= 0 && at < kRoundKeys) {
      atomicOr(&m.masks[row * kMaskWords + at / 32], 1u << at % 32);
    }
  });
  __syncthreads();
}

/// Where keys are.
template <typename T>
struct Pages {
  const T *k, *v;  ///< of the kv head in page 0
  const int32_t* table;
  int64_t page_step;  ///< elements

  /// Begins to copy `count` keys and their values, 64 at most; zeros beyond.
  template <int kD>
  __device__ void copy(const int32_t* positions, int count, int d, T* to) const {
    constexpr int kChunks = kD / 8, kRound = kGroupThreads / kChunks;
    const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kPassingRows; row += kRound) {
      const bool there = row < count && column < d;
      int64_t from = 0;
      if (there) {
        const int position = positions[row];
        from = table[position / kKvPageTokens] * page_step + position % kKvPageTokens * d + column;
      }
      copy_16(to + row * kRowStep<kD> + column, k + from, there);
      copy_16(to + kTileElements<kD> + row * kRowStep<kD> + column, v + from, there);
    }
  }
};

/// Grid: kv heads, sequences, tiles of kUnits units.
template <typename T, int kD>
__global__ void __launch_bounds__(kGroupThreads, kChosenBlocks<kD>)
    attend_chosen(const __grid_constant__ Chosen r) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  const AttentionArgs& a = r.a;
  const int64_t sequence = blockIdx.y, head = blockIdx.x, d = a.kv.head_dim;
  const QueryUnits units = paged_units(a, sequence, head);
  const int first = static_cast<int>(blockIdx.z) * kUnits;
  if (first >= units.count) return;
  const int first_row = units.row(first), last_row = units.row(first + kUnits - 1);
  auto* tiles = reinterpret_cast<T*>(shared);
  const MapMemory m(tiles + 4 * kTileElements<kD>, r.map_words);
  const ChosenRows rows{r.chosen, units.row0 + first_row, a.kv.n_kv_heads, head,
                        last_row - first_row + 1};
  const int words = (units.before + last_row) / 32 + 1;
  const int n_keys = map_keys(rows, m, words);
  const int64_t at = head * kKvPageTokens * d;
  const Pages<T> pages{static_cast<const T*>(a.kv.k) + at, static_cast<const T*>(a.kv.v) + at,
                       a.table + sequence * a.table_width, a.kv.n_kv_heads * kKvPageTokens * d};

  const int lane = threadIdx.x % 32, mine = first + static_cast<int>(threadIdx.x) / 32 * 16;
  uint32_t queries[1][kD / 16][4];
  const float* row_at[2];
  int mask_row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int unit = mine + half * 8 + lane / 4;
    row_at[half] = a.q + units.index(unit) * d;
    mask_row[half] = units.row(unit) - first_row;
  }
  load_operand<T>(row_at, units.d, queries[0]);
  Attended<1, kD / 8> state{};
  state.max[0][0] = state.max[0][1] = -INFINITY;
  for (int round = 0; round < n_keys; round += kRoundKeys) {
    begin_round(rows, m, words, round);
    const int keys = min(kRoundKeys, n_keys - round);
    const auto copy_keys = [&](int from, int buffer) {
      pages.template copy<kD>(m.positions + from, keys - from, units.d,
                              tiles + buffer * 2 * kTileElements<kD>);
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
      softmax_step(a.scale * kLog2E, score, state);
      add_weighted_rows(score, tile + kTileElements<kD>, state.out);
    }
  }
  store_attended({a.q, a.scale, a.out, nullptr}, units, mine, state);
}

}  // namespace

bool attend_chosen_on_tensor_cores(const StreamState& s, const AttentionArgs& a,
                                   const KeySelection& chosen) {
  const int64_t d = a.kv.head_dim, units = a.max_rows * (a.n_heads / a.kv.n_kv_heads);
  const int64_t map_words = ceil_div(a.max_keys, 32);
  if (a.kv.dtype == KvDtype::kF32 || !suits_tensor_cores(d, a.scale)) return false;
  if (!is_aligned16(a.q) || !is_aligned16(a.out) || !is_aligned16(a.kv.k) || !is_aligned16(a.kv.v))
    return false;
  if (MapMemory::bytes<128>(map_words) > kMaxSharedBytes) return false;
  const dim3 grid(static_cast<unsigned>(a.kv.n_kv_heads), static_cast<unsigned>(a.batch),
                  static_cast<unsigned>(ceil_div(units, kUnits)));
  for_padded_head(d, [&]<int kD>() {
    const int64_t bytes = MapMemory::bytes<kD>(map_words);
    const auto kernel =
        a.kv.dtype == KvDtype::kF16 ? attend_chosen<Half, kD> : attend_chosen<Bf16, kD>;
    if (!allow_shared(kernel, bytes)) return;
    launch_next("attention", kernel, grid, kGroupThreads, static_cast<size_t>(bytes), s.stream(),
                Chosen{a, chosen, static_cast<int>(map_words)});
  });
  return true;
}

}  // namespace ds::cuda
