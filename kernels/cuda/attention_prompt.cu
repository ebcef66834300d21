// SPDX-License-Identifier: Apache-2.0
// Paged attention of prompts over pages of 16 bits, on tensor cores: a passing tile is two pages,
// or 64 chosen keys.
#include "kernels/cuda/attention_chosen.cuh"
#include "kernels/cuda/attention_mma.h"

namespace ds::cuda {
namespace {

static_assert(kPassingRows == 2 * kKvPageTokens);

template <typename T>
struct PagedKeys {
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
  __device__ int64_t offset(int position) const {
    return pages[position / kKvPageTokens] * page_step + position % kKvPageTokens * units.d;
  }
};

template <typename T>
struct PagedSource {
  using Element = T;
  AttentionArgs a;

  __device__ PagedKeys<T> keys(int64_t sequence, int64_t head) const {
    const int64_t d = a.kv.head_dim;
    const int64_t at = head * kKvPageTokens * d;
    return {paged_units(a, sequence, head), static_cast<const T*>(a.kv.k) + at,
            static_cast<const T*>(a.kv.v) + at, a.table + sequence * a.table_width,
            a.kv.n_kv_heads * kKvPageTokens * d};
  }
};

bool takes(const AttentionArgs& a) {
  if (a.kv.dtype == KvDtype::kF32 || !suits_tensor_cores(a.kv.head_dim, a.scale)) return false;
  return is_aligned16(a.q) && is_aligned16(a.out) && is_aligned16(a.kv.k) && is_aligned16(a.kv.v);
}

}  // namespace

bool attend_prompts_on_tensor_cores(const StreamState& s, const AttentionArgs& a,
                                    const KeySelection* chosen) {
  if (!takes(a) || (chosen != nullptr && !map_fits(a.max_keys))) return false;
  const auto attend = [&](const auto& source) {
    const int64_t max_units = a.max_rows * (a.n_heads / a.kv.n_kv_heads);
    const Attend what{a.q, a.scale, AttendedRows(a), nullptr};
    if (chosen == nullptr) {
      attend_on_tensor_cores(s, source, a.kv.n_kv_heads, a.batch, max_units, a.kv.head_dim, what);
    } else {
      attend_chosen_on_tensor_cores(s, source, *chosen, a.kv.n_kv_heads, a.batch, max_units,
                                    a.max_keys, a.kv.head_dim, what);
    }
  };
  if (a.kv.dtype == KvDtype::kF16) {
    attend(PagedSource<Half>{a});
  } else {
    attend(PagedSource<Bf16>{a});
  }
  return true;
}

}  // namespace ds::cuda
