// SPDX-License-Identifier: Apache-2.0
// Five random Llama variants against FP64 references: logits, loss, every gradient's norm and first
// values, greedy tokens, and the bits rule on the serving path.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "engine/train_graph.h"
#include "learn/objective.h"
#include "reference_model.h"
#include "tests/kernels/cases.h"

namespace ds {
namespace {

class TinyModel : public testing::TestWithParam<std::tuple<const char*, CpuIsa>> {
 protected:
  void SetUp() override {
    const auto [name, isa] = GetParam();
    machine = std::make_unique<test::Machine>(isa);
    folder = test::data_path(std::string("tiny/") + name);
    reference = test::read_json(folder + "/reference.json");
    for (const Json& id : reference["ids"]) ids.push_back(id.get<int>());
    model = test::load_model(folder, machine->compute, WeightFormat::kF32);
  }
  std::unique_ptr<test::Machine> machine;
  std::string folder;
  Json reference;
  std::vector<TokenId> ids;
  test::LoadedModel model;
};

TEST_P(TinyModel, ServesTheReferenceLogits) {
  const Result<std::string> bytes = posix_file_system().read(folder + "/reference.safetensors");
  ASSERT_TRUE(bytes.ok());
  const Result<SafeTensors> tensors =
      parse_safetensors(std::as_bytes(std::span(bytes->data(), bytes->size())));
  ASSERT_TRUE(tensors.ok()) << tensors.status().message();
  const auto& entry = tensors->tensors.begin()->second;
  ASSERT_EQ(entry.dtype, "F32");
  const std::vector<float> got =
      test::serve_logits(machine->compute, *model.base, nullptr, ids, 16, KvDtype::kF32);
  ASSERT_EQ(entry.data.size(), got.size() * sizeof(float));
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    float want;
    std::memcpy(&want, entry.data.data() + i * sizeof(float), sizeof(float));
    worst = std::max(worst, std::fabs(static_cast<double>(got[i]) - want));
  }
  EXPECT_LE(worst, 1e-4);
}

TEST_P(TinyModel, GreedyTokensMatch) {
  std::vector<TokenId> text(ids.begin(), ids.begin() + 20);
  const int64_t vocab = model.base->config().vocab;
  for (const Json& want : reference["greedy_12"]) {
    const std::vector<float> logits =
        test::serve_logits(machine->compute, *model.base, nullptr, text, 32, KvDtype::kF32);
    const float* last = logits.data() + (static_cast<int64_t>(text.size()) - 1) * vocab;
    const auto best = static_cast<TokenId>(std::max_element(last, last + vocab) - last);
    ASSERT_EQ(best, want.get<int>()) << "after " << text.size() << " tokens";
    text.push_back(best);
  }
}

TEST_P(TinyModel, LossAndEveryGradientMatch) {
  TrainGraph graph(model.base->config(), machine->compute);
  FullGradients gradients = FullGradients::make(machine->compute, model.base->config()).value();
  const Sequence sequence{ids, 1, nullptr};
  Terms terms;
  terms.cross_entropy.push_back({&sequence, 1.0f});
  const StepLoss loss =
      run_terms(graph, machine->compute, *model.base, nullptr, &gradients, terms, true);
  const double want_loss = reference["loss_mean_nats"].get<double>();
  EXPECT_NEAR(loss.total, want_loss, 1e-4 * want_loss);
  NamedTensors full = *gradients.read();
  ASSERT_EQ(full.size(), reference["grad_norms"].size());
  for (const auto& [name, norm] : reference["grad_norms"].items()) {
    ASSERT_TRUE(full.count(name)) << name;
    double sum = 0;
    for (const float g : full[name]) sum += static_cast<double>(g) * g;
    EXPECT_NEAR(std::sqrt(sum), norm.get<double>(), 1e-4 * norm.get<double>()) << name;
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(full[name][i], reference["grad_first4"][name][i].get<double>(),
                  1e-4 * norm.get<double>())
          << name << "[" << i << "]";
    }
  }
}

/// Direct preference optimisation (Rafailov et al. 2023, eq. 7) of one pair, as a learner states
/// it.
struct Dpo {
  double chosen_reference, rejected_reference, beta, weight;

  double margin(std::span<const double> logprob) const {
    return beta * ((logprob[0] - chosen_reference) - (logprob[1] - rejected_reference));
  }
  double loss(std::span<const double> logprob) const {
    return weight * std::log1p(std::exp(-margin(logprob)));
  }
  Status derivative(std::span<const double> logprob, std::span<double> out) const {
    out[0] = -weight * beta / (1 + std::exp(margin(logprob)));
    out[1] = -out[0];
    return {};
  }
};

// The adapters' gradient against central differences of the whole loss (CE + KL + a pair), a few
// entries of A and of B in every layer and target.
TEST_P(TinyModel, AdapterGradientMatchesFiniteDifferences) {
  const BaseWeights& base = *model.base;
  TrainGraph graph(base.config(), machine->compute);
  const auto made =
      Adapters::make(machine->compute, base.config(), 3, 2.0f, (1u << kTargets) - 1).value();
  Adapters& adapters = *made;
  adapters.initialise(7);
  Rng rng(11);
  std::vector<float> start = *adapters.parameters().read();
  for (float& p : start) p += 0.05f * static_cast<float>(rng.uniform() - 0.5);
  adapters.parameters().set(start);
  const auto prefix = graph.prefix(base, std::span(ids).subspan(0, 5)).value();
  const Sequence a{{ids.begin() + 5, ids.begin() + 20}, 4, &prefix};
  const Sequence b{{ids.begin() + 20, ids.begin() + 40}, 10, nullptr};
  const Sequence c{{ids.begin() + 40, ids.begin() + 52}, 6, &prefix};
  const Sequence* kl_of[] = {&b};
  const std::vector<StoredTopK> stored =
      store_top_k(graph, base, nullptr, kl_of, base.config().vocab);
  Terms terms;
  terms.cross_entropy.push_back({&a, 1.0f});
  terms.kl.push_back({&b, &stored[0], 20.0f});
  const Dpo pair{-60, -40, 0.1, 0.7};
  terms.summed.sequences = {&a, &c};
  terms.summed.derivative = [&](std::span<const double> logprob, std::span<double> out) {
    return pair.derivative(logprob, out);
  };
  const auto loss_at = [&] {
    DS_CHECK(adapters.pack(graph.formats(base)).ok());
    const StepLoss loss =
        run_terms(graph, machine->compute, base, &adapters, nullptr, terms, false);
    return loss.total + pair.loss(loss.logprob);
  };
  DS_CHECK(adapters.pack(graph.formats(base)).ok() && adapters.zero_gradient().ok());
  run_terms(graph, machine->compute, base, &adapters, nullptr, terms, true);
  const std::vector<float> gradient = *adapters.gradient().read();
  double norm = 0;
  for (const float g : gradient) norm += static_cast<double>(g) * g;
  norm = std::sqrt(norm);
  ASSERT_GT(norm, 0.0);
  // Along random directions: every entry takes part, and the differences stand above FP32 noise.
  for (int trial = 0; trial < 6; ++trial) {
    std::vector<float> direction(gradient.size());
    double along = 0;
    for (size_t i = 0; i < direction.size(); ++i) {
      direction[i] = static_cast<float>(rng.uniform() - 0.5);
      if (trial == 0) direction[i] = gradient[i] / static_cast<float>(norm);
      along += static_cast<double>(direction[i]) * gradient[i];
    }
    const float h = trial == 0 ? 2e-3f : 2e-4f;
    const std::vector<float> at = *adapters.parameters().read();
    const auto move = [&](float by) {
      std::vector<float> there = at;
      for (size_t i = 0; i < at.size(); ++i) there[i] += by * direction[i];
      adapters.parameters().set(there);
    };
    move(h);
    const double above = loss_at();
    move(-h);
    const double below = loss_at();
    move(0);
    EXPECT_NEAR((above - below) / (2.0 * h), along, 0.02 * std::fabs(along) + 2e-3 * norm)
        << "trial " << trial;
  }
}

TEST_P(TinyModel, SameBitsHoweverTheRowsAreSplit) {
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16}) {
    const test::LoadedModel m = test::load_model(folder, machine->compute, format);
    const KvDtype kv = format == WeightFormat::kF32 ? KvDtype::kF32 : KvDtype::kBF16;
    const std::vector<float> whole =
        test::serve_logits(machine->compute, *m.base, nullptr, ids, 65, kv);
    for (const int64_t chunk : {1, 2, 7, 32, 33}) {
      const std::vector<float> parts =
          test::serve_logits(machine->compute, *m.base, nullptr, ids, chunk, kv);
      EXPECT_EQ(0, std::memcmp(whole.data(), parts.data(), whole.size() * sizeof(float)))
          << "chunk " << chunk;
    }
  }
}

std::string case_name(const testing::TestParamInfo<std::tuple<const char*, CpuIsa>>& info) {
  std::string name =
      std::string(std::get<0>(info.param)) + "_" + cpu_ops(std::get<1>(info.param)).name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Variants, TinyModel,
                         testing::Combine(testing::Values("tied", "untied-gqa", "bias",
                                                          "headdim-llama3", "linear-rope"),
                                          testing::ValuesIn(test::supported_isas())),
                         case_name);

}  // namespace
}  // namespace ds
