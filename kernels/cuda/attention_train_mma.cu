// SPDX-License-Identifier: Apache-2.0
// Attention of training on tensor cores, where products may round their operands. Keys and values
// are rounded to 16 bits once per call, each sequence's prefix and own ones in a row, in the
// stream's scratch. The backward recomputes p from lse in two passes, as attention_train.cu does:
// one by units for dq, which leaves q, dout, lse and D = dout . out as the second reads them; one
// by keys for dk and dv. Every gradient is summed by one block in a fixed order. D and lse stay
// FP32, p and ds = p (dout . v - D) scale are rounded as operands. With chosen keys, tiles are
// passed over of which no row of a warp reads a key.
#include "kernels/cuda/attention_chosen.cuh"
#include "kernels/cuda/attention_mma.h"
#include "kernels/cuda/attention_packed.cuh"

namespace ds::cuda {
namespace {

struct Gradients {
  const float *q, *out, *lse, *dout;
  float *dq, *dk, *dv;
  float scale;  ///< above 0
};

/// Factors of keys for dq, of what they are for dk: score becomes p, back becomes p (back - D).
template <int kM, int kN>
__device__ inline void make_factors(float scale, const float2 (&stats)[kM][2],
                                    float (&score)[kM][kN][4], float (&back)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 of_row = stats[m][e / 2];
        const float p = exp2_of(fmaf(score[m][n][e], scale, -of_row.x));
        back[m][n][e] = p * (back[m][n][e] - of_row.y);
      }
    }
  }
}

/// What the lanes hold of the warp's units in the first pass: q and dout as operands, and of each
/// row what RoundedUnits calls its stats.
template <int kM, int kSteps>
struct Stay {
  uint32_t q[kM][kSteps][4], dout[kM][kSteps][4];
  float2 stats[kM][2];
};

/// `mine`: the warp's first unit.
template <int kM, int kSteps>
__device__ inline void load_units(const Gradients& g, const QueryUnits& units, int mine,
                                  Stay<kM, kSteps>& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int64_t index[2] = {units.index(mine + m * 16 + lane / 4),
                              units.index(mine + m * 16 + 8 + lane / 4)};
    const float* const q[2] = {g.q + index[0] * units.d, g.q + index[1] * units.d};
    load_operand<Bf16>(q, units.d, to.q[m]);
    float dot[2] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = s * 16 + i / 2 * 8 + lane % 4 * 2;
        const int64_t at = index[i % 2] * units.d;
        const auto dout = pair_at<float2>(g.dout + at, column, units.d);
        const auto out = pair_at<float2>(g.out + at, column, units.d);
        dot[i % 2] = fmaf(dout.x, out.x, fmaf(dout.y, out.y, dot[i % 2]));
        to.dout[m][s][i] = as_pair<Bf16>(dout);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to.stats[m][half] = make_float2(g.lse[index[half]] * kLog2E, quad_sum(dot[half]));
    }
  }
}

/// For the second pass.
template <int kM, int kSteps>
__device__ inline void keep_units(const QueryUnits& units, int mine, const Stay<kM, kSteps>& from,
                                  const RoundedUnits& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = mine + m * 16 + half * 8 + lane / 4;
      if (unit >= units.count) continue;
      const int64_t at = int64_t{unit} * units.d;
      if (lane % 4 == 0) to.stats[unit] = from.stats[m][half];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = half; i < 4; i += 2) {
          const int column = s * 16 + i / 2 * 8 + lane % 4 * 2;
          if (column >= units.d) continue;
          *reinterpret_cast<uint32_t*>(to.q + at + column) = from.q[m][s][i];
          *reinterpret_cast<uint32_t*>(to.dout + at + column) = from.dout[m][s][i];
        }
      }
    }
  }
}

/// Group 0's sums become those of both; true there.
template <typename Sums>
__device__ inline bool add_groups(float* memory, Sums& sums) {
  constexpr int kValues = sizeof(sums) / sizeof(float);
  float other[kValues];
  auto& mine = reinterpret_cast<float(&)[kValues]>(sums);
  if (!hand_over<kValues>(mine, memory, other)) return false;
#pragma unroll
  for (int i = 0; i < kValues; ++i) mine[i] += other[i];
  return true;
}

template <int kM, int kColumns>
__device__ inline void store_query_gradient(const Gradients& g, const QueryUnits& units, int mine,
                                            const float (&dq)[kM][kColumns][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = mine + m * 16 + half * 8 + lane / 4;
      if (unit >= units.count) continue;
      float* to = g.dq + units.index(unit) * units.d + lane % 4 * 2;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c * 8 >= units.d) continue;
        *reinterpret_cast<float2*>(to + c * 8) =
            make_float2(dq[m][c][2 * half] * g.scale, dq[m][c][2 * half + 1] * g.scale);
      }
    }
  }
}

/// The group's tiles of keys for dq; memory as attend_keys has it.
template <int kD, int kGroups, typename Keys, int kM, int kColumns>
__device__ inline void pass_keys(const Keys& keys, const RoundedUnits& to, const Gradients& g,
                                 int first, Bf16* memory, float (&dq)[kM][kColumns][4]) {
  constexpr int kN = 4;  // 32 keys at once: two products of them and the sums fill the registers
  const QueryUnits& units = keys.units;
  const int group = threadIdx.x / kGroupThreads, lane = threadIdx.x % 32;
  const int mine = first + threadIdx.x / 32 % kGroupWarps * kM * 16;
  const int n_keys = units.seen(first + kBlockUnits<kM> - 1);
  const int n_tiles = (n_keys + kPassingRows - 1) / kPassingRows;
  const auto copy_keys = [&](int tile, Bf16* at) {
    const PassingRows rows = keys.rows(tile, n_keys);
    copy_tile<kD>(keys.k, rows, units.d, at);
    copy_tile<kD>(keys.v, rows, units.d, at + kTileElements<kD>);
  };
  if (group < n_tiles) copy_keys(group, memory);
  Stay<kM, kD / 16> stay;
  load_units(g, units, mine, stay);
  if (group == 0) keep_units(units, mine, stay, to);
  int seen[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      seen[m][half] = units.seen(mine + m * 16 + half * 8 + lane / 4);
    }
  }
  const int seen_by_first = units.seen(mine), seen_by_last = units.seen(mine + kM * 16 - 1);
  int buffer = 0;
  for (int tile = group; tile < n_tiles; tile += kGroups, buffer ^= 1) {
    wait_for_copies();
    barrier(1 + group, kGroupThreads);
    if (tile + kGroups < n_tiles) {
      copy_keys(tile + kGroups, memory + (buffer ^ 1) * 2 * kTileElements<kD>);
    }
    const Bf16* tile_keys = memory + buffer * 2 * kTileElements<kD>;
#pragma unroll 1
    for (int part = 0; part < kPassingRows; part += 8 * kN) {
      const int first_key = tile * kPassingRows + part;
      if (first_key >= seen_by_last) break;
      uint32_t chosen[kM][2][kN / 4];
      if constexpr (Keys::kChosen) {
        if (!keys.chosen(first_key, seen, chosen)) continue;
      }
      const Bf16* at = tile_keys + part * kRowStep<kD>;
      float score[kM][kN][4], back[kM][kN][4];
      multiply_rows(stay.q, at, score);
      if constexpr (Keys::kChosen) {
        hide_unchosen(chosen, score);
      } else if (first_key + 8 * kN > seen_by_first) {
        hide_unseen(first_key, seen, score);
      }
      multiply_rows(stay.dout, at + kTileElements<kD>, back);
      make_factors(g.scale * kLog2E, stay.stats, score, back);
      add_weighted_rows(back, at, dq);
    }
  }
}

/// dq. Grid as of attend_units.
template <typename Source, int kD, int kGroups>
__global__ void __launch_bounds__(kGroups* kGroupThreads, kBlocksOfSm<kGroups>)
    query_gradient(const __grid_constant__ Source source, const __grid_constant__ Gradients g) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  constexpr int kM = kSixteens<kD>;
  const auto keys = source.keys(blockIdx.y, blockIdx.x);
  const int first = static_cast<int>(gridDim.z - 1 - blockIdx.z) * kBlockUnits<kM>;
  if (first >= keys.units.count) return;
  float dq[kM][kD / 8][4] = {};
  auto* memory = reinterpret_cast<Bf16*>(shared);
  const int group = threadIdx.x / kGroupThreads;
  pass_keys<kD, kGroups>(keys, source.units(blockIdx.y, blockIdx.x), g, first,
                         memory + group * 4 * kTileElements<kD>, dq);
  if constexpr (kGroups == 2) {
    if (!add_groups(reinterpret_cast<float*>(shared), dq)) return;
  }
  store_query_gradient(g, keys.units, first + threadIdx.x / 32 % kGroupWarps * kM * 16, dq);
}

/// A passing tile of units: q, dout, stats, then which of the block's 64 keys are chosen.
template <int kD, bool kChosen>
constexpr int kUnitBytes = 2 * kTileElements<kD> * 2 + kPassingRows*(kChosen ? 16 : 8);

/// first_key: of the block, counted in the sequence's own.
template <int kD, typename Keys>
__device__ inline void copy_units(const RoundedUnits& from, const Keys& keys, int first_key,
                                  int first, char* to) {
  const QueryUnits& units = keys.units;
  auto* tile = reinterpret_cast<Bf16*>(to);
  const int count = units.count - first;
  const int64_t at = int64_t{first} * units.d;
  const PassingRows rows{{at, at + kPassingRows / 2 * units.d}, units.d, count};
  copy_tile<kD>(from.q, rows, units.d, tile);
  copy_tile<kD>(from.dout, rows, units.d, tile + kTileElements<kD>);
  const int thread = threadIdx.x % kGroupThreads;
  if (thread < kPassingRows) {
    const bool there = thread < count;
    copy_8(to + 4 * kTileElements<kD> + thread * 8,
           there ? from.stats + first + thread : from.stats, there);
    if constexpr (Keys::kChosen) {
      const int at = (units.before + first_key + keys.shift) / 32;
      copy_8(to + 4 * kTileElements<kD> + (kPassingRows + thread) * 8,
             keys.bits + units.row(first + thread) * keys.row_words + at, there);
    }
  }
}

/// What a part of a passing tile of units, from `first` on, adds to dk and dv of the warp's 16
/// keys: the lane's are own[0] and own[1], counted in the sequence's own. `chosen`, or null: of
/// each unit, every second word, which keys of the warp's 32 it reads.
template <int kD, int kN, bool kChosen>
__device__ inline void add_units(const QueryUnits& units, float scale, int first, bool hides,
                                 const uint32_t* chosen, const int (&own)[2],
                                 const uint32_t (&keys)[1][kD / 16][4],
                                 const uint32_t (&values)[1][kD / 16][4], const Bf16* queries,
                                 const float2* stats, float (&dk)[1][kD / 8][4],
                                 float (&dv)[1][kD / 8][4]) {
  const int column = threadIdx.x % 4 * 2;
  const Bf16* douts = queries + kTileElements<kD>;
  float p[1][kN][4], ds[1][kN][4];
  multiply_rows(keys, queries, p);
  multiply_rows(values, douts, ds);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float4 two = *reinterpret_cast<const float4*>(stats + n * 8 + column);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int unit = n * 8 + column + e % 2;
      // A unit sees keys up to its row: own <= unit / group.
      const bool hidden = kChosen ? (chosen[2 * unit] >> own[e / 2] % 32 & 1u) == 0
                                  : hides && own[e / 2] * units.group > first + unit;
      const float lse = e % 2 == 0 ? two.x : two.z, dot = e % 2 == 0 ? two.y : two.w;
      p[0][n][e] = hidden ? 0.0f : exp2_of(fmaf(p[0][n][e], scale, -lse));
      ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - dot);
    }
  }
  add_weighted_rows(p, douts, dv);
  add_weighted_rows(ds, queries, dk);
}

/// sums: dk, dv of the lane's keys.
template <int kColumns>
__device__ inline void store_key_gradients(const Gradients& g, const QueryUnits& units,
                                           int64_t n_kv_heads, int64_t head, const int (&own)[2],
                                           const float (&sums)[2][1][kColumns][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (own[half] * units.group >= units.count) continue;
    const int64_t row = (units.row0 + own[half]) * n_kv_heads + head;
    const int64_t at = row * units.d + threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c * 8 >= units.d) continue;
      const float(&dk)[4] = sums[0][0][c], (&dv)[4] = sums[1][0][c];
      *reinterpret_cast<float2*>(g.dk + at + c * 8) =
          make_float2(dk[2 * half] * g.scale, dk[2 * half + 1] * g.scale);
      *reinterpret_cast<float2*>(g.dv + at + c * 8) = make_float2(dv[2 * half], dv[2 * half + 1]);
    }
  }
}

/// dk and dv of 64 own keys, 16 to a warp; units from the first that sees one pass by. Grid: kv
/// heads, sequences, tiles of own keys: the first, which most units see, first.
template <typename Source, int kD, int kGroups>
__global__ void __launch_bounds__(kGroups* kGroupThreads, kBlocksOfSm<kGroups>)
    key_gradient(const __grid_constant__ Source source, const __grid_constant__ Gradients g) {
  begin_after_previous();
  extern __shared__ float4 shared[];
  constexpr int kN = kD <= 64 ? 8 : 2;
  const auto all = source.keys(blockIdx.y, blockIdx.x);
  constexpr bool kChosen = decltype(source.keys(0, 0))::kChosen;
  constexpr int kBytes = kUnitBytes<kD, kChosen>;
  const RoundedUnits from = source.units(blockIdx.y, blockIdx.x);
  const QueryUnits& units = all.units;
  const int group = threadIdx.x / kGroupThreads, lane = threadIdx.x % 32;
  const int first_key = static_cast<int>(blockIdx.z) * kPassingRows;
  const int n_rows = units.count / units.group;
  if (first_key >= n_rows) return;
  const int n_tiles = (units.count + kPassingRows - 1) / kPassingRows;
  char* memory = reinterpret_cast<char*>(shared) + group * 2 * kBytes;
  const int begin = first_key * units.group / kPassingRows + group;
  if (begin < n_tiles) copy_units<kD>(from, all, first_key, begin * kPassingRows, memory);
  const int mine = first_key + threadIdx.x / 32 % kGroupWarps * 16;
  const int own[2] = {mine + lane / 4, mine + lane / 4 + 8};
  uint32_t keys[1][kD / 16][4], values[1][kD / 16][4];
  const Bf16 *k[2], *v[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // keys beyond the last: as that one, and not stored
    const int64_t at = (units.before + min(own[half], n_rows - 1)) * all.stride;
    k[half] = all.k + at;
    v[half] = all.v + at;
  }
  load_operand<Bf16>(k, units.d, keys[0]);
  load_operand<Bf16>(v, units.d, values[0]);
  float sums[2][1][kD / 8][4] = {};  // dk, dv
  int buffer = 0;
  for (int tile = begin; tile < n_tiles; tile += kGroups, buffer ^= 1) {
    wait_for_copies();
    barrier(1 + group, kGroupThreads);
    if (tile + kGroups < n_tiles) {
      copy_units<kD>(from, all, first_key, (tile + kGroups) * kPassingRows,
                     memory + (buffer ^ 1) * kBytes);
    }
    const char* passing = memory + buffer * kBytes;
    const auto* stats = reinterpret_cast<const float2*>(passing + 4 * kTileElements<kD>);
    // Behind them the chosen keys; the warp's 16 are in one of the two words of each.
    const auto* chosen =
        reinterpret_cast<const uint32_t*>(stats + kPassingRows) + (mine - first_key) / 32;
#pragma unroll 1
    for (int part = 0; part < kPassingRows; part += 8 * kN) {
      const int first = tile * kPassingRows + part;
      if (mine * units.group >= first + 8 * kN) continue;
      if constexpr (kChosen) {
        uint32_t any = 0;
        for (int i = lane; i < 8 * kN; i += 32)
          any |= chosen[2 * (part + i)] >> mine % 32 & 0xffffu;
        if (!__any_sync(kAllLanes, any != 0)) continue;
      }
      add_units<kD, kN, kChosen>(units, g.scale * kLog2E, first, (mine + 15) * units.group > first,
                                 chosen + 2 * part, own, keys, values,
                                 reinterpret_cast<const Bf16*>(passing) + part * kRowStep<kD>,
                                 stats + part, sums[0], sums[1]);
    }
  }
  if constexpr (kGroups == 2) {
    if (!add_groups(reinterpret_cast<float*>(shared), sums)) return;
  }
  store_key_gradients(g, units, source.n_kv_heads, blockIdx.x, own, sums);
}

template <typename Source>
void launch_backward(const StreamState& s, const Source& source, int64_t sequences,
                     int64_t max_rows, const Gradients& g) {
  const int64_t group = source.n_heads / source.n_kv_heads;
  const auto heads = static_cast<unsigned>(source.n_kv_heads);
  const auto each = static_cast<unsigned>(sequences);
  for_padded_head(source.d, [&]<int kD>() {
    const auto unit_tiles =
        static_cast<unsigned>(ceil_div(max_rows * group, kBlockUnits<kSixteens<kD>>));
    const auto key_tiles = static_cast<unsigned>(ceil_div(max_rows, kPassingRows));
    for_groups(int64_t{unit_tiles} * heads * each, [&]<int kGroups>() {
      constexpr int64_t kBytes = kGroups * 4 * kTileElements<kD> * sizeof(Bf16);
      const auto kernel = query_gradient<Source, kD, kGroups>;
      if (!allow_shared(kernel, kBytes)) return;
      launch_next("gradient of queries", kernel, dim3(heads, each, unit_tiles),
                  kGroups * kGroupThreads, kBytes, s.stream(), source, g);
    });
    for_groups(int64_t{key_tiles} * heads * each, [&]<int kGroups>() {
      constexpr bool kChosen = decltype(source.keys(0, 0))::kChosen;
      constexpr int64_t kBytes = kGroups * 2 * kUnitBytes<kD, kChosen>;
      const auto kernel = key_gradient<Source, kD, kGroups>;
      if (!allow_shared(kernel, kBytes)) return;
      launch_next("gradient of keys", kernel, dim3(heads, each, key_tiles), kGroups * kGroupThreads,
                  kBytes, s.stream(), source, g);
    });
  });
}

/// How much scratch sequences take: their keys and values, and in the backward their units and the
/// bits of chosen keys.
struct Room {
  int64_t keys = 0, rows = 0, longest = 0;

  int64_t bytes(const TrainAttentionArgs& a, bool chosen, bool backward) const {
    const int64_t units = rows * a.n_heads;
    const int64_t rounded = units * (2 * a.head_dim * 2 + static_cast<int64_t>(sizeof(float2)));
    const int64_t bits = rows * a.n_kv_heads * ChosenSource::words_for(longest) * 4;
    return keys * a.n_kv_heads * a.head_dim * 2 * 2 +
           (backward ? rounded + (chosen ? bits : 0) : 0);
  }
  Room with(const TrainSequence& s) const {
    return {keys + s.prefix + s.n_rows, rows + s.n_rows, larger(longest, s.prefix + s.n_rows)};
  }
};

/// Some sequences of a call: their scratch, of any elements of 16 bits, and how many rows the
/// longest has.
struct Part {
  ChosenSource source{};
  int64_t count = 0, max_rows = 0;
  Room used;
};

/// False: it could not be enqueued.
template <typename T>
bool round_some(const StreamState& s, const TrainAttentionArgs& a, const Part& part,
                const PackedSource<T>& source) {
  const int64_t chunks = part.used.longest * a.n_kv_heads * a.head_dim / 8;
  const dim3 grid(loop_blocks(chunks, kRoundThreads), static_cast<unsigned>(part.count), 2);
  return launch_next("rounding keys", round_keys<T>, grid, kRoundThreads, 0, s.stream(), source,
                     a.k, a.v);
}

template <typename T>
void run_forward(const StreamState& s, const TrainAttentionArgs& a, const KeySelection* chosen,
                 const Part& part) {
  const PackedSource<T> source = part.source.of<T>();
  if (!round_some(s, a, part, source)) return;
  const Attend attend{a.q, a.scale, AttendedRows(a.out), a.lse};
  const int64_t max_units = part.max_rows * (a.n_heads / a.n_kv_heads);
  if (chosen == nullptr) {
    attend_on_tensor_cores(s, source, a.n_kv_heads, part.count, max_units, a.head_dim, attend);
  } else {
    attend_chosen_on_tensor_cores(s, source, *chosen, a.n_kv_heads, part.count, max_units,
                                  part.used.longest, a.head_dim, attend);
  }
}

void run_backward(const StreamState& s, const TrainAttentionArgs& a, const KeySelection* chosen,
                  const Part& part) {
  const Gradients g{a.q, a.out, a.lse, a.dout, a.dq, a.dk, a.dv, a.scale};
  const PackedSource<Bf16>& source = part.source;
  if (!round_some(s, a, part, source)) return;
  if (chosen == nullptr) return launch_backward(s, source, part.count, part.max_rows, g);
  const int64_t bytes = kMarkWarps * part.source.words * 4;
  const dim3 rows(static_cast<unsigned>(ceil_div(part.max_rows, kMarkWarps)),
                  static_cast<unsigned>(a.n_kv_heads), static_cast<unsigned>(part.count));
  if (allow_shared(mark_chosen, bytes) &&
      launch_next("chosen keys", mark_chosen, rows, kMarkWarps * 32, static_cast<size_t>(bytes),
                  s.stream(), part.source, *chosen)) {
    launch_backward(s, part.source, part.count, part.max_rows, g);
  }
}

/// As many sequences from `first` on as one launch takes, at least one.
Part part_from(const StreamState& s, const TrainAttentionArgs& a, bool chosen, int64_t first,
               bool backward) {
  Part part;
  for (; part.count < kSequences && first + part.count < a.n_sequences; ++part.count) {
    const TrainSequence& next = a.sequences[first + part.count];
    const Room room = part.used.with(next);
    if (part.count > 0 && room.bytes(a, chosen, backward) > kScratchBytes) break;
    part.source.sequences[part.count] = {next, part.used.keys, part.used.rows};
    part.used = room;
    part.max_rows = larger(part.max_rows, next.n_rows);
  }
  ChosenSource& source = part.source;
  const int64_t of_keys = part.used.keys * a.n_kv_heads * a.head_dim;
  const int64_t of_units = part.used.rows * a.n_heads * a.head_dim;
  source.n_heads = a.n_heads, source.n_kv_heads = a.n_kv_heads, source.d = a.head_dim;
  source.k = s.scratch<Bf16>();
  source.v = source.k + of_keys;
  source.rounded.q = source.v + of_keys;
  source.rounded.dout = source.rounded.q + of_units;
  source.rounded.stats = reinterpret_cast<float2*>(source.rounded.dout + of_units);
  source.rounded.of_head = part.used.rows * (a.n_heads / a.n_kv_heads);
  source.bits = reinterpret_cast<uint32_t*>(source.rounded.stats + part.used.rows * a.n_heads);
  source.words = ChosenSource::words_for(part.used.longest);
  return part;
}

/// Rows are read and written in steps of 16 bytes and less; a sequence fits the scratch as a whole.
bool takes(const TrainAttentionArgs& a, bool chosen, bool backward) {
  if (is_f32(a.operands) || !suits_tensor_cores(a.head_dim, a.scale)) return false;
  for (const float* p :
       {a.q, a.k, a.v, static_cast<const float*>(a.out), a.dout, static_cast<const float*>(a.dq),
        static_cast<const float*>(a.dk), static_cast<const float*>(a.dv)}) {
    if (!is_aligned16(p)) return false;
  }
  for (int64_t i = 0; i < a.n_sequences; ++i) {
    const TrainSequence& s = a.sequences[i];
    const Room room = Room().with(s);
    if (!is_aligned16(s.prefix_k) || !is_aligned16(s.prefix_v)) return false;
    if (room.bytes(a, chosen, backward) > kScratchBytes) return false;
    if (chosen && !(backward ? marks_fit(room.longest) : map_fits(room.longest))) return false;
  }
  return true;
}

}  // namespace

bool train_on_tensor_cores(const StreamState& s, const TrainAttentionArgs& a,
                           const KeySelection* chosen, bool backward) {
  if (!takes(a, chosen != nullptr, backward)) return false;
  const auto forward = a.operands == WeightFormat::kF16 ? run_forward<Half> : run_forward<Bf16>;
  for (int64_t i = 0; i < a.n_sequences;) {
    const Part part = part_from(s, a, chosen != nullptr, i, backward);
    i += part.count;
    if (part.max_rows > 0) (backward ? run_backward : forward)(s, a, chosen, part);
  }
  return true;
}

}  // namespace ds::cuda
