// SPDX-License-Identifier: Apache-2.0
// A model over the codes of int8 and int4: what serves it, and LoRA over it, on the CPU or on
// $DS_TEST_DEVICE. A GPU is held against the CPU's copy beside it.
#include <gtest/gtest.h>

#include <cmath>

#include "engine/train_graph.h"
#include "learn/objective.h"
#include "reference_model.h"
#include "served_model.h"

namespace ds {
namespace {

class QuantizedModel : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const Json reference = test::read_json(folder_ + "/reference.json");
    for (const Json& id : reference["ids"]) ids_.push_back(id.get<int>());
    const auto quantizer =
        std::make_shared<Quantizer>(test::module_of(DS_KIND_QUANTIZER, GetParam()), 1);
    auto made =
        BaseWeights::load(*model_.file, machine_.compute, {WeightFormat::kF32, quantizer, nullptr});
    ASSERT_TRUE(made.ok()) << made.status().message();
    base_ = *made;
  }
  bool on_gpu() const { return !machine_.compute.ops->host_memory; }
  Compute cpu() {
    return {&cpu_ops(best_cpu_isa()), {machine_.pool.engine()}, &machine_.components};
  }
  static std::vector<float> random_floats(int64_t n, uint64_t seed) {
    Rng rng(seed);
    std::vector<float> out;
    for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<float>(rng.uniform() - 0.5));
    return out;
  }
  /// Root mean square of the difference over that of `expected`.
  static double error(const std::vector<float>& got, const std::vector<float>& expected) {
    double squares = 0, of_all = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      squares += std::pow(double{got[i]} - double{expected[i]}, 2);
      of_all += double{expected[i]} * double{expected[i]};
    }
    return got.size() == expected.size() ? std::sqrt(squares / of_all) : INFINITY;
  }

  test::Machine machine_;
  const std::string folder_ = test::data_path("tiny/untied-gqa");
  test::LoadedModel model_ = test::load_model(folder_, machine_.compute, WeightFormat::kF32);
  std::vector<TokenId> ids_;
  std::shared_ptr<const BaseWeights> base_;
};

/// Served from codes: in chunks of any size near the plain weights' logits, and on a GPU nearer yet
/// to the CPU's over the same codes. Chunks of one row are recorded and replayed.
TEST_P(QuantizedModel, ServesFromItsCodes) {
  EXPECT_TRUE(base_->by_quantizer());
  const auto serve = [&](const Compute& at, const BaseWeights& base, int64_t chunk) {
    return test::serve_logits(at, base, nullptr, ids_, chunk, KvDtype::kF32);
  };
  const std::vector<float> plain = serve(machine_.compute, *model_.base, 64);
  for (const int64_t chunk : {1, 7, 33}) {
    const std::vector<float> got = serve(machine_.compute, *base_, chunk);
    EXPECT_LT(error(got, plain), std::string(GetParam()) == "int8" ? 0.03 : 0.25) << chunk;
    if (!on_gpu()) continue;
    ASSERT_NE(base_->host(), nullptr);
    EXPECT_TRUE(base_->host()->by_quantizer());
    // A value between two codes may fall either way.
    EXPECT_LT(error(got, serve(cpu(), *base_->host(), 64)), 0.02) << chunk;
    // Pages of a GPU's default: each way of appending to them has to write what attention reads.
    const auto halves =
        test::serve_logits(machine_.compute, *base_, nullptr, ids_, chunk, KvDtype::kF16);
    EXPECT_LT(error(halves, got), 0.02) << chunk;
  }
}

TEST_P(QuantizedModel, ServesDeltasBesideItsCodes) {
  const auto delta = test::random_delta(*base_, machine_.compute, 3);
  const auto serve = [&](const Compute& at, const BaseWeights& base, const LoraDelta* with,
                         int64_t chunk) {
    return test::serve_logits(at, base, with, ids_, chunk, KvDtype::kF32);
  };
  const std::vector<float> without = serve(machine_.compute, *base_, nullptr, 64);
  for (const int64_t chunk : {1, 5, 40}) {
    const std::vector<float> got = serve(machine_.compute, *base_, delta.get(), chunk);
    EXPECT_GT(error(got, without), 0.1) << chunk;
    if (!on_gpu()) continue;
    EXPECT_LT(error(got, serve(cpu(), *base_->host(), delta->host().get(), 64)), 0.02) << chunk;
  }
}

/// The gradient of adapters over codes: through W^T as the codes mean it.
TEST_P(QuantizedModel, TrainsAdaptersOverItsCodes) {
  const Sequence sequence{ids_, 1, nullptr};
  Terms terms;
  terms.cross_entropy.push_back({&sequence, 1.0f});
  const auto gradient = [&](const Compute& at, const BaseWeights& base, double* loss) {
    TrainGraph graph(base.config(), at);
    const auto adapters = Adapters::make(at, base.config(), 4, 2.0f, (1u << kTargets) - 1).value();
    adapters->initialise(5);
    std::vector<float> start = *adapters->parameters().read();
    Rng rng(9);
    for (float& p : start) p += 0.05f * static_cast<float>(rng.uniform() - 0.5);
    adapters->parameters().set(start);
    EXPECT_TRUE(adapters->pack(graph.formats(base)).ok() && adapters->zero_gradient().ok());
    const StepLoss got = run_terms(graph, at, base, adapters.get(), nullptr, terms, true);
    EXPECT_TRUE(got.failure.ok() && graph.take_status().ok());
    *loss = got.total;
    return *adapters->gradient().read();
  };
  double plain_loss = 0, loss = 0, host_loss = 0;
  const std::vector<float> plain = gradient(machine_.compute, *model_.base, &plain_loss);
  const std::vector<float> got = gradient(machine_.compute, *base_, &loss);
  EXPECT_NEAR(loss, plain_loss, 0.05 * plain_loss);
  EXPECT_LT(error(got, plain), std::string(GetParam()) == "int8" ? 0.06 : 0.4);
  if (!on_gpu()) return;
  const std::vector<float> expected = gradient(cpu(), *base_->host(), &host_loss);
  EXPECT_NEAR(loss, host_loss, 2e-3 * host_loss);
  EXPECT_LT(error(got, expected), 0.03);
}

/// The plugin only enqueues: what is recorded of a call computes anew on other inputs.
TEST_P(QuantizedModel, ItsCallsAreRecordedAsTheyAre) {
  const Ops& ops = *machine_.compute.ops;
  if (!on_gpu()) GTEST_SKIP() << ops.name << " records nothing; DS_TEST_DEVICE=cuda:0 runs this";
  const OpContext& context = machine_.compute.context;
  const Linear* weights[] = {&base_->layer(0).linear[kGate], &base_->layer(0).linear[kUp]};
  const int64_t n = weights[0]->view.n, k = weights[0]->view.k;
  for (const int64_t rows : {1, 8, 40}) {
    const std::vector<float> inputs[] = {random_floats(rows * k, 1), random_floats(rows * k, 2)};
    const Buffer x = Buffer::make(ops, static_cast<size_t>(rows * k) * 4).value();
    const Buffer y = Buffer::make(ops, static_cast<size_t>(rows * n) * 4).value();
    LinearScratch scratch;
    const auto call = [&] {
      LinearArgs args;
      args.rows = rows;
      args.x = x.as<float>(), args.x_stride = k;
      args.y[0] = y.as<float>();
      args.epilogue = Epilogue::kSwiglu;
      EXPECT_TRUE(run_linear(machine_.compute, *base_, weights, args, scratch).ok());
    };
    const auto result = [&](const std::vector<float>& input, const std::function<void()>& compute) {
      std::vector<float> out(static_cast<size_t>(rows * n));
      ops.upload(context, x.data(), input.data(), rows * k * 4);
      compute();
      ops.download(context, out.data(), y.data(), rows * n * 4);
      EXPECT_TRUE(finish(machine_.compute).ok());
      return out;
    };
    const std::vector<float> first = result(inputs[0], call), second = result(inputs[1], call);
    EXPECT_NE(first, second);
    ASSERT_TRUE(ops.begin_recording(context));
    call();
    void* recording = ops.end_recording(context);
    ASSERT_NE(recording, nullptr) << rows << " rows: something in the call may not be recorded";
    const auto replay = [&] { ops.replay(context, recording); };
    EXPECT_EQ(result(inputs[0], replay), first) << rows << " rows";
    EXPECT_EQ(result(inputs[1], replay), second) << rows << " rows";
    ops.release_recording(recording);
  }
}

/// The next generation of the same quantizer takes the codes over where they are, and the CPU's.
TEST_P(QuantizedModel, KeepsItsCodesWhenTheQuantizerIsLoadedAnew) {
  const auto next = std::make_shared<Quantizer>(test::module_of(DS_KIND_QUANTIZER, GetParam()), 2);
  const auto after = base_->with(next);
  ASSERT_NE(after, nullptr);
  EXPECT_EQ(after->layer(0).linear[kQ].quant.get(), base_->layer(0).linear[kQ].quant.get());
  EXPECT_EQ(after->host() != nullptr, on_gpu());
  const auto other = std::make_shared<Quantizer>(
      test::module_of(DS_KIND_QUANTIZER, std::string(GetParam()) == "int8" ? "int4" : "int8"), 1);
  EXPECT_EQ(base_->with(other), nullptr);
}

INSTANTIATE_TEST_SUITE_P(Modules, QuantizedModel, testing::Values("int8", "int4"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace ds
