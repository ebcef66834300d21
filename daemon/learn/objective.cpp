// SPDX-License-Identifier: Apache-2.0
#include "learn/objective.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

namespace ds {
namespace {

/// Rows of one term inside the batch's loss rows.
struct Part {
  int64_t row0, rows;
};

Part append(TrainBatch& batch, const Sequence& s) {
  const auto row0 = static_cast<int64_t>(batch.loss_rows.size());
  batch.add(s.ids, s.first_target, s.prefix);
  return {row0, s.targets()};
}

std::vector<int32_t> targets_of(const TrainBatch& batch) {
  std::vector<int32_t> out;
  out.reserve(batch.loss_rows.size());
  for (const int32_t row : batch.loss_rows) out.push_back(batch.ids[static_cast<size_t>(row) + 1]);
  return out;
}

TargetView view_of(const Part& part, const std::vector<float>& logprob,
                   const std::vector<int32_t>& argmax, const std::vector<int32_t>& target) {
  TargetView view;
  view.all_argmax = true;
  for (int64_t i = part.row0; i < part.row0 + part.rows; ++i) {
    const auto at = static_cast<size_t>(i);
    view.sum_logprob += logprob[at];
    view.worst_logprob = std::min(view.worst_logprob, logprob[at]);
    view.all_argmax = view.all_argmax && argmax[at] == target[at];
  }
  view.mean_logprob = view.sum_logprob / static_cast<double>(std::max<int64_t>(part.rows, 1));
  return view;
}

struct Layout {
  TrainBatch batch;
  std::vector<Part> ce, summed, kl;
  int64_t ce_rows = 0;  ///< loss rows of cross-entropy and summed sequences; KL rows follow
};

/// A sequence that several of the terms below name stands in the batch once.
Layout lay_out(const Terms& terms) {
  Layout out;
  std::map<const Sequence*, Part> placed;
  const auto place = [&](const Sequence* s) {
    const auto [at, added] = placed.try_emplace(s);
    if (added) at->second = append(out.batch, *s);
    return at->second;
  };
  for (const auto& t : terms.cross_entropy) out.ce.push_back(place(t.sequence));
  for (const Sequence* s : terms.summed.sequences) out.summed.push_back(place(s));
  out.ce_rows = static_cast<int64_t>(out.batch.loss_rows.size());
  for (const auto& t : terms.kl) out.kl.push_back(append(out.batch, *t.sequence));
  return out;
}

void add(std::vector<float>& weight, const Part& part, float value) {
  for (int64_t i = part.row0; i < part.row0 + part.rows; ++i)
    weight[static_cast<size_t>(i)] += value;
}

/// The losses of one batch between its forward and its backward pass.
class Losses {
 public:
  Losses(TrainGraph& graph, const Compute& compute, int64_t vocab, const Terms& terms,
         const Layout& layout, float* logits)
      : graph_(graph),
        compute_(compute),
        vocab_(vocab),
        terms_(terms),
        layout_(layout),
        logits_(logits),
        prepared_(static_cast<std::byte*>(graph.prepared_gradient())),
        tables_(graph.loss_tables()),
        target_(targets_of(layout.batch)),
        weight_(target_.size(), 0.0f),
        logprob_(target_.size(), 0.0f),
        argmax_(target_.size(), -1),
        kl_(target_.size() - static_cast<size_t>(layout.ce_rows)) {
    for (size_t i = 0; i < layout.ce.size(); ++i) {
      add(weight_, layout.ce[i],
          terms.cross_entropy[i].weight /
              static_cast<float>(std::max<int64_t>(layout.ce[i].rows, 1)));
    }
  }

  /// The summed sequences' derivatives depend on the sums, which are read before the gradient is
  /// made.
  Status weigh_summed(StepLoss& loss) {
    if (layout_.summed.empty()) return {};
    DS_TRY(bring());
    cross_entropy(false);
    fetch();
    DS_TRY(finish(compute_));
    for (const Part& part : layout_.summed)
      loss.logprob.push_back(view_of(part, logprob_, argmax_, target_).sum_logprob);
    std::vector<double> derivative(layout_.summed.size());
    DS_TRY(terms_.summed.derivative(loss.logprob, derivative));
    for (size_t i = 0; i < derivative.size(); ++i)
      add(weight_, layout_.summed[i], static_cast<float>(-derivative[i]));
    return {};
  }

  Status enqueue(bool gradient) {
    DS_TRY(bring());
    cross_entropy(gradient);
    if (!kl_.empty()) divergence(gradient);
    return {};
  }

  /// Waits for them, and for whatever else has been enqueued since.
  Status read(StepLoss& loss) {
    fetch();
    if (!kl_.empty()) tables_.fetch(*compute_.ops, compute_.context, at_.kl, std::span(kl_));
    DS_TRY(finish(compute_));
    for (size_t i = 0; i < layout_.ce.size(); ++i) {
      loss.items.push_back(view_of(layout_.ce[i], logprob_, argmax_, target_));
      loss.cross_entropy -= terms_.cross_entropy[i].weight * loss.items.back().mean_logprob;
    }
    auto next = kl_.begin();
    for (size_t i = 0; i < terms_.kl.size(); ++i) {
      const double sum = std::accumulate(next, next + layout_.kl[i].rows, 0.0);
      next += layout_.kl[i].rows;
      loss.kl_mean.push_back(sum / static_cast<double>(std::max<int64_t>(layout_.kl[i].rows, 1)));
      loss.kl += terms_.kl[i].weight * loss.kl_mean.back();
    }
    loss.total = loss.cross_entropy + loss.kl;
    return {};
  }

 private:
  struct Places {
    size_t target, weight, logprob, argmax, kl_index, kl_logprob, kl_weight, kl;
  };

  Status bring() {
    tables_.clear();
    const auto rows = static_cast<size_t>(layout_.ce_rows);
    at_.target = tables_.append(std::span<const int32_t>(target_).first(rows));
    at_.weight = tables_.append(std::span<const float>(weight_).first(rows));
    at_.logprob = tables_.room(rows);
    at_.argmax = tables_.room(rows);
    if (!kl_.empty()) append_stored();
    return tables_.bring(*compute_.ops, compute_.context);
  }

  void append_stored() {
    std::vector<int32_t> index;
    std::vector<float> stored, weight;
    for (size_t i = 0; i < terms_.kl.size(); ++i) {
      const StoredTopK& side = *terms_.kl[i].stored;
      index.insert(index.end(), side.index.begin(), side.index.end());
      stored.insert(stored.end(), side.logprob.begin(), side.logprob.end());
      const auto n = static_cast<size_t>(layout_.kl[i].rows);
      weight.insert(weight.end(), n,
                    terms_.kl[i].weight / static_cast<float>(std::max<size_t>(n, 1)));
    }
    DS_CHECK(index.size() == kl_.size() * kStoredTopK && weight.size() == kl_.size());
    at_.kl_index = tables_.append(index);
    at_.kl_logprob = tables_.append(stored);
    at_.kl_weight = tables_.append(weight);
    at_.kl = tables_.room(kl_.size());
  }

  void cross_entropy(bool gradient) {
    CrossEntropyArgs args;
    args.rows = layout_.ce_rows;
    args.vocab = args.stride = vocab_;
    args.logits = logits_;
    args.target = tables_.at(at_.target);
    args.weight = tables_.at<const float>(at_.weight);
    args.logprob = tables_.at<float>(at_.logprob);
    args.argmax = tables_.at<int32_t>(at_.argmax);
    args.gradient = gradient;
    args.prepared = gradient ? prepared_ : nullptr;
    compute_.ops->cross_entropy(compute_.context, args);
  }

  void divergence(bool gradient) {
    KlTopkArgs args;
    args.rows = std::ssize(kl_);
    args.vocab = args.stride = vocab_;
    args.top_k = kStoredTopK;
    args.logits = logits_ + layout_.ce_rows * vocab_;
    args.index = tables_.at(at_.kl_index);
    args.logprob = tables_.at<const float>(at_.kl_logprob);
    args.weight = tables_.at<const float>(at_.kl_weight);
    args.kl = tables_.at<float>(at_.kl);
    args.gradient = gradient;
    if (gradient && prepared_ != nullptr) {  // its rows come after those of cross-entropy
      const auto rows = std::ssize(target_);
      args.prepared = prepared_ + compute_.ops->prepared_bytes(WeightFormat::kBF16, rows, vocab_) /
                                      rows * layout_.ce_rows;
    }
    compute_.ops->kl_topk(compute_.context, args);
  }

  void fetch() {
    const auto rows = static_cast<size_t>(layout_.ce_rows);
    tables_.fetch(*compute_.ops, compute_.context, at_.logprob, std::span(logprob_).first(rows));
    tables_.fetch(*compute_.ops, compute_.context, at_.argmax, std::span(argmax_).first(rows));
    graph_.fetch_saturation();
  }

  TrainGraph& graph_;
  const Compute& compute_;
  const int64_t vocab_;
  const Terms& terms_;
  const Layout& layout_;
  float* const logits_;
  std::byte* const prepared_;  ///< of the gradient, see TrainGraph
  CallTables& tables_;
  const std::vector<int32_t> target_;
  std::vector<float> weight_, logprob_;
  std::vector<int32_t> argmax_;
  std::vector<float> kl_;
  Places at_{};
};

}  // namespace

StepLoss run_terms(TrainGraph& graph, const Compute& compute, const BaseWeights& base,
                   Adapters* adapters, FullGradients* full, const Terms& terms, bool gradient,
                   AdamW* optimizer) {
  const Layout layout = lay_out(terms);
  float* logits = graph.forward(base, adapters, layout.batch);
  if (logits == nullptr) {
    StepLoss none;
    none.failure = graph.take_status();
    return none;
  }
  Losses losses(graph, compute, base.config().vocab, terms, layout, logits);
  StepLoss loss;
  loss.tokens = static_cast<int64_t>(layout.batch.ids.size());
  loss.failure = losses.weigh_summed(loss);
  if (!loss.failure.ok()) return loss;
  loss.failure = losses.enqueue(gradient);
  if (!loss.failure.ok()) return loss;
  if (gradient) graph.backward(base, adapters, full, layout.batch);
  if (optimizer != nullptr)
    optimizer->measure(full != nullptr ? full->all() : adapters->gradient().all());
  loss.failure = losses.read(loss);
  return loss;
}

void top_first(const float* row, int64_t k, std::vector<int32_t>& order) {
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
    return row[a] != row[b] ? row[a] > row[b] : a < b;
  });
}

std::vector<StoredTopK> store_top_k(TrainGraph& graph, const BaseWeights& base,
                                    const Adapters* adapters,
                                    std::span<const Sequence* const> sequences, int64_t vocab) {
  constexpr size_t kRowsMax = 256;
  std::vector<StoredTopK> out;
  std::vector<int32_t> order(static_cast<size_t>(vocab));
  for (size_t i = 0; i < sequences.size();) {
    TrainBatch batch;
    size_t j = i;
    for (; j < sequences.size() &&
           (j == i || batch.ids.size() + sequences[j]->ids.size() <= kRowsMax);
         ++j) {
      batch.add(sequences[j]->ids, sequences[j]->first_target, sequences[j]->prefix);
    }
    graph.forward(base, adapters, batch);
    const float* logits = graph.host_logits(std::ssize(batch.loss_rows));
    for (; i < j; ++i) {
      StoredTopK stored;
      for (int64_t row = 0; row < sequences[i]->targets(); ++row, logits += vocab) {
        const float top = *std::max_element(logits, logits + vocab);
        double sum = 0;
        for (int64_t t = 0; t < vocab; ++t) sum += std::exp(static_cast<double>(logits[t] - top));
        const double lse = top + std::log(sum);
        top_first(logits, kStoredTopK, order);
        for (int64_t t = 0; t < kStoredTopK; ++t) {
          stored.index.push_back(order[static_cast<size_t>(t)]);
          stored.logprob.push_back(static_cast<float>(logits[order[static_cast<size_t>(t)]] - lse));
        }
      }
      out.push_back(std::move(stored));
    }
  }
  return out;
}

Result<AdamW> AdamW::make(const Compute& compute, size_t parameters) {
  DS_ASSIGN(BackendVector m, BackendVector::make(compute, parameters));
  DS_ASSIGN(BackendVector v, BackendVector::make(compute, parameters));
  DS_ASSIGN(Buffer squares, Buffer::make(*compute.ops, sizeof(double)));
  return AdamW(compute, std::move(m), std::move(v), std::move(squares));
}

void AdamW::measure(std::span<const float> gradient) {
  compute_.ops->dot(compute_.context, std::ssize(gradient), gradient.data(), gradient.data(),
                    squares_.as<double>());
  compute_.ops->download(compute_.context, &measured_squares_, squares_.data(),
                         sizeof measured_squares_);
  measured_ = true;
}

Result<double> AdamW::step(std::span<float> parameters, std::span<const float> gradient, float lr,
                           float beta2, float clip) {
  DS_CHECK(parameters.size() == m_.size() && gradient.size() == m_.size());
  if (!measured_) {
    measure(gradient);
    DS_TRY(finish(compute_));
  }
  measured_ = false;
  AdamWArgs args;
  args.n = std::ssize(parameters);
  args.master = parameters.data();
  args.m = m_.data();
  args.v = v_.data();
  args.gradient = gradient.data();
  args.squares = squares_.as<double>();
  args.clip = clip;
  args.lr = lr;
  args.beta2 = beta2;
  args.step = step_ + 1;
  compute_.ops->adamw(compute_.context, args);
  const double norm = std::sqrt(measured_squares_);
  if (std::isfinite(norm)) ++step_;
  return norm;
}

}  // namespace ds
