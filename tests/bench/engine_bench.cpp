// SPDX-License-Identifier: Apache-2.0
// engine_bench [isa] [threads]: tokens per second of the real model, alone on the machine: prefill
// of 512 tokens, greedy decode behind 128, LoRA training (rank 8 on every linear, 8 x 64 tokens,
// loss on all of them). Best of five rounds, the three taking turns. isa as in ops_bench.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "kernels/pool.h"
#include "learn/objective.h"
#include "tests/daemon/reference_model.h"
#include "tests/kernels/cases.h"

namespace {

using namespace ds;

constexpr int kRounds = 5;

std::vector<TokenId> some_ids(int64_t count, int64_t vocab) {
  std::vector<TokenId> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<TokenId>((i * 7919 + 17) % vocab));
  return ids;
}

/// Steps of one sequence over its own pages.
struct Serving {
  Serving(const Compute& compute, const BaseWeights& base)
      : base(base),
        pages(base.config(), compute, KvDtype::kBF16, 32),
        forward(base.config(), compute, 512) {
    for (int32_t i = 0; i < 32; ++i) table.push_back(i);
    logits.resize(static_cast<size_t>(base.config().vocab));
  }
  void step(std::span<const TokenId> ids, int64_t position) {
    const auto rows = static_cast<int64_t>(ids.size());
    const SequenceSpan span{0, rows, position, table.data()};
    const std::vector<int32_t> slots(ids.size(), -1);
    const int32_t last = static_cast<int32_t>(rows - 1);
    StepBatch batch;
    batch.ids = ids;
    batch.sequences = {&span, 1};
    batch.slot_of_row = slots;
    batch.logit_rows = {&last, 1};
    DS_CHECK(forward.run(base, batch, pages, logits.data(), nullptr).ok());
  }
  const BaseWeights& base;
  KvPages pages;
  Forward forward;
  std::vector<int32_t> table;
  std::vector<float> logits;
};

struct Training {
  Training(const Compute& compute, const BaseWeights& base)
      : compute(compute),
        base(base),
        graph(base.config(), compute),
        adapters(Adapters::make(compute, base.config(), 8, 2.0f, (1u << kTargets) - 1).value()),
        optimizer(AdamW::make(compute, adapters->size()).value()) {
    adapters->initialise(1);
    for (int64_t i = 0; i < 8; ++i) {
      sequences.push_back({some_ids(65 + i, base.config().vocab), 1 + i, nullptr});
    }
    for (Sequence& s : sequences) {
      s.ids.erase(s.ids.begin(), s.ids.end() - 65);  // eight different ones
      s.first_target = 1;
      terms.cross_entropy.push_back({&s, 1.0f});
    }
  }
  int64_t step() {
    DS_CHECK(adapters->pack(graph.formats(base)).ok() && adapters->zero_gradient().ok());
    const StepLoss loss = run_terms(graph, compute, base, adapters.get(), nullptr, terms, true);
    DS_CHECK(
        optimizer.step(adapters->parameters().all(), adapters->gradient().all(), 1e-4f, 0.99f, 1.0f)
            .ok());
    return loss.tokens;
  }
  Compute compute;
  const BaseWeights& base;
  TrainGraph graph;
  std::unique_ptr<Adapters> adapters;
  AdamW optimizer;
  std::vector<Sequence> sequences;
  Terms terms;
};

double rate(const std::function<int64_t()>& work) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t tokens = work();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return static_cast<double>(tokens) / took.count();
}

}  // namespace

int main(int argc, char** argv) {
  const CpuIsa isa = argc > 1 ? test::isa_named(argv[1]) : best_cpu_isa();
  Pool pool(argc > 2 ? std::atoi(argv[2]) : 0);
  const ComponentsSlot components(test::default_components());
  const Compute compute{&cpu_ops(isa), {pool.engine(), nullptr}, &components};
  const test::LoadedModel model =
      test::load_model(test::smollm2_path(), compute, WeightFormat::kBF16);
  Serving serving(compute, *model.base);
  Training training(compute, *model.base);
  const std::vector<TokenId> prompt = some_ids(512, model.base->config().vocab);
  training.step();  // first use packs the transposed weights
  double prefill = 0, decode = 0, train = 0;
  for (int round = 0; round < kRounds; ++round) {
    prefill = std::max(prefill, rate([&] {
                         serving.step(prompt, 0);
                         return int64_t{512};
                       }));
    decode = std::max(decode, rate([&] {
                        for (int64_t i = 0; i < 64; ++i)
                          serving.step({&prompt[static_cast<size_t>(i)], 1}, 128 + i);
                        return int64_t{64};
                      }));
    train = std::max(train, rate([&] { return training.step(); }));
  }
  std::printf(
      "%s, %d threads: prefill 512 %.0f tok/s | decode %.0f tok/s | LoRA 8 x 64 %.0f tok/s\n",
      compute.ops->name, pool.threads(), prefill, decode, train);
  return 0;
}
