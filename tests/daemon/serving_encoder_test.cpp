// SPDX-License-Identifier: Apache-2.0
// The encoder of text in the passes: the built-in one gives the bits of Ops, another one's rows
// reach the logits, training follows what it can differentiate, and one that cannot serve says why.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/text_encoder.h"
#include "engine/train_graph.h"
#include "learn/objective.h"
#include "reference_model.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

using testing::HasSubstr;

class ServingEncoder : public testing::Test {
 protected:
  ServingEncoder() {
    model_ =
        test::load_model(test::data_path("tiny/untied-gqa"), machine_.compute, WeightFormat::kF32);
    auto opened = Plugins::open(
        {std::string(DS_BIN_DIR) + "/../modules", folder_ / "plugins", Json::object()}, {},
        posix_file_system(), system_clock_seam());
    DS_CHECK(opened.ok());
    plugins_ = std::move(*opened);
    const Json config = {{"width", model_.base->config().d_model}};
    const auto loaded = plugins_->load(DS_ENCODER_PROBE, true, config);
    if (!loaded.ok()) ADD_FAILURE() << loaded.status().message();
  }
  Result<std::shared_ptr<const TextEncoder>> probe(const std::string& name) {
    const auto found = plugins_->find(DS_KIND_ENCODER, name);
    if (!found.ok()) return found.status();
    return TextEncoder::make(found->instance, found->generation);
  }
  void use(const std::string& name) {
    const auto encoder = probe(name);
    ASSERT_TRUE(encoder.ok()) << encoder.status().message();
    machine_.components.update([&](Components& c) { c.encoder = *encoder; });
  }
  std::vector<float> logits(int64_t chunk) {
    return test::serve_logits(machine_.compute, *model_.base, nullptr, ids_, chunk, KvDtype::kF32);
  }
  /// Gradients of the mean loss of `ids_`.
  NamedTensors gradients() {
    TrainGraph graph(model_.base->config(), machine_.compute);
    FullGradients full = FullGradients::make(machine_.compute, model_.base->config()).value();
    const Sequence sequence{ids_, 1, nullptr};
    Terms terms;
    terms.cross_entropy.push_back({&sequence, 1.0f});
    run_terms(graph, machine_.compute, *model_.base, nullptr, &full, terms, true);
    EXPECT_TRUE(graph.take_status().ok());
    return *full.read();
  }

  test::Machine machine_;
  ScratchFolder folder_;
  std::unique_ptr<Plugins> plugins_;
  test::LoadedModel model_;
  const std::vector<TokenId> ids_ = {5, 9, 9, 31, 2, 17, 40, 5, 3, 3, 28, 11};
};

TEST_F(ServingEncoder, TheBuiltInOneGivesTheBitsOfOps) {
  const int64_t width = model_.base->config().d_model, vocab = model_.base->config().vocab;
  const auto rows = std::ssize(ids_);
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16}) {
    const auto base =
        test::load_model(test::data_path("tiny/untied-gqa"), machine_.compute, format).base;
    std::vector<float> got(static_cast<size_t>(rows * width)), want(got.size());
    const std::shared_ptr<const Components> with = machine_.components.current();
    TextEncoding encoding;
    ASSERT_TRUE(encoding
                    .forward(*with->encoder, *machine_.compute.ops, machine_.compute.context, *base,
                             ids_, got.data(), true)
                    .ok());
    machine_.compute.ops->embed(machine_.compute.context, base->embedding().view, rows, ids_.data(),
                                want.data());
    EXPECT_EQ(got, want);
    std::vector<float> dgot(static_cast<size_t>(vocab * width), 0.5f), dwant(dgot);
    ASSERT_TRUE(encoding.backward(*with->encoder, want.data(), dgot.data()).ok());
    machine_.compute.ops->embed_backward(machine_.compute.context, rows, width, ids_.data(),
                                         want.data(), dwant.data());
    EXPECT_EQ(dgot, dwant);
  }
}

TEST_F(ServingEncoder, AnotherOnesRowsReachTheLogitsWhateverTheChunks) {
  const std::vector<float> text = logits(4);
  use("own-rows");
  const std::vector<float> whole = logits(64);
  EXPECT_NE(whole, text);
  EXPECT_EQ(whole, logits(5));
  EXPECT_EQ(whole, logits(1));
}

TEST_F(ServingEncoder, WithoutBackwardTheEmbeddingIsFrozen) {
  const NamedTensors text = gradients();
  use("own-rows");
  const NamedTensors own = gradients();
  const auto norm = [](const std::vector<float>& g) {
    double sum = 0;
    for (const float v : g) sum += double{v} * v;
    return sum;
  };
  EXPECT_GT(norm(text.at("model.embed_tokens.weight")), 0);
  EXPECT_EQ(norm(own.at("model.embed_tokens.weight")), 0);
  EXPECT_GT(norm(own.at("lm_head.weight")), 0);
}

TEST_F(ServingEncoder, KeysOfPagesTellEncodersApart) {
  const uint64_t text = machine_.components.current()->key();
  use("own-rows");
  EXPECT_NE(machine_.components.current()->key(), text);
  machine_.components.update([&](Components& c) { c.encoder = test::text_encoder_module(); });
  EXPECT_EQ(machine_.components.current()->key(), text);
}

TEST_F(ServingEncoder, OneThatCannotServeSaysWhy) {
  EXPECT_THAT(probe("deaf").status().message(), HasSubstr("encoder deaf: does not read text"));
  EXPECT_THAT(probe("other-tensor").status().message(),
              HasSubstr("reads the tensor \"\"; the daemon gives an encoder of text "
                        "model.embed_tokens.weight"));
  const int64_t width = model_.base->config().d_model;
  std::vector<float> out(ids_.size() * static_cast<size_t>(width + 1));
  const auto forward = [&](const std::string& name) {
    const auto encoder = probe(name);
    EXPECT_TRUE(encoder.ok()) << encoder.status().message();
    return TextEncoding().forward(**encoder, *machine_.compute.ops, machine_.compute.context,
                                  *model_.base, ids_, out.data());
  };
  EXPECT_THAT(forward("too-wide").message(),
              HasSubstr("plans rows [12, " + std::to_string(width + 1) +
                        "] of 12 tokens, expected [12, " + std::to_string(width) + "]"));
  EXPECT_THAT(forward("fails").message(), HasSubstr("generation 1 of encoder: fails: not today"));
}

}  // namespace
}  // namespace ds
