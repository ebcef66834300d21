// SPDX-License-Identifier: Apache-2.0
// May a candidate serve? Measuring (GateProbe, by the serving path) and judging (judge(), a pure
// function of the scores) are apart, so that every check can be tested alone.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/batch_decoder.h"
#include "learn/round_trainer.h"
#include "storage/json.h"

namespace ds {

struct GateLimits {
  double max_drop = 0.01;  ///< relative rise of an old domain's mean held-out loss
  double max_kl = 0.10;    ///< mean KL(base || candidate) on the probe, nats per token
};

struct GateScores {
  /// Of a plugin, the device or memory while it was measured; the rest is undefined then.
  std::string failure;
  bool finite = true;
  bool changed = true;  ///< the delta differs from the parent's
  struct Item {
    std::string id;
    double before = 0, after = 0;  ///< mean log-probability of the answer, over its wordings
    bool answer = true;            ///< to a question; false: a raw text
  };
  std::vector<Item> items;
  struct Domain {
    double before = 0, after = 0;  ///< mean held-out loss, nats per token
    /// Standard error of the mean rise over the held-out examples; 0: the means are taken as they
    /// are. A rise counts as far as it exceeds twice this.
    double noise = 0;
  };
  std::map<std::string, Domain> domains;
  double kl = 0;
  std::vector<std::string> broken_canaries;
  int canaries = 0;
  int64_t tokens = 0;  ///< rows the measurement ran
};

struct GateVerdict {
  bool pass = false;
  std::string check;  ///< "finite", "changed", "canary", "kl", "domain", "items"; empty when passed
  std::string reason;  ///< what, got and limit
};

/// The checks in that order; the first that fails gives the reason. Items: each is better than
/// before, or already near certain (mean log-probability above -0.05).
GateVerdict judge(const GateScores& scores, const GateLimits& limits);

Json to_json(const GateScores& scores, const GateVerdict& verdict);

/// Held-out material of one domain.
struct HeldOut {
  std::string domain;
  std::vector<std::vector<TokenId>> sequences;
  std::vector<int64_t> first_target;
};

class GateProbe {
 public:
  /// `base` says what a candidate must not stray from, and is not needed afterwards.
  GateProbe(const Compute& compute, const std::shared_ptr<const BaseWeights>& base,
            std::shared_ptr<const Tokenizer> tokenizer);

  /// Whether it could not ask the base for want of memory: it has to be made anew.
  bool wants_memory() const { return failure_code_ == Code::kResource; }
  /// Scores `candidate` against `parent`; only their base and delta count. `items` gives, per item,
  /// the sequences that it is scored on.
  GateScores measure(const Weights& parent, const Weights& candidate,
                     const std::vector<std::pair<std::string, HeldOut>>& items,
                     const std::vector<HeldOut>& domains);

 private:
  struct Loss {
    double sum = 0;
    int64_t n = 0;
    bool finite = true;
    double mean() const { return sum / static_cast<double>(std::max<int64_t>(n, 1)); }
  };
  /// Called per target with its logits and the logarithm of the sum of their exponentials.
  using SeeRow = std::function<void(const float* row, double log_sum_exp)>;
  Loss loss_of(const Weights& weights, const HeldOut& text, GateScores& scores, const SeeRow& see);
  void probe(const Weights& parent, const Weights& candidate, GateScores& scores);
  void check_canaries(const Weights& candidate, GateScores& scores);

  std::string failure_;  ///< while the base was read
  Code failure_code_ = Code::kOk;
  const int64_t vocab_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  BatchDecoder decoder_;
  HeldOut probe_;
  std::vector<std::vector<float>> base_logprobs_;  ///< of the probe: top-k per row, with their ids
  std::vector<std::vector<int32_t>> base_ids_;
  struct KnownCanary {
    std::string prompt, key;
    std::vector<TokenId> ids;
    TokenId token;
  };
  std::vector<KnownCanary> canaries_;
};

}  // namespace ds
