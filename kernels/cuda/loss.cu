// SPDX-License-Identifier: Apache-2.0
// Losses over a vocabulary: one block a row, three passes (maximum, sum of exponentials, gradient)
// over memory or, for cross-entropy where a row fits, over registers.
// A thread sums its elements in FP32, the threads' sums are added in double.
#include <climits>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kMaxTopK = 8192;  // of one row in shared memory

struct Best {
  float value;
  int index;
  __device__ void meet(float other, int at) {
    if (other > value || (other == value && at < index)) {
      value = other;
      index = at;
    }
  }
};

/// The best of all threads.
__device__ inline Best block_best(Best best) {
  __shared__ Best of_warp[32];
  const auto across = [&best] {
    for (int step = 16; step > 0; step /= 2) {
      const float value = __shfl_xor_sync(kAllLanes, best.value, step);
      const int index = __shfl_xor_sync(kAllLanes, best.index, step);
      best.meet(value, index);
    }
  };
  across();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  best = of_warp[threadIdx.x % 32];
  across();
  if (best.index == INT_MAX) best.index = 0;
  return best;
}

/// Largest element of a row and the first index that holds it; NaN is passed over, and a row of
/// nothing else has index 0.
__device__ inline Best row_best(const float* x, int64_t n) {
  Best best{-INFINITY, INT_MAX};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) best.meet(x[i], static_cast<int>(i));
  return block_best(best);
}

__device__ inline double sum_exp(const float* x, int64_t n, float top) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += expf(x[i] - top);
  return block_sum(static_cast<double>(sum));
}

/// Where the gradient of a row goes: over the logits, or to BF16 as prepare() gives it.
struct RowGradient {
  float* x;
  Bf16* prepared;  ///< null: to x
  __device__ void set(int64_t i, float value) const {
    if (prepared == nullptr) {
      x[i] = value;
    } else {
      prepared[i] = __float2bfloat16_rn(value);
    }
  }
};
template <typename Args>
__device__ inline RowGradient row_gradient(const Args& a, int64_t r) {
  const int64_t padded = padded_k(WeightFormat::kBF16, a.vocab);
  auto* prepared = static_cast<Bf16*>(a.prepared);
  if (prepared != nullptr) prepared += r * padded;
  if (prepared != nullptr && threadIdx.x < padded - a.vocab) {
    prepared[a.vocab + threadIdx.x] = __float2bfloat16_rn(0.0f);
  }
  return {a.logits + r * a.stride, prepared};
}

/// What a row of cross-entropy gives beside its gradient. One thread calls it.
__device__ inline void set_outcome(const CrossEntropyArgs& a, int64_t r, const Best& best,
                                   float at_target, double sum) {
  if (a.argmax != nullptr) a.argmax[r] = best.index;
  const double lead = static_cast<double>(at_target) - static_cast<double>(best.value);
  a.logprob[r] = static_cast<float>(lead - log(sum));
}

/// logits [rows, vocab].
__global__ void __launch_bounds__(kThreads)
    cross_entropy_rows(const __grid_constant__ CrossEntropyArgs a) {
  const int64_t r = blockIdx.x;
  const RowGradient gradient = row_gradient(a, r);
  const float* x = gradient.x;
  const Best best = row_best(x, a.vocab);
  const int32_t target = a.target[r];
  const float at_target = x[target];
  const double sum = sum_exp(x, a.vocab, best.value);
  if (threadIdx.x == 0) set_outcome(a, r, best, at_target, sum);
  if (!a.gradient) return;
  const float weight = a.weight[r];
  const auto factor = static_cast<float>(static_cast<double>(weight) / sum);
  // block_sum() was a barrier: every thread has read x[target].
  for (int64_t i = threadIdx.x; i < a.vocab; i += kThreads) {
    const float back = expf(x[i] - best.value) * factor;
    gradient.set(i, i == target ? back - weight : back);
  }
}

constexpr int kKept = 48;  // logits of a row that a thread keeps in registers

/// The same for rows of up to kKept * kThreads logits in whole float4: they are read once.
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kept(const __grid_constant__ CrossEntropyArgs a) {
  const int64_t r = blockIdx.x;
  const RowGradient gradient = row_gradient(a, r);
  const auto* fours = reinterpret_cast<const float4*>(gradient.x);
  const int count = static_cast<int>(a.vocab / 4);
  float4 v[kKept / 4];
  Best best{-INFINITY, INT_MAX};
#pragma unroll
  for (int c = 0; c < kKept / 4; ++c) {
    const int i = threadIdx.x + c * kThreads;
    v[c] = i < count ? fours[i] : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    if (i >= count) continue;
    best.meet(v[c].x, 4 * i);
    best.meet(v[c].y, 4 * i + 1);
    best.meet(v[c].z, 4 * i + 2);
    best.meet(v[c].w, 4 * i + 3);
  }
  best = block_best(best);
  const int32_t target = a.target[r];
  const float at_target = gradient.x[target];
  float part = 0.0f;
#pragma unroll
  for (int c = 0; c < kKept / 4; ++c) {
    v[c].x = expf(v[c].x - best.value), v[c].y = expf(v[c].y - best.value);
    v[c].z = expf(v[c].z - best.value), v[c].w = expf(v[c].w - best.value);
    part += (v[c].x + v[c].y) + (v[c].z + v[c].w);
  }
  const double sum = block_sum(static_cast<double>(part));
  if (threadIdx.x == 0) set_outcome(a, r, best, at_target, sum);
  if (!a.gradient) return;
  const float weight = a.weight[r];
  const auto factor = static_cast<float>(static_cast<double>(weight) / sum);
#pragma unroll
  for (int c = 0; c < kKept / 4; ++c) {
    const int i = threadIdx.x + c * kThreads;
    if (i >= count) continue;
    float4 back = make_float4(v[c].x * factor, v[c].y * factor, v[c].z * factor, v[c].w * factor);
    if (target == 4 * i) back.x -= weight;
    if (target == 4 * i + 1) back.y -= weight;
    if (target == 4 * i + 2) back.z -= weight;
    if (target == 4 * i + 3) back.w -= weight;
    if (gradient.prepared == nullptr) {
      reinterpret_cast<float4*>(gradient.x)[i] = back;
      continue;
    }
    store_four(gradient.prepared + 4 * i, back);
  }
}

/// The rest's mass is summed without the top k (their logits are -inf meanwhile), never as 1 - sum:
/// that would cancel when the student is sure. With q = softmax, P = sum p + p_rest:
/// d/dx_j = P q_j - p_j for j in the top k, q_j (P - p_rest / q_rest) for the others.
__global__ void __launch_bounds__(kThreads) kl_topk_rows(const __grid_constant__ KlTopkArgs a) {
  extern __shared__ float kept[];  // [top_k]
  const int64_t r = blockIdx.x;
  const RowGradient gradient = row_gradient(a, r);
  float* x = gradient.x;
  const int32_t* index = a.index + r * a.top_k;
  const float* stored = a.logprob + r * a.top_k;
  const float top = row_best(x, a.vocab).value;
  double p_part = 0.0, q_part = 0.0;
  for (int64_t i = threadIdx.x; i < a.top_k; i += kThreads) {
    kept[i] = x[index[i]];
    p_part += static_cast<double>(expf(stored[i]));
    q_part += static_cast<double>(expf(kept[i] - top));
  }
  const double p_sum = block_sum(p_part), q_sum = block_sum(q_part);  // barriers: all have read x
  for (int64_t i = threadIdx.x; i < a.top_k; i += kThreads) x[index[i]] = -INFINITY;
  __syncthreads();
  const double rest = fmax(sum_exp(x, a.vocab, top), 1e-30);
  const double log_all = log(rest + q_sum);
  const double p_rest = fmax(1.0 - p_sum, 0.0);
  double kl = 0.0;
  for (int64_t i = threadIdx.x; i < a.top_k; i += kThreads) {
    const double log_q = static_cast<double>(kept[i]) - static_cast<double>(top) - log_all;
    kl += static_cast<double>(expf(stored[i])) * (static_cast<double>(stored[i]) - log_q);
  }
  kl = block_sum(kl);
  if (threadIdx.x == 0) {
    if (p_rest > 1e-9) kl += p_rest * (log(p_rest) - log(rest) + log_all);
    a.kl[r] = static_cast<float>(kl);
  }
  const double weight = a.weight[r], mass = p_sum + p_rest, all = rest + q_sum;
  if (a.gradient) {
    const auto factor = static_cast<float>(weight * (mass / all - p_rest / rest));
    for (int64_t i = threadIdx.x; i < a.vocab; i += kThreads) {
      gradient.set(i, expf(x[i] - top) * factor);
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < a.top_k; i += kThreads) {
    const double q = static_cast<double>(expf(kept[i] - top)) / all;
    const auto p = static_cast<double>(expf(stored[i]));
    if (a.gradient) {
      gradient.set(index[i], static_cast<float>(weight * (mass * q - p)));
    } else {
      x[index[i]] = kept[i];
    }
  }
}

}  // namespace

void cross_entropy(const OpContext& context, const CrossEntropyArgs& a) {
  StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0) return;
  const bool kept = a.vocab <= kKept * kThreads && a.vocab % 4 == 0 && a.stride % 4 == 0 &&
                    is_aligned16(a.logits) && (a.prepared == nullptr || is_aligned16(a.prepared));
  const auto kernel = kept ? cross_entropy_kept : cross_entropy_rows;
  const int64_t row_bytes = 2 * padded_k(WeightFormat::kBF16, a.vocab);
  s->in_chunks(a.rows, 128, [&](int64_t row, int64_t rows) {
    CrossEntropyArgs part = a;
    part.rows = rows;
    part.logits += row * a.stride;
    part.target += row, part.weight += row, part.logprob += row;
    if (a.argmax != nullptr) part.argmax += row;
    if (a.prepared != nullptr) part.prepared = static_cast<char*>(a.prepared) + row * row_bytes;
    kernel<<<static_cast<unsigned>(part.rows), kThreads, 0, s->stream()>>>(part);
    return launched("cross_entropy");
  });
}

void kl_topk(const OpContext& context, const KlTopkArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0) return;
  if (a.top_k > kMaxTopK) return fail("kl_topk: more than " + std::to_string(kMaxTopK));
  const auto bytes = static_cast<size_t>(a.top_k) * sizeof(float);
  kl_topk_rows<<<static_cast<unsigned>(a.rows), kThreads, bytes, s->stream()>>>(a);
  launched("kl_topk");
}

}  // namespace ds::cuda
