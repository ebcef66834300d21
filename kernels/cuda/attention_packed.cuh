// SPDX-License-Identifier: Apache-2.0
// Training's sequences as kernels on tensor cores read them, in the stream's scratch: keys and
// values in 16 bits, each sequence's prefix and own ones in a row, and in the backward, of BF16,
// chosen keys as bits.
#pragma once

#include <algorithm>

#include "kernels/cuda/attention_mma.cuh"

namespace ds::cuda {

constexpr int kSequences = 32;  // of one launch: they travel in its parameters
constexpr int kRoundThreads = 256;
constexpr int kMarkWarps = 4;

struct PackedSequence {
  TrainSequence s;
  int64_t key0, unit0;  ///< first key and, times the group, first unit in the scratch
};

template <typename T>
struct PackedKeys {
  static constexpr bool kChosen = false;
  QueryUnits units;
  const T *k, *v;  ///< of the kv head at the sequence's first key
  int64_t stride;

  __device__ PassingRows rows(int tile, int n_keys) const {
    const int64_t first = int64_t{tile} * kPassingRows * stride;
    return {{first, first + kPassingRows / 2 * stride}, stride, n_keys - tile * kPassingRows};
  }
  __device__ int64_t offset(int position) const { return position * stride; }
};

/// With a bit for each key that a row reads, `shift` bits on: own keys begin at a multiple of 64.
struct ChosenKeys : PackedKeys<Bf16> {
  static constexpr bool kChosen = true;
  const uint32_t* bits;  ///< of the kv head and the sequence's first row
  int64_t row_words;     ///< from row to row
  int shift;

  /// Which of the keys from this one on the lane's rows read, whose keys so far `seen` counts;
  /// false: none of the warp's reads any.
  template <int kM, int kWords>
  __device__ bool chosen(int first_key, const int (&seen)[kM][2],
                         uint32_t (&to)[kM][2][kWords]) const {
    const int first = first_key + shift;
    uint32_t any = 0;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* words = bits + (seen[m][half] - units.before - 1) * row_words + first / 32;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          to[m][half][w] = __funnelshift_r(words[w], words[w + 1], first % 32);
          any |= to[m][half][w];
        }
      }
    }
    return __any_sync(kAllLanes, any != 0);
  }
};

/// What the first pass of the backward leaves to the second: units of a kv head in a row.
struct RoundedUnits {
  Bf16 *q, *dout;
  float2* stats;    ///< {lse * log2(e), D}
  int64_t of_head;  ///< units of a kv head
};

template <typename T>
struct PackedSource {
  using Element = T;
  int64_t n_heads, n_kv_heads, d;
  T *k, *v;  ///< [keys][n_kv_heads * d] in the scratch
  RoundedUnits rounded;
  PackedSequence sequences[kSequences];

  __device__ PackedKeys<T> keys(int64_t sequence, int64_t head) const {
    const PackedSequence& p = sequences[sequence];
    const auto group = static_cast<int>(n_heads / n_kv_heads);
    const QueryUnits units{p.s.row0,
                           n_heads,
                           static_cast<int>(p.s.n_rows) * group,
                           group,
                           static_cast<int>(head) * group,
                           static_cast<int>(p.s.prefix),
                           static_cast<int>(d)};
    const int64_t stride = n_kv_heads * d, at = p.key0 * stride + head * d;
    return {units, k + at, v + at, stride};
  }
  /// The same places with other elements of 16 bits.
  template <typename U>
  PackedSource<U> of() const {
    PackedSource<U> out{n_heads, n_kv_heads, d, reinterpret_cast<U*>(k), reinterpret_cast<U*>(v),
                        rounded, {}};
    std::copy(std::begin(sequences), std::end(sequences), out.sequences);
    return out;
  }
  /// The sequence's units in the scratch.
  __device__ RoundedUnits units(int64_t sequence, int64_t head) const {
    const int64_t group = n_heads / n_kv_heads;
    const int64_t at = head * rounded.of_head + sequences[sequence].unit0 * group;
    return {rounded.q + at * d, rounded.dout + at * d, rounded.stats + at, rounded.of_head};
  }
};

struct ChosenSource : PackedSource<Bf16> {
  uint32_t* bits;  ///< [rows][n_kv_heads][words] in the scratch
  int64_t words;   ///< an even number

  /// Of lists of positions up to `keys`, a word more than any tile has.
  __host__ __device__ static int64_t words_for(int64_t keys) {
    return 2 * (ceil_div(keys + kPassingRows, kPassingRows) + 1);
  }
  __device__ ChosenKeys keys(int64_t sequence, int64_t head) const {
    const PackedSequence& p = sequences[sequence];
    const auto into = static_cast<int>(p.s.prefix % kPassingRows);
    return {PackedSource<Bf16>::keys(sequence, head), bits + (p.unit0 * n_kv_heads + head) * words,
            n_kv_heads * words, into > 0 ? kPassingRows - into : 0};
  }
};

inline bool marks_fit(int64_t keys) {
  return kMarkWarps * ChosenSource::words_for(keys) * 4 <= kMaxSharedBytes;
}

/// A warp for each list. Grid: rows by kMarkWarps, kv heads, sequences.
static __global__ void mark_chosen(const __grid_constant__ ChosenSource source,
                                   KeySelection chosen) {
  begin_after_previous();
  extern __shared__ uint32_t marks[];  // [kMarkWarps][words]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const ChosenKeys keys = source.keys(blockIdx.z, blockIdx.y);
  const int row = static_cast<int>(blockIdx.x) * kMarkWarps + warp;
  if (row * keys.units.group >= keys.units.count) return;
  uint32_t* mine = marks + warp * source.words;
  for (int64_t i = lane; i < source.words; i += 32) mine[i] = 0;
  __syncwarp();
  const int64_t list = (keys.units.row0 + row) * source.n_kv_heads + blockIdx.y;
  for (int i = lane; i < chosen.counts[list]; i += 32) {
    const int at = chosen.keys[list * chosen.stride + i] + keys.shift;
    atomicOr(&mine[at / 32], 1u << at % 32);
  }
  __syncwarp();
  uint32_t* to = const_cast<uint32_t*>(keys.bits) + row * keys.row_words;
  for (int64_t i = lane; i < source.words; i += 32) to[i] = mine[i];
}

/// Grid: blocks of a loop, sequences, {keys, values}.
template <typename T>
__global__ void round_keys(const __grid_constant__ PackedSource<T> source,
                           const float* __restrict__ k, const float* __restrict__ v) {
  begin_after_previous();
  const PackedSequence& p = source.sequences[blockIdx.y];
  const bool keys = blockIdx.z == 0;
  const int64_t width = source.n_kv_heads * source.d, before = p.s.prefix * width;
  const int64_t chunks = (p.s.prefix + p.s.n_rows) * width / 8;
  const float* own = (keys ? k : v) + p.s.row0 * width;
  const float* prefix = keys ? p.s.prefix_k : p.s.prefix_v;
  T* to = (keys ? source.k : source.v) + p.key0 * width;
  for (int64_t n = loop_begin(); n < chunks; n += loop_step()) {
    const int64_t at = n * 8;
    const auto* from =
        reinterpret_cast<const float4*>(at < before ? prefix + at : own + at - before);
    store_eight(to + at, from[0], from[1]);
  }
}

}  // namespace ds::cuda
