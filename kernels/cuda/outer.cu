// SPDX-License-Identifier: Apache-2.0
// Gradients of weights: dy^T x over rows, through cuBLAS; those of low-rank factors and biases,
// which have up to 16 rows, many in one launch.
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kColumns = 64;    // of x, to a cluster: two neighbours a lane
constexpr int kWarps = 8;       // each takes every 8th of the rows at hand
constexpr int kRows = 96;       // at hand: 12 of a warp, all under way at once
constexpr int kMostBlocks = 8;  // of a cluster, which takes all rows of its columns
constexpr int kMostOuters = 12;

/// One of a launch, n up to 16; x is FP32, or BF16 where `rounded`.
struct Outer {
  const float* dy;
  const void* x;
  float* out;
  int64_t rows, dy_stride, x_stride;
  float scale;
  int n, k, first_tile;
  bool rounded;
};
struct Outers {
  int count = 0;
  Outer of[kMostOuters];
};

/// sum[i] of the lane's two columns over the warp's of the block's rows: every `blocks`-th 96.
/// two(row): x there. What x is may not be asked per row: loads would wait for each other.
template <typename Two>
__device__ inline void sum_rows(const Outer& a, const Two& two, int rank, int blocks,
                                float (&dy)[kRows][kLoraRank], float2 (&sum)[kLoraRank]) {
  const int warp = threadIdx.x / 32;
  for (int64_t first = int64_t{rank} * kRows; first < a.rows; first += int64_t{blocks} * kRows) {
    const auto rows = static_cast<int>(smaller(kRows, a.rows - first));
    float2 x_of[kRows / kWarps];
#pragma unroll
    for (int u = 0; u < kRows / kWarps; ++u) {
      const int r = warp + u * kWarps;  // beyond the last dy is zero
      x_of[u] = two(first + (r < rows ? r : 0));
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kRows * kLoraRank / (kWarps * 32); ++u) {
      const int at = threadIdx.x + u * kWarps * 32, r = at / kLoraRank, i = at % kLoraRank;
      dy[r][i] = r < rows && i < a.n ? a.dy[(first + r) * a.dy_stride + i] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kRows / kWarps; ++u) {
      const float2 x = x_of[u];
#pragma unroll
      for (int i = 0; i < kLoraRank; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&dy[warp + u * kWarps][i]);
        const float of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[i + e].x = fmaf(of[e], x.x, sum[i + e].x);
          sum[i + e].y = fmaf(of[e], x.y, sum[i + e].y);
        }
      }
    }
  }
}

/// out [n, k] += scale dy^T x of each. A cluster takes 64 columns of one of them, its blocks parts
/// of the rows: sums of warps, then of blocks, are added in order. Grid: clusters.
__global__ void __launch_bounds__(kWarps * 32)
    outer_few(const __grid_constant__ Outers g, int blocks) {
  begin_after_previous();
  __shared__ float of_warp[kWarps][kLoraRank][kColumns];
  __shared__ float dy[kRows][kLoraRank];
  const int rank = static_cast<int>(blockIdx.x) % blocks;
  const int tile = static_cast<int>(blockIdx.x) / blocks, thread = threadIdx.x;
  int which = 0;
  while (which + 1 < g.count && tile >= g.of[which + 1].first_tile) ++which;
  const Outer& a = g.of[which];
  const int64_t first_column = int64_t{tile - a.first_tile} * kColumns;
  float2 sum[kLoraRank] = {};
  // Columns beyond the last: as that one, and not stored.
  const int64_t columns[2] = {smaller(first_column + thread % 32 * 2, a.k - 1),
                              smaller(first_column + thread % 32 * 2 + 1, a.k - 1)};
  const bool pairs = a.k % 2 == 0 && a.x_stride % 2 == 0 && is_aligned8(a.x);
  const auto* rounded = static_cast<const Bf16*>(a.x);
  const auto* exact = static_cast<const float*>(a.x);
  const int64_t even = columns[1] - columns[1] % 2;  // of a pair
  if (a.rounded && pairs) {
    const auto two = [&](int64_t row) {
      return __bfloat1622float2(
          *reinterpret_cast<const __nv_bfloat162*>(rounded + row * a.x_stride + even));
    };
    sum_rows(a, two, rank, blocks, dy, sum);
  } else if (pairs) {
    const auto two = [&](int64_t row) {
      return *reinterpret_cast<const float2*>(exact + row * a.x_stride + even);
    };
    sum_rows(a, two, rank, blocks, dy, sum);
  } else if (a.rounded) {
    const auto two = [&](int64_t row) {
      return make_float2(to_float(rounded[row * a.x_stride + columns[0]]),
                         to_float(rounded[row * a.x_stride + columns[1]]));
    };
    sum_rows(a, two, rank, blocks, dy, sum);
  } else {
    const auto two = [&](int64_t row) {
      return make_float2(exact[row * a.x_stride + columns[0]],
                         exact[row * a.x_stride + columns[1]]);
    };
    sum_rows(a, two, rank, blocks, dy, sum);
  }
#pragma unroll
  for (int i = 0; i < kLoraRank; ++i)
    *reinterpret_cast<float2*>(&of_warp[thread / 32][i][thread % 32 * 2]) = sum[i];
  __syncthreads();
  for (int at = thread; at < kLoraRank * kColumns; at += kWarps * 32) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += of_warp[w][at / kColumns][at % kColumns];
    of_warp[0][at / kColumns][at % kColumns] = total;
  }
  cluster_barrier();
  for (int at = rank * kWarps * 32 + thread; at < a.n * kColumns; at += blocks * kWarps * 32) {
    const int i = at / kColumns, column = at % kColumns;
    if (first_column + column >= a.k) continue;
    float total = 0.0f;
    for (int r = 0; r < blocks; ++r) total += load_of_block(&of_warp[0][i][column], r);
    float& out = a.out[i * a.k + first_column + column];
    out = fmaf(a.scale, total, out);
  }
  cluster_barrier();  // until the others have read this block's
}

/// Collects, and launches what it has when that is as much as a launch takes.
class FewOuters {
 public:
  explicit FewOuters(const StreamState& s) : s_(s) {}
  void add(const OuterArgs& a) {
    const bool rounded = a.x_prepared != nullptr;
    args_.of[args_.count++] = {a.dy,
                               rounded ? a.x_prepared : a.x,
                               a.out,
                               a.rows,
                               a.dy_stride,
                               rounded ? padded_k(WeightFormat::kBF16, a.k) : a.x_stride,
                               a.scale,
                               static_cast<int>(a.n),
                               static_cast<int>(a.k),
                               tiles_,
                               rounded};
    tiles_ += static_cast<int>(ceil_div(a.k, kColumns));
    most_rows_ = larger(most_rows_, a.rows);
    if (args_.count == kMostOuters) launch_all();
  }
  void launch_all() {
    if (args_.count == 0) return;
    int blocks = 1;
    while (blocks < kMostBlocks && blocks * kRows < most_rows_) blocks *= 2;
    launch("gradient of factors", {.cluster = static_cast<unsigned>(blocks)}, outer_few,
           dim3(static_cast<unsigned>(tiles_ * blocks)), kWarps * 32, 0, s_.stream(), args_,
           blocks);
    args_.count = tiles_ = 0;
    most_rows_ = 0;
  }

 private:
  const StreamState& s_;
  Outers args_;
  int tiles_ = 0;
  int64_t most_rows_ = 0;
};

void multiply_outer(const StreamState& s, const OuterArgs& a) {
  const bool rounded = a.dy_prepared != nullptr && a.x_prepared != nullptr;
  Product p = product_of(rounded  ? WeightFormat::kBF16
                         : a.tf32 ? WeightFormat::kTF32
                                  : WeightFormat::kF32);
  p.m = a.n;
  p.n = a.k;
  p.k = a.rows;
  const int64_t dy_stride =
      a.dy_prepared_stride != 0 ? a.dy_prepared_stride : padded_k(WeightFormat::kBF16, a.n);
  p.a = {rounded ? a.dy_prepared : a.dy, rounded ? dy_stride : a.dy_stride, true};
  p.b = {rounded ? a.x_prepared : a.x, rounded ? padded_k(WeightFormat::kBF16, a.k) : a.x_stride,
         false};
  p.alpha = a.scale;
  p.beta = 1.0f;
  p.c = a.out;
  p.c_stride = a.k;
  s.multiply(p, "gradient of a weight");
}

}  // namespace

/// out [n, k] += scale * dy^T x, of each.
void outer_accumulate(const OpContext& context, int64_t count, const OuterArgs* each) {
  const StreamState* s = enter(context);
  if (s == nullptr) return;
  FewOuters few(*s);
  for (int64_t i = 0; i < count; ++i) {
    const OuterArgs& a = each[i];
    if (a.rows == 0 || a.n == 0 || a.k == 0) continue;
    if (a.n <= kLoraRank) {
      few.add(a);
    } else {
      multiply_outer(*s, a);
    }
  }
  few.launch_all();
}

}  // namespace ds::cuda
