// SPDX-License-Identifier: Apache-2.0
// Linear layers of a few rows on tensor cores, with everything around the products in one launch. A
// block takes 16 outputs of one or two weights for all rows; k is split over its warps, so that the
// weights and the input are read once, straight into registers, all of a warp's loads at a time:
// these kernels follow each other closely, and what they wait for is latency. The warps' sums meet
// in shared memory. Up to 16 rows a block makes t = A x of their low-rank parts as well: a launch
// of its own takes longer than all blocks doing so.
//
// The order of k within a step of 32 is the one in which 16-byte loads give it: lane t of four
// holds elements 8t .. 8t + 7, the first half of which are its columns in one mma, the rest in a
// second.
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rope.cuh"

namespace ds::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kOut = 16;                            // outputs of a tile
constexpr int kStep = 32;                           // of k
constexpr int kOutStep = kOut + 1;                  // floats between rows of sums
constexpr int kMostEights = 4;                      // of the rows of a block
constexpr int64_t kRowsWithFactors = kFewRows;      // up to which blocks make t = A x
static_assert(8 * kMostEights * kOut <= kThreads);  // a thread finishes one output of one row

enum class Tiles {
  kOne,     ///< outputs of one weight
  kSwiglu,  ///< the same outputs of both weights
  kRope,    ///< outputs i and i + half of one head of q, k or v
};
__host__ __device__ constexpr int tiles_of_block(Tiles tiles) {
  return tiles == Tiles::kOne ? 1 : 2;
}

struct SomeArgs {
  const float* x = nullptr;
  const uint4* rounded = nullptr;  ///< [rows][k] as prepare() gives them, in place of x; or null
  const float* norm = nullptr;     ///< as in InputRows
  int64_t x_stride = 0;
  float eps = 0;
  int32_t* saturated = nullptr;
  int k = 0, rows = 0, blocks = 0;
  const void* w[kMaxFusedWeights];
  int n[kMaxFusedWeights];
  float* y[kMaxFusedWeights];
  int64_t y_stride[kMaxFusedWeights];
  void* y_prepared = nullptr;  ///< [rows][n] in place of y[0], or null
  const float* residual = nullptr;
  Additions add;
  float* t = nullptr;  ///< that of `add`, for blocks that make it
  RopeAppendArgs rope;
};

/// First outputs of a block's tiles.
struct Outputs {
  int w[2] = {0, 0}, i[2] = {0, 0};
  int head = 0, pair = 0;  ///< kRope: of the weight's heads, and the first pair

  template <Tiles kTiles>
  __device__ static Outputs of(const SomeArgs& a, int block) {
    Outputs o;
    if constexpr (kTiles == Tiles::kSwiglu) {
      o.w[1] = 1;
      o.i[0] = o.i[1] = block * kOut;
    } else if constexpr (kTiles == Tiles::kOne) {
      while (block >= (a.n[o.w[0]] + kOut - 1) / kOut) block -= (a.n[o.w[0]++] + kOut - 1) / kOut;
      o.i[0] = block * kOut;
    } else {
      const int half = static_cast<int>(a.rope.kv.head_dim) / 2, of_head = half / kOut;
      const auto of = head_of(a.rope, block / of_head);
      o.w[0] = o.w[1] = of.w;
      o.head = of.head;
      o.pair = block % of_head * kOut;
      o.i[0] = o.head * 2 * half + o.pair;
      o.i[1] = o.i[0] + half;
    }
    return o;
  }
};

/// A warp's sums over its steps of k: tiles of outputs times 8 kEights rows, behind kTiles tiles of
/// weights kLow of low-rank factors A. It has the weights of kAhead steps under way, and the input
/// of kInputs.
template <typename T, int kEights, int kTiles, int kLow, bool kParts>
struct WarpSums {
  static constexpr int kAll = kTiles + kLow;
  // As far as registers go.
  static constexpr int kAhead =
      kLow == 0 ? (kEights * kTiles > 2 ? 2 : 3) : (kEights * kAll > 4 ? 1 : 2);
  static constexpr int kInputs = kEights > 2 ? 1 : kAhead;
  const uint4* from[kAll][2];  // rows g and g + 8 of a tile; null: zeros
  uint4 w[kAhead][kAll][2];
  float sum[kAll][kEights][4] = {};
  float squares[kEights] = {};
  int slots[kEights];  // of the lane's input rows
  int slot = -1;       // whose factors the tiles have

  /// The first of the block's rows; `kParts`: not all rows are its.
  __device__ static int row0() { return kParts ? static_cast<int>(blockIdx.y) * 8 * kEights : 0; }
  /// Tiles [first, end).
  template <int first, int end>
  __device__ void load_weights(int chunk, int chunks) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = chunk + u * kWarps * (kStep / 8);
#pragma unroll
      for (int tile = first; tile < end; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool there = at < chunks && (tile < kTiles || from[tile][r] != nullptr);
          w[u][tile][r] = there ? stream_chunk(from[tile][r] + at) : make_uint4(0, 0, 0, 0);
        }
      }
    }
  }
  /// The largest of the rows' slots below `end`; -1: none.
  __device__ int slot_below(int end) const {
    int most = -1;
#pragma unroll
    for (const int of_row : slots)
      if (of_row < end) most = max(most, of_row);
    return __reduce_max_sync(kAllLanes, most);
  }
  /// Asks for the weights of the first steps.
  __device__ void begin(const SomeArgs& a, const Outputs& o, int first, int chunks) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto* rows = static_cast<const uint4*>(a.w[o.w[tile]]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = min(o.i[tile] + threadIdx.x % 32 / 4 + 8 * r, a.n[o.w[tile]] - 1);
        from[tile][r] = rows + static_cast<int64_t>(i) * chunks;
      }
    }
    load_weights<0, kTiles>(first, chunks);
  }
  /// The same of the factors of the first slot that rows have: neither waits for kernels
  /// (LoraSlots).
  __device__ void begin_factors(const SomeArgs& a, const Outputs& o, int first, int chunks) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int row = row0() + 8 * e + static_cast<int>(threadIdx.x) % 32 / 4;
      slots[e] = a.add.slot_of_row[min(row, a.rows - 1)];
    }
    take_slot(a, o, slot_below(kMaxLoraSlots), chunks);
    load_weights<kTiles, kAll>(first, chunks);
  }
  __device__ void take_slot(const SomeArgs& a, const Outputs& o, int which, int chunks) {
    slot = which;
#pragma unroll
    for (int low = 0; low < kLow; ++low) {
      const auto* rows =
          slot < 0 ? nullptr : static_cast<const uint4*>(a.add.low.at(o.w[low], slot).a);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int rank = threadIdx.x % 32 / 4 + 8 * r;
        from[kTiles + low][r] = rows == nullptr ? nullptr : rows + rank * chunks;
      }
    }
  }
  /// The products with factors again for each further slot, where rows have several.
  __device__ void add_other_slots(const SomeArgs& a, const Outputs& o, int first, int chunks) {
    float kept[kEights];  // the squares of the rows have been summed
    memcpy(kept, squares, sizeof squares);
    for (int next = slot_below(slot); next >= 0; next = slot_below(next)) {
      take_slot(a, o, next, chunks);
      load_weights<kTiles, kAll>(first, chunks);
      add_all<kTiles>(a, first, chunks);
    }
    memcpy(squares, kept, sizeof squares);
  }

  /// A lane's 8 elements of an input row as the weights'.
  __device__ static uint4 rounded(const float4 (&x)[2], int32_t* saturated) {
    if (std::is_same_v<T, Half> && saturated != nullptr) {
      for (const float v : {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w})
        if (saturates(v)) atomicAdd(saturated, 1);
    }
    return pack_eight<T>(x[0], x[1]);
  }
  __device__ static void scale(float4& x, const float4& by, float& square) {
    square = fmaf(x.x, x.x, fmaf(x.y, x.y, square));
    square = fmaf(x.z, x.z, fmaf(x.w, x.w, square));
    x = make_float4(x.x * by.x, x.y * by.y, x.z * by.z, x.w * by.w);
  }

  /// All steps of tiles from `first` on, the weights of the first of which are there.
  template <int first>
  __device__ void add_all(const SomeArgs& a, int begin, int chunks) {
    constexpr int kRound = kAhead * kWarps * (kStep / 8);
    for (int c = begin; c < chunks + static_cast<int>(threadIdx.x) % 4; c += kRound) {
      if (c != begin) load_weights<first, kAll>(c, chunks);
#pragma unroll
      for (int u = 0; u < kAhead; u += kInputs) add_inputs<first>(a, u, c, chunks);
    }
  }
  template <int first_tile>
  __device__ void add_inputs(const SomeArgs& a, int first, int chunk, int chunks) {
    if constexpr (8 * kEights > kFewRows) {  // fewer need not be rounded ahead
      if (a.rounded != nullptr) return add_rounded<first_tile>(a, first, chunk, chunks);
    }
    const int g = threadIdx.x % 32 / 4;
    float4 x[kInputs][kEights][2], norm[kInputs][2];
#pragma unroll
    for (int u = 0; u < kInputs; ++u) {
      const int at = 2 * (chunk + (first + u) * kWarps * (kStep / 8));
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const bool there = at < 2 * chunks;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
          const int row = min(row0() + 8 * e + g, a.rows - 1);
          const auto* from = reinterpret_cast<const float4*>(a.x + row * a.x_stride);
          x[u][e][part] = there ? from[at + part] : make_float4(0, 0, 0, 0);
        }
        norm[u][part] = make_float4(1, 1, 1, 1);
        if (there && a.norm != nullptr)
          norm[u][part] = before_norm<T>(reinterpret_cast<const float4*>(a.norm)[at + part]);
      }
    }
#pragma unroll
    for (int u = 0; u < kInputs; ++u) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        scale(x[u][e][0], norm[u][0], squares[e]);
        scale(x[u][e][1], norm[u][1], squares[e]);
        // Every block of its rows has them all: the first counts.
        const bool counts = first_tile == 0 && blockIdx.x == 0 && row0() + 8 * e + g < a.rows;
        multiply<first_tile>(first + u, e, rounded(x[u][e], counts ? a.saturated : nullptr));
      }
    }
  }
  template <int first_tile>
  __device__ void add_rounded(const SomeArgs& a, int first, int chunk, int chunks) {
    const int g = threadIdx.x % 32 / 4;
    uint4 x[kInputs][kEights];
#pragma unroll
    for (int u = 0; u < kInputs; ++u) {
      const int at = chunk + (first + u) * kWarps * (kStep / 8);
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const int64_t row = min(row0() + 8 * e + g, a.rows - 1);
        x[u][e] = at < chunks ? a.rounded[row * chunks + at] : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int u = 0; u < kInputs; ++u) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) multiply<first_tile>(first + u, e, x[u][e]);
    }
  }
  /// Step u's weights with 8 rows; factors with those of their slot.
  template <int first_tile>
  __device__ void multiply(int u, int e, uint4 b) {
#pragma unroll
    for (int tile = first_tile; tile < kAll; ++tile) {
      if (tile == kTiles && slots[e] != slot) b = make_uint4(0, 0, 0, 0);
      const uint4 &low = w[u][tile][0], &high = w[u][tile][1];
      multiply_add<T>({low.x, high.x, low.y, high.y}, b.x, b.y, sum[tile][e]);
      multiply_add<T>({low.z, high.z, low.w, high.w}, b.z, b.w, sum[tile][e]);
    }
  }

  /// To part [kAll][8 kEights][kOutStep] and of_squares [8 kEights].
  __device__ void store(float* part, float* of_squares) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int tile = 0; tile < kAll; ++tile) {
        float* to = part + (tile * 8 * kEights + 8 * e + 2 * t) * kOutStep + g;
        to[0] = sum[tile][e][0];
        to[kOutStep] = sum[tile][e][1];
        to[8] = sum[tile][e][2];
        to[kOutStep + 8] = sum[tile][e][3];
      }
      float all = squares[e] + __shfl_xor_sync(kAllLanes, squares[e], 1);
      all += __shfl_xor_sync(kAllLanes, all, 2);
      if (t == 0) of_squares[8 * e + g] = all;
    }
  }
};

/// A row of B, for one output of a row with that slot, in steps: where it is, it, its product.
template <typename T>
struct LowOutput {
  const uint4* row = nullptr;
  float scale = 0.0f;
  uint4 raw[2];

  __device__ void find(const Additions& add, int w, int slot, int output) {
    const LoraEntry low = slot < 0 ? LoraEntry{} : add.low.at(w, slot);
    if (low.b == nullptr) return;
    scale = low.scale;
    row = static_cast<const uint4*>(low.b) + output * 2;
  }
  __device__ void load() {
#pragma unroll
    for (int part = 0; part < 2; ++part)
      raw[part] = row == nullptr ? make_uint4(0, 0, 0, 0) : row[part];
  }
  /// With t [16].
  __device__ float times(const float* t) const {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Chunk<T> b = unpack_chunk(raw[part], T());
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(b.v[j], t[8 * part + j], sum);
    }
    return sum * scale;
  }
};

/// kLow: tiles of factors; 0: t = A x is in memory, where there are low-rank parts.
template <typename T, int kEights, Tiles kTiles, bool kParts, int kLow>
struct Some {
  static constexpr int kEach = tiles_of_block(kTiles), kRows = 8 * kEights;
  static constexpr int kSquares = (kEach + kLow) * kOutStep * kRows;  ///< where a warp leaves them
  static constexpr int kPart = kSquares + kRows;                      ///< floats of a warp
  static constexpr int64_t kBytes = (int64_t{kWarps} * kPart + kLow * kRows * kLoraRank) * 4;
  using Sums = WarpSums<T, kEights, kEach, kLow, kParts>;
};

/// What all warps have left at `at`.
template <typename S>
__device__ inline float total_of(const float* parts, int at) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w * S::kPart + at];
  return sum;
}
/// What a row's products still want for its norm.
template <typename T, typename S>
__device__ inline float factor_of(const SomeArgs& a, const float* parts, int of_block) {
  if (a.norm == nullptr) return 1.0f;
  const float squares = total_of<S>(parts, S::kSquares + of_block);
  return norm_factor<T>(squares, static_cast<float>(a.k), a.eps);
}

/// t [tiles of factors][kRows][16] of the block's rows; in memory, too, by a weight's first block.
/// All threads.
template <typename T, typename S, int kLow>
__device__ inline void finish_factors(const SomeArgs& a, const Outputs& o, const float* parts,
                                      float* t) {
#pragma unroll
  for (int tile = 0; tile < kLow; ++tile) {
    for (int i = threadIdx.x; i < S::kRows * kLoraRank; i += kThreads) {
      const int of_block = i / kLoraRank, row = S::Sums::row0() + of_block;
      const int at = ((S::kEach + tile) * S::kRows + of_block) * kOutStep + i % kLoraRank;
      const float value = total_of<S>(parts, at) * factor_of<T, S>(a, parts, of_block);
      t[tile * S::kRows * kLoraRank + i] = value;
      if (o.i[tile] != 0 || row >= a.rows) continue;
      a.t[(o.w[tile] * a.add.t_rows + row) * kLoraRank + i % kLoraRank] = value;
    }
  }
  __syncthreads();
}

template <typename T, int kEights, Tiles kTiles, bool kParts, int kLow>
__global__ void __launch_bounds__(kThreads) multiply_some(const __grid_constant__ SomeArgs a) {
  using S = Some<T, kEights, kTiles, kParts, kLow>;
  constexpr int kEach = S::kEach, kRows = S::kRows;
  extern __shared__ float parts[];  // [kWarps][kPart], t
  const auto o = Outputs::of<kTiles>(a, static_cast<int>(blockIdx.x));
  const int warp = threadIdx.x / 32, chunks = a.k / 8;
  const int first = warp * (kStep / 8) + threadIdx.x % 4;
  typename S::Sums sums;
  sums.begin(a, o, first, chunks);
  // What this thread finishes, and what it needs for that.
  const int of_block = threadIdx.x / kOut, out = threadIdx.x % kOut;
  const int row = S::Sums::row0() + of_block;
  const bool finishes = row < a.rows && o.i[0] + out < a.n[o.w[0]];
  LowOutput<T> low[kEach];
  if constexpr (kLow > 0) {
    sums.begin_factors(a, o, first, chunks);
#pragma unroll
    for (int tile = 0; tile < kEach; ++tile) {
      if (finishes) low[tile].find(a.add, o.w[tile], a.add.slot_of_row[row], o.i[tile] + out);
    }
  }
  begin_after_previous();
  const int64_t to = row * a.y_stride[o.w[0]] + o.i[0] + out;
  const float residual = finishes && a.residual != nullptr ? a.residual[to] : 0.0f;
  PairPlace place;
  if constexpr (kTiles == Tiles::kRope) {
    if (finishes) place.find(a.rope, o.w[0], o.head, o.pair + out, row);
  }
  sums.template add_all<0>(a, first, chunks);
  if constexpr (kLow > 0) {
    sums.add_other_slots(a, o, first, chunks);
#pragma unroll
    for (int tile = 0; tile < kEach; ++tile) low[tile].load();
  }
  sums.store(parts + warp * S::kPart, parts + warp * S::kPart + S::kSquares);
  __syncthreads();
  float* t = parts + kWarps * S::kPart;
  if constexpr (kLow > 0) finish_factors<T, S, kLow>(a, o, parts, t);
  if (!finishes) return;
  const float factor = factor_of<T, S>(a, parts, of_block);
  float value[kEach];
#pragma unroll
  for (int tile = 0; tile < kEach; ++tile) {
    const int w = o.w[tile], i = o.i[tile] + out;
    value[tile] = total_of<S>(parts, (tile * kRows + of_block) * kOutStep + out) * factor;
    if constexpr (kLow > 0) {
      const int of = kLow == 2 ? tile : 0;
      value[tile] += low[tile].times(t + (of * kRows + of_block) * kLoraRank);
      if (a.add.bias[w] != nullptr) value[tile] += a.add.bias[w][i];
    } else {
      value[tile] = with_additions<T>(a.add, w, i, row, value[tile]);
    }
  }
  if constexpr (kTiles == Tiles::kRope) {
    return place.put(a.rope, o.w[0], a.y[0] + to, value[0], value[1]);
  }
  if constexpr (kTiles == Tiles::kSwiglu) {
    value[0] = silu_times(value[0], value[1]);
    if (kRows > kFewRows && a.y_prepared != nullptr) {
      static_cast<T*>(a.y_prepared)[static_cast<int64_t>(row) * a.n[0] + o.i[0] + out] =
          from_float<T>(value[0]);
      return;
    }
  }
  a.y[o.w[0]][to] = residual + value[0];
}

template <typename T, int kEights, Tiles kTiles, bool kParts, int kLow>
void launch_as(const StreamState& s, const SomeArgs& a) {
  const auto kernel = multiply_some<T, kEights, kTiles, kParts, kLow>;
  constexpr int64_t kBytes = Some<T, kEights, kTiles, kParts, kLow>::kBytes;
  if (!allow_shared(kernel, kBytes)) return;
  launch(
      "linear of some rows", Launching{.early = !s.take_weights_changed()}, kernel,
      dim3(static_cast<unsigned>(a.blocks), static_cast<unsigned>(ceil_div(a.rows, 8 * kEights))),
      kThreads, kBytes, s.stream(), a);
}

template <typename T, int kEights, Tiles kTiles>
void launch_tiles(const StreamState& s, const SomeArgs& a) {
  constexpr int kLow = kTiles == Tiles::kSwiglu ? 2 : 1;
  if constexpr (8 * kEights <= kRowsWithFactors) {
    if (a.add.slot_of_row != nullptr) return launch_as<T, kEights, kTiles, false, kLow>(s, a);
  }
  if constexpr (kEights == kMostEights && kTiles == Tiles::kRope) {
    if (a.rows > 8 * kEights) return launch_as<T, kEights, kTiles, true, 0>(s, a);
  }
  launch_as<T, kEights, kTiles, false, 0>(s, a);
}

template <typename T, int kEights>
void launch_some(const StreamState& s, const SomeArgs& a, Tiles tiles) {
  switch (tiles) {
    case Tiles::kOne:
      return launch_tiles<T, kEights, Tiles::kOne>(s, a);
    case Tiles::kSwiglu:
      return launch_tiles<T, kEights, Tiles::kSwiglu>(s, a);
    case Tiles::kRope:
      return launch_tiles<T, kEights, Tiles::kRope>(s, a);
  }
}

bool takes(const LinearArgs& a) {
  // Of more rows than a block takes cuBLAS is quicker, but where it needs a launch before and one
  // behind it.
  const int64_t most = a.rope == nullptr ? 8 * kMostEights : kSomeRows;
  if (is_f32(a.w[0].format) || a.rows > most) return false;
  const int64_t k = a.w[0].k;
  if (a.x_prepared == nullptr ? !input_rows(a, 0, nullptr).whole : k % 8 != 0) return false;
  if (a.y_prepared != nullptr && a.w[0].n % 8 != 0)
    return false;  // rows that want zeros at the end
  if (a.rows <= kFewRows && (a.x_prepared != nullptr || a.y_prepared != nullptr)) return false;
  // Their t = A x is quick of rows that a norm has left rounded.
  if (a.lora != nullptr && a.norm != nullptr && a.rows > kRowsWithFactors) return false;
  for (int w = 0; w < a.n_weights; ++w) {
    if (a.w[w].transposed || a.w[w].n == 0 || a.w[w].n > kManyOutputs) return false;
  }
  return a.rope == nullptr || a.rope->kv.head_dim % (2 * kOut) == 0;
}

}  // namespace

bool some_rows(const StreamState& s, const LinearArgs& a) {
  if (!takes(a)) return false;
  if (a.lora != nullptr && a.rows > kRowsWithFactors)
    low_rank_inputs(s, a, 0, a.rows, a.x_prepared);
  SomeArgs g{};
  g.x = a.x;
  g.rounded = static_cast<const uint4*>(a.x_prepared);
  g.y_prepared = a.y_prepared;
  g.x_stride = a.x_stride;
  g.norm = a.norm;
  g.eps = a.norm_eps;
  g.saturated = a.saturated;
  g.k = static_cast<int>(a.w[0].k);
  g.rows = static_cast<int>(a.rows);
  Tiles tiles = a.epilogue == Epilogue::kSwiglu ? Tiles::kSwiglu : Tiles::kOne;
  if (a.rope != nullptr) tiles = Tiles::kRope;
  for (int w = 0; w < a.n_weights; ++w) {
    g.w[w] = a.w[w].data;
    g.n[w] = static_cast<int>(a.w[w].n);
    g.y[w] = a.y[w];
    g.y_stride[w] = a.y_stride[w];
    g.blocks += static_cast<int>(ceil_div(a.w[w].n, kOut));
  }
  g.blocks /= tiles_of_block(tiles);
  if (a.epilogue == Epilogue::kResidual) g.residual = a.residual;
  if (a.rope != nullptr) g.rope = *a.rope;
  g.add = additions_of(a, 0);
  if (a.lora != nullptr) g.t = a.lora->t;
  const bool half = a.w[0].format == WeightFormat::kF16;
  if (a.rows <= 8) {
    half ? launch_some<Half, 1>(s, g, tiles) : launch_some<Bf16, 1>(s, g, tiles);
  } else if (a.rows <= 16) {
    half ? launch_some<Half, 2>(s, g, tiles) : launch_some<Bf16, 2>(s, g, tiles);
  } else {
    half ? launch_some<Half, 4>(s, g, tiles) : launch_some<Bf16, 4>(s, g, tiles);
  }
  return true;
}

}  // namespace ds::cuda
