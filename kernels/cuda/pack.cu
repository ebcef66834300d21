// SPDX-License-Identifier: Apache-2.0
// Packed matrices: [n][k] row-major in FP32 or BF16, rows padded with zeros to 16 bytes. The shared
// input of BF16 products is rounded to the same layout.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;

/// source [n, k] with rows `stride` apart -> packed [n, padded]. A thread takes one element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_rows(int64_t n, int64_t k, int64_t padded, const float* __restrict__ source,
              int64_t stride, T* packed) {
  for (int64_t at = loop_begin(); at < n * padded; at += loop_step()) {
    const int64_t i = at / padded, j = at % padded;
    packed[at] = from_float<T>(j < k ? source[i * stride + j] : 0.0f);
  }
}

/// source [k, n] -> packed [n, padded]. A block turns tiles of 32 x 32 in shared memory, so that
/// both sides are read and written along their rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_transposed(int64_t n, int64_t k, int64_t padded, const float* __restrict__ source,
                    T* packed) {
  __shared__ float tile[kTile][kTile + 1];
  const int lane = threadIdx.x % kTile, line = threadIdx.x / kTile;
  const int64_t across = ceil_div(padded, kTile), tiles = across * ceil_div(n, kTile);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t i0 = t / across * kTile, j0 = t % across * kTile;
    for (int j = line; j < kTile; j += kThreads / kTile) {
      const bool inside = j0 + j < k && i0 + lane < n;
      tile[j][lane] = inside ? source[(j0 + j) * n + i0 + lane] : 0.0f;
    }
    __syncthreads();
    for (int i = line; i < kTile; i += kThreads / kTile) {
      if (i0 + i < n && j0 + lane < padded) {
        packed[(i0 + i) * padded + j0 + lane] = from_float<T>(tile[lane][i]);
      }
    }
    __syncthreads();
  }
}

/// packed [n, padded] -> out [n, k]. A thread takes one element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_rows(int64_t n, int64_t k, int64_t padded, const T* __restrict__ packed, float* out) {
  for (int64_t at = loop_begin(); at < n * k; at += loop_step()) {
    out[at] = to_float(packed[at / k * padded + at % k]);
  }
}

template <typename T>
void pack_as(const StreamState& s, WeightFormat format, int64_t n, int64_t k, const float* source,
             bool transposed, void* packed) {
  const int64_t padded = padded_k(format, k);
  if (transposed) {
    const int64_t tiles = ceil_div(padded, kTile) * ceil_div(n, kTile);
    pack_transposed<<<loop_blocks(tiles, 1), kThreads, 0, s.stream()>>>(n, k, padded, source,
                                                                        static_cast<T*>(packed));
  } else {
    pack_rows<<<loop_blocks(n * padded, kThreads), kThreads, 0, s.stream()>>>(
        n, k, padded, source, k, static_cast<T*>(packed));
  }
  launched("pack");
}

}  // namespace

void round_rows(const StreamState& s, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                void* rounded) {
  const int64_t padded = padded_k(WeightFormat::kBF16, k);
  if (rows * padded == 0) return;
  pack_rows<<<loop_blocks(rows * padded, kThreads), kThreads, 0, s.stream()>>>(
      rows, k, padded, x, x_stride, static_cast<Bf16*>(rounded));
  launched("prepare");
}

int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return n * padded_k(format, k) * element_bytes(format);
}

void pack(const OpContext& context, WeightFormat format, int64_t n, int64_t k, const float* source,
          bool transposed, void* packed) {
  const StreamState* s = enter(context);
  if (s == nullptr || n * k == 0) return;
  if (format == WeightFormat::kF32) {
    pack_as<float>(*s, format, n, k, source, transposed, packed);
  } else {
    pack_as<Bf16>(*s, format, n, k, source, transposed, packed);
  }
}

void unpack(const OpContext& context, const WeightView& w, float* out) {
  const StreamState* s = enter(context);
  const int64_t n = w.n * w.k, padded = padded_k(w.format, w.k);
  if (s == nullptr || n == 0) return;
  if (w.format == WeightFormat::kF32) {
    unpack_rows<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(
        w.n, w.k, padded, static_cast<const float*>(w.data), out);
  } else {
    unpack_rows<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(
        w.n, w.k, padded, static_cast<const Bf16*>(w.data), out);
  }
  launched("unpack");
}

int64_t prepared_bytes(WeightFormat format, int64_t rows, int64_t k) {
  const bool rounds_itself = format == WeightFormat::kF32 || rows <= kFewRows;
  return rounds_itself ? 0 : packed_bytes(format, rows, k);
}

void prepare(const OpContext& context, WeightFormat format, int64_t rows, int64_t k, const float* x,
             int64_t x_stride, void* prepared) {
  const StreamState* s = enter(context);
  if (s == nullptr || format == WeightFormat::kF32) return;
  round_rows(*s, rows, k, x, x_stride, prepared);
}

}  // namespace ds::cuda
