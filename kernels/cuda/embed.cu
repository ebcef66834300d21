// SPDX-License-Identifier: Apache-2.0
// Rows by index: embeddings from packed tables and their gradient, gather and scatter.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;

/// table [vocab, padded] -> out [rows, d]. A thread takes one element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    embed_rows(int64_t n, int64_t d, int64_t padded, const int32_t* __restrict__ ids,
               const T* __restrict__ table, float* out) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) {
    out[i] = to_float(table[ids[i / d] * padded + i % d]);
  }
}

/// Rows of d between out and x by index, one element a thread.
template <bool kScatter>
__global__ void __launch_bounds__(kThreads)
    move_rows(int64_t n, int64_t d, const int32_t* __restrict__ index, const float* x, float* out) {
  for (int64_t i = loop_begin(); i < n; i += loop_step()) {
    const int64_t other = index[i / d] * d + i % d;
    if (kScatter) {
      out[other] = x[i];
    } else {
      out[i] = x[other];
    }
  }
}

/// out[ids[r]] += dy[r]. One block a row: the first row that has an id adds all rows with that id,
/// in their order; the blocks of the others do nothing.
__global__ void __launch_bounds__(kThreads)
    embed_gradient(int rows, int64_t d, const int32_t* __restrict__ ids,
                   const float* __restrict__ dy, float* out) {
  __shared__ bool same[kThreads];
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int32_t id = ids[row];
  bool earlier = false;
  for (int r = thread; r < row; r += kThreads) earlier |= ids[r] == id;
  if (__syncthreads_or(earlier)) return;
  for (int64_t base = row; base < rows; base += kThreads) {
    same[thread] = base + thread < rows && ids[base + thread] == id;
    if (__syncthreads_or(same[thread])) {
      for (int j = 0; j < kThreads; ++j) {
        if (!same[j]) continue;
        for (int64_t i = thread; i < d; i += kThreads) out[id * d + i] += dy[(base + j) * d + i];
      }
    }
    __syncthreads();
  }
}

}  // namespace

void embed(const OpContext& context, const WeightView& table, int64_t rows, const int32_t* ids,
           float* out) {
  const StreamState* s = enter(context);
  const int64_t n = rows * table.k, padded = padded_k(table.format, table.k);
  if (s == nullptr || n == 0) return;
  with_element(table.format, [&]<typename T>(T) {
    embed_rows<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(
        n, table.k, padded, ids, static_cast<const T*>(table.data), out);
  });
  launched("embed");
}

namespace {

template <bool kScatter>
void launch_move(const char* what, const OpContext& context, int64_t rows, int64_t d,
                 const int32_t* index, const float* x, float* out) {
  const StreamState* s = enter(context);
  const int64_t n = rows * d;
  if (s == nullptr || n == 0) return;
  move_rows<kScatter><<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(n, d, index, x, out);
  launched(what);
}

}  // namespace

void gather_rows(const OpContext& context, int64_t rows, int64_t d, const int32_t* index,
                 const float* x, float* out) {
  launch_move<false>("gather_rows", context, rows, d, index, x, out);
}

void scatter_rows(const OpContext& context, int64_t rows, int64_t d, const int32_t* index,
                  const float* x, float* out) {
  launch_move<true>("scatter_rows", context, rows, d, index, x, out);
}

void embed_backward(const OpContext& context, int64_t rows, int64_t d, const int32_t* ids,
                    const float* dy, float* out) {
  const StreamState* s = enter(context);
  if (s == nullptr || rows == 0 || d == 0) return;
  embed_gradient<<<static_cast<unsigned>(rows), kThreads, 0, s->stream()>>>(static_cast<int>(rows),
                                                                            d, ids, dy, out);
  launched("embed_backward");
}

}  // namespace ds::cuda
