// SPDX-License-Identifier: Apache-2.0
// Paged attention. Over pages of 16 bits batches of single rows go to attention_decode.cu, prompts
// to attention_prompt.cu; other single rows and chosen keys to attention_rows.cu, and other prompts
// are here, in FP32 by tiles.
#include "kernels/cuda/attention_mma.h"
#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

/// Units are the rows of a sequence in this call, tiles its pages.
template <typename T>
struct PagedTiles {
  using Element = T;
  AttentionArgs a;

  __device__ int64_t rows(int sequence) const {
    return a.starts[sequence + 1] - a.starts[sequence];
  }
  __device__ Units units(int sequence, int) const {
    const int64_t group = a.n_heads / a.kv.n_kv_heads, d = a.kv.head_dim;
    return {rows(sequence) * group, group, a.n_heads * d, d};
  }
  __device__ int64_t q_offset(int sequence, int head) const {
    const int64_t group = a.n_heads / a.kv.n_kv_heads;
    return (a.starts[sequence] * a.n_heads + head * group) * a.kv.head_dim;
  }
  __device__ int64_t lse_offset(int, int, int64_t) const { return 0; }
  __device__ int64_t position(int sequence, int64_t row) const {
    return a.lengths[sequence] - rows(sequence) + row;
  }
  __device__ int n_tiles(int sequence, int64_t last_row) const {
    return static_cast<int>(position(sequence, last_row) / kKvPageTokens) + 1;
  }
  __device__ KeyTile tile(int sequence, int head, int i, int64_t last_row) const {
    const int64_t page = a.table[sequence * a.table_width + i], d = a.kv.head_dim;
    const int64_t first = i * kKvPageTokens;
    const int64_t at = (page * a.kv.n_kv_heads + head) * kKvPageTokens * d;
    const int64_t count = smaller(kKvPageTokens, position(sequence, last_row) + 1 - first);
    return {static_cast<const T*>(a.kv.k) + at,
            static_cast<const T*>(a.kv.v) + at,
            d,
            static_cast<int>(count),
            first,
            first};
  }
  __device__ uint32_t mask(int sequence, int, int64_t row, const KeyTile& tile) const {
    return low_bits(position(sequence, row) + 1 - tile.first);
  }
};

template <typename T>
void attend_prompts(const StreamState& s, const AttentionArgs& a) {
  const int64_t units = a.max_rows * (a.n_heads / a.kv.n_kv_heads);
  const dim3 grid(static_cast<unsigned>(ceil_div(units, kTileRows)),
                  static_cast<unsigned>(a.kv.n_kv_heads), static_cast<unsigned>(a.batch));
  attend(s, PagedTiles<T>{a}, grid, a.kv.head_dim, a.q, a.scale, a.out, nullptr);
}

/// Behind kernels that leave FP32 alone.
void round_attended(const StreamState& s, const AttentionArgs& a) {
  const int64_t width = a.n_heads * a.kv.head_dim;
  if (a.out_16.data != nullptr) round_rows(s, a.rows, width, a.out, width, a.out_16);
}

}  // namespace

void attention(const OpContext& context, const AttentionArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.batch == 0 || a.max_rows == 0 || a.max_keys == 0) return;
  if (attend_one_row_each(*s, a, nullptr)) return;
  if (a.max_rows > 1 && attend_prompts_on_tensor_cores(*s, a, nullptr)) return;
  if (a.max_rows == 1) {
    attend_rows(*s, a, nullptr);
  } else if (a.kv.dtype == KvDtype::kF32) {
    attend_prompts<float>(*s, a);
  } else if (a.kv.dtype == KvDtype::kF16) {
    attend_prompts<Half>(*s, a);
  } else {
    attend_prompts<Bf16>(*s, a);
  }
  round_attended(*s, a);
}

void attention_selected(const OpContext& context, const AttentionArgs& a,
                        const KeySelection& selection) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.batch == 0 || a.max_rows == 0 || a.max_keys == 0) return;
  if (attend_one_row_each(*s, a, &selection)) return;
  if (a.max_rows > 1 && attend_prompts_on_tensor_cores(*s, a, &selection)) return;
  attend_rows(*s, a, &selection);
  round_attended(*s, a);
}

}  // namespace ds::cuda
