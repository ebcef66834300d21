// SPDX-License-Identifier: Apache-2.0
// Loss terms of one training step and their combined gradient. A step packs all terms into one
// batch: one forward, the losses, one backward.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "ds/status.h"
#include "engine/train_graph.h"

namespace ds {

/// A tokenised example: `ids` after an optional frozen prefix; tokens from `first_target` on are
/// learned.
struct Sequence {
  std::vector<TokenId> ids;
  int64_t first_target = 1;
  const PrefixKv* prefix = nullptr;
  int64_t targets() const { return static_cast<int64_t>(ids.size()) - first_target; }
};

/// The base's distribution at each target of a sequence: its top-k log-probabilities (the rest is
/// one bucket, see KlTopkArgs).
constexpr int64_t kStoredTopK = 64;
struct StoredTopK {
  std::vector<int32_t> index;  ///< [targets, kStoredTopK]
  std::vector<float> logprob;  ///< same shape, natural log, descending
};

/// weight * mean over the targets of -log p(target).
struct CrossEntropyTerm {
  const Sequence* sequence = nullptr;
  float weight = 1.0f;
};

/// weight * mean over the targets of KL(stored || model); at most `positions` targets when
/// positive.
struct KlTerm {
  const Sequence* sequence = nullptr;
  const StoredTopK* stored = nullptr;
  float weight = 1.0f;
};

/// A loss of several sequences that reads only their log-probabilities, summed over the targets:
/// preference pairs, odds, rewards. Its value is not part of StepLoss::total.
struct SequenceLoss {
  std::vector<const Sequence*> sequences;
  /// Writes d loss / d logprob of each. An error ends the step before its backward.
  std::function<Status(std::span<const double> logprob, std::span<double> derivative)> derivative;
};

struct Terms {
  std::vector<CrossEntropyTerm> cross_entropy;
  std::vector<KlTerm> kl;
  SequenceLoss summed;
};

/// What a sequence's targets looked like in the forward pass.
struct TargetView {
  double mean_logprob = 0, sum_logprob = 0;
  float worst_logprob = 0;
  bool all_argmax = false;
};

struct StepLoss {
  double total = 0, cross_entropy = 0, kl = 0;  ///< weighted sums
  std::vector<TargetView> items;                ///< one per cross-entropy term
  std::vector<double> kl_mean;                  ///< one per KL term
  std::vector<double> logprob;                  ///< one per sequence of `summed`
  int64_t tokens = 0;                           ///< rows through forward and backward
  /// Of SequenceLoss::derivative, of the device, or for want of memory; then the rest is undefined.
  Status failure;
};

/// Puts the ids of the `k` largest of row[0 .. order.size()) first in `order`, ties by id.
void top_first(const float* row, int64_t k, std::vector<int32_t>& order);

/// The base's stored side of each sequence, in one forward per `rows_max` rows.
std::vector<StoredTopK> store_top_k(TrainGraph& graph, const BaseWeights& base,
                                    const Adapters* adapters,
                                    std::span<const Sequence* const> sequences, int64_t vocab);

/// AdamW with global-norm clipping over one vector of parameters, where they are.
class AdamW {
 public:
  static Result<AdamW> make(const Compute& compute, size_t parameters);
  /// Enqueues what the next step() has to know of the gradient, which is not changed until then,
  /// and which is there after finish(): so whoever waits for something else waits for this, too.
  void measure(std::span<const float> gradient);
  /// One step from the gradient; returns its norm before clipping. NaN or infinity: nothing is
  /// changed and the norm returned is not finite. Waits, and fails as the backend does, unless
  /// measure() and finish() came before.
  Result<double> step(std::span<float> parameters, std::span<const float> gradient, float lr,
                      float beta2, float clip);

 private:
  AdamW(const Compute& compute, BackendVector m, BackendVector v, Buffer squares)
      : compute_(compute), m_(std::move(m)), v_(std::move(v)), squares_(std::move(squares)) {}

  Compute compute_;
  BackendVector m_, v_;
  Buffer squares_;
  double measured_squares_ = 0;
  bool measured_ = false;
  int64_t step_ = 0;
};

/// Forward, losses, and (when `adapters` or `full` is given and `gradient`) backward into them,
/// whose sum `optimizer` (or null) then measures. Waits once, for the losses and that.
StepLoss run_terms(TrainGraph& graph, const Compute& compute, const BaseWeights& base,
                   Adapters* adapters, FullGradients* full, const Terms& terms, bool gradient,
                   AdamW* optimizer = nullptr);

}  // namespace ds
