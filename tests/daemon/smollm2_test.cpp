// SPDX-License-Identifier: Apache-2.0
// The real model against PyTorch's references: log-probabilities, greedy chat answers, gradients,
// and loss trajectories of full and LoRA fine-tuning.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "engine/full_weights.h"
#include "learn/objective.h"
#include "reference_model.h"

namespace ds {
namespace {

std::vector<TokenId> ids_of(const Json& list) {
  std::vector<TokenId> out;
  for (const Json& id : list) out.push_back(id.get<int>());
  return out;
}

double log_sum_exp(const float* x, int64_t n) {
  const float top = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(x[i] - top));
  return top + std::log(sum);
}

class SmolLm2 : public testing::Test {
 protected:
  void SetUp() override {
    path = test::smollm2_path();
    ASSERT_FALSE(path.empty()) << "the model file is missing: run examples/setup.sh";
  }
  void check_teacher_forced(WeightFormat format, KvDtype kv, double mean_max, double argmax_min) {
    const test::LoadedModel model = test::load_model(path, machine.compute, format);
    const int64_t vocab = model.base->config().vocab;
    double sum = 0;
    int64_t n = 0, same = 0, rows = 0;
    for (const Json& text : reference["teacher_forced"]) {
      const std::vector<TokenId> ids = ids_of(text["ids"]);
      const std::vector<float> logits =
          test::serve_logits(machine.compute, *model.base, nullptr, ids, 64, kv);
      for (size_t i = 0; i < ids.size(); ++i) {
        const float* row = logits.data() + static_cast<int64_t>(i) * vocab;
        same += std::max_element(row, row + vocab) - row == text["argmax"][i].get<int64_t>();
        ++rows;
        if (i + 1 == ids.size()) continue;
        sum += std::fabs(row[ids[i + 1]] - log_sum_exp(row, vocab) -
                         text["logprob_next"][i].get<double>());
        ++n;
      }
    }
    const double mean = sum / static_cast<double>(n),
                 agree = static_cast<double>(same) / static_cast<double>(rows);
    std::printf("mean |dlogprob| %.5f over %lld tokens, argmax agreement %.4f\n", mean,
                static_cast<long long>(n), agree);
    EXPECT_LE(mean, mean_max);
    EXPECT_GE(agree, argmax_min);
  }
  void check_greedy(WeightFormat format, KvDtype kv, double margin) {
    const test::LoadedModel model = test::load_model(path, machine.compute, format);
    const int64_t vocab = model.base->config().vocab;
    for (const Json& chat : reference["greedy_chat"]) {
      const std::vector<TokenId> want = ids_of(chat["ids"]);
      std::vector<TokenId> ids = ids_of(chat["prompt_ids"]);
      const size_t prompt = ids.size();
      ids.insert(ids.end(), want.begin(), want.end());
      const std::vector<float> logits =
          test::serve_logits(machine.compute, *model.base, nullptr, ids, 64, kv);
      for (size_t i = 0; i < want.size(); ++i) {
        if (chat["top1_margin"][i].get<double>() < margin) break;
        const float* row = logits.data() + static_cast<int64_t>(prompt + i - 1) * vocab;
        ASSERT_EQ(std::max_element(row, row + vocab) - row, want[i])
            << chat["question"].get<std::string>() << " step " << i;
      }
    }
  }

  std::string path;
  test::Machine machine;
  Json reference = test::read_json(test::data_path("smollm2/reference.json"));
  Json training = test::read_json(test::data_path("smollm2/train-reference.json"));
};

TEST_F(SmolLm2, TeacherForcedFp32) {
  check_teacher_forced(WeightFormat::kF32, KvDtype::kF32, 0.002, 0.995);
}
TEST_F(SmolLm2, TeacherForcedDefault) {
  check_teacher_forced(WeightFormat::kBF16, KvDtype::kBF16, 0.03, 0.98);
}
TEST_F(SmolLm2, TeacherForcedFp16) {
  const KvDtype kv = kv_dtype(*machine.compute.ops, WeightFormat::kF16);
  check_teacher_forced(WeightFormat::kF16, kv, 0.005, 0.99);
}
TEST_F(SmolLm2, GreedyChatFp32) { check_greedy(WeightFormat::kF32, KvDtype::kF32, 0.05); }
TEST_F(SmolLm2, GreedyChatDefault) { check_greedy(WeightFormat::kBF16, KvDtype::kBF16, 0.25); }

// One batch of four chat pairs: the mean over all answer tokens of the batch.
struct Batch {
  std::vector<Sequence> sequences;
  Terms terms;
};
Batch reference_batch(const Json& training) {
  Batch out;
  double total = 0;
  for (const Json& pair : training["batch"]) {
    Sequence s;
    s.ids = ids_of(pair["prompt_ids"]);
    s.first_target = static_cast<int64_t>(s.ids.size());
    const std::vector<TokenId> answer = ids_of(pair["answer_ids"]);
    s.ids.insert(s.ids.end(), answer.begin(), answer.end());
    total += static_cast<double>(s.targets());
    out.sequences.push_back(std::move(s));
  }
  for (const Sequence& s : out.sequences) {
    out.terms.cross_entropy.push_back(
        {&s, static_cast<float>(static_cast<double>(s.targets()) / total)});
  }
  return out;
}

TEST_F(SmolLm2, GradientsMatchAutograd) {
  const test::LoadedModel model = test::load_model(path, machine.compute, WeightFormat::kF32);
  TrainGraph graph(model.base->config(), machine.compute);
  const Batch batch = reference_batch(training);
  FullGradients full = FullGradients::make(machine.compute, model.base->config()).value();
  const StepLoss loss =
      run_terms(graph, machine.compute, *model.base, nullptr, &full, batch.terms, true);
  EXPECT_NEAR(loss.total, training["loss0"].get<double>(), 1e-3 * training["loss0"].get<double>());
  double total = 0;
  const NamedTensors gradients = *full.read();
  for (const auto& [name, g] : gradients) {
    double sum = 0;
    for (const float x : g) sum += static_cast<double>(x) * x;
    total += sum;
    if (!training["grad"].contains(name)) continue;
    const double want = training["grad"][name]["norm"].get<double>();
    EXPECT_NEAR(std::sqrt(sum), want, 1e-3 * want) << name;
    for (size_t i = 0; i < 8; ++i) {
      EXPECT_NEAR(g[i], training["grad"][name]["first8"][i].get<double>(), 2e-3 * want)
          << name << "[" << i << "]";
    }
  }
  EXPECT_NEAR(std::sqrt(total), training["grad_total_norm"].get<double>(),
              1e-3 * training["grad_total_norm"].get<double>());
}

TEST_F(SmolLm2, LoraTrajectoryMatches) {
  const test::LoadedModel model = test::load_model(path, machine.compute, WeightFormat::kF32);
  const ModelConfig& c = model.base->config();
  TrainGraph graph(c, machine.compute);
  const Batch batch = reference_batch(training);
  const auto made = Adapters::make(machine.compute, c, 8, 2.0f, (1u << kTargets) - 1).value();
  Adapters& adapters = *made;
  auto factors = *adapters.factors();
  for (size_t layer = 0; layer < factors.size(); ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      std::vector<float>& a = factors[layer][t].a;
      const size_t k = a.size() / 8;
      for (size_t i = 0; i < a.size(); ++i) {
        a[i] = static_cast<float>(0.02 * std::sin(1.0 + 0.7 * static_cast<double>(i / k) +
                                                  0.013 * static_cast<double>(i % k) +
                                                  static_cast<double>(layer)));
      }
    }
  }
  ASSERT_TRUE(adapters.set_factors(factors).ok());
  AdamW optimizer = AdamW::make(machine.compute, adapters.size()).value();
  const Json& losses = training["lora"]["losses"];
  for (size_t step = 0; step < losses.size(); ++step) {
    DS_CHECK(adapters.pack(graph.formats(*model.base)).ok() && adapters.zero_gradient().ok());
    const StepLoss loss =
        run_terms(graph, machine.compute, *model.base, &adapters, nullptr, batch.terms, true);
    const double want = losses[step].get<double>();
    EXPECT_NEAR(loss.total, want, 0.01 * want) << "step " << step;
    const auto norm =
        optimizer.step(adapters.parameters().all(), adapters.gradient().all(), 1e-3f, 0.999f, 1.0f);
    ASSERT_TRUE(norm.ok()) << norm.status().message();
  }
}

TEST_F(SmolLm2, FullFineTuningTrajectoryMatches) {
  const test::LoadedModel model = test::load_model(path, machine.compute, WeightFormat::kF32);
  const ModelConfig& c = model.base->config();
  const NamedTensors tensors = model.file->read_all_f32().value();
  const Batch batch = reference_batch(training);
  auto full = FullWeights::make(machine.compute, c, tensors);
  ASSERT_TRUE(full.ok());
  TrainGraph graph(c, machine.compute);
  AdamW optimizer = AdamW::make(machine.compute, (*full)->size()).value();
  const Json& losses = training["full"]["losses"];
  for (size_t step = 0; step < losses.size(); ++step) {
    DS_CHECK((*full)->pack(WeightFormat::kF32).ok() && (*full)->zero_gradient().ok());
    const StepLoss loss = run_terms(graph, machine.compute, *(*full)->packed(), nullptr,
                                    &(*full)->gradient(), batch.terms, true);
    const double want = losses[step].get<double>();
    EXPECT_NEAR(loss.total, want, 0.01 * want) << "step " << step;
    const auto norm =
        optimizer.step((*full)->masters(), (*full)->gradient().all(), 5e-5f, 0.999f, 1.0f);
    ASSERT_TRUE(norm.ok()) << norm.status().message();
  }
}

TEST_F(SmolLm2, SameBitsAloneInABatchAndInChunks) {
  const test::LoadedModel model = test::load_model(path, machine.compute, WeightFormat::kBF16);
  const std::vector<TokenId> ids = ids_of(reference["teacher_forced"][0]["ids"]);
  const std::vector<TokenId> prompt(ids.begin(), ids.begin() + 70);
  const std::vector<float> whole =
      test::serve_logits(machine.compute, *model.base, nullptr, prompt, 70, KvDtype::kBF16);
  for (const int64_t chunk : {1, 5, 64}) {
    const std::vector<float> parts =
        test::serve_logits(machine.compute, *model.base, nullptr, prompt, chunk, KvDtype::kBF16);
    EXPECT_EQ(0, std::memcmp(whole.data(), parts.data(), whole.size() * sizeof(float)))
        << "chunk " << chunk;
  }
}

}  // namespace
}  // namespace ds
