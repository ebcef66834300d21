// SPDX-License-Identifier: Apache-2.0
// The real model file against figures computed once with gguf-py 0.19 (gguf.dequantize, Q/K
// un-permuted with numpy).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "storage/model_file.h"

namespace ds {
namespace {

constexpr const char* kSha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

std::string model_path() {
  if (const char* path = std::getenv("DS_MODEL")) return path;
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::string base = cache ? cache : std::string(home ? home : "") + "/.cache";
  return base + "/driftstone/" + kSha256 + "/SmolLM2-135M-Instruct.Q4_1.gguf";
}

TEST(SmolLm2File, ConfigAndTensorsMatchTheOracle) {
  const auto opened = ModelFile::open(model_path());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const ModelFile& file = **opened;
  EXPECT_EQ(file.sha256(), kSha256);
  const ModelConfig& c = file.config();
  EXPECT_EQ(c.n_layers, 30);
  EXPECT_EQ(c.d_model, 576);
  EXPECT_EQ(c.d_ff, 1536);
  EXPECT_EQ(c.n_heads, 9);
  EXPECT_EQ(c.n_kv_heads, 3);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.vocab, 49152);
  EXPECT_EQ(c.context, 8192);
  EXPECT_EQ(c.rope_theta, 100000.0);
  EXPECT_TRUE(c.tied_head);
  EXPECT_EQ(file.tokenizer().pre_tokenizer, "smollm");
  EXPECT_EQ(file.tokenizer().special.size(), 17u);
  EXPECT_EQ(file.tensors().size(), 272u);

  struct Expected {
    const char* name;
    size_t elements;
    float first, at_1234, last;  ///< element 1234 modulo the tensor's size
    double weighted;             ///< sum of element i * (i mod 97)
  };
  const Expected cases[] = {
      {"model.embed_tokens.weight", 49152 * 576, -0.10654449462890625f, 0.18457984924316406f,
       -0.0417022705078125f, -740630.3343496323},
      {"model.layers.0.self_attn.q_proj.weight", 576 * 576, -0.0963134765625f, 0.123046875f,
       -0.255859375f, -3906.5491638183594},
      {"model.layers.3.self_attn.k_proj.weight", 192 * 576, 0.1629638671875f, -0.31011962890625f,
       -0.5703125f, -7556.250686645508},
      {"model.layers.29.mlp.down_proj.weight", 576 * 1536, -0.2733154296875f, 0.0234375f,
       0.056640625f, 3770.8242797851562},
      {"model.norm.weight", 576, 1.7578125f, 2.1875f, 1.984375f, 49451.53125}};
  for (const Expected& want : cases) {
    SCOPED_TRACE(want.name);
    std::vector<float> values(want.elements);
    const Status status = file.read_f32(want.name, values);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(values.front(), want.first);
    EXPECT_EQ(values[1234 % values.size()], want.at_1234);
    EXPECT_EQ(values.back(), want.last);
    double weighted = 0;
    for (size_t i = 0; i < values.size(); ++i) weighted += values[i] * static_cast<double>(i % 97);
    EXPECT_NEAR(weighted, want.weighted, 1e-5 * std::abs(want.weighted));
  }
}

}  // namespace
}  // namespace ds
