// SPDX-License-Identifier: Apache-2.0
// The Hugging Face folder reader on the five tiny models, and what it refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "storage/gguf.h"
#include "storage/hf_folder.h"
#include "storage/safetensors.h"
#include "tests/storage/gguf_builder.h"
#include "tests/storage/read_tensor.h"

namespace ds {
namespace {

using test::read;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const std::string kTiny = DS_TEST_DATA "/tiny/";

Json load_json(const std::string& path) {
  return parse_json(posix_file_system().read(path).value()).value();
}

TEST(HfFolder, ReadsEveryVariant) {
  for (const char* name : {"tied", "untied-gqa", "bias", "headdim-llama3", "linear-rope"}) {
    SCOPED_TRACE(name);
    const auto file = ModelFile::open(kTiny + name);
    ASSERT_TRUE(file.ok()) << file.status().message();
    const ModelConfig& c = (*file)->config();
    EXPECT_EQ((*file)->name(), name);
    EXPECT_EQ(c.n_layers, 2);
    EXPECT_EQ(c.d_model, 64);
    EXPECT_EQ(c.d_ff, 160);
    EXPECT_EQ(c.vocab, 640);
    EXPECT_EQ(c.context, 512);
    EXPECT_EQ(c.attention_bias, std::string(name) == "bias");
    const std::string weights =
        posix_file_system().read(kTiny + name + "/model.safetensors").value();
    EXPECT_EQ((*file)->sha256(), to_hex(sha256(weights)));
    EXPECT_EQ((*file)->tokenizer().pre_tokenizer, "gpt-2");
    EXPECT_EQ((*file)->tokenizer().tokens.size(), 640u);
    EXPECT_THAT((*file)->tokenizer().special, ElementsAre(0, 1, 2));
    EXPECT_EQ((*file)->tokenizer().eos, 2);
    // Values against the bytes of the file, widened by hand.
    const SafeTensors raw = parse_safetensors(test::as_bytes(weights)).value();
    for (const auto& [tensor_name, tensor] : raw.tensors) {
      const std::vector<float> values = read(**file, tensor_name);
      ASSERT_EQ(values.size() * 2, tensor.data.size());
      for (size_t i = 0; i < values.size(); ++i) {
        uint16_t bits;
        std::memcpy(&bits, tensor.data.data() + 2 * i, 2);
        ASSERT_EQ(std::bit_cast<uint32_t>(values[i]), static_cast<uint32_t>(bits) << 16);
      }
      EXPECT_EQ(reinterpret_cast<uintptr_t>((*file)->tensors().at(tensor_name).data) % 2, 0u);
    }
  }
}

TEST(HfFolder, Settings) {
  const auto config = [](const char* name) {
    return parse_hf_config(load_json(kTiny + name + "/config.json")).value();
  };
  EXPECT_EQ(config("tied").n_kv_heads, 2);
  EXPECT_TRUE(config("tied").tied_head);
  EXPECT_FALSE(config("untied-gqa").tied_head);
  EXPECT_EQ(config("untied-gqa").n_kv_heads, 1);
  const ModelConfig llama3 = config("headdim-llama3");
  EXPECT_EQ(llama3.head_dim, 32);
  EXPECT_EQ(llama3.rope_scaling, RopeScaling::kLlama3);
  EXPECT_EQ(llama3.rope_theta, 500000.0);
  EXPECT_EQ(llama3.rope_factor, 8.0);
  EXPECT_EQ(llama3.rope_original_context, 64);
  EXPECT_EQ(config("linear-rope").rope_scaling, RopeScaling::kLinear);

  // The older spelling of the same settings.
  Json older = load_json(kTiny + "headdim-llama3/config.json");
  Json rope = older["rope_parameters"];
  older.erase("rope_parameters");
  older["rope_theta"] = rope["rope_theta"];
  rope.erase("rope_theta");
  older["rope_scaling"] = rope;
  const ModelConfig same = parse_hf_config(older).value();
  EXPECT_EQ(same.rope_theta, llama3.rope_theta);
  EXPECT_EQ(same.rope_scaling, llama3.rope_scaling);
  EXPECT_EQ(same.rope_factor, llama3.rope_factor);
  EXPECT_EQ(same.rope_original_context, llama3.rope_original_context);
  older["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  EXPECT_EQ(parse_hf_config(older).value().rope_factor, 2.0);
  older["rope_scaling"] = nullptr;
  EXPECT_EQ(parse_hf_config(older).value().rope_scaling, RopeScaling::kNone);
}

TEST(HfFolder, RefusesUnknownSettingsByName) {
  const auto error = [](const char* key, const Json& value) {
    Json config = load_json(kTiny + "tied/config.json");
    config[key] = value;
    return parse_hf_config(config).status().message();
  };
  EXPECT_THAT(error("model_type", "mistral"), HasSubstr("\"mistral\""));
  EXPECT_THAT(error("hidden_act", "gelu"), HasSubstr("\"gelu\""));
  EXPECT_THAT(error("hidden_size", "64"), HasSubstr("\"hidden_size\" is string"));
  EXPECT_THAT(error("num_hidden_layers", 1e18), HasSubstr("expected an integer"));
  EXPECT_THAT(error("num_hidden_layers", -1), HasSubstr("number of layers is -1"));
  EXPECT_THAT(error("num_key_value_heads", 3), HasSubstr("multiple of the 3"));
  EXPECT_THAT(error("head_dim", 15), HasSubstr("even"));
  EXPECT_THAT(error("rope_parameters", {{"rope_type", "yarn"}, {"factor", 2.0}}),
              HasSubstr("yarn"));
  EXPECT_THAT(error("rope_parameters", 5), HasSubstr("are number, expected an object"));
  EXPECT_THAT(error("quantization_config", Json::object()),
              HasSubstr("quantization_config is given, expected"));
}

TEST(HfTokenizer, ReadsBothSpellingsAndRefusesTheRest) {
  const Json tokenizer = load_json(kTiny + "tied/tokenizer.json");
  const Json config = load_json(kTiny + "tied/config.json");
  const auto parse = [&](const Json& t, const Json& tc = Json()) {
    return parse_hf_tokenizer(t, tc, config, 640);
  };
  const auto error = [&](const char* path, const Json& value) {
    Json changed = tokenizer;
    changed[Json::json_pointer(path)] = value;
    return parse(changed).status().message();
  };
  const TokenizerData data = parse(tokenizer).value();
  Json text_merges = tokenizer;
  for (Json& merge : text_merges["model"]["merges"]) {
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  EXPECT_EQ(parse(text_merges).value().merges, data.merges);
  const Json byte_level = tokenizer["pre_tokenizer"];
  Json smol = tokenizer;
  smol["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers", {{{"type", "Digits"}, {"individual_digits", true}}, byte_level}}};
  EXPECT_EQ(parse(smol).value().pre_tokenizer, "smollm");

  EXPECT_THAT(error("/pre_tokenizer/add_prefix_space", true), HasSubstr("ByteLevel"));
  EXPECT_THAT(error("/pre_tokenizer/type", "Metaspace"),
              AllOf(HasSubstr("\"Metaspace\""), HasSubstr("expected Sequence[Digits")));
  EXPECT_THAT(error("/pre_tokenizer",
                    {{"type", "Sequence"}, {"pretokenizers", {{{"type", "Split"}}, byte_level}}}),
              HasSubstr("Sequence[Split, ByteLevel]"));
  EXPECT_THAT(error("/model/type", "WordPiece"), HasSubstr("WordPiece"));
  EXPECT_THAT(error("/model/byte_fallback", true), HasSubstr("byte_fallback"));
  EXPECT_THAT(error("/model/ignore_merges", true), HasSubstr("ignore_merges"));
  EXPECT_THAT(error("/normalizer", {{"type", "NFC"}}), HasSubstr("NFC"));
  EXPECT_THAT(error("/model/merges/0", 7), HasSubstr("merge 7"));
  EXPECT_THAT(error("/model/vocab/x", 640), HasSubstr("id 640, expected 0 to 639"));
  EXPECT_THAT(error("/model/vocab/zz", 5), HasSubstr("same id 5"));
  EXPECT_THAT(error("/added_tokens/0/lstrip", true), HasSubstr("lstrip"));

  const TokenizerData named =
      parse(tokenizer, {{"eos_token", {{"content", "<|endoftext|>"}}},
                        {"chat_template", {{{"name", "default"}, {"template", "T"}}}}})
          .value();
  EXPECT_EQ(named.eos, 0);
  EXPECT_EQ(named.chat_template, "T");
  EXPECT_THAT(parse(tokenizer, {{"eos_token", "</s>"}}).status().message(), HasSubstr("\"</s>\""));
}

/// A copy of a tiny model's folder to change.
class HfCopy : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "hfXXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
    for (const char* name : {"config.json", "tokenizer.json", "model.safetensors"}) {
      write(name, posix_file_system().read(kTiny + "untied-gqa/" + name).value());
    }
  }
  void TearDown() override { EXPECT_TRUE(posix_file_system().remove_all(dir_).ok()); }
  void write(const std::string& name, const std::string& bytes) {
    ASSERT_TRUE(write_file_atomically(posix_file_system(), dir_ + "/" + name, bytes).ok());
  }
  std::string error() const {
    const auto file = ModelFile::open(dir_);
    return file.ok() ? "accepted" : file.status().message();
  }

  std::string dir_;
};

TEST_F(HfCopy, ShardsWithIndex) {
  const std::string whole = posix_file_system().read(dir_ + "/model.safetensors").value();
  const SafeTensors all = parse_safetensors(test::as_bytes(whole)).value();
  SafeTensors parts[2];
  Json map;
  size_t n = 0;
  for (const auto& [name, tensor] : all.tensors) {
    const size_t part = n++ % 2;
    parts[part].tensors[name] = tensor;
    map[name] = part ? "model-2.safetensors" : "model-1.safetensors";
  }
  const auto one = ModelFile::open(dir_);
  ASSERT_TRUE(one.ok());
  write("model-1.safetensors", serialize_safetensors(parts[0]));
  write("model-2.safetensors", serialize_safetensors(parts[1]));
  ASSERT_TRUE(posix_file_system().remove_all(dir_ + "/model.safetensors").ok());
  EXPECT_THAT(error(), HasSubstr("2 *.safetensors files and no index"));
  write("model.safetensors.index.json", dump_json({{"weight_map", map}}));
  const auto two = ModelFile::open(dir_);
  ASSERT_TRUE(two.ok()) << two.status().message();
  EXPECT_EQ(read(**one, "lm_head.weight"), read(**two, "lm_head.weight"));
  map["lm_head.weight"] = "../model-1.safetensors";
  write("model.safetensors.index.json", dump_json({{"weight_map", map}}));
  EXPECT_THAT(error(), HasSubstr("name of a .safetensors file in this folder"));
  map["lm_head.weight"] = "model-9.safetensors";
  write("model.safetensors.index.json", dump_json({{"weight_map", map}}));
  EXPECT_THAT(error(), HasSubstr("model-9.safetensors"));
}

TEST_F(HfCopy, BrokenFoldersNameTheFault) {
  Json config = load_json(dir_ + "/config.json");
  config["intermediate_size"] = 161;
  write("config.json", dump_json(config));
  EXPECT_THAT(error(), HasSubstr("mlp.gate_proj.weight: 160 rows, the model wants 161"));
  config["intermediate_size"] = 160;
  config["num_hidden_layers"] = 1;
  write("config.json", dump_json(config));
  EXPECT_THAT(error(), HasSubstr("unknown tensor model.layers.1."));
  config["num_hidden_layers"] = 3;
  write("config.json", dump_json(config));
  EXPECT_THAT(error(),
              HasSubstr("tensor model.layers.2.input_layernorm.weight is missing, expected [64]"));
  config["num_hidden_layers"] = 2;
  config["tie_word_embeddings"] = true;  // then lm_head.weight is ignored, as transformers does
  write("config.json", dump_json(config));
  EXPECT_EQ(error(), "accepted");
  write("tokenizer_config.json", "{");
  EXPECT_THAT(error(), HasSubstr("tokenizer_config.json: JSON at byte"));
  write("tokenizer_config.json", "{}");
  write("chat_template.jinja", "from file");
  EXPECT_EQ(ModelFile::open(dir_).value()->tokenizer().chat_template, "from file");
  write("model.safetensors.index.json", R"({"weight_map":7})");
  EXPECT_THAT(error(), HasSubstr("index.json: weight_map is number, expected an object"));
  ASSERT_TRUE(posix_file_system().remove_all(dir_ + "/model.safetensors.index.json").ok());
  ASSERT_TRUE(posix_file_system().remove_all(dir_ + "/config.json").ok());
  EXPECT_THAT(error(), HasSubstr("config.json is missing"));
  EXPECT_EQ(ModelFile::open(dir_ + "/absent").status().code(), Code::kNotFound);
  EXPECT_THAT(ModelFile::open("/dev/null").status().message(), HasSubstr("not a regular file"));
}

// Opening one would wait for a writer, perhaps for ever.
TEST_F(HfCopy, APipeIsNoFile) {
  for (const char* name : {"chat_template.jinja", "model.safetensors", "config.json"}) {
    ASSERT_TRUE(posix_file_system().remove_all(dir_ + "/" + name).ok());
    ASSERT_EQ(mkfifo((dir_ + "/" + name).c_str(), 0600), 0);
    EXPECT_THAT(error(), HasSubstr(std::string(name) + ": "));
    ASSERT_TRUE(posix_file_system().remove_all(dir_ + "/" + name).ok());
    if (std::string(name) != "chat_template.jinja") {
      write(name, posix_file_system().read(kTiny + "untied-gqa/" + name).value());
    }
    EXPECT_EQ(error(), "accepted");
  }
}

// The table of rotations has a row per position: a config of a few bytes must not ask for
// gigabytes.
TEST_F(HfCopy, ADeclaredContextIsBounded) {
  Json config = load_json(dir_ + "/config.json");
  for (const int64_t declared : {int64_t{131072}, int64_t{1} << 31}) {
    config["max_position_embeddings"] = declared;
    write("config.json", dump_json(config));
    const auto file = ModelFile::open(dir_);
    ASSERT_TRUE(file.ok()) << file.status().message();
    EXPECT_EQ((*file)->config().context, std::min<int64_t>(declared, (1 << 26) / 16));
  }
}

TEST_F(HfCopy, GgufOfTheSameWeightsReadsTheSame) {
  const auto hf = ModelFile::open(dir_);
  ASSERT_TRUE(hf.ok());
  const ModelConfig& c = (*hf)->config();
  test::GgufBuilder b;
  b.text("general.architecture", "llama");
  b.u32("llama.block_count", 2);
  b.u32("llama.context_length", 512);
  b.u32("llama.embedding_length", 64);
  b.u32("llama.feed_forward_length", 160);
  b.u32("llama.attention.head_count", static_cast<uint32_t>(c.n_heads));
  b.u32("llama.attention.head_count_kv", static_cast<uint32_t>(c.n_kv_heads));
  b.f32("llama.attention.layer_norm_rms_epsilon", c.norm_eps);
  b.text("tokenizer.ggml.model", "gpt2");
  b.text("tokenizer.ggml.pre", "gpt-2");
  b.strings("tokenizer.ggml.tokens", (*hf)->tokenizer().tokens);
  b.strings("tokenizer.ggml.merges", (*hf)->tokenizer().merges);
  for (const ExpectedTensor& want : llama_tensors(c)) {
    const TensorInfo& info = (*hf)->tensors().at(want.hf_name);
    std::string data(reinterpret_cast<const char*>(info.data), info.bytes);
    if (want.gguf_permuted_rows) {  // numpy: reshape(heads, 2, half, in).swapaxes(1, 2)
      const size_t row_bytes = info.bytes / static_cast<size_t>(info.shape[0]);
      const auto half = static_cast<size_t>(c.head_dim / 2);
      size_t to = 0;
      for (size_t head = 0; head < info.bytes / row_bytes / (2 * half); ++head) {
        for (size_t i = 0; i < half; ++i) {
          for (size_t part = 0; part < 2; ++part, ++to) {
            const size_t from = (head * 2 + part) * half + i;
            std::memcpy(&data[to * row_bytes], info.data + from * row_bytes, row_bytes);
          }
        }
      }
    }
    std::vector<uint64_t> dims(info.shape.rbegin(), info.shape.rend());
    b.tensors.push_back({want.gguf_name, dims, 30, data, -1});
  }
  write("model.gguf", b.build().bytes);
  const auto gguf = ModelFile::open(dir_ + "/model.gguf");
  ASSERT_TRUE(gguf.ok()) << gguf.status().message();
  EXPECT_EQ((*gguf)->name(), "model");
  ASSERT_EQ((*gguf)->tensors().size(), (*hf)->tensors().size());
  for (const auto& [name, info] : (*hf)->tensors()) {
    EXPECT_EQ(read(**gguf, name), read(**hf, name)) << name;
  }
}

}  // namespace
}  // namespace ds
