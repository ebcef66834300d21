// SPDX-License-Identifier: Apache-2.0
#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "storage/seams.h"

namespace ds {
namespace {

constexpr size_t kLanes = 8;

Status out_of_range(const char* name, double value, const char* range) {
  return invalid(std::string(name) + ": " + std::to_string(value) + ", expected " + range);
}

/// `value > low` in the form that is false for NaN.
bool within(float value, float low, float high) { return value >= low && value <= high; }

/// The largest logit, or a failure naming the first value that is not finite. Lanes let the
/// compiler use SIMD: this runs over the whole vocabulary for every token.
Result<float> largest_finite(std::span<const float> x) {
  float best[kLanes], poison[kLanes] = {};
  std::fill(best, best + kLanes, x[0]);
  const size_t whole = x.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
      poison[j] += x[i + j] * 0.0f;  // NaN from NaN and infinity
    }
  }
  for (size_t i = whole; i < x.size(); ++i) {
    best[0] = x[i] > best[0] ? x[i] : best[0];
    poison[0] += x[i] * 0.0f;
  }
  for (size_t j = 1; j < kLanes; ++j) poison[0] += poison[j];
  if (poison[0] == 0.0f) return *std::max_element(best, best + kLanes);
  const auto bad = std::ranges::find_if(x, [](float v) { return !std::isfinite(v); });
  return corrupt("logit of token " + std::to_string(bad - x.begin()) + " is " +
                 std::to_string(*bad) + ", expected a finite number");
}

TokenId first_with(std::span<const float> x, float value) {
  return static_cast<TokenId>(std::ranges::find(x, value) - x.begin());
}

/// e^x for x <= 0 within 2 ulp, 0 below the normal numbers. Cephes' expf (Moshier): x = n ln 2 + r,
/// then a polynomial in r. Branchless, so that a loop over the vocabulary becomes SIMD; libm's does
/// not.
inline float exp_below_one(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound) + 127;
  const float scaled = p * std::bit_cast<float>(exponent << 23);
  return x > -87.0f ? scaled : 0.0f;
}

/// weights[i] = e^((x[i] - best) * heat); returns their sum, in double and in a fixed order.
double softmax_weights(std::span<const float> x, float best, float heat,
                       std::vector<float>& weights) {
  weights.resize(x.size());
  float* w = weights.data();
  for (size_t i = 0; i < x.size(); ++i) w[i] = exp_below_one((x[i] - best) * heat);
  double sum[kLanes] = {};
  const size_t whole = x.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) sum[j] += w[i + j];
  }
  for (size_t i = whole; i < x.size(); ++i) sum[0] += w[i];
  double total = 0;
  for (const double lane : sum) total += lane;
  return total;
}

bool adjusts(const Sampling& s, const TokenCounts& counts) {
  return !s.logit_bias.empty() ||
         ((s.presence_penalty != 0 || s.frequency_penalty != 0) && !counts.empty());
}

void adjust(std::span<float> logits, const Sampling& s, const TokenCounts& counts) {
  for (const auto& [id, bias] : s.logit_bias) logits[static_cast<size_t>(id)] += bias;
  for (const auto& [id, count] : counts) {
    logits[static_cast<size_t>(id)] -=
        s.presence_penalty + s.frequency_penalty * static_cast<float>(count);
  }
}

/// Best weight first, equal ones by id: a total order, so that cuts do not depend on the sort.
bool better(const std::pair<float, TokenId>& a, const std::pair<float, TokenId>& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

using Candidates = std::vector<std::pair<float, TokenId>>;

double total_weight(Candidates::const_iterator begin, Candidates::const_iterator end) {
  double total = 0;
  for (auto c = begin; c != end; ++c) total += c->first;
  return total;
}

/// Keeps the smallest set of best candidates that together weigh at least `wanted`: a quickselect
/// on sums instead of a sort.
void keep_nucleus(Candidates& candidates, double wanted) {
  double kept = 0;  // weight of those before `low`, all in
  auto low = candidates.begin(), high = candidates.end();
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, better);
    const double upper = total_weight(low, middle);
    if (kept + upper >= wanted) {
      high = middle;
    } else {
      kept += upper;
      low = middle;
    }
  }
  const bool takes_last = low != high && kept < wanted;
  candidates.erase(takes_last ? low + 1 : low, candidates.end());
}

/// The k largest values with their ids, in no order. A heap whose front is the worst so far: k is
/// small against the vocabulary, so most values cost one comparison.
void take_largest(std::span<const float> values, size_t k, Candidates& heap) {
  heap.clear();
  for (size_t i = 0; i < values.size(); ++i) {
    const std::pair<float, TokenId> candidate(values[i], static_cast<TokenId>(i));
    if (heap.size() == k) {
      if (!better(candidate, heap.front())) continue;
      std::ranges::pop_heap(heap, better);
      heap.pop_back();
    }
    heap.push_back(candidate);
    std::ranges::push_heap(heap, better);
  }
}

/// Tokens that pass top-k, top-p and min-p. The best weighs 1, which makes min-p a plain bound.
void filter(const Sampling& s, double total, std::span<const float> weights,
            Candidates& candidates) {
  if (s.top_k > 0 && static_cast<size_t>(s.top_k) < weights.size()) {
    take_largest(weights, static_cast<size_t>(s.top_k), candidates);
    total = total_weight(candidates.begin(), candidates.end());
  } else {
    // Tokens below this weight have less than 1 - top_p of the total together: none is in the
    // nucleus.
    const auto crumbs =
        static_cast<float>((1.0 - s.top_p) * total / static_cast<double>(weights.size()));
    candidates.clear();
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] >= crumbs) candidates.emplace_back(weights[i], static_cast<TokenId>(i));
    }
  }
  if (s.top_p < 1) keep_nucleus(candidates, s.top_p * total);
  std::erase_if(candidates, [&](const auto& c) { return c.first < s.min_p; });
}

/// First index at which the running sum of weights passes `target`.
template <typename WeightAt>
size_t walk(size_t n, double target, WeightAt weight_at) {
  size_t last = 0;
  for (size_t i = 0; i < n; ++i) {
    if (weight_at(i) <= 0) continue;
    last = i;
    target -= weight_at(i);
    if (target < 0) break;
  }
  return last;  // rounding can leave a hair behind the end: then the last one with any weight
}

}  // namespace

Status check_sampling(const Sampling& s, int64_t vocab) {
  if (!within(s.temperature, 0, 2)) return out_of_range("temperature", s.temperature, "0 .. 2");
  if (s.top_k < 0) return out_of_range("top_k", s.top_k, "0 (off) or more");
  if (!within(s.top_p, 0, 1) || s.top_p == 0)
    return out_of_range("top_p", s.top_p, "above 0, at most 1");
  if (!within(s.min_p, 0, 1)) return out_of_range("min_p", s.min_p, "0 .. 1");
  if (!within(s.presence_penalty, -2, 2)) {
    return out_of_range("presence_penalty", s.presence_penalty, "-2 .. 2");
  }
  if (!within(s.frequency_penalty, -2, 2)) {
    return out_of_range("frequency_penalty", s.frequency_penalty, "-2 .. 2");
  }
  for (const auto& [id, bias] : s.logit_bias) {
    if (id < 0 || id >= vocab) {
      return invalid("logit_bias: token " + std::to_string(id) + ", expected 0 .. " +
                     std::to_string(vocab - 1));
    }
    if (!within(bias, -100, 100)) return out_of_range("logit_bias", bias, "-100 .. 100");
  }
  return {};
}

Result<TokenId> sample_token(std::span<const float> logits, const Sampling& sampling,
                             const TokenCounts& counts, uint64_t position, SampleScratch& scratch) {
  DS_ASSIGN(float best, largest_finite(logits));
  if (adjusts(sampling, counts)) {
    scratch.logits.assign(logits.begin(), logits.end());
    adjust(scratch.logits, sampling, counts);
    logits = scratch.logits;
    best = *std::ranges::max_element(logits);
  }
  if (sampling.temperature == 0) return first_with(logits, best);

  const float heat = 1.0f / std::max(sampling.temperature, 1e-6f);
  const double total = softmax_weights(logits, best, heat, scratch.weights);
  const double chance = Rng(sampling.seed, position).uniform();
  if (sampling.top_k == 0 && sampling.top_p == 1 && sampling.min_p == 0) {
    const auto& weights = scratch.weights;
    const auto at = walk(weights.size(), chance * total, [&](size_t i) { return weights[i]; });
    return static_cast<TokenId>(at);
  }
  const Candidates& candidates = scratch.candidates;
  filter(sampling, total, scratch.weights, scratch.candidates);
  const double left = total_weight(candidates.begin(), candidates.end());
  return candidates[walk(candidates.size(), chance * left,
                         [&](size_t i) { return candidates[i].first; })]
      .second;
}

Result<Logprobs> score_token(std::span<const float> logits, TokenId id, int n_top,
                             SampleScratch& scratch) {
  DS_ASSIGN(const float best, largest_finite(logits));
  const double total = softmax_weights(logits, best, 1.0f, scratch.weights);
  const double log_total = static_cast<double>(best) + std::log(total);

  Logprobs out;
  out.logprob = static_cast<float>(logits[static_cast<size_t>(id)] - log_total);
  const auto wanted = static_cast<size_t>(std::clamp<int64_t>(n_top, 0, std::ssize(logits)));
  if (wanted == 0) return out;
  auto& heap = scratch.candidates;
  take_largest(logits, wanted, heap);
  std::ranges::sort(heap, better);
  for (const auto& [logit, token] : heap) {
    out.top.emplace_back(token, static_cast<float>(logit - log_total));
  }
  return out;
}

}  // namespace ds
