// SPDX-License-Identifier: Apache-2.0
// What formats of products cost in accuracy: how far the trainer's log-probabilities are from the
// server's, and what training all weights ends with.
#pragma once

#include <cstdio>
#include <numeric>

#include "engine/full_weights.h"
#include "learn/objective.h"
#include "tests/bench/texts.h"

namespace ds {

inline const char* precision_name(WeightFormat format) {
  static constexpr const char* kNames[] = {"fp32", "bf16", "fp16", "tf32"};
  return kNames[static_cast<int>(format)];
}

inline double mean_difference(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::fabs(a[i] - b[i]);
  return sum / static_cast<double>(a.size());
}

inline std::vector<float> served_logits(const Compute& compute, const BaseWeights& base,
                                        const std::vector<TokenId>& ids, int64_t rows_at_once) {
  const KvDtype kv = kv_dtype(*compute.ops, base.format());
  return test::serve_logits(compute, base, nullptr, ids, rows_at_once, kv);
}

/// Mean |difference| between the trainer's forward pass and serving token by token, on one text.
inline double trainer_server_gap(const Compute& compute, const BaseWeights& base,
                                 const std::vector<TokenId>& ids) {
  const int64_t vocab = base.config().vocab;
  const auto served = served_logits(compute, base, ids, 1);
  TrainGraph graph(base.config(), compute);
  TrainBatch batch;
  batch.add(ids, 1, nullptr);
  DS_CHECK(graph.forward(base, nullptr, batch) != nullptr);
  const float* trained = graph.host_logits(std::ssize(batch.loss_rows));
  DS_CHECK(graph.take_status().ok());
  return mean_difference(next_logprobs(served.data(), ids, vocab),
                         next_logprobs(trained, ids, vocab));
}

/// Training all weights of a real model on a stream of tokens whose end is held out.
class HeldOut {
 public:
  static constexpr int kSteps = 200, kSequences = 8, kTokens = 512, kHeldOut = 8;

  HeldOut(const Compute& compute, const ModelConfig& config, const NamedTensors& start,
          std::vector<TokenId> stream)
      : compute_(compute), config_(config), start_(start), stream_(std::move(stream)) {
    const size_t held = static_cast<size_t>(kHeldOut * kTokens);
    DS_CHECK(stream_.size() > 4 * held);
    for (size_t at = stream_.size() - held; at < stream_.size(); at += kTokens)
      held_out_.push_back(piece(at));
    stream_.resize(stream_.size() - held);
  }

  /// Mean loss on what was held out, in nats a token, after training in that format.
  double loss_after(WeightFormat format, uint64_t seed) const {
    auto full = FullWeights::make(compute_, config_, start_).value();
    TrainGraph graph(config_, compute_);
    AdamW optimizer = AdamW::make(compute_, full->size()).value();
    Rng rng(seed);
    for (int step = 0; step < kSteps; ++step) {
      std::vector<Sequence> drawn;
      for (int s = 0; s < kSequences; ++s)
        drawn.push_back(piece(static_cast<size_t>(
            rng.uniform() * static_cast<double>(stream_.size() - kTokens - 1))));
      DS_CHECK(full->pack(format).ok() && full->zero_gradient().ok());
      loss_of(graph, *full, drawn, true);
      DS_CHECK(optimizer.step(full->masters(), full->gradient().all(), 1e-4f, 0.99f, 1.0f).ok());
      saturated_ += graph.settle_saturation();
    }
    DS_CHECK(full->pack(format).ok());
    return loss_of(graph, *full, held_out_, false);
  }
  int64_t saturated() const { return saturated_; }

 private:
  Sequence piece(size_t at) const {
    const auto begin = stream_.begin() + static_cast<ptrdiff_t>(at);
    return {{begin, begin + kTokens}, 1, nullptr};
  }
  double loss_of(TrainGraph& graph, FullWeights& full, const std::vector<Sequence>& sequences,
                 bool gradient) const {
    Terms terms;
    for (const Sequence& s : sequences)
      terms.cross_entropy.push_back({&s, 1.0f / static_cast<float>(sequences.size())});
    const StepLoss loss = run_terms(graph, compute_, *full.packed(), nullptr,
                                    gradient ? &full.gradient() : nullptr, terms, gradient);
    DS_CHECK(loss.failure.ok() && graph.take_status().ok());
    return loss.total;
  }

  const Compute& compute_;
  const ModelConfig& config_;
  const NamedTensors& start_;
  std::vector<TokenId> stream_;
  std::vector<Sequence> held_out_;
  mutable int64_t saturated_ = 0;
};

/// False: a format other than the first is beyond two of its deviations. FP32 goes first.
inline bool held_out_rows(const HeldOut& held_out, std::span<const WeightFormat> formats) {
  double first = 0, allowed = 0;
  bool within = true;
  for (const WeightFormat format : formats) {
    double sum = 0, squares = 0;
    std::printf("held-out: %s", precision_name(format));
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      const double loss = held_out.loss_after(format, seed);
      std::printf(" %.4f", loss);
      sum += loss, squares += loss * loss;
    }
    const double mean = sum / 3;
    const double deviation = std::sqrt(std::max(0.0, (squares - 3 * mean * mean) / 2));
    std::printf(" mean %.4f deviation %.4f, %ld saturated\n", mean, deviation,
                held_out.saturated());
    std::fflush(stdout);
    if (allowed == 0) first = mean, allowed = 2 * deviation;
    within = within && mean <= first + allowed;
  }
  return within;
}

}  // namespace ds
