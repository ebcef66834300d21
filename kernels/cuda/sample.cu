// SPDX-License-Identifier: Apache-2.0
// Tokens from logits: a cluster of blocks takes a row, a block a stretch of it. Weights are those
// of kernels/sampling.cpp bit for bit; sums are in double, but not in its order, so that a draw
// within some 1e-13 of the bound between two tokens may fall on the other one.
#include <climits>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;  // of a cluster
constexpr int kEach = 4;    // neighbours that a thread takes
constexpr int kTile = kThreads * kEach;

/// As exp_below_one of kernels/sampling.cpp; the intrinsics keep the compiler from fusing.
__device__ inline float exp_below_one(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  constexpr float kRound = 12582912.0f;
  const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504088896341f), kRound);
  const float n = __fsub_rn(shifted, kRound);
  const float r =
      __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
  const int exponent = __float_as_int(shifted) - __float_as_int(kRound) + 127;
  return x > -87.0f ? __fmul_rn(p, __int_as_float(exponent << 23)) : 0.0f;
}

/// The largest so far, the first of equal ones, and NaN where something was not finite.
struct Best {
  float value = -INFINITY;
  int index = INT_MAX;
  float poison = 0.0f;

  __device__ void take(float v, int i) {
    if (v > value || (v == value && i < index)) value = v, index = i;
  }
  __device__ void take(const Best& other) {
    take(other.value, other.index);
    poison += other.poison;
  }
};

/// What a block tells its cluster.
struct Told {
  float best, index, poison;  ///< index: its bits
  float sum[2];               ///< a double's halves
};

struct Row {
  const float* x;
  float best, heat;
  __device__ float weight(int i) const {
    return exp_below_one(__fmul_rn(__fsub_rn(x[i], best), heat));
  }
};

__device__ inline Best best_of_block(const float* x, int begin, int end) {
  __shared__ Best of_warp[kThreads / 32];
  Best mine;
#pragma unroll 4
  for (int i = begin + threadIdx.x; i < end; i += kThreads) {
    const float v = x[i];
    mine.take(v, i);
    mine.poison += v * 0.0f;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Best other;
    other.value = __shfl_xor_sync(kAllLanes, mine.value, step);
    other.index = __shfl_xor_sync(kAllLanes, mine.index, step);
    other.poison = __shfl_xor_sync(kAllLanes, mine.poison, step);
    mine.take(other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) mine.take(of_warp[w]);
  return mine;
}

/// The sum of x of all threads before this one, and of all.
struct Before {
  double sum, total;
  __device__ explicit Before(double x) {
    __shared__ double of_warp[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const double up_to = warp_sum_up_to(x);
    __syncthreads();  // of an earlier one
    if (lane == 31) of_warp[warp] = up_to;
    __syncthreads();
    sum = up_to - x;
    total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w == warp) sum += total;
      total += of_warp[w];
    }
  }
};

/// The first index of [begin, end) at which the running sum of weights passes `left`, or the last
/// one with any weight. All threads of the block; some thread writes *token.
__device__ inline void draw_in_block(const Row& row, int begin, int end, double left,
                                     int32_t* token) {
  __shared__ int first, last, last_tile;
  if (threadIdx.x == 0) first = INT_MAX, last = -1, last_tile = -1;
  __syncthreads();
  const auto tile_of = [&](int at, float(&w)[kEach]) {
    double sum = 0;
    for (int e = 0; e < kEach; ++e) {
      const int i = at + threadIdx.x * kEach + e;
      w[e] = i < end ? row.weight(i) : 0.0f;
      sum += static_cast<double>(w[e]);
    }
    return sum;
  };
  float w[kEach];
  int at = begin;
  for (; at < end; at += kTile) {
    const double total = Before(tile_of(at, w)).total;
    if (threadIdx.x == 0 && total > 0) last_tile = at;
    if (total > left) break;
    left -= total;
  }
  __syncthreads();
  if (at >= end) at = last_tile, left = INFINITY;
  if (at < 0) return;
  const double sum = tile_of(at, w), before = Before(sum).sum;
  if (sum > 0) atomicMax(&last, static_cast<int>(threadIdx.x));
  if (sum > 0 && before + sum > left) atomicMin(&first, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (static_cast<int>(threadIdx.x) != (first == INT_MAX ? last : first)) return;
  left -= before;
  int chosen = -1;
  for (int e = 0; e < kEach; ++e) {
    if (w[e] <= 0) continue;
    chosen = at + threadIdx.x * kEach + e;
    left -= static_cast<double>(w[e]);
    if (left < 0) break;
  }
  *token = chosen;
}

__global__ void __launch_bounds__(kThreads) sample_rows(const __grid_constant__ SampleArgs a) {
  __shared__ Told told;
  begin_after_previous();
  const int rank = blockIdx.x % kBlocks, r = blockIdx.x / kBlocks;
  const auto vocab = static_cast<int>(a.vocab), stretch = (vocab + kBlocks - 1) / kBlocks;
  const int begin = min(vocab, rank * stretch), end = min(vocab, begin + stretch);
  const float* x = a.logits + r * a.stride;
  Best best = best_of_block(x, begin, end);
  if (threadIdx.x == 0)
    told.best = best.value, told.index = __int_as_float(best.index), told.poison = best.poison;
  cluster_barrier();
  for (int b = 0; b < kBlocks; ++b) {
    Best other;
    other.value = load_of_block(&told.best, b);
    other.index = __float_as_int(load_of_block(&told.index, b));
    other.poison = load_of_block(&told.poison, b);
    best.take(other);
  }
  const bool finite = best.poison == 0.0f;
  const float heat = a.heat[r];
  if (!finite || heat == 0.0f) {
    if (rank == 0 && threadIdx.x == 0) a.token[r] = finite ? best.index : -1;
    cluster_barrier();  // nobody leaves while others read from here
    return;
  }
  const Row row{x, best.value, heat};
  double sum = 0;
  for (int i = begin + threadIdx.x; i < end; i += kThreads)
    sum += static_cast<double>(row.weight(i));
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    told.sum[0] = __int_as_float(__double2loint(sum));
    told.sum[1] = __int_as_float(__double2hiint(sum));
  }
  cluster_barrier();
  double of_block[kBlocks], total = 0;
  for (int b = 0; b < kBlocks; ++b) {
    of_block[b] = __hiloint2double(__float_as_int(load_of_block(&told.sum[1], b)),
                                   __float_as_int(load_of_block(&told.sum[0], b)));
    total += of_block[b];
  }
  cluster_barrier();
  // As in draw_in_block, by blocks.
  const double target = a.chance[r] * total;
  double left = INFINITY, before = 0;
  int taker = 0;
  for (int b = 0; b < kBlocks; ++b) {
    if (of_block[b] <= 0) continue;
    taker = b;
    if (before + of_block[b] > target) {
      left = target - before;
      break;
    }
    before += of_block[b];
  }
  if (rank == taker) draw_in_block(row, begin, end, left, a.token + r);
}

}  // namespace

void sample(const OpContext& context, const SampleArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0) return;
  launch("sampling", Launching{.cluster = kBlocks}, sample_rows,
         dim3(static_cast<unsigned>(a.rows * kBlocks)), kThreads, 0, s->stream(), a);
}

}  // namespace ds::cuda
