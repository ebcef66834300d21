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

/// A whole item by the blocks of one y of the grid. Rows that need no padding are converted in
/// fours, which is what bounds the copy of a model.
template <typename T>
__device__ inline void pack_item(const PackItem& item, int64_t padded) {
  auto* to = static_cast<T*>(item.packed);
  const int64_t count = item.n * padded;
  if (!item.transposed && padded == item.k && is_aligned16(item.source) && is_aligned16(to)) {
    const int64_t fours = count / 4;
    for (int64_t i = loop_begin(); i < fours; i += loop_step()) {
      const float4 v = reinterpret_cast<const float4*>(item.source)[i];
      to[4 * i] = from_float<T>(v.x);
      to[4 * i + 1] = from_float<T>(v.y);
      to[4 * i + 2] = from_float<T>(v.z);
      to[4 * i + 3] = from_float<T>(v.w);
    }
    for (int64_t i = fours * 4 + loop_begin(); i < count; i += loop_step()) {
      to[i] = from_float<T>(item.source[i]);
    }
    return;
  }
  for (int64_t at = loop_begin(); at < count; at += loop_step()) {
    const int64_t i = at / padded, j = at % padded;
    const int64_t from = item.transposed ? j * item.n + i : i * item.k + j;
    to[at] = from_float<T>(j < item.k ? item.source[from] : 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads) pack_items(const PackItem* __restrict__ items) {
  const PackItem item = items[blockIdx.y];
  const int64_t padded = padded_k(item.format, item.k);
  if (item.format == WeightFormat::kF32) {
    pack_item<float>(item, padded);
  } else {
    pack_item<Bf16>(item, padded);
  }
}

/// The four packs of one weight's factors. Blocks of a weight are along x, weights along y; a
/// thread takes elements of all four.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_factor_rows(int64_t rank, WeightFormat format, const FactorPack* __restrict__ factors) {
  const FactorPack f = factors[blockIdx.y];
  // [16, columns] and [columns, 16] of one source [rank, columns].
  const auto both = [&](int64_t columns, const float* source, void* wide, void* tall) {
    const int64_t padded = padded_k(format, columns);
    for (int64_t at = loop_begin(); at < kLoraRank * padded; at += loop_step()) {
      const int64_t i = at / padded, j = at % padded;
      const bool given = i < rank && j < columns;
      static_cast<T*>(wide)[at] = from_float<T>(given ? source[i * columns + j] : 0.0f);
    }
    for (int64_t at = loop_begin(); at < kLoraRank * columns; at += loop_step()) {
      const int64_t j = at / kLoraRank, i = at % kLoraRank;
      static_cast<T*>(tall)[at] = from_float<T>(i < rank ? source[i * columns + j] : 0.0f);
    }
  };
  both(f.k, f.a, f.a_packed, f.at_packed);
  both(f.n, f.bt, f.bt_packed, f.b_packed);
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

namespace {

/// Eight elements a thread; n counts eights.
__global__ void __launch_bounds__(kThreads)
    round_eights(int64_t n, const float4* x, uint4* rounded) {
  begin_after_previous();
  for (int64_t i = loop_begin(); i < n; i += loop_step()) {
    const float4 a = x[2 * i], b = x[2 * i + 1];
    const __nv_bfloat162 pairs[4] = {
        __floats2bfloat162_rn(a.x, a.y), __floats2bfloat162_rn(a.z, a.w),
        __floats2bfloat162_rn(b.x, b.y), __floats2bfloat162_rn(b.z, b.w)};
    rounded[i] = *reinterpret_cast<const uint4*>(pairs);
  }
}

}  // namespace

void round_rows(const StreamState& s, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                void* rounded) {
  const int64_t padded = padded_k(WeightFormat::kBF16, k);
  if (rows * padded == 0) return;
  if (padded == k && x_stride == k && is_aligned16(x) && is_aligned16(rounded)) {
    const int64_t n = rows * k / 8;
    launch_next("prepare", round_eights, dim3(loop_blocks(n, kThreads)), kThreads, 0, s.stream(), n,
                reinterpret_cast<const float4*>(x), static_cast<uint4*>(rounded));
    return;
  }
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
  s->weights_change();
  if (format == WeightFormat::kF32) {
    pack_as<float>(*s, format, n, k, source, transposed, packed);
  } else {
    pack_as<Bf16>(*s, format, n, k, source, transposed, packed);
  }
}

void pack_all(const OpContext& context, int64_t count, const PackItem* items) {
  const StreamState* s = enter(context);
  if (s == nullptr || count == 0) return;
  s->weights_change();
  constexpr unsigned kBlocks = 48;  // of an item: some matrices are 200 times as large as others
  pack_items<<<dim3(kBlocks, static_cast<unsigned>(count)), kThreads, 0, s->stream()>>>(items);
  launched("pack_all");
}

void pack_factors(const OpContext& context, WeightFormat format, int64_t rank, int64_t count,
                  const FactorPack* factors) {
  const StreamState* s = enter(context);
  if (s == nullptr || count == 0) return;
  s->weights_change();
  constexpr unsigned kBlocks = 24;  // of one weight: an element or two a thread at 1,536 columns
  const dim3 grid(kBlocks, static_cast<unsigned>(count));
  if (format == WeightFormat::kF32) {
    pack_factor_rows<float><<<grid, kThreads, 0, s->stream()>>>(rank, format, factors);
  } else {
    pack_factor_rows<Bf16><<<grid, kThreads, 0, s->stream()>>>(rank, format, factors);
  }
  launched("pack_factors");
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
