// SPDX-License-Identifier: Apache-2.0
// The GGUF reader on well-formed files: formats, row order, names, settings.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "storage/dequantize.h"
#include "storage/gguf.h"
#include "storage/seams.h"
#include "tests/storage/gguf_builder.h"
#include "tests/storage/read_tensor.h"

namespace ds {
namespace {

using test::as_bytes;
using test::GgufBuilder;
using test::raw;
using test::read;
using test::small_model;
using testing::ElementsAre;
using testing::HasSubstr;

std::unique_ptr<ModelFile> open_bytes(const GgufBuilder& builder) {
  const std::string path = testing::TempDir() + "gguf_file_test.gguf";
  EXPECT_TRUE(write_file_atomically(posix_file_system(), path, builder.build().bytes).ok());
  Result<std::unique_ptr<ModelFile>> file = ModelFile::open(path);
  EXPECT_TRUE(file.ok()) << file.status().message();
  // The model is in memory: a mapping would raise SIGBUS from here on.
  std::filesystem::resize_file(path, 0);
  std::filesystem::remove(path);
  return file.ok() ? std::move(file).value() : nullptr;
}

TEST(Dequantize, HalfIsExactForAllBitPatterns) {
  EXPECT_EQ(f16_to_f32(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_f32(0xc000), -2.0f);
  EXPECT_EQ(f16_to_f32(0x7bff), 65504.0f);
  EXPECT_EQ(f16_to_f32(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_f32(0x03ff), 0x1.ff8p-15f);
  EXPECT_TRUE(std::signbit(f16_to_f32(0x8000)));
  EXPECT_EQ(f16_to_f32(0x7c00), INFINITY);
  EXPECT_TRUE(std::isnan(f16_to_f32(0x7e00)));
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {  // against the definition of binary16
    const int exponent = static_cast<int>(bits >> 10);
    const double mantissa = static_cast<double>(bits & 1023);
    const double value =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024.0 + mantissa, exponent - 25);
    ASSERT_EQ(f16_to_f32(static_cast<uint16_t>(bits)), static_cast<float>(value)) << bits;
  }
}

TEST(Dequantize, BlocksMatchTheirDefinition) {
  // Q8_0: d = 0.5, q = -16..15.
  std::string q8 = raw<uint16_t>(0x3800);
  for (int i = -16; i < 16; ++i) q8 += static_cast<char>(i);
  float out[32];
  dequantize(FileDtype::kQ8_0, as_bytes(q8).data(), 32, out);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out[i], 0.5f * static_cast<float>(i - 16));
  // Low nibbles are 0..15 = weights 0..15, high nibbles 15..0 = weights 16..31.
  std::string nibbles;
  for (int i = 0; i < 16; ++i) nibbles += static_cast<char>(i | (15 - i) << 4);
  dequantize(FileDtype::kQ4_0, as_bytes(raw<uint16_t>(0x4000) + nibbles).data(), 32, out);
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(out[i], 2.0f * static_cast<float>(i - 8));
    EXPECT_EQ(out[16 + i], 2.0f * static_cast<float>(7 - i));
  }
  dequantize(FileDtype::kQ4_1,
             as_bytes(raw<uint16_t>(0x4000) + raw<uint16_t>(0xc200) + nibbles).data(), 32,
             out);  // d = 2, m = -3
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(out[i], 2.0f * static_cast<float>(i) - 3.0f);
    EXPECT_EQ(out[16 + i], 2.0f * static_cast<float>(15 - i) - 3.0f);
  }
  float wide[2];
  dequantize(FileDtype::kBF16, as_bytes(raw<uint16_t>(0x3fc0) + raw<uint16_t>(0xc000)).data(), 2,
             wide);
  EXPECT_THAT(wide, ElementsAre(1.5f, -2.0f));
  dequantize(FileDtype::kF16, as_bytes(raw<uint16_t>(0x3e00) + raw<uint16_t>(0xc000)).data(), 2,
             wide);
  EXPECT_THAT(wide, ElementsAre(1.5f, -2.0f));
}

TEST(GgufFile, SmallModelComesOutInHfNames) {
  const auto file = open_bytes(small_model());
  ASSERT_NE(file, nullptr);
  const ModelConfig& c = file->config();
  EXPECT_EQ(file->name(), "small");
  EXPECT_EQ(c.n_layers, 1);
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.vocab, test::kSmallVocab);
  EXPECT_TRUE(c.tied_head);
  EXPECT_FLOAT_EQ(c.norm_eps, 1e-5f);
  EXPECT_EQ(file->sha256().size(), 64u);
  EXPECT_EQ(file->tensors().size(), 11u);
  const TensorInfo& down = file->tensors().at("model.layers.0.mlp.down_proj.weight");
  EXPECT_THAT(down.shape, ElementsAre(32, 64));
  EXPECT_EQ(down.dtype, FileDtype::kQ4_1);
  EXPECT_EQ(down.bytes, 32u * 64 / 32 * 20);
  EXPECT_THAT(file->tokenizer().special, ElementsAre(0, 1, 2));
  EXPECT_THAT(file->tokenizer().user_defined, ElementsAre(3));
  EXPECT_THAT(file->tokenizer().merges, ElementsAre("h e"));
  EXPECT_EQ(file->tokenizer().pre_tokenizer, "smollm");
  EXPECT_EQ(file->tokenizer().eos, 2);
  EXPECT_EQ(file->tokenizer().pad, -1);
  EXPECT_EQ(read(*file, "model.norm.weight")[31], 32.0f);
  std::vector<float> wrong(5);
  EXPECT_THAT(file->read_f32("model.norm.weight", wrong).message(),
              HasSubstr("5 values, expected 32"));
  EXPECT_EQ(file->read_f32("absent", wrong).code(), Code::kNotFound);
}

TEST(GgufFile, QAndKRowsReturnToHfOrder) {
  // llama.cpp permutes [heads, 2, half] to [heads, half, 2]: written out here the other way round.
  GgufBuilder b = small_model();
  std::string q, k;
  const auto hf = [](int head, int part, int i, int column) {
    return static_cast<float>(((head * 2 + part) * 8 + i) * 100 + column);
  };
  for (int head = 0; head < 2; ++head) {
    for (int i = 0; i < 8; ++i) {
      for (int part = 0; part < 2; ++part) {
        for (int column = 0; column < 32; ++column) {
          q += raw(hf(head, part, i, column));
          if (head == 0) k += raw(hf(head, part, i, column));
        }
      }
    }
  }
  b.tensor("blk.0.attn_q.weight") = {"blk.0.attn_q.weight", {32, 32}, 0, q, -1};
  b.tensor("blk.0.attn_k.weight") = {"blk.0.attn_k.weight", {32, 16}, 0, k, -1};
  const auto file = open_bytes(b);
  ASSERT_NE(file, nullptr);
  const auto q_read = read(*file, "model.layers.0.self_attn.q_proj.weight");
  const auto k_read = read(*file, "model.layers.0.self_attn.k_proj.weight");
  for (int row = 0; row < 32; ++row) {
    for (int column = 0; column < 32; ++column) {
      const size_t at = static_cast<size_t>(row * 32 + column);
      ASSERT_EQ(q_read[at], static_cast<float>(row * 100 + column));
      if (row >= 16) continue;
      ASSERT_EQ(k_read[at], static_cast<float>(row * 100 + column));
    }
  }
  const TensorInfo& info = file->tensors().at("model.layers.0.self_attn.q_proj.weight");
  EXPECT_EQ(file->file_row(info, 1), 2);
  EXPECT_EQ(file->file_row(info, 8), 1);
  EXPECT_EQ(file->file_row(info, 16), 16);
}

TEST(GgufFile, BiasesAndUntiedHeadAreRecognised) {
  GgufBuilder b = small_model();
  const auto vector = [](int n) {
    std::string data;
    for (int i = 0; i < n; ++i) data += raw(static_cast<float>(i));
    return data;
  };
  for (const auto& [name, n] :
       {std::pair{"attn_q", 32}, {"attn_k", 16}, {"attn_v", 16}, {"attn_output", 32}}) {
    const std::string full = std::string("blk.0.") + name + ".bias";
    b.tensors.push_back({full, {static_cast<uint64_t>(n)}, 0, vector(n), -1});
  }
  b.tensors.push_back(
      {"output.weight", {32, test::kSmallVocab}, 0, vector(32 * test::kSmallVocab), -1});
  const auto file = open_bytes(b);
  ASSERT_NE(file, nullptr);
  EXPECT_TRUE(file->config().attention_bias);
  EXPECT_FALSE(file->config().mlp_bias);
  EXPECT_FALSE(file->config().tied_head);
  const auto bias = read(*file, "model.layers.0.self_attn.q_proj.bias");
  EXPECT_EQ(bias[1], 2.0f);  // permuted like the rows of its matrix
  EXPECT_EQ(bias[8], 1.0f);
}

TEST(GgufFile, RopeScaling) {
  GgufBuilder linear = small_model();
  linear.text("llama.rope.scaling.type", "linear");
  linear.f32("llama.rope.scaling.factor", 4.0f);
  ModelConfig c = read_gguf_model(as_bytes(linear.build().bytes)).value().config;
  EXPECT_EQ(c.rope_scaling, RopeScaling::kLinear);
  EXPECT_EQ(c.rope_factor, 4.0);

  // Llama 3.2's factors as convert_hf_to_gguf.py computes them: factor 32, low 1, high 4, 8192.
  GgufBuilder llama3 = small_model();
  llama3.f32("llama.rope.freq_base", 500000.0f);
  std::string factors;
  for (int i = 0; i < 8; ++i) {
    const double wavelength = 2 * M_PI * std::pow(500000.0, 2.0 * i / 16.0);
    double factor = 1.0;
    if (wavelength > 8192.0) {
      factor = 32.0;
    } else if (wavelength >= 8192.0 / 4) {
      const double smooth = (8192.0 / wavelength - 1.0) / 3.0;
      factor = 1.0 / ((1.0 - smooth) / 32.0 + smooth);
    }
    factors += raw(static_cast<float>(factor));
  }
  llama3.tensors.push_back({"rope_freqs.weight", {8}, 0, factors, -1});
  c = read_gguf_model(as_bytes(llama3.build().bytes)).value().config;
  EXPECT_EQ(c.rope_scaling, RopeScaling::kLlama3);
  EXPECT_EQ(c.rope_factor, 32.0);
  const std::string seven = raw(7.0f);
  llama3.tensor("rope_freqs.weight").data.replace(4, 4, seven);
  EXPECT_THAT(read_gguf_model(as_bytes(llama3.build().bytes)).status().message(),
              HasSubstr("rope_freqs.weight"));
}

TEST(GgufFile, ReadsAFileOfAnotherWriter) {
  const auto file = ModelFile::open(DS_TEST_DATA "/../fuzz/corpus/gguf/gguf-py.gguf");
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ((*file)->name(), "py");
  EXPECT_FALSE((*file)->config().tied_head);
  EXPECT_EQ((*file)->tensors().at("lm_head.weight").dtype, FileDtype::kBF16);
  // First value of numpy's default_rng(1).standard_normal, rounded to FP16.
  EXPECT_FLOAT_EQ(read(**file, "model.embed_tokens.weight")[0], 0.345703125f);
}

TEST(GgufFile, AlignmentOfTheFileIsUsed) {
  GgufBuilder b = small_model();
  b.alignment = 128;
  b.u32("general.alignment", 128);
  EXPECT_TRUE(read_gguf_model(as_bytes(b.build().bytes)).ok());
  b.version = 2;
  EXPECT_TRUE(read_gguf_model(as_bytes(b.build().bytes)).ok());
}

}  // namespace
}  // namespace ds
