// SPDX-License-Identifier: Apache-2.0
// Quantizing with calibration: the module int4 sees the inputs of the layers' weights, what it
// makes of them is nearer to the model than without, and the same each time.
#include "engine/calibration.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "reference_model.h"

namespace ds {
namespace {

class CalibrationTest : public testing::Test {
 protected:
  /// The tiny model in 4 bits; calibrated unless `with` is null.
  std::shared_ptr<const BaseWeights> quantized(std::shared_ptr<const Components> with) {
    auto base = BaseWeights::load(*model_.file, machine_.compute,
                                  {WeightFormat::kF32, int4_, std::move(with)});
    if (!base.ok()) ADD_FAILURE() << base.status().message();
    return *base;
  }
  std::vector<float> logits(const BaseWeights& base) {
    std::vector<TokenId> ids;
    Rng rng(5);
    for (int i = 0; i < 96; ++i)
      ids.push_back(static_cast<TokenId>(rng.below(static_cast<uint64_t>(base.config().vocab))));
    return test::serve_logits(machine_.compute, base, nullptr, ids, 32, KvDtype::kF32);
  }
  /// Mean square of what the logits of `base` are off.
  double error(const BaseWeights& base) {
    const std::vector<float> exact = logits(*model_.base), got = logits(base);
    double squares = 0;
    for (size_t i = 0; i < got.size(); ++i)
      squares += std::pow(double{got[i]} - double{exact[i]}, 2);
    return squares / static_cast<double>(got.size());
  }

  test::Machine machine_;
  test::LoadedModel model_ =
      test::load_model(test::data_path("tiny/untied-gqa"), machine_.compute, WeightFormat::kF32);
  std::shared_ptr<const Quantizer> int4_ =
      std::make_shared<Quantizer>(test::module_of(DS_KIND_QUANTIZER, "int4"), 1);
};

TEST_F(CalibrationTest, CalibratedWeightsAreNearerAndTheSameEachTime) {
  const auto with = machine_.components.current();
  const auto plain = quantized(nullptr), first = quantized(with), again = quantized(with);
  EXPECT_LT(error(*first), 0.9 * error(*plain));
  EXPECT_EQ(logits(*first), logits(*again));
  const auto after = quantized(nullptr);  // nothing is left of the calibrations
  EXPECT_EQ(logits(*after), logits(*plain));
}

TEST_F(CalibrationTest, WhatComputedTheInputsIsPartOfTheKey) {
  const auto dense = machine_.components.current();
  auto window = std::make_shared<Components>(*dense);
  window->attention = test::attention_module("window-global");
  const WeightForm none{WeightFormat::kF32, int4_}, one{WeightFormat::kF32, int4_, dense},
      other{WeightFormat::kF32, int4_, window};
  EXPECT_EQ((std::set<uint64_t>{none.key(), one.key(), other.key()}.size()), 3u);
}

TEST_F(CalibrationTest, EveryWeightOfTheLayersIsSeen) {
  const std::vector<TokenId> ids = {1, 2, 3, 4, 5};
  std::set<std::string> seen;
  const LinearWatch watch = [&](int64_t layer, Target target, int64_t rows, int64_t k,
                                const float* x) -> Status {
    EXPECT_EQ(rows, 5);
    EXPECT_EQ(k, target_shape(model_.base->config(), target).second);
    EXPECT_TRUE(std::all_of(x, x + rows * k, [](float v) { return std::isfinite(v); }));
    seen.insert(weight_name(layer, target));
    if (seen.size() == 9) return {Code::kPlugin, "enough"};
    return {};
  };
  KvPages pages(model_.base->config(), machine_.compute, KvDtype::kF32, 1);
  const int32_t page = 0;
  const SequenceSpan span{0, 5, 0, &page};
  const std::vector<int32_t> slots(ids.size(), -1);
  StepBatch batch;
  batch.ids = ids;
  batch.sequences = {&span, 1};
  batch.slot_of_row = slots;
  batch.watch = &watch;
  Forward forward(model_.base->config(), machine_.compute, 8);
  const Status ended = forward.run(*model_.base, batch, pages, nullptr, nullptr);
  EXPECT_EQ(ended.message(), "enough");
  EXPECT_EQ(seen.size(), 9u);
  EXPECT_TRUE(seen.contains("model.layers.0.mlp.down_proj.weight"));
  EXPECT_TRUE(seen.contains("model.layers.1.self_attn.k_proj.weight"));
}

}  // namespace
}  // namespace ds
