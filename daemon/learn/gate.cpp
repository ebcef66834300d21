// SPDX-License-Identifier: Apache-2.0
#include "learn/gate.h"

#include <algorithm>
#include <cmath>

#include "learn/shipped_texts.h"

namespace ds {
namespace {

constexpr double kNearCertain = -0.05;
constexpr int64_t kProbeTopK = 64;
constexpr float kCanaryMargin = 1.0f;

std::string number(double x) {
  char out[32];
  std::snprintf(out, sizeof out, "%.4g", x);
  return out;
}

double log_sum_exp(const float* row, int64_t vocab) {
  const float top = *std::max_element(row, row + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - top);
  return top + std::log(sum);
}

/// How much of the way to certainty the candidate went: 0 none, 1 all of it.
double gain(const GateScores::Item& item) {
  return item.before < 0 ? (item.after - item.before) / -item.before : 0.0;
}

/// What an item must gain: where half of the round's answers went more than half of the way, a
/// quarter of what they did. Less is what the form of the other answers gives for nothing to a
/// question that was taught something else.
double gain_wanted(const std::vector<GateScores::Item>& items) {
  std::vector<double> gains;
  for (const GateScores::Item& item : items) {
    if (item.answer && item.after <= kNearCertain) gains.push_back(gain(item));
  }
  if (gains.empty()) return 0;
  const auto middle = gains.begin() + static_cast<std::ptrdiff_t>(gains.size() / 2);
  std::nth_element(gains.begin(), middle, gains.end());
  return *middle > 0.5 ? *middle / 4 : 0.0;
}

}  // namespace

GateVerdict judge(const GateScores& s, const GateLimits& limits) {
  const auto held = [](std::string check, std::string reason) {
    return GateVerdict{false, std::move(check), std::move(reason)};
  };
  if (!s.failure.empty()) return held("plugin", s.failure);
  if (!s.finite) return held("finite", "the candidate computes NaN or infinity");
  if (!s.changed) return held("changed", "the candidate's weights equal its parent's");
  if (!s.broken_canaries.empty()) {
    return held("canary", std::to_string(s.broken_canaries.size()) + " of " +
                              std::to_string(s.canaries) +
                              " canaries broken, first: " + s.broken_canaries.front());
  }
  if (!(s.kl <= limits.max_kl)) {
    return held("kl", "KL(base || candidate) " + number(s.kl) + " nats/token, limit " +
                          number(limits.max_kl));
  }
  for (const auto& [name, d] : s.domains) {
    const double rise = d.before > 0 ? d.after / d.before - 1.0 : 0.0;
    const double doubt = d.before > 0 ? 2.0 * d.noise / d.before : 0.0;
    if (!(rise - doubt <= limits.max_drop)) {
      return held("domain", "domain " + name + ": held-out loss " + number(d.before) + " -> " +
                                number(d.after) + " (" + number(100 * rise) + " %), limit " +
                                number(100 * limits.max_drop) + " %");
    }
  }
  size_t worse = 0, behind = 0;
  std::string first;
  const double wanted = gain_wanted(s.items);
  for (const GateScores::Item& item : s.items) {
    if (item.after > kNearCertain) continue;
    if (item.after > item.before && (!item.answer || gain(item) >= wanted)) continue;
    if (item.after > item.before) ++behind;
    if (worse++ == 0) first = item.id;
  }
  if (worse > 0) {
    return held("items", std::to_string(worse) + " of " + std::to_string(s.items.size()) +
                             " new items not learned: " + std::to_string(worse - behind) +
                             " not better than before, " + std::to_string(behind) +
                             " far behind the others, first: " + first);
  }
  return {true, "", ""};
}

Json to_json(const GateScores& s, const GateVerdict& verdict) {
  Json domains = Json::object();
  for (const auto& [name, d] : s.domains)
    domains[name] = {{"before", d.before}, {"after", d.after}, {"noise", d.noise}};
  double before = 0, after = 0;
  for (const auto& item : s.items) {
    before += item.before / static_cast<double>(s.items.size());
    after += item.after / static_cast<double>(s.items.size());
  }
  return {
      {"passed", verdict.pass},
      {"check", verdict.check},
      {"reason", verdict.reason},
      {"kl", s.kl},
      {"domains", domains},
      {"items", {{"count", s.items.size()}, {"logprob_before", before}, {"logprob_after", after}}},
      {"canaries", {{"checked", s.canaries}, {"broken", s.broken_canaries}}},
      {"tokens", s.tokens}};
}

GateProbe::GateProbe(const Compute& compute, const std::shared_ptr<const BaseWeights>& base,
                     std::shared_ptr<const Tokenizer> tokenizer)
    : vocab_(base->config().vocab),
      tokenizer_(std::move(tokenizer)),
      decoder_(base->config(), compute, kv_dtype(*compute.ops, base->format())) {
  probe_.domain = "base";
  for (const std::string_view text : probe_texts()) {
    probe_.sequences.push_back(tokenizer_->encode(text, false));
    probe_.first_target.push_back(1);
  }
  const int64_t k = std::min(kProbeTopK, vocab_);
  std::vector<int32_t> order(static_cast<size_t>(vocab_));
  const auto note = [&](const Status& status) {
    if (status.ok() || !failure_.empty()) return;
    failure_ = status.message();
    failure_code_ = status.code();
  };
  note(decoder_.score(*base, nullptr, probe_.sequences, probe_.first_target,
                      [&](size_t, int64_t, const float* row) {
                        const double lse = log_sum_exp(row, vocab_);
                        top_first(row, k, order);
                        base_ids_.emplace_back(order.begin(), order.begin() + k);
                        std::vector<float> logs;
                        for (const int32_t id : base_ids_.back())
                          logs.push_back(static_cast<float>(row[id] - lse));
                        base_logprobs_.push_back(std::move(logs));
                      }));
  for (const Canary& c : canaries()) {
    KnownCanary known{std::string(c.prompt), std::string(c.key),
                      tokenizer_->encode(c.prompt, false), 0};
    known.token = tokenizer_->encode(c.key, false).front();
    known.ids.push_back(known.token);
    const int64_t last = static_cast<int64_t>(known.ids.size()) - 1;
    bool holds = false;
    note(decoder_.score(*base, nullptr, {&known.ids, 1}, {&last, 1},
                        [&](size_t, int64_t, const float* row) {
                          float second = -1e30f;
                          for (int64_t i = 0; i < vocab_; ++i) {
                            if (i != known.token) second = std::max(second, row[i]);
                          }
                          holds = row[known.token] - second >= kCanaryMargin;
                        }));
    if (holds) canaries_.push_back(std::move(known));
  }
}

GateProbe::Loss GateProbe::loss_of(const Weights& weights, const HeldOut& text, GateScores& scores,
                                   const SeeRow& see) {
  Loss loss;
  const auto note = [&](const Status& status) {
    if (!status.ok() && scores.failure.empty()) scores.failure = status.message();
  };
  for (const auto& s : text.sequences) scores.tokens += static_cast<int64_t>(s.size());
  note(decoder_.score(*weights.base, weights.delta.get(), text.sequences, text.first_target,
                      [&](size_t s, int64_t target, const float* row) {
                        const double lse = log_sum_exp(row, vocab_);
                        loss.finite = loss.finite && std::isfinite(lse);
                        loss.sum += lse - row[text.sequences[s][static_cast<size_t>(target)]];
                        ++loss.n;
                        if (see) see(row, lse);
                      }));
  return loss;
}

void GateProbe::probe(const Weights& parent, const Weights& candidate, GateScores& scores) {
  size_t index = 0;
  double kl_sum = 0;
  const auto add_kl = [&](const float* row, double lse) {
    double p_rest = 1.0, q_rest = 1.0;
    for (size_t i = 0; i < base_ids_[index].size(); ++i) {
      const double log_p = base_logprobs_[index][i], log_q = row[base_ids_[index][i]] - lse;
      kl_sum += std::exp(log_p) * (log_p - log_q);
      p_rest -= std::exp(log_p);
      q_rest -= std::exp(log_q);
    }
    p_rest = std::max(p_rest, 1e-12);
    q_rest = std::max(q_rest, 1e-12);
    kl_sum += p_rest * (std::log(p_rest) - std::log(q_rest));
    ++index;
  };
  const Loss before = loss_of(parent, probe_, scores, {}),
             after = loss_of(candidate, probe_, scores, add_kl);
  scores.domains["base"] = {before.mean(), after.mean()};
  scores.finite = scores.finite && after.finite;
  scores.kl = kl_sum / static_cast<double>(std::max<size_t>(index, 1));
}

void GateProbe::check_canaries(const Weights& candidate, GateScores& scores) {
  std::vector<std::vector<TokenId>> ids;
  std::vector<int64_t> last;
  for (const KnownCanary& c : canaries_) {
    ids.push_back(c.ids);
    last.push_back(static_cast<int64_t>(c.ids.size()) - 1);
    scores.tokens += static_cast<int64_t>(c.ids.size());
  }
  scores.canaries = static_cast<int>(canaries_.size());
  const Status scored = decoder_.score(
      *candidate.base, candidate.delta.get(), ids, last, [&](size_t s, int64_t, const float* row) {
        if (std::max_element(row, row + vocab_) - row == canaries_[s].token) return;
        scores.broken_canaries.push_back(canaries_[s].prompt + canaries_[s].key);
      });
  if (!scored.ok() && scores.failure.empty()) scores.failure = scored.message();
}

GateScores GateProbe::measure(const Weights& parent, const Weights& candidate,
                              const std::vector<std::pair<std::string, HeldOut>>& items,
                              const std::vector<HeldOut>& domains) {
  GateScores scores;
  scores.failure = failure_;
  if (!failure_.empty()) return scores;
  for (const auto& [id, wordings] : items) {
    const Loss before = loss_of(parent, wordings, scores, {}),
               after = loss_of(candidate, wordings, scores, {});
    const bool answer = wordings.first_target.front() > 1;
    scores.items.push_back({id, -before.mean(), -after.mean(), answer});
    scores.finite = scores.finite && after.finite;
  }
  for (const HeldOut& domain : domains) {
    const Loss before = loss_of(parent, domain, scores, {}),
               after = loss_of(candidate, domain, scores, {});
    scores.domains[domain.domain] = {before.mean(), after.mean()};
    scores.finite = scores.finite && after.finite;
  }
  probe(parent, candidate, scores);
  check_canaries(candidate, scores);
  return scores;
}

}  // namespace ds
