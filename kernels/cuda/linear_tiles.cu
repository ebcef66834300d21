// SPDX-License-Identifier: Apache-2.0
// Linear layers of many rows by tiles (product_tiles.cuh), with what follows their products in the
// same launch.
#include "kernels/cuda/driver.h"
#include "kernels/cuda/low_rank.cuh"
#include "kernels/cuda/product_tiles.cuh"
#include "kernels/cuda/rope.cuh"

namespace ds::cuda {
namespace {

// ------------------------------------------------------------------ what becomes of sums

__device__ inline int first_column(const TilePlace& at) {
  return at.column - static_cast<int>(threadIdx.x) % 4 * 2;
}

/// The outputs of one weight that neighbouring columns of a tile are: from `output` on, below
/// `end`.
struct Outputs {
  int w, output, end;
};

/// Adds low-rank parts and biases to sums: of(run) says what the tile's run-th kEights eights of
/// columns are.
template <typename T, int kEights, typename Tile, typename Of>
__device__ inline void add_to_sums(const Additions& add, WarpSlots slots, const TilePlace& at,
                                   TileSums<Tile>& sums, const Of& of) {
  constexpr int kRuns = Tile::kColumns / 8 / kEights;
  for (int slot = slots.next(); slot >= 0; slot = slots.next()) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const Outputs o = of(run);
      add_low_rank<T, kEights>(add, slots, slot, o.w, at.row, o.output, o.end,
                               [&](int i) -> float(&)[4] { return sums.eight(run * kEights + i); });
    }
    slots.done(slot);
  }
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const Outputs o = of(run);
    if (add.bias[o.w] == nullptr) continue;
    const float* bias = add.bias[o.w] + o.output + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      if (o.output + i * 8 >= o.end) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums.at(run * kEights + i, half, 0) += bias[i * 8];
        sums.at(run * kEights + i, half, 1) += bias[i * 8 + 1];
      }
    }
  }
}

/// Stores pairs of 16 bits, pair(c, half) those of the lane's two columns of eight c, by fours:
/// neighbouring lanes change pairs of neighbouring eights. Columns are a multiple of 8.
template <int kEights, typename Pair>
__device__ inline void store_pairs(const TilePlace& at, void* y, int64_t stride, const Pair& pair) {
  static_assert(kEights % 2 == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool odd = lane % 2 != 0;
  const int column = first_column(at) + lane % 2 * 8 + lane % 4 / 2 * 4;
  auto* to = static_cast<uint16_t*>(y) + at.row * stride + column;
#pragma unroll
  for (int c = 0; c < kEights; c += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t first = pair(c, half), second = pair(c + 1, half);
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
      if (!at.has_row(half) || column + c * 8 >= at.columns) continue;
      *reinterpret_cast<uint2*>(to + half * 8 * stride + c * 8) =
          odd ? make_uint2(other, second) : make_uint2(first, other);
    }
  }
}

/// y = silu(gate) * up as T, of which the matrices are gate and up.
template <bool kAdds>
struct SwigluEnd {
  static constexpr int kMatrices = 2;
  void* y;
  int64_t stride;
  Additions add;  ///< read if kAdds

  template <typename Tile>
  __device__ WarpSlots look_up(const TilePlace& at) const {
    WarpSlots slots;
    if constexpr (kAdds) slots.look_up(add.slot_of_row, at.row, at.rows);
    return slots;
  }
  template <typename T, typename Tile>
  __device__ void store(const TilePlace& at, TileSums<Tile>& sums, const WarpSlots& slots) const {
    constexpr int kEights = Tile::kColumns / 16;
    if constexpr (kAdds) {
      add_to_sums<T, kEights>(add, slots, at, sums, [&](int w) {
        return Outputs{w, first_column(at), at.columns};
      });
    }
    // Results are rounded to T, so fast exponentials and divisions do.
    store_pairs<kEights>(at, y, stride, [&](int c, int half) {
      float out[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float gate = sums.at(c, half, e);
        out[e] = __fdividef(gate, 1.0f + __expf(-gate)) * sums.at(kEights + c, half, e);
      }
      return pack_pair<T>(out[0], out[1]);
    });
  }
};

constexpr int kHeadDim = 64;  ///< of heads that RopeEnd takes

/// Heads of q, k and v, side by side, go where rope_append() puts them.
template <bool kAdds>
struct RopeEnd {
  static constexpr int kMatrices = 1, kHalf = kHeadDim / 2;
  float* q;
  int64_t q_stride;
  RopeAppendArgs rope;
  Additions add;  ///< read if kAdds

  /// Of the lane's two rows: where they go, and the angles of its eight pairs.
  struct Ahead {
    int32_t slot[2];  // in the pages
    WarpSlots low_rank;
    float2 cos[2][kHalf / 8], sin[2][kHalf / 8];
  };
  template <typename Tile>
  __device__ Ahead look_up(const TilePlace& at) const {
    Ahead ahead;
    if constexpr (kAdds) ahead.low_rank.look_up(add.slot_of_row, at.row, at.rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(at.row + 8 * half, at.rows - 1);
      ahead.slot[half] = rope.slots[row];
      const int64_t angle = static_cast<int64_t>(rope.positions[row]) * kHalf + at.column % 8;
#pragma unroll
      for (int c = 0; c < kHalf / 8; ++c) {
        ahead.cos[half][c] = *reinterpret_cast<const float2*>(rope.cos + angle + c * 8);
        ahead.sin[half][c] = *reinterpret_cast<const float2*>(rope.sin + angle + c * 8);
      }
    }
    return ahead;
  }
  template <typename T, typename Tile>
  __device__ void store(const TilePlace& at, TileSums<Tile>& sums, const Ahead& ahead) const {
    if constexpr (kAdds) {
      add_to_sums<T, kHeadDim / 8>(add, ahead.low_rank, at, sums, [&](int h) {
        const int number = at.column / kHeadDim + h;
        const auto [w, head] = head_of(rope, number);
        const int output = head * kHeadDim;
        // Of a head behind the last: nothing.
        return Outputs{w, output, number * kHeadDim < at.columns ? output + kHeadDim : 0};
      });
    }
#pragma unroll
    for (int h = 0; h < Tile::kColumns / kHeadDim; ++h) {
      if (at.column + h * kHeadDim >= at.columns) return;
      const auto [w, head] = head_of(rope, at.column / kHeadDim + h);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!at.has_row(half)) continue;
        const int64_t to = (w == 0 ? (at.row + 8 * half) * q_stride + head * kHeadDim
                                   : page_offset(rope.kv, ahead.slot[half], head)) +
                           at.column % 8;
#pragma unroll
        for (int i = 0; i < kHalf / 8; ++i) {
          const int c = h * kHeadDim / 8 + i;
          float2 x = {sums.at(c, half, 0), sums.at(c, half, 1)};
          float2 y = {sums.at(c + kHalf / 8, half, 0), sums.at(c + kHalf / 8, half, 1)};
          if (w < 2) {
            rotate(ahead.cos[half][i].x, ahead.sin[half][i].x, &x.x, &y.x);
            rotate(ahead.cos[half][i].y, ahead.sin[half][i].y, &x.y, &y.y);
          }
          put(w, to + i * 8, x);
          put(w, to + i * 8 + kHalf, y);
        }
      }
    }
  }

 private:
  __device__ void put(int w, int64_t to, float2 v) const {
    void* base = w == 0 ? q : w == 1 ? rope.kv.k : rope.kv.v;
    if (w == 0 || rope.kv.dtype == KvDtype::kF32) {
      *reinterpret_cast<float2*>(static_cast<float*>(base) + to) = v;
    } else {
      static_cast<uint32_t*>(base)[to / 2] =
          rope.kv.dtype == KvDtype::kF16 ? pack_pair<Half>(v.x, v.y) : pack_pair<Bf16>(v.x, v.y);
    }
  }
};

// ------------------------------------------------------------------ launches

/// Null where the driver is older than the toolkit.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  static const bool found = find_in_driver("cuTensorMapEncodeTiled", &encode);
  return found ? encode : nullptr;
}

/// data [rows, k] of elements of 16 bits, to be copied in boxes of kBoxColumns times `box_rows`.
bool describe(WeightFormat format, const void* data, int64_t rows, int64_t k, int64_t stride,
              int64_t box_rows, CUtensorMap* map) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t bytes[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  const auto element = format == WeightFormat::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encoder()(map, element, 2, const_cast<void*>(data), sizes, bytes, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return true;
  fail("a matrix of " + std::to_string(rows) + " x " + std::to_string(k) +
       " cannot be copied in boxes: driver error " + std::to_string(result));
  return false;
}

/// What a launch multiplies: rows of x, and one or two weights of the same size.
struct Factors {
  int64_t rows;
  const void* x;
  int64_t x_stride;
  const WeightView* w[2];
};

template <typename Tile, typename End>
struct Launch {
  static constexpr int64_t kOutputs = TileWalk<Tile, End::kMatrices>::kOutputs;

  static int64_t tiles(const Factors& f) {
    return ceil_div(f.rows, Tile::kRows) * ceil_div(f.w[0]->n, kOutputs);
  }
  /// About how long it takes.
  static int64_t cycles(const Factors& f, int64_t sms) {
    return ceil_div(tiles(f), sms) *
           (ceil_div(f.w[0]->k, kBoxColumns) * Tile::kStepCycles + Tile::kEndCycles);
  }
  static void run(const StreamState& s, const Factors& f, const End& end) {
    const WeightFormat format = f.w[0]->format;
    const int64_t k = padded_k(format, f.w[0]->k);
    TileArgs a{};
    a.rows = static_cast<int>(f.rows);
    a.columns = static_cast<int>(f.w[0]->n);
    a.steps = static_cast<int>(ceil_div(k, kBoxColumns));
    if (!describe(format, f.x, f.rows, k, f.x_stride, Tile::kRows, &a.x)) return;
    for (int m = 0; m < End::kMatrices; ++m) {
      if (!describe(format, f.w[m]->data, f.w[m]->n, k, k, kOutputs, &a.w[m])) return;
    }
    const auto launch_as = [&]<typename T>(T) {
      const auto kernel = multiply_tiles<T, Tile, End>;
      if (!allow_shared(kernel, Tile::kBytes)) return;
      const auto blocks = static_cast<unsigned>(smaller(tiles(f), s.sms()));
      launch("linear by tiles", Launching{.early = !s.take_weights_changed()}, kernel, dim3(blocks),
             Tile::kThreads, Tile::kBytes, s.stream(), a, end);
    };
    format == WeightFormat::kF16 ? launch_as(Half()) : launch_as(Bf16());
  }
};

/// By those of the tiles that should be done first.
template <typename... Tiles>
struct Choice {
  template <typename End>
  static void run(const StreamState& s, const Factors& f, const End& end) {
    const int64_t cycles[] = {Launch<Tiles, End>::cycles(f, s.sms())...};
    size_t best = 0, i = 0;
    for (size_t t = 1; t < sizeof...(Tiles); ++t)
      if (cycles[t] < cycles[best]) best = t;
    ((i++ == best ? Launch<Tiles, End>::run(s, f, end) : void()), ...);
  }
};

bool suits(const WeightView& w, const void* x, int64_t x_stride) {
  return !is_f32(w.format) && !w.transposed && w.n > 0 && w.k > 0 && is_aligned16(w.data) &&
         is_aligned16(x) && x_stride % 8 == 0 && encoder() != nullptr;
}

/// f(with): whether anything is added to products, as a constant.
template <typename F>
void for_additions(const Additions& add, const F& f) {
  bool adds = add.slot_of_row != nullptr;
  for (const float* bias : add.bias) adds = adds || bias != nullptr;
  adds ? f(std::true_type()) : f(std::false_type());
}

}  // namespace

bool swiglu_by_tiles(const StreamState& s, const WeightView& gate, const WeightView& up,
                     int64_t rows, const void* x, int64_t x_stride, const Additions& add, void* y) {
  if (!suits(gate, x, x_stride) || !suits(up, x, x_stride)) return false;
  if (gate.n != up.n || gate.n % 8 != 0 || !is_aligned8(y)) return false;
  for_additions(add, [&]<typename Adds>(Adds) {
    Choice<Tile<1, 1, 96>, Tile<2, 1, 96>, Tile<2, 2, 96>>::run(
        s, {rows, x, x_stride, {&gate, &up}}, SwigluEnd<Adds::value>{y, gate.n, add});
  });
  return true;
}

bool rope_by_tiles(const StreamState& s, const WeightView& heads, int64_t rows, const void* x,
                   int64_t x_stride, const Additions& add, float* q, int64_t q_stride,
                   const RopeAppendArgs& rope) {
  if (!suits(heads, x, x_stride) || rope.kv.head_dim != kHeadDim) return false;
  if (q_stride % 2 != 0 || !is_aligned8(q) || !is_aligned8(rope.cos) || !is_aligned8(rope.sin) ||
      !is_aligned8(rope.kv.k) || !is_aligned8(rope.kv.v))
    return false;
  for_additions(add, [&]<typename Adds>(Adds) {
    Choice<Tile<1, 1, 64>, Tile<2, 1, 64>, Tile<2, 2, 96>>::run(
        s, {rows, x, x_stride, {&heads, nullptr}}, RopeEnd<Adds::value>{q, q_stride, rope, add});
  });
  return true;
}

}  // namespace ds::cuda
