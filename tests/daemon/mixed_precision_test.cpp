// SPDX-License-Identifier: Apache-2.0
// FP16 forward, BF16 backward: what each product of a training step multiplies, as the backend is
// told, and what happens where FP16 cannot hold an input. On a GPU by DS_TEST_DEVICE; on the CPU,
// whose FP16 is FP32, saturation is made up.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "engine/full_weights.h"
#include "learn/objective.h"
#include "reference_model.h"

namespace ds {
namespace {

using enum WeightFormat;

/// The backend's table, which notes what it is asked to multiply. One at a time: an op has no
/// state.
class Watched {
 public:
  struct Product {
    bool backward;
    WeightFormat weight, low_rank, input;  ///< as `weight` where there is none, or it is FP32
  };

  explicit Watched(const Compute& compute) : compute_(compute) {
    real_ = *compute.ops;
    table_ = real_;
    table_.host_memory = false;  // as a GPU: that is what counts
    table_.linear = linear;
    table_.outer_accumulate = outer;
    table_.prepare = prepare;
    table_.rmsnorm = rmsnorm;
    table_.swiglu = swiglu;
    table_.swiglu_backward = swiglu_backward;
    table_.rmsnorm_backward = rmsnorm_backward;
    table_.rope = rope;
    table_.cross_entropy = cross_entropy;
    compute_.ops = &table_;
    begin();
  }
  const Compute& compute() const { return compute_; }
  /// A step begins; the loss is where its backward pass does.
  static void begin() {
    products_.clear();
    backward_ = false;
    norms_ = 0;
  }
  static const std::vector<Product>& products() { return products_; }
  /// The norm of that number in a step finds three values too large.
  static void saturate_norm(int number) { saturating_norm_ = number; }

 private:
  static void note(const PreparedRows& to) {
    if (to.data != nullptr) format_of_[to.data] = to.format;
  }
  static WeightFormat input_of(const void* prepared, WeightFormat otherwise) {
    return prepared == nullptr ? otherwise : format_of_.at(prepared);
  }
  static void linear(const OpContext& c, const LinearArgs& a) {
    for (int w = 0; w < a.n_weights; ++w) {
      const WeightFormat weight = a.w[w].format;
      const LoraPair pair = a.lora != nullptr ? a.lora->pair[0][w] : LoraPair();
      const bool low = pair.a.data != nullptr;
      products_.push_back(
          {backward_, weight, low ? pair.a.format : weight, input_of(a.x_prepared, weight)});
      if (low) EXPECT_EQ(pair.a.format, pair.b.format);
    }
    real_.linear(c, a);
  }
  static void outer(const OpContext& c, int64_t count, const OuterArgs* a) {
    for (int64_t i = 0; i < count; ++i) {
      const WeightFormat dy = input_of(a[i].dy_prepared, kBF16);
      const WeightFormat x = input_of(a[i].x_prepared, kBF16);
      products_.push_back({true, dy, x, x});
    }
    real_.outer_accumulate(c, count, a);
  }
  static void prepare(const OpContext& c, int64_t rows, int64_t k, const float* x, int64_t stride,
                      const PreparedRows& to) {
    note(to);
    real_.prepare(c, rows, k, x, stride, to);
  }
  static void rmsnorm(const OpContext& c, int64_t rows, int64_t d, const float* x, const float* w,
                      float eps, float* y, float* rstd, const PreparedRows& to) {
    note(to);
    if (real_.host_memory && !backward_ && norms_++ == saturating_norm_) {
      EXPECT_NE(to.saturated, nullptr);
      *to.saturated += 3;
    }
    real_.rmsnorm(c, rows, d, x, w, eps, y, rstd, to);
  }
  static void swiglu(const OpContext& c, const SwigluArgs& a) {
    note(a.y_prepared);
    real_.swiglu(c, a);
  }
  static void swiglu_backward(const OpContext& c, const SwigluArgs& a) {
    note(a.dgate_prepared);
    note(a.dup_prepared);
    note(a.y_prepared);
    real_.swiglu_backward(c, a);
  }
  static void rmsnorm_backward(const OpContext& c, int64_t rows, int64_t d, const float* dy,
                               const float* x, const float* w, const float* rstd, float* dx,
                               void* dx_prepared, float* dw) {
    note({dx_prepared});
    real_.rmsnorm_backward(c, rows, d, dy, x, w, rstd, dx, dx_prepared, dw);
  }
  static void rope(const OpContext& c, const RopeArgs& a) {
    for (const PreparedRows& to : {a.q_prepared, a.k_prepared, a.v_prepared}) note(to);
    real_.rope(c, a);
  }
  static void cross_entropy(const OpContext& c, const CrossEntropyArgs& a) {
    note({a.prepared});
    real_.cross_entropy(c, a);
    backward_ = a.gradient;
  }

  static inline Ops real_, table_;
  static inline std::vector<Product> products_;
  static inline std::map<const void*, WeightFormat> format_of_;
  static inline bool backward_ = false;
  static inline int norms_ = 0, saturating_norm_ = -1;
  Compute compute_;
};

class MixedPrecision : public testing::Test {
 protected:
  void load(WeightFormat format, const NamedTensors* instead = nullptr) {
    model = test::load_model(test::data_path("tiny/tied"), watched.compute(), format);
    if (instead != nullptr) {
      auto made =
          BaseWeights::from_tensors(model.base->config(), *instead, "", watched.compute(), format);
      ASSERT_TRUE(made.ok()) << made.status().message();
      model.base = *made;
    }
    const Json reference = test::read_json(test::data_path("tiny/tied/reference.json"));
    sequence.ids.clear();
    for (const Json& id : reference["ids"]) sequence.ids.push_back(id.get<int>());
    terms = {};
    terms.cross_entropy.push_back({&sequence, 1.0f});
    graph = std::make_unique<TrainGraph>(model.base->config(), watched.compute());
  }
  std::unique_ptr<Adapters> adapters() const {
    auto made =
        Adapters::make(watched.compute(), model.base->config(), 4, 2.0f, (1u << kTargets) - 1)
            .value();
    made->initialise(3);
    return made;
  }
  double step(Adapters& on) {
    Watched::begin();
    EXPECT_TRUE(on.pack(graph->formats(*model.base)).ok() && on.zero_gradient().ok());
    const StepLoss loss =
        run_terms(*graph, watched.compute(), *model.base, &on, nullptr, terms, true);
    EXPECT_TRUE(loss.failure.ok()) << loss.failure.message();
    EXPECT_TRUE(graph->take_status().ok());
    return loss.total;
  }
  /// Losses of a few steps of training all weights.
  std::vector<double> train(WeightFormat format) {
    load(format);
    auto full = FullWeights::make(watched.compute(), model.base->config(),
                                  model.file->read_all_f32().value())
                    .value();
    AdamW optimizer = AdamW::make(watched.compute(), full->size()).value();
    std::vector<double> losses;
    for (int i = 0; i < 6; ++i) {
      Watched::begin();
      EXPECT_TRUE(full->pack(format).ok() && full->zero_gradient().ok());
      losses.push_back(run_terms(*graph, watched.compute(), *full->packed(), nullptr,
                                 &full->gradient(), terms, true)
                           .total);
      EXPECT_TRUE(
          optimizer.step(full->masters(), full->gradient().all(), 1e-3f, 0.999f, 1.0f).ok());
    }
    return losses;
  }
  static void expect_formats(WeightFormat forward, WeightFormat backward) {
    size_t behind = 0;
    for (const Watched::Product& p : Watched::products()) {
      const WeightFormat want = p.backward ? backward : forward;
      behind += p.backward ? 1 : 0;
      EXPECT_EQ(p.weight, want);
      EXPECT_EQ(p.low_rank, want);
      EXPECT_EQ(p.input, want);
    }
    EXPECT_GT(behind, 0u);
    EXPECT_GT(Watched::products().size(), behind);
  }

  // A scalar CPU's linear layers take FP32 rows, as this table says of a GPU with few.
  test::Machine machine{CpuIsa::kScalar};
  Watched watched{machine.compute};
  test::LoadedModel model;
  Sequence sequence;
  Terms terms;
  std::unique_ptr<TrainGraph> graph;
};

TEST_F(MixedPrecision, MultipliesFp16ForwardAndBf16BackwardWithAdapters) {
  load(kF16);
  const auto on = adapters();
  step(*on);
  expect_formats(kF16, kBF16);
}

TEST_F(MixedPrecision, MultipliesFp16ForwardAndBf16BackwardOfAllWeights) {
  train(kF16);
  expect_formats(kF16, kBF16);
}

TEST_F(MixedPrecision, PureFormatsStayPure) {
  for (const WeightFormat format : {kF32, kTF32, kBF16}) {
    load(format);
    const auto on = adapters();
    step(*on);
    for (const Watched::Product& p : Watched::products()) {
      if (p.backward && is_f32(format)) continue;  // of FP32 rows, whose format is not told
      EXPECT_EQ(p.weight, format);
      EXPECT_EQ(p.input, format);
    }
  }
}

TEST_F(MixedPrecision, LearnsAsFp32Does) {
  const std::vector<double> want = train(kF32), got = train(kF16);
  EXPECT_LT(want.back(), 0.98 * want.front());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 0.01 * want[i]) << i;
}

TEST_F(MixedPrecision, WhatSaturatesFallsBackAlone) {
  load(kF16);
  const bool on_gpu = !machine.compute.ops->host_memory;
  if (on_gpu) {
    // 1e6 times what the second layer's attention reads, and the weights behind it smaller.
    NamedTensors changed = model.file->read_all_f32().value();
    for (float& w : changed.at("model.layers.1.input_layernorm.weight")) w *= 1e6f;
    for (const Target t : {kQ, kK, kV}) {
      for (float& w : changed.at(weight_name(1, t))) w *= 1e-6f;
    }
    load(kF16, &changed);
  } else {
    Watched::saturate_norm(2);
  }
  const auto on = adapters();
  step(*on);
  Watched::saturate_norm(-1);
  EXPECT_GE(graph->settle_saturation(), 3);
  EXPECT_EQ(graph->settle_saturation(), 0);
  const OperandFormats& now = graph->formats(*model.base);
  for (int64_t layer = -1; layer < model.base->config().n_layers; ++layer) {
    for (int t = 0; t < (layer < 0 ? 1 : static_cast<int>(kTargets)); ++t) {
      const bool fallen = layer == 1 && t <= kV;
      EXPECT_EQ(now.forward(layer, static_cast<Target>(t)), fallen ? kBF16 : kF16)
          << layer << " " << t;
    }
  }
  const double loss = step(*on);
  size_t forward_bf16 = 0;
  for (const Watched::Product& p : Watched::products()) {
    if (p.backward) continue;
    forward_bf16 += p.weight == kBF16 ? 1 : 0;
    EXPECT_EQ(p.low_rank, p.weight);
    EXPECT_EQ(p.input, p.weight);
  }
  EXPECT_EQ(forward_bf16, 3u);  // q, k and v
  EXPECT_EQ(graph->settle_saturation(), 0);
  EXPECT_TRUE(std::isfinite(loss));
}

}  // namespace
}  // namespace ds
