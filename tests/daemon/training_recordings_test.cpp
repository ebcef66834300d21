// SPDX-License-Identifier: Apache-2.0
// Training passes in recorded pieces (train_graph.h): the same as called one by one, on a GPU
// (DS_TEST_DEVICE); and the rows that are added to share recordings change nothing, on any machine.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "engine/full_weights.h"
#include "learn/objective.h"
#include "reference_model.h"

namespace ds {
namespace {

using test::Machine;

constexpr uint32_t kAllTargets = (1u << kTargets) - 1;

std::atomic<int> recordings{0};
const Ops* real = nullptr;

bool count_and_record(const OpContext& context) {
  ++recordings;
  return real->begin_recording(context);
}
bool record_nothing(const OpContext&) { return false; }

int waits = 0;
const char* count_and_finish(const OpContext& context) {
  ++waits;
  return real->finish(context);
}

/// `rows` tokens in sequences of 13, one of them behind a prefix; other tokens for each `number`.
struct Batch {
  Batch(int64_t rows, int64_t vocab, int number, const PrefixKv* prefix) {
    for (int64_t row = 0; row < rows; row += 13) {
      Sequence& s = sequences.emplace_back();
      for (int64_t i = 0; i < std::min<int64_t>(13, rows - row); ++i)
        s.ids.push_back(static_cast<TokenId>((row * 31 + i * 7 + number * 11 + 3) % vocab));
      s.first_target = std::min<int64_t>(1 + row % 5, std::ssize(s.ids));
      if (row == 13) s.prefix = prefix;
    }
    for (const Sequence& s : sequences) terms.cross_entropy.push_back({&s, 0.5f});
  }
  std::vector<Sequence> sequences;
  Terms terms;
};

struct Outcome {
  double loss = 0;
  std::vector<float> gradient;
};

/// Steps of one training on a table of ops.
class Training {
 public:
  Training(Machine& machine, const Ops& ops, const BaseWeights& base, const NamedTensors* masters)
      : base_(base), compute_(machine.compute), graph_(base.config(), with(ops)) {
    if (masters != nullptr) {
      full_ = FullWeights::make(compute_, base.config(), *masters).value();
    } else {
      adapters_ = Adapters::make(compute_, base.config(), 4, 2.0f, kAllTargets).value();
      adapters_->initialise(7);
    }
    prefix_ = graph_.prefix(base, std::vector<TokenId>{5, 9, 2, 11, 6}).value();
  }

  Outcome step(int64_t rows, int number) {
    const Batch batch(rows, base_.config().vocab, number, &prefix_);
    DS_CHECK(full_ ? full_->zero_gradient().ok() : adapters_->zero_gradient().ok());
    DS_CHECK(full_ ? full_->pack(base_.format()).ok()
                   : adapters_->pack(graph_.formats(base_)).ok());
    const StepLoss loss =
        run_terms(graph_, compute_, full_ ? *full_->packed() : base_, adapters_.get(),
                  full_ ? &full_->gradient() : nullptr, batch.terms, true);
    DS_CHECK(loss.failure.ok() && graph_.take_status().ok());
    const std::span<float> weights = full_ ? full_->masters() : adapters_->parameters().all();
    const std::span<float> gradient = full_ ? full_->gradient().all() : adapters_->gradient().all();
    Outcome out{loss.total, std::vector<float>(gradient.size())};
    compute_.ops->download(compute_.context, out.gradient.data(), gradient.data(),
                           std::ssize(gradient) * 4);
    compute_.ops->axpby(compute_.context, std::ssize(gradient), -0.05f, gradient.data(), 1.0f,
                        weights.data());
    DS_CHECK(finish(compute_).ok());
    return out;
  }

 private:
  const Compute& with(const Ops& ops) {
    compute_.ops = &ops;
    return compute_;
  }
  const BaseWeights& base_;
  Compute compute_;
  TrainGraph graph_;
  PrefixKv prefix_;
  std::unique_ptr<FullWeights> full_;
  std::unique_ptr<Adapters> adapters_;
};

TEST(TrainingRecordings, PiecesAreTheCallsOfWhateverBatch) {
  Machine machine;
  if (machine.compute.ops->host_memory) GTEST_SKIP() << "no GPU: DS_TEST_DEVICE is not set";
  real = machine.compute.ops;
  Ops recording = *real, calling = *real;
  recording.begin_recording = count_and_record;
  calling.begin_recording = record_nothing;
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16}) {
    const auto model =
        test::load_model(test::data_path("tiny/untied-gqa"), machine.compute, format);
    const NamedTensors masters = model.file->read_all_f32().value();
    for (const bool full : {false, true}) {
      SCOPED_TRACE(full ? "all weights" : "low-rank factors");
      const NamedTensors* const from = full ? &masters : nullptr;
      Training recorded(machine, recording, *model.base, from);
      Training called(machine, calling, *model.base, from);
      std::vector<int> count;
      int number = 0;
      // 65 to 96 rows are passes of 96; the 40 between them need another recording.
      for (const int64_t rows : {70, 70, 70, 70, 96, 40, 65, 40, 40, 40, 90, 33}) {
        const Outcome got = recorded.step(rows, number), want = called.step(rows, number);
        EXPECT_EQ(got.loss, want.loss) << rows << " rows, step " << number;
        EXPECT_EQ(got.gradient, want.gradient) << rows << " rows, step " << number;
        ++number;
        count.push_back(recordings);
      }
      EXPECT_GT(count[3], 0);
      EXPECT_EQ(count[4], count[3]) << "of 96 rows";
      EXPECT_EQ(count[6], count[4]) << "of 65 rows";
      EXPECT_EQ(count[11], count[9]) << "of 90 and 33 rows";
      recordings = 0;
    }
  }
}

TEST(TrainingRecordings, AStepWaitsOnce) {
  Machine machine;
  real = machine.compute.ops;
  Ops ops = *real;
  ops.finish = count_and_finish;
  Compute compute = machine.compute;
  compute.ops = &ops;
  const auto model =
      test::load_model(test::data_path("tiny/untied-gqa"), compute, WeightFormat::kF32);
  TrainGraph graph(model.base->config(), compute);
  const Batch batch(40, model.base->config().vocab, 0, nullptr);
  std::vector<std::vector<float>> weights;
  for (const bool beside : {true, false}) {
    auto adapters = Adapters::make(compute, model.base->config(), 4, 2.0f, kAllTargets).value();
    adapters->initialise(7);
    auto optimizer = AdamW::make(compute, adapters->size()).value();
    for (int step = 0; step < 3; ++step) {
      ASSERT_TRUE(adapters->pack(graph.formats(*model.base)).ok());
      ASSERT_TRUE(adapters->zero_gradient().ok());
      waits = 0;
      const StepLoss loss = run_terms(graph, compute, *model.base, adapters.get(), nullptr,
                                      batch.terms, true, beside ? &optimizer : nullptr);
      ASSERT_TRUE(loss.failure.ok());
      const auto norm = optimizer.step(adapters->parameters().all(), adapters->gradient().all(),
                                       1e-3f, 0.99f, 1.0f);
      ASSERT_TRUE(norm.ok());
      EXPECT_GT(*norm, 0);
      if (step > 0)  // the first makes packs for the backward pass
        EXPECT_EQ(waits, beside ? 1 : 2) << "step " << step;
    }
    weights.push_back(adapters->parameters().read().value());
  }
  EXPECT_EQ(weights[0], weights[1]);
}

TEST(TrainingRecordings, RowsThatAreAddedChangeNothing) {
  Machine machine(CpuIsa::kScalar);
  if (!machine.compute.ops->host_memory) GTEST_SKIP() << "on the CPU";
  Ops padding = *machine.compute.ops;
  padding.host_memory = false;
  const auto model =
      test::load_model(test::data_path("tiny/untied-gqa"), machine.compute, WeightFormat::kF32);
  const NamedTensors masters = model.file->read_all_f32().value();
  for (const NamedTensors* from : {static_cast<const NamedTensors*>(nullptr), &masters}) {
    Training padded(machine, padding, *model.base, from);
    Training plain(machine, *machine.compute.ops, *model.base, from);
    for (const int64_t rows : {70, 33, 64}) {
      const Outcome got = padded.step(rows, 1), want = plain.step(rows, 1);
      EXPECT_EQ(got.loss, want.loss) << rows << " rows";
      EXPECT_EQ(got.gradient, want.gradient) << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace ds
