// SPDX-License-Identifier: Apache-2.0
// Low-rank parts on tensor cores: what a warp needs whose 16 rows may have different slots.
#pragma once

#include "kernels/cuda/linear.h"
#include "kernels/cuda/mma.cuh"

namespace ds::cuda {

/// Slots of the lane's rows, g and g + 8 of the warp's 16 (mma.cuh), that are still to be done.
struct WarpSlots {
  int32_t of[2] = {-1, -1};

  /// Rows [row, rows), `row` the lane's first.
  __device__ void look_up(const int32_t* slot_of_row, int64_t row, int64_t rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (slot_of_row != nullptr && row + 8 * half < rows) of[half] = slot_of_row[row + 8 * half];
  }
  /// One that some row has; -1: none is left. All lanes.
  __device__ int next() const { return __reduce_max_sync(kAllLanes, max(of[0], of[1])); }
  __device__ void done(int slot) {
#pragma unroll
    for (int32_t& mine : of)
      if (mine == slot) mine = -1;
  }
};

/// Two neighbours of a row of t, times `scale`, as two elements each: their sum is exact to 16 bits
/// and more.
template <typename T>
__device__ inline void split_pair(float2 t, float scale, uint32_t& high, uint32_t& low) {
  const float x = t.x * scale, y = t.y * scale;
  const float x_high = to_float(from_float<T>(x)), y_high = to_float(from_float<T>(y));
  high = pack_pair<T>(x_high, y_high);
  low = pack_pair<T>(x - x_high, y - y_high);
}

/// Adds scale * B t of the rows with `slot` to kEights times 8 outputs of weight w, from `output`
/// on and below `end`: sum(i) is the C of eight i. `row`: the lane's first.
template <typename T, int kEights, typename Sum>
__device__ inline void add_low_rank(const Additions& add, const WarpSlots& slots, int slot, int w,
                                    int64_t row, int output, int end, const Sum& sum) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
  const LoraEntry low = add.low.at(w, slot);
  if (low.b == nullptr) return;
  uint32_t b[kEights][2];  // all loads first
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const bool there = output + 8 * i < end;
    const auto* from = reinterpret_cast<const uint32_t*>(
        static_cast<const T*>(low.b) + (output + 8 * i + group) * int64_t{kLoraRank} + pair);
    b[i][0] = there ? from[0] : 0;
    b[i][1] = there ? from[4] : 0;
  }
  uint32_t high[4], rest[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* t = add.t + (w * add.t_rows + row + 8 * half) * kLoraRank + pair;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const auto two = slots.of[half] == slot ? *reinterpret_cast<const float2*>(t + 8 * k)
                                              : make_float2(0.0f, 0.0f);
      split_pair<T>(two, low.scale, high[half + 2 * k], rest[half + 2 * k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    multiply_add<T>(rest, b[i][0], b[i][1], sum(i));
    multiply_add<T>(high, b[i][0], b[i][1], sum(i));
  }
}

}  // namespace ds::cuda
