// SPDX-License-Identifier: Apache-2.0
#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/sampling.h"
#include "storage/seams.h"

namespace ds {
namespace {

Status out_of_range(const char* name, double value, const char* range) {
  return invalid(std::string(name) + ": " + std::to_string(value) + ", expected " + range);
}

/// `value > low` in the form that is false for NaN.
bool within(float value, float low, float high) { return value >= low && value <= high; }

Status not_finite(std::span<const float> x) {
  const auto bad = std::ranges::find_if(x, [](float v) { return !std::isfinite(v); });
  return corrupt("logit of token " + std::to_string(bad - x.begin()) + " is " +
                 std::to_string(*bad) + ", expected a finite number");
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

Draw draw_of(const Sampling& s, uint64_t position) {
  if (s.temperature == 0) return {};
  return {1.0f / std::max(s.temperature, 1e-6f), Rng(s.seed, position).uniform()};
}

bool filters(const Sampling& s) {
  return s.temperature != 0 && (s.top_k > 0 || s.top_p < 1 || s.min_p > 0);
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

std::optional<Draw> plain_draw(const Sampling& s, const TokenCounts& counts, uint64_t position) {
  if (adjusts(s, counts) || filters(s)) return std::nullopt;
  return draw_of(s, position);
}

Result<TokenId> sample_token(std::span<const float> logits, const Sampling& sampling,
                             const TokenCounts& counts, uint64_t position, SampleScratch& scratch) {
  const int64_t vocab = std::ssize(logits);
  const Draw draw = draw_of(sampling, position);
  if (adjusts(sampling, counts)) {
    if (std::isnan(largest_finite(logits.data(), vocab))) return not_finite(logits);
    scratch.logits.assign(logits.begin(), logits.end());
    adjust(scratch.logits, sampling, counts);
    logits = scratch.logits;
  }
  if (!filters(sampling)) {
    const TokenId token = sample_row(logits.data(), vocab, draw.heat, draw.chance);
    if (token < 0) return not_finite(logits);
    return token;
  }
  const float best = largest_finite(logits.data(), vocab);
  if (std::isnan(best)) return not_finite(logits);
  scratch.weights.resize(logits.size());
  const double total =
      softmax_weights(logits.data(), vocab, best, draw.heat, scratch.weights.data());
  filter(sampling, total, scratch.weights, scratch.candidates);
  const Candidates& candidates = scratch.candidates;
  const double left = total_weight(candidates.begin(), candidates.end());
  Walk walk(draw.chance * left);
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (walk.passes_at(static_cast<int64_t>(i), candidates[i].first)) break;
  }
  return candidates[static_cast<size_t>(walk.last())].second;
}

Result<Logprobs> score_token(std::span<const float> logits, TokenId id, int n_top,
                             SampleScratch& scratch) {
  const float best = largest_finite(logits.data(), std::ssize(logits));
  if (std::isnan(best)) return not_finite(logits);
  const double total = softmax_weights(logits.data(), std::ssize(logits), best, 1.0f, nullptr);
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
