// SPDX-License-Identifier: Apache-2.0
// Files made to break the readers: each must give an error that names the fault, never a crash and
// never an allocation out of proportion to the file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "storage/gguf.h"
#include "storage/safetensors.h"
#include "storage/seams.h"
#include "tests/storage/gguf_builder.h"

namespace {
size_t largest_allocation = 0;  // bytes, since the last reset; the test has one thread
}

// Replaced for this program only, to see what the readers ask for.
[[gnu::noinline]] void* operator new(size_t bytes) {
  largest_allocation = std::max(largest_allocation, bytes);
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace ds {
namespace {

using test::as_bytes;
using test::GgufBuilder;
using test::raw;
using test::raw_string;
using test::small_model;
using testing::AllOf;
using testing::HasSubstr;

constexpr size_t kSmallAllocation = 64 * 1024;  // bytes; vectors of names, messages

std::string gguf_error(const std::string& bytes) {
  largest_allocation = 0;
  const Result<ModelContents> read = read_gguf_model(as_bytes(bytes));
  const size_t largest = largest_allocation;
  EXPECT_LE(largest, std::max(kSmallAllocation, 2 * bytes.size()));
  return read.ok() ? "accepted" : read.status().message();
}
std::string gguf_error(const GgufBuilder& builder) { return gguf_error(builder.build().bytes); }

uint64_t seed() {
  const char* text = std::getenv("DS_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 20240607;
}

TEST(HostileGguf, TruncationAtEveryByteIsAnError) {
  const test::GgufBytes file = small_model().build();
  ASSERT_EQ(gguf_error(file.bytes), "accepted");
  for (size_t n = 0; n < file.bytes.size(); n += n < file.header_bytes ? 1 : 97) {
    ASSERT_NE(gguf_error(file.bytes.substr(0, n)), "accepted") << "cut at byte " << n;
  }
  EXPECT_NE(gguf_error(file.bytes.substr(0, file.bytes.size() - 1)), "accepted");
}

TEST(HostileGguf, SingleByteMutationsNeverCrash) {
  const test::GgufBytes file = small_model().build();
  std::printf("seed %llu (set DS_SEED to repeat)\n", static_cast<unsigned long long>(seed()));
  Rng rng(seed());
  for (size_t at = 0; at < file.header_bytes; ++at) {
    for (const uint8_t value : {uint8_t{0}, uint8_t{0x7f}, uint8_t{0x80}, uint8_t{0xff},
                                static_cast<uint8_t>(rng.next())}) {
      std::string mutated = file.bytes;
      mutated[at] = static_cast<char>(value);
      gguf_error(mutated);
    }
  }
}

TEST(HostileGguf, HeaderCountsAndLengths) {
  const std::string magic = "GGUF" + raw<uint32_t>(3);
  EXPECT_THAT(gguf_error(""), HasSubstr("magic at byte 0 needs 4 bytes, 0 are left"));
  EXPECT_THAT(gguf_error("GGML----"), HasSubstr("not a GGUF file"));
  EXPECT_THAT(gguf_error("GGUF" + raw<uint32_t>(1)), HasSubstr("GGUF version 1, expected 2 or 3"));
  EXPECT_THAT(gguf_error("GGUF" + raw<uint32_t>(0x03000000)), HasSubstr("big-endian"));
  EXPECT_THAT(gguf_error(magic + raw<uint64_t>(1ull << 60) + raw<uint64_t>(0)),
              HasSubstr("number of tensors at byte 8 is 1152921504606846976"));
  EXPECT_THAT(gguf_error(magic + raw<uint64_t>(0) + raw<uint64_t>(UINT64_MAX)),
              HasSubstr("number of metadata keys at byte 16"));
  EXPECT_THAT(gguf_error(magic + raw<uint64_t>(0) + raw<uint64_t>(1) + raw<uint64_t>(1ull << 63) +
                         std::string(32, 'x')),
              HasSubstr("metadata key 0 at byte 32 needs 9223372036854775808 bytes"));
  GgufBuilder many = small_model();
  many.extra_tensors = 100;
  EXPECT_NE(gguf_error(many), "accepted");
  GgufBuilder few = small_model();
  few.extra_keys = -1;
  EXPECT_NE(gguf_error(few), "accepted");
}

TEST(HostileGguf, MetadataValues) {
  GgufBuilder b = small_model();
  b.key("x", 13, raw<uint32_t>(0));
  EXPECT_THAT(gguf_error(b), AllOf(HasSubstr("x: value type 13"), HasSubstr("expected 0 to 12")));
  b.key("x", 0xffffffff, raw<uint32_t>(0));
  EXPECT_THAT(gguf_error(b), HasSubstr("value type -1"));
  b.key("x", 9, raw<uint32_t>(8) + raw<uint64_t>(1ull << 60));
  EXPECT_THAT(gguf_error(b), HasSubstr("x: array length"));
  b.key("x", 9, raw<uint32_t>(4) + raw<uint64_t>(1ull << 62));  // * 4 would be 0 in 64 bits
  EXPECT_THAT(gguf_error(b), HasSubstr("x: array length"));
  b.key("x", 9, raw<uint32_t>(9) + raw<uint64_t>(1));
  EXPECT_THAT(gguf_error(b), HasSubstr("x: arrays of arrays, expected an array of"));
  b.key("x", 8, raw<uint64_t>(1ull << 63));
  EXPECT_THAT(gguf_error(b), HasSubstr("x: string at byte"));
  b.key("x", 7, "\2");  // any other byte is true, as in C
  EXPECT_EQ(gguf_error(b), "accepted");
  b.key("general.name", 8, raw_string("again"), true);
  EXPECT_THAT(gguf_error(b), HasSubstr("duplicate metadata key general.name"));
  GgufBuilder nameless = small_model();
  nameless.key("", 0, "x");
  EXPECT_THAT(gguf_error(nameless), HasSubstr("0 bytes, expected 1 to 65535"));
}

TEST(HostileGguf, WrongTypesAndSettings) {
  const auto with_text = [](const std::string& key, std::string_view value) {
    GgufBuilder b = small_model();
    b.text(key, value);
    return gguf_error(b);
  };
  const auto with_u32 = [](const std::string& key, uint32_t value) {
    GgufBuilder b = small_model();
    b.u32(key, value);
    return gguf_error(b);
  };
  EXPECT_THAT(with_text("llama.block_count", "1"),
              HasSubstr("llama.block_count is string, expected an integer"));
  EXPECT_THAT(with_u32("general.architecture", 1), HasSubstr("u32, expected a string"));
  EXPECT_THAT(with_u32("tokenizer.ggml.tokens", 1), HasSubstr("expected an array of strings"));
  EXPECT_THAT(with_text("general.architecture", "qwen2"),
              HasSubstr("general.architecture \"qwen2\", expected \"llama\""));
  EXPECT_THAT(with_text("tokenizer.ggml.model", "llama"),
              HasSubstr("\"llama\", expected \"gpt2\""));
  EXPECT_THAT(with_u32("llama.block_count", 0), HasSubstr("number of layers is 0"));
  EXPECT_THAT(with_u32("llama.block_count", 16384), HasSubstr("the file has 11 tensors"));
  EXPECT_THAT(with_u32("llama.block_count", 2),
              HasSubstr("blk.1.attn_norm.weight is missing, expected [32]"));
  EXPECT_THAT(with_u32("llama.attention.head_count", 0), HasSubstr("attention heads is 0"));
  EXPECT_THAT(with_u32("llama.attention.head_count_kv", 4294967295u), HasSubstr("4294967295"));
  EXPECT_THAT(with_u32("llama.feed_forward_length", 96),
              HasSubstr("blk.0.ffn_gate.weight: 64 rows, the model wants 96"));
  EXPECT_THAT(with_u32("llama.attention.key_length", 8),
              HasSubstr("blk.0.attn_q.weight: 32 rows, the model wants 16"));
  EXPECT_THAT(with_u32("llama.attention.value_length", 8), HasSubstr("expected key_length 16"));
  EXPECT_THAT(with_u32("llama.expert_count", 8), HasSubstr("llama.expert_count 8"));
  EXPECT_THAT(with_u32("llama.rope.dimension_count", 8),
              HasSubstr("llama.rope.dimension_count is 8"));
  EXPECT_THAT(with_text("llama.rope.scaling.type", "yarn"), HasSubstr("\"yarn\""));
  EXPECT_THAT(with_u32("tokenizer.ggml.eos_token_id", 100), HasSubstr("vocabulary has 100 tokens"));
  for (const uint32_t alignment : {0u, 1u, 3u, 4u, 48u}) {
    EXPECT_THAT(with_u32("general.alignment", alignment),
                HasSubstr("general.alignment is " + std::to_string(alignment)));
  }
  EXPECT_NE(with_u32("general.alignment", 1u << 31), "accepted");
  EXPECT_THAT(with_text("general.alignment", "32"),
              HasSubstr("general.alignment is string, expected u32"));
  GgufBuilder b = small_model();
  b.f32("llama.attention.layer_norm_rms_epsilon", NAN);
  EXPECT_THAT(gguf_error(b), HasSubstr("norm epsilon is nan"));
  b = small_model();
  b.remove_key("llama.block_count");
  EXPECT_THAT(gguf_error(b), HasSubstr("llama.block_count is missing"));
  b = small_model();
  b.i32s("tokenizer.ggml.token_type", {1, 1});
  EXPECT_THAT(gguf_error(b), HasSubstr("2 entries, expected one per token: 100"));
}

TEST(HostileGguf, Tensors) {
  const auto with = [](const std::string& name, auto change) {
    GgufBuilder b = small_model();
    change(b.tensor(name));
    return gguf_error(b);
  };
  const std::string up = "blk.0.ffn_up.weight";
  using Tensor = GgufBuilder::Tensor;
  EXPECT_THAT(with(up,
                   [](Tensor& t) {
                     t.dims = {1ull << 32, 1ull << 32};
                   }),
              HasSubstr("must fit 57 bits"));
  // As F32 these would have 2^64 bytes, which is 0.
  EXPECT_THAT(with("output_norm.weight", [](Tensor& t) { t.dims = {1ull << 62}; }),
              HasSubstr("must fit 57 bits"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.dims = {32, 0}; }), HasSubstr("dimension 1 is 0"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.dims = {32, 1, 1, 1, 1}; }), HasSubstr("5 dimensions"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.dims = {}; }), HasSubstr("0 dimensions"));
  EXPECT_THAT(with(up,
                   [](Tensor& t) {
                     t.dims = {31, 64};
                   }),
              HasSubstr("rows of 31 values, Q4_0 needs a multiple of 32"));
  EXPECT_THAT(with(up,
                   [](Tensor& t) {
                     t.dims = {32, 65};
                     t.data.resize(65 * 18);
                   }),
              HasSubstr(up + ": 65 rows, the model wants 64"));
  EXPECT_THAT(with(up,
                   [](Tensor& t) {
                     t.dims = {64, 64};
                     t.data.resize(128 * 18);
                   }),
              HasSubstr(up + ": 64 columns, the model wants 32"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.dims = {32}; }),
              HasSubstr("shape [32], the model wants [64, 32]"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.type = 12; }), HasSubstr(up + ": type Q4_K, expected"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.type = 0xffffffff; }), HasSubstr(up + ": type id -1"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.type = 77; }),
              HasSubstr("type id 77, which ggml has not, expected F32"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.offset = 1 << 20; }), HasSubstr("at offset 1048576"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.offset = INT64_MAX - 31; }), HasSubstr(up + ": "));
  EXPECT_THAT(with(up, [](Tensor& t) { t.offset = 16; }),
              HasSubstr("multiple of the alignment 32"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.offset = 0; }), HasSubstr("overlaps"));
  EXPECT_THAT(with(up, [](Tensor& t) { t.offset = 0; }), HasSubstr(", which ends at "));
  EXPECT_THAT(with("output_norm.weight", [](Tensor& t) { t.name = "output_norm.bias"; }),
              HasSubstr("tensor output_norm.weight is missing"));
  EXPECT_THAT(with("output_norm.weight", [](Tensor& t) { t.type = 2; }),
              HasSubstr("Q4_0, expected F32, F16 or BF16 for a vector"));
  GgufBuilder b = small_model();
  b.tensors.push_back({"blk.0.attn_q_norm.weight", {16}, 0, std::string(64, '\0'), -1});
  EXPECT_THAT(gguf_error(b), HasSubstr("unknown tensor blk.0.attn_q_norm.weight"));
  b = small_model();
  b.tensors.push_back(b.tensors[0]);
  EXPECT_THAT(gguf_error(b), HasSubstr("duplicate tensor token_embd.weight"));
}

TEST(HostileSafetensors, MutationsNeverCrash) {
  const std::string header =
      R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"__metadata__":{"k":"v"}})";
  const std::string file = raw_string(header) + std::string(32, 'x');
  ASSERT_TRUE(parse_safetensors(as_bytes(file)).ok());
  std::printf("seed %llu (set DS_SEED to repeat)\n", static_cast<unsigned long long>(seed()));
  Rng rng(seed());
  for (int round = 0; round < 5000; ++round) {
    std::string mutated = file;
    for (uint64_t n = 0; n <= rng.below(3); ++n) {
      mutated[rng.below(mutated.size())] = static_cast<char>(rng.next());
    }
    largest_allocation = 0;
    (void)parse_safetensors(as_bytes(mutated)).ok();
    ASSERT_LE(largest_allocation, kSmallAllocation);
  }
}

}  // namespace
}  // namespace ds
