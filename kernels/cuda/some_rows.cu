// SPDX-License-Identifier: Apache-2.0
// Linear layers of a few rows on tensor cores, with everything around the products in one launch. A
// block takes 16 outputs of one or two weights for all rows; k is split over its warps, so that the
// weights and the input are read once, straight into registers, all of a warp's loads at a time:
// these kernels follow each other closely, and what they wait for is latency. The warps' sums meet
// in shared memory.
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
  RopeAppendArgs rope;
};

/// First outputs of a block's tiles.
struct Outputs {
  int w0 = 0, w1 = 0, i0 = 0, i1 = 0;
  int head = 0, pair = 0;  ///< kRope: of the weight's heads, and the first pair

  template <Tiles kTiles>
  __device__ static Outputs of(const SomeArgs& a, int block) {
    Outputs o;
    if constexpr (kTiles == Tiles::kSwiglu) {
      o.w1 = 1;
      o.i0 = o.i1 = block * kOut;
    } else if constexpr (kTiles == Tiles::kOne) {
      while (block >= (a.n[o.w0] + kOut - 1) / kOut) block -= (a.n[o.w0++] + kOut - 1) / kOut;
      o.i0 = block * kOut;
    } else {
      const int half = static_cast<int>(a.rope.kv.head_dim) / 2, of_head = half / kOut;
      const auto of = head_of(a.rope, block / of_head);
      o.w0 = o.w1 = of.w;
      o.head = of.head;
      o.pair = block % of_head * kOut;
      o.i0 = o.head * 2 * half + o.pair;
      o.i1 = o.i0 + half;
    }
    return o;
  }
};

/// A warp's sums over its steps of k: tiles of outputs times 8 kEights rows. It has the weights of
/// kAhead steps under way, and the input of kInputs.
template <typename T, int kEights, int kTiles, bool kParts>
struct WarpSums {
  static constexpr int kAhead = kEights * kTiles > 2 ? 2 : 3;
  static constexpr int kInputs = kEights > 2 ? 1 : kAhead;
  uint4 w[kAhead][kTiles][2];  // rows g and g + 8 of a tile
  float sum[kTiles][kEights][4] = {};
  float squares[kEights] = {};

  /// The first of the block's rows; `kParts`: not all rows are its.
  __device__ static int row0() { return kParts ? static_cast<int>(blockIdx.y) * 8 * kEights : 0; }
  __device__ void load_weights(const uint4* const (&row)[kTiles][2], int chunk, int chunks) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = chunk + u * kWarps * (kStep / 8);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          w[u][tile][r] = at < chunks ? stream_chunk(row[tile][r] + at) : make_uint4(0, 0, 0, 0);
        }
      }
    }
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

  /// Adds the steps whose weights are there.
  __device__ void add(const SomeArgs& a, int chunk, int chunks) {
#pragma unroll
    for (int u = 0; u < kAhead; u += kInputs) add_inputs(a, u, chunk, chunks);
  }
  __device__ void add_inputs(const SomeArgs& a, int first, int chunk, int chunks) {
    if constexpr (8 * kEights > kFewRows) {  // fewer need not be rounded ahead
      if (a.rounded != nullptr) return add_rounded(a, first, chunk, chunks);
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
        const bool counts = blockIdx.x == 0 && row0() + 8 * e + g < a.rows;
        multiply(first + u, e, rounded(x[u][e], counts ? a.saturated : nullptr));
      }
    }
  }
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
      for (int e = 0; e < kEights; ++e) multiply(first + u, e, x[u][e]);
    }
  }
  /// Step u's weights with 8 rows.
  __device__ void multiply(int u, int e, const uint4& b) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 &low = w[u][tile][0], &high = w[u][tile][1];
      multiply_add<T>({low.x, high.x, low.y, high.y}, b.x, b.y, sum[tile][e]);
      multiply_add<T>({low.z, high.z, low.w, high.w}, b.z, b.w, sum[tile][e]);
    }
  }

  /// To part [kTiles][8 kEights][kOutStep] and of_squares [8 kEights].
  __device__ void store(float* part, float* of_squares) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
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

template <typename T, int kEights, Tiles kTiles, bool kParts>
__global__ void __launch_bounds__(kThreads) multiply_some(const __grid_constant__ SomeArgs a) {
  constexpr int kEach = tiles_of_block(kTiles), kRows = 8 * kEights;
  constexpr int kPart = (kEach * kOutStep + 1) * kRows;  // floats that a warp leaves
  using Sums = WarpSums<T, kEights, kEach, kParts>;
  extern __shared__ float parts[];  // [kWarps][kPart]
  const auto o = Outputs::of<kTiles>(a, static_cast<int>(blockIdx.x));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int chunks = a.k / 8, first = warp * (kStep / 8) + lane % 4;
  const uint4* weights[kEach][2];
#pragma unroll
  for (int tile = 0; tile < kEach; ++tile) {
    const int w = tile == 0 ? o.w0 : o.w1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = min((tile == 0 ? o.i0 : o.i1) + g + 8 * r, a.n[w] - 1);
      weights[tile][r] = static_cast<const uint4*>(a.w[w]) + static_cast<int64_t>(i) * chunks;
    }
  }
  Sums sums;
  sums.load_weights(weights, first, chunks);
  begin_after_previous();
  // What this thread finishes, and what it needs for that.
  const int of_block = threadIdx.x / kOut, row = Sums::row0() + of_block, out = threadIdx.x % kOut;
  const bool finishes = row < a.rows && o.i0 + out < a.n[o.w0];
  const int64_t to = row * a.y_stride[o.w0] + o.i0 + out;
  const float residual = finishes && a.residual != nullptr ? a.residual[to] : 0.0f;
  PairPlace place;
  if constexpr (kTiles == Tiles::kRope) {
    if (finishes) place.find(a.rope, o.w0, o.head, o.pair + out, row);
  }
  constexpr int kRound = Sums::kAhead * kWarps * (kStep / 8);
  for (int c = first; c < chunks + lane % 4; c += kRound) {
    if (c != first) sums.load_weights(weights, c, chunks);
    sums.add(a, c, chunks);
  }
  float* part = parts + warp * kPart;
  sums.store(part, part + kEach * kOutStep * kRows);
  __syncthreads();
  if (!finishes) return;
  const auto total = [&](int at) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w * kPart + at];
    return sum;
  };
  float factor = 1.0f;
  if (a.norm != nullptr) {
    const float squares = total(kEach * kOutStep * kRows + of_block);
    factor = norm_factor<T>(squares, static_cast<float>(a.k), a.eps);
  }
  float value = total(of_block * kOutStep + out) * factor, other = 0.0f;
  value = with_additions<T>(a.add, o.w0, o.i0 + out, row, value);
  if constexpr (kEach == 2) {
    other = total((kRows + of_block) * kOutStep + out) * factor;
    other = with_additions<T>(a.add, o.w1, o.i1 + out, row, other);
  }
  if constexpr (kTiles == Tiles::kRope) {
    return place.put(a.rope, o.w0, a.y[0] + to, value, other);
  }
  if constexpr (kTiles == Tiles::kSwiglu) {
    value = silu_times(value, other);
    if (kRows > kFewRows && a.y_prepared != nullptr) {
      static_cast<T*>(a.y_prepared)[static_cast<int64_t>(row) * a.n[0] + o.i0 + out] =
          from_float<T>(value);
      return;
    }
  }
  a.y[o.w0][to] = residual + value;
}

template <typename T, int kEights>
void launch_some(const StreamState& s, const SomeArgs& a, Tiles tiles) {
  auto* kernel = multiply_some<T, kEights, Tiles::kOne, false>;
  if (tiles == Tiles::kSwiglu) kernel = multiply_some<T, kEights, Tiles::kSwiglu, false>;
  if (tiles == Tiles::kRope) kernel = multiply_some<T, kEights, Tiles::kRope, false>;
  if constexpr (kEights == kMostEights) {
    if (a.rows > 8 * kEights) kernel = multiply_some<T, kEights, Tiles::kRope, true>;
  }
  const int64_t shared = int64_t{kWarps} * (tiles_of_block(tiles) * kOutStep + 1) * 8 * kEights *
                         static_cast<int64_t>(sizeof(float));
  if (!allow_shared(kernel, shared)) return;
  launch(
      "linear of some rows", Launching{.early = !s.take_weights_changed()}, kernel,
      dim3(static_cast<unsigned>(a.blocks), static_cast<unsigned>(ceil_div(a.rows, 8 * kEights))),
      kThreads, static_cast<size_t>(shared), s.stream(), a);
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
  for (int w = 0; w < a.n_weights; ++w) {
    if (a.w[w].transposed || a.w[w].n == 0 || a.w[w].n > kManyOutputs) return false;
  }
  return a.rope == nullptr || a.rope->kv.head_dim % (2 * kOut) == 0;
}

}  // namespace

bool some_rows(const StreamState& s, const LinearArgs& a) {
  if (!takes(a)) return false;
  if (a.lora != nullptr) low_rank_inputs(s, a, 0, a.rows, a.x_prepared);
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
