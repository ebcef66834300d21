// SPDX-License-Identifier: Apache-2.0
// Recorded steps on a GPU (DS_TEST_DEVICE): what is published later is served by the recording that
// is there, and what lies elsewhere by another.
#include <gtest/gtest.h>

#include <array>
#include <atomic>

#include "engine/quantizer.h"
#include "random_delta.h"
#include "reference_model.h"
#include "served_model.h"

namespace ds {
namespace {

using test::Machine;

std::atomic<int> recordings{0};
const Ops* real = nullptr;

/// The machine's table, but for how it begins to record.
Ops with_recording(bool (*begin)(const OpContext&)) {
  Ops ops = *real;
  ops.begin_recording = begin;
  return ops;
}

std::shared_ptr<const LoraDelta> random_delta(const BaseWeights& base, const Compute& compute,
                                              uint32_t seed) {
  return test::random_delta(base, compute, 4, seed);
}

/// Decode steps of some sequences, every second of which is on a delta.
class Decoding {
 public:
  Decoding(const Compute& compute, const BaseWeights& base, int64_t batch)
      : base_(base),
        batch_(batch),
        pages_(base.config(), compute, KvDtype::kBF16, batch),
        forward_(base.config(), compute, batch) {
    for (int64_t b = 0; b < batch; ++b) table_.push_back(static_cast<int32_t>(b));
  }

  std::vector<float> step(const LoraDelta* delta, int64_t position) {
    std::vector<TokenId> ids;
    std::vector<SequenceSpan> spans;
    std::vector<int32_t> slots, rows;
    for (int64_t b = 0; b < batch_; ++b) {
      ids.push_back(static_cast<TokenId>(3 + (b * 31 + position * 7) % 500));
      spans.push_back({b, 1, position, table_.data() + b});
      slots.push_back(b % 2 == 0 ? 0 : -1);
      rows.push_back(static_cast<int32_t>(b));
    }
    StepBatch step;
    step.ids = ids;
    step.sequences = spans;
    step.slot_of_row = slots;
    step.deltas = {&delta, 1};
    step.logit_rows = rows;
    std::vector<float> logits(static_cast<size_t>(batch_ * base_.config().vocab));
    DS_CHECK(forward_.run(base_, step, pages_, logits.data(), nullptr).ok());
    return logits;
  }

 private:
  const BaseWeights& base_;
  int64_t batch_;
  KvPages pages_;
  Forward forward_;
  std::vector<int32_t> table_;
};

/// The weights of a tiny model as they are, or (in FP32 but for that) as a quantizer's codes.
class PublishedDeltas : public testing::TestWithParam<const char*> {};

TEST_P(PublishedDeltas, AreServedByTheRecordingThatIsThere) {
  Machine machine;
  if (machine.compute.ops->host_memory) GTEST_SKIP() << "no GPU: DS_TEST_DEVICE is not set";
  const std::string codes = GetParam();
  real = machine.compute.ops;
  const Ops counting = with_recording([](const OpContext& context) {
    ++recordings;
    return real->begin_recording(context);
  });
  const Ops direct = with_recording([](const OpContext&) { return false; });
  auto model =
      test::load_model(test::data_path("tiny/untied-gqa"), machine.compute, WeightFormat::kBF16);
  if (!codes.empty()) {
    const auto quantizer =
        std::make_shared<Quantizer>(test::module_of(DS_KIND_QUANTIZER, codes), 1);
    auto quantized =
        BaseWeights::load(*model.file, machine.compute, {WeightFormat::kF32, quantizer, nullptr});
    ASSERT_TRUE(quantized.ok()) << quantized.status().message();
    model.base = *quantized;
  }
  Compute recorded_with = machine.compute, direct_with = machine.compute;
  recorded_with.ops = &counting;
  direct_with.ops = &direct;
  for (const int64_t batch : {int64_t{2}, int64_t{20}}) {  // by few_rows(), by products
    recordings = 0;
    Decoding recorded(recorded_with, *model.base, batch), called(direct_with, *model.base, batch);
    std::vector<float> before;
    int64_t position = 0;
    for (uint32_t published = 1; published <= 5; ++published) {
      const auto delta = random_delta(*model.base, machine.compute, published);
      for (int step = 0; step < 3; ++step, ++position) {
        const std::vector<float> got = recorded.step(delta.get(), position);
        EXPECT_EQ(got, called.step(delta.get(), position))
            << batch << " sequences, delta " << published << ", position " << position;
        EXPECT_NE(got, before);
        before = got;
      }
    }
    EXPECT_EQ(recordings, 1) << batch << " sequences";
  }
}

INSTANTIATE_TEST_SUITE_P(Weights, PublishedDeltas, testing::Values("", "int8", "int4"),
                         [](const auto& info) {
                           return *info.param == 0 ? "plain" : std::string(info.param);
                         });

/// Chunks of prompts are recorded, too; pages of another number lie elsewhere, often from the same
/// address on.
TEST(Recordings, PagesOfAnotherNumberAreAnotherRecording) {
  Machine machine;
  if (machine.compute.ops->host_memory) GTEST_SKIP() << "no GPU: DS_TEST_DEVICE is not set";
  const auto model =
      test::load_model(test::data_path("tiny/untied-gqa"), machine.compute, WeightFormat::kBF16);
  const ModelConfig& config = model.base->config();
  constexpr int64_t kRows = 64;
  std::vector<TokenId> prompt;
  for (int64_t i = 0; i < kRows; ++i) prompt.push_back(static_cast<TokenId>(3 + i * 7 % 200));
  // Of the last of the ids, the first of which is at `position`.
  const auto logits = [&](Forward& forward, KvPages& pages, const std::vector<TokenId>& ids,
                          int64_t position) {
    const std::vector<int32_t> table = {0, 1}, slots(ids.size(), -1),
                               last = {static_cast<int32_t>(ids.size()) - 1};
    const SequenceSpan span{0, std::ssize(ids), position, table.data()};
    StepBatch step;
    step.ids = ids;
    step.sequences = {&span, 1};
    step.slot_of_row = slots;
    step.logit_rows = last;
    std::vector<float> out(static_cast<size_t>(config.vocab));
    DS_CHECK(forward.run(*model.base, step, pages, out.data(), nullptr).ok());
    return out;
  };
  Forward kept(config, machine.compute, kRows);
  std::vector<float> want, after;
  for (const int64_t n_pages : {40, 40, 40, 2, 90, 2, 40}) {
    KvPages pages(config, machine.compute, KvDtype::kBF16, n_pages);
    const std::vector<float> got = logits(kept, pages, prompt, 0);
    if (want.empty()) want = got;
    EXPECT_EQ(got, want) << n_pages << " pages";
    // What it wrote has to be in these pages: the next token reads it.
    Forward fresh(config, machine.compute, kRows);
    const std::vector<float> here = logits(fresh, pages, {5}, kRows - 1);
    if (after.empty()) after = here;
    EXPECT_EQ(here, after) << n_pages << " pages";
  }
}

}  // namespace
}  // namespace ds
