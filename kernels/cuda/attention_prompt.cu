// SPDX-License-Identifier: Apache-2.0
// Paged attention of prompts over pages of BF16 or FP16, on tensor cores: a passing tile is two
// pages.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"

namespace ds::cuda {
namespace {

static_assert(kPassingRows == 2 * kKvPageTokens);

template <typename T>
struct PagedKeys {
  static constexpr bool kChosen = false;
  QueryUnits units;
  const T *k, *v;  ///< of the kv head in page 0
  const int32_t* pages;
  int64_t page_step;  ///< elements

  __device__ PassingRows rows(int tile, int n_keys) const {
    const int count = n_keys - tile * kPassingRows;
    const int64_t first = pages[2 * tile] * page_step;
    const bool both = count > kKvPageTokens;
    return {{first, both ? pages[2 * tile + 1] * page_step : first}, units.d, count};
  }
};

template <typename T>
struct PagedSource {
  using Element = T;
  AttentionArgs a;

  __device__ PagedKeys<T> keys(int64_t sequence, int64_t head) const {
    const QueryUnits units = paged_units(a, sequence, head);
    const int64_t d = a.kv.head_dim;
    const int64_t at = head * kKvPageTokens * d;
    return {units, static_cast<const T*>(a.kv.k) + at, static_cast<const T*>(a.kv.v) + at,
            a.table + sequence * a.table_width, a.kv.n_kv_heads * kKvPageTokens * d};
  }
};

}  // namespace

bool attend_prompts_on_tensor_cores(const StreamState& s, const AttentionArgs& a) {
  const int64_t d = a.kv.head_dim;
  if (a.kv.dtype == KvDtype::kF32 || !suits_tensor_cores(d, a.scale)) return false;
  if (!is_aligned16(a.q) || !is_aligned16(a.out) || !is_aligned16(a.kv.k) || !is_aligned16(a.kv.v))
    return false;
  const auto attend = [&](const auto& source) {
    attend_on_tensor_cores(s, source, a.kv.n_kv_heads, a.batch,
                           a.max_rows * (a.n_heads / a.kv.n_kv_heads), d,
                           {a.q, a.scale, a.out, nullptr});
  };
  if (a.kv.dtype == KvDtype::kF16) {
    attend(PagedSource<Half>{a});
  } else {
    attend(PagedSource<Bf16>{a});
  }
  return true;
}

}  // namespace ds::cuda
