// SPDX-License-Identifier: Apache-2.0
// From one row of logits to a token. Pure: the same logits, settings, counts, seed and position
// give the same token, whatever else runs. Filters follow transformers: bias and penalties,
// temperature, top-k, top-p, min-p, each on what the one before left.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ds/status.h"
#include "engine/step_tables.h"
#include "engine/tokenizer.h"

namespace ds {

struct Sampling {
  float temperature = 1.0f;  ///< 0 = greedy
  int top_k = 0;             ///< 0 = off
  float top_p = 1.0f, min_p = 0.0f;
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;
  uint64_t seed = 0;
  std::vector<std::pair<TokenId, float>> logit_bias = {};
};

/// Refuses values outside OpenAI's ranges (and NaN), naming the field, the value and the range.
Status check_sampling(const Sampling& sampling, int64_t vocab);

/// How often each token was generated so far; penalties look at the answer, not at the prompt.
using TokenCounts = std::unordered_map<TokenId, int32_t>;

/// The draw of a token that depends on nothing but the logits: no bias, penalties or filters are
/// in the way. Ops::sample gives the same token as sample_token() then.
std::optional<Draw> plain_draw(const Sampling& sampling, const TokenCounts& counts,
                               uint64_t position);

/// Workspace of one thread; grows to the vocabulary once.
struct SampleScratch {
  std::vector<float> logits, weights;
  std::vector<std::pair<float, TokenId>> candidates;  ///< weight or logit, id
};

/// Draws from `logits` [vocab] with Rng(seed, position); `position` counts tokens from the start of
/// the prompt. Among equal logits greedy takes the lowest id. Fails on NaN or infinite logits.
Result<TokenId> sample_token(std::span<const float> logits, const Sampling& sampling,
                             const TokenCounts& counts, uint64_t position, SampleScratch& scratch);

struct Logprobs {
  float logprob = 0;                           ///< of the token asked for
  std::vector<std::pair<TokenId, float>> top;  ///< best first, equal ones by id
};

/// Natural logs of the raw distribution softmax(logits): no temperature, bias or filter.
/// Fails on NaN or infinite logits.
Result<Logprobs> score_token(std::span<const float> logits, TokenId id, int n_top,
                             SampleScratch& scratch);

}  // namespace ds
