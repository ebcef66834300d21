// SPDX-License-Identifier: Apache-2.0
// Packed matrices: [n][k] row-major in FP32, BF16 or FP16, rows padded with zeros to 16 bytes. The
// shared input of products of 16 bits is rounded to the same layout.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;

/// source [n, k] with rows `stride` apart -> to [n, padded], by all threads of the grid's x. Rows
/// without gaps are converted in eights: memory bounds them. Counts halves that saturate.
template <typename T>
__device__ inline void convert_rows(int64_t n, int64_t k, int64_t padded, const float* source,
                                    int64_t stride, T* to, int32_t* saturated) {
  int beyond = 0;
  const auto look = [&](float x) { beyond += std::is_same_v<T, Half> && saturates(x) ? 1 : 0; };
  int64_t done = 0;
  if (padded == k && stride == k && is_aligned16(source) && is_aligned16(to)) {
    done = n * k / 8 * 8;
    for (int64_t i = loop_begin(); i < done / 8; i += loop_step()) {
      const float4 a = reinterpret_cast<const float4*>(source)[2 * i];
      const float4 b = reinterpret_cast<const float4*>(source)[2 * i + 1];
      store_eight(to + 8 * i, a, b);
      for (const float x : {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}) look(x);
    }
  }
  for (int64_t at = done + loop_begin(); at < n * padded; at += loop_step()) {
    const int64_t i = at / padded, j = at % padded;
    const float x = j < k ? source[i * stride + j] : 0.0f;
    to[at] = from_float<T>(x);
    look(x);
  }
  if (beyond > 0 && saturated != nullptr) atomicAdd(saturated, beyond);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_rows(int64_t n, int64_t k, int64_t padded, const float* source, int64_t stride, T* packed,
              int32_t* saturated) {
  begin_after_previous();
  convert_rows(n, k, padded, source, stride, packed, saturated);
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

/// A whole item by the blocks of one y of the grid.
template <typename T>
__device__ inline void pack_item(const PackItem& item, int64_t padded) {
  auto* to = static_cast<T*>(item.packed);
  if (!item.transposed) {
    return convert_rows(item.n, item.k, padded, item.source, item.k, to, nullptr);
  }
  for (int64_t at = loop_begin(); at < item.n * padded; at += loop_step()) {
    const int64_t i = at / padded, j = at % padded;
    to[at] = from_float<T>(j < item.k ? item.source[j * item.n + i] : 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads) pack_items(const PackItem* __restrict__ items) {
  const PackItem item = items[blockIdx.y];
  const int64_t padded = padded_k(item.format, item.k);
  if (is_f32(item.format)) {
    pack_item<float>(item, padded);
  } else if (item.format == WeightFormat::kF16) {
    pack_item<Half>(item, padded);
  } else {
    pack_item<Bf16>(item, padded);
  }
}

/// Two packs of one source [rank, columns]: [16, columns] and [columns, 16].
template <typename Wide, typename Tall>
__device__ inline void pack_factor(int64_t rank, int64_t columns, const float* source, void* wide,
                                   void* tall) {
  constexpr int64_t kEach = 16 / sizeof(Wide);
  const int64_t padded = ceil_div(columns, kEach) * kEach;
  for (int64_t at = loop_begin(); at < kLoraRank * padded; at += loop_step()) {
    const int64_t i = at / padded, j = at % padded;
    const bool given = i < rank && j < columns;
    static_cast<Wide*>(wide)[at] = from_float<Wide>(given ? source[i * columns + j] : 0.0f);
  }
  for (int64_t at = loop_begin(); at < kLoraRank * columns; at += loop_step()) {
    const int64_t j = at / kLoraRank, i = at % kLoraRank;
    static_cast<Tall*>(tall)[at] = from_float<Tall>(i < rank ? source[i * columns + j] : 0.0f);
  }
}

/// The four packs of one weight's factors. Blocks of a weight are along x, weights along y; a
/// thread takes elements of all four.
__global__ void __launch_bounds__(kThreads)
    pack_factor_rows(int64_t rank, const FactorPack* __restrict__ factors) {
  const FactorPack f = factors[blockIdx.y];
  const auto all = [&]<typename Forward, typename Backward>(Forward, Backward) {
    pack_factor<Forward, Backward>(rank, f.k, f.a, f.a_packed, f.at_packed);
    pack_factor<Backward, Forward>(rank, f.n, f.bt, f.bt_packed, f.b_packed);
  };
  if (is_f32(f.format)) {
    all(float(), float());
  } else if (f.format == WeightFormat::kF16) {
    all(Half(), Bf16());
  } else {
    all(Bf16(), Bf16());
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
        n, k, padded, source, k, static_cast<T*>(packed), nullptr);
  }
  launched("pack");
}

}  // namespace

void round_rows(const StreamState& s, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                const PreparedRows& to) {
  const int64_t padded = padded_k(to.format, k);
  if (rows * padded == 0) return;
  const dim3 blocks(loop_blocks(ceil_div(rows * padded, 8), kThreads));
  with_element(to.format, [&]<typename T>(T) {
    launch_next("prepare", pack_rows<T>, blocks, kThreads, 0, s.stream(), rows, k, padded, x,
                x_stride, static_cast<T*>(to.data), to.saturated);
  });
}

int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return n * padded_k(format, k) * element_bytes(format);
}

void pack(const OpContext& context, WeightFormat format, int64_t n, int64_t k, const float* source,
          bool transposed, void* packed) {
  const StreamState* s = enter(context);
  if (s == nullptr || n * k == 0) return;
  s->weights_change();
  with_element(format,
               [&]<typename T>(T) { pack_as<T>(*s, format, n, k, source, transposed, packed); });
}

void pack_all(const OpContext& context, int64_t count, const PackItem* items) {
  StreamState* s = enter(context);
  if (s == nullptr || count == 0) return;
  s->weights_change();
  constexpr unsigned kBlocks = 48;  // of an item: some matrices are 200 times as large as others
  s->in_chunks(count, 4, [&](int64_t from, int64_t some) {
    const dim3 grid(kBlocks, static_cast<unsigned>(some));
    pack_items<<<grid, kThreads, 0, s->stream()>>>(items + from);
    return launched("pack_all");
  });
}

void pack_factors(const OpContext& context, int64_t rank, int64_t count,
                  const FactorPack* factors) {
  const StreamState* s = enter(context);
  if (s == nullptr || count == 0) return;
  s->weights_change();
  constexpr unsigned kBlocks = 24;  // of one weight: an element or two a thread at 1,536 columns
  const dim3 grid(kBlocks, static_cast<unsigned>(count));
  pack_factor_rows<<<grid, kThreads, 0, s->stream()>>>(rank, factors);
  launched("pack_factors");
}

void unpack(const OpContext& context, const WeightView& w, float* out) {
  const StreamState* s = enter(context);
  const int64_t n = w.n * w.k, padded = padded_k(w.format, w.k);
  if (s == nullptr || n == 0) return;
  with_element(w.format, [&]<typename T>(T) {
    unpack_rows<<<loop_blocks(n, kThreads), kThreads, 0, s->stream()>>>(
        w.n, w.k, padded, static_cast<const T*>(w.data), out);
  });
  launched("unpack");
}

int64_t prepared_bytes(WeightFormat format, int64_t rows, int64_t k) {
  const bool rounds_itself = is_f32(format) || rows <= kFewRows;
  return rounds_itself ? 0 : packed_bytes(format, rows, k);
}

void prepare(const OpContext& context, int64_t rows, int64_t k, const float* x, int64_t x_stride,
             const PreparedRows& to) {
  const StreamState* s = enter(context);
  if (s == nullptr || is_f32(to.format)) return;
  round_rows(*s, rows, k, x, x_stride, to);
}

}  // namespace ds::cuda
