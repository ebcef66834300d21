// SPDX-License-Identifier: Apache-2.0
// Answers and scores of many prompts at once by the serving path (paged KV, BF16 factors as
// served), for the learner: anchors, gate, benches. Not the engine: no queue, no streaming, its own
// pages.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "engine/model.h"
#include "engine/sampler.h"

namespace ds {

class BatchDecoder {
 public:
  BatchDecoder(const ModelConfig& config, const Compute& compute, KvDtype dtype);

  /// Continuations of each prompt, without the stop token (-1: none); at most `max_tokens` each.
  /// Fails as a plugin does, like score(), and on logits that are not finite.
  Result<std::vector<std::vector<TokenId>>> generate(const BaseWeights& base,
                                                     const LoraDelta* delta,
                                                     std::span<const std::vector<TokenId>> prompts,
                                                     int64_t max_tokens, TokenId stop,
                                                     const Sampling& sampling,
                                                     const LinearWatch* watch = nullptr);
  /// The likeliest token each time.
  Result<std::vector<std::vector<TokenId>>> greedy(const BaseWeights& base, const LoraDelta* delta,
                                                   std::span<const std::vector<TokenId>> prompts,
                                                   int64_t max_tokens, TokenId stop) {
    return generate(base, delta, prompts, max_tokens, stop, {.temperature = 0});
  }

  /// Calls `row(sequence, target, logits)` for each target >= first_target[sequence], the logits
  /// being those that predict ids[target]; FP32 [vocab], valid during the call.
  Status score(
      const BaseWeights& base, const LoraDelta* delta,
      std::span<const std::vector<TokenId>> sequences, std::span<const int64_t> first_target,
      const std::function<void(size_t sequence, int64_t target, const float* logits)>& row);

 private:
  static constexpr int64_t kRows = 128;
  struct Live;
  Status step(const BaseWeights& base, const LoraDelta* delta, KvPages& pages, std::span<Live> live,
              const Sampling& sampling, const LinearWatch* watch);
  ModelConfig config_;
  Compute compute_;
  KvDtype dtype_;
  Forward forward_;
  std::vector<float> logits_;
  SampleScratch scratch_;
};

}  // namespace ds
