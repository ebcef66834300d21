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

Status cross_entropy_rows(const Compute& compute, int64_t rows, int64_t vocab, float* logits,
                          const std::vector<int32_t>& target, const std::vector<float>& weight,
                          std::vector<float>& logprob, std::vector<int32_t>& argmax,
                          bool gradient) {
  const Ops& ops = *compute.ops;
  const auto n = static_cast<size_t>(rows);
  const InBackend targets(ops, compute.context, target.data(), n * sizeof(int32_t)),
      weights(ops, compute.context, weight.data(), n * sizeof(float));
  const OutOfBackend logprobs(ops, logprob.data(), n * sizeof(float)),
      best(ops, argmax.data(), n * sizeof(int32_t));
  CrossEntropyArgs args;
  args.rows = rows;
  args.vocab = args.stride = vocab;
  args.logits = logits;
  args.target = targets.as<int32_t>();
  args.weight = weights.as<float>();
  args.logprob = logprobs.as<float>();
  args.argmax = best.as<int32_t>();
  args.gradient = gradient;
  ops.cross_entropy(compute.context, args);
  logprobs.fetch(compute.context);
  best.fetch(compute.context);
  return finish(compute);
}

Status kl_rows(const Compute& compute, const Terms& terms, const Layout& layout, size_t rows,
               int64_t vocab, float* logits, bool gradient, StepLoss& loss) {
  std::vector<int32_t> index;
  std::vector<float> stored, weight, kl(rows);
  for (size_t i = 0; i < terms.kl.size(); ++i) {
    const StoredTopK& side = *terms.kl[i].stored;
    index.insert(index.end(), side.index.begin(), side.index.end());
    stored.insert(stored.end(), side.logprob.begin(), side.logprob.end());
    const auto n = static_cast<size_t>(layout.kl[i].rows);
    weight.insert(weight.end(), n, terms.kl[i].weight / static_cast<float>(std::max<size_t>(n, 1)));
  }
  DS_CHECK(index.size() == rows * kStoredTopK && weight.size() == rows);
  const Ops& ops = *compute.ops;
  const InBackend indices(ops, compute.context, index.data(), index.size() * sizeof(int32_t)),
      logprobs(ops, compute.context, stored.data(), stored.size() * sizeof(float)),
      weights(ops, compute.context, weight.data(), weight.size() * sizeof(float));
  const OutOfBackend divergence(ops, kl.data(), kl.size() * sizeof(float));
  KlTopkArgs args;
  args.rows = static_cast<int64_t>(rows);
  args.vocab = args.stride = vocab;
  args.top_k = kStoredTopK;
  args.logits = logits;
  args.index = indices.as<int32_t>();
  args.logprob = logprobs.as<float>();
  args.weight = weights.as<float>();
  args.kl = divergence.as<float>();
  args.gradient = gradient;
  ops.kl_topk(compute.context, args);
  divergence.fetch(compute.context);
  DS_TRY(finish(compute));
  auto next = kl.begin();
  for (size_t i = 0; i < terms.kl.size(); ++i) {
    const double sum = std::accumulate(next, next + layout.kl[i].rows, 0.0);
    next += layout.kl[i].rows;
    loss.kl_mean.push_back(sum / static_cast<double>(std::max<int64_t>(layout.kl[i].rows, 1)));
    loss.kl += terms.kl[i].weight * loss.kl_mean.back();
  }
  return {};
}

void add(std::vector<float>& weight, const Part& part, float value) {
  for (int64_t i = part.row0; i < part.row0 + part.rows; ++i)
    weight[static_cast<size_t>(i)] += value;
}

}  // namespace

StepLoss run_terms(TrainGraph& graph, const Compute& compute, const BaseWeights& base,
                   Adapters* adapters, FullGradients* full, const Terms& terms, bool gradient) {
  const Layout layout = lay_out(terms);
  const int64_t vocab = base.config().vocab;
  const auto loss_rows = layout.batch.loss_rows.size();
  float* logits = graph.forward(base, adapters, layout.batch);
  const std::vector<int32_t> target = targets_of(layout.batch);
  std::vector<float> weight(loss_rows, 0.0f), logprob(loss_rows, 0.0f);
  std::vector<int32_t> argmax(loss_rows, -1);

  StepLoss loss;
  loss.tokens = static_cast<int64_t>(layout.batch.ids.size());
  for (size_t i = 0; i < layout.ce.size(); ++i) {
    add(weight, layout.ce[i],
        terms.cross_entropy[i].weight /
            static_cast<float>(std::max<int64_t>(layout.ce[i].rows, 1)));
  }
  if (!layout.summed.empty()) {  // the derivatives depend on the sums: read them first
    loss.failure = cross_entropy_rows(compute, layout.ce_rows, vocab, logits, target, weight,
                                      logprob, argmax, false);
    if (!loss.failure.ok()) return loss;
    for (const Part& part : layout.summed)
      loss.logprob.push_back(view_of(part, logprob, argmax, target).sum_logprob);
    std::vector<double> derivative(layout.summed.size());
    loss.failure = terms.summed.derivative(loss.logprob, derivative);
    if (!loss.failure.ok()) return loss;
    for (size_t i = 0; i < derivative.size(); ++i)
      add(weight, layout.summed[i], static_cast<float>(-derivative[i]));
  }
  loss.failure = cross_entropy_rows(compute, layout.ce_rows, vocab, logits, target, weight, logprob,
                                    argmax, gradient);
  if (!loss.failure.ok()) return loss;
  for (size_t i = 0; i < layout.ce.size(); ++i) {
    loss.items.push_back(view_of(layout.ce[i], logprob, argmax, target));
    loss.cross_entropy -= terms.cross_entropy[i].weight * loss.items.back().mean_logprob;
  }
  if (!terms.kl.empty()) {
    loss.failure = kl_rows(compute, terms, layout, loss_rows - static_cast<size_t>(layout.ce_rows),
                           vocab, logits + layout.ce_rows * vocab, gradient, loss);
    if (!loss.failure.ok()) return loss;
  }
  loss.total = loss.cross_entropy + loss.kl;
  if (gradient) graph.backward(base, adapters, full, layout.batch);
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

double AdamW::step(const Compute& compute, std::span<const Part> parts, float lr, float beta2,
                   float clip) {
  const Ops& ops = host_ops(compute);
  double squares = 0;
  for (const Part& part : parts) {
    squares += ops.sum_squares(compute.context, static_cast<int64_t>(part.gradient.size()),
                               part.gradient.data());
  }
  const double norm = std::sqrt(squares);
  if (!std::isfinite(norm)) return norm;
  ++step_;
  size_t at = 0;
  for (const Part& part : parts) {
    const size_t first = at;
    at += part.parameters.size();
    DS_CHECK(at <= m_.size());
    if (part.gradient.empty()) continue;
    DS_CHECK(part.gradient.size() == part.parameters.size());
    AdamWArgs args;
    args.n = static_cast<int64_t>(part.parameters.size());
    args.master = part.parameters.data();
    args.m = m_.data() + first;
    args.v = v_.data() + first;
    args.gradient = part.gradient.data();
    args.gradient_scale = clip > 0 && norm > clip ? static_cast<float>(clip / norm) : 1.0f;
    args.lr = lr;
    args.beta2 = beta2;
    args.step = step_;
    ops.adamw(compute.context, args);
  }
  return norm;
}

}  // namespace ds
