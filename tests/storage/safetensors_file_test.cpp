// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "storage/json.h"
#include "storage/safetensors.h"
#include "tests/storage/gguf_builder.h"

namespace ds {
namespace {

using test::as_bytes;
using testing::HasSubstr;

std::string file_of(std::string_view header, std::string_view data = "") {
  return test::raw_string(header) + std::string(data);
}

std::string error_of(std::string_view header, std::string_view data = "") {
  const std::string bytes = file_of(header, data);
  const Result<SafeTensors> parsed = parse_safetensors(as_bytes(bytes));
  return parsed.ok() ? "accepted" : parsed.status().message();
}

TEST(Safetensors, RoundTripIsStableByteForByte) {
  const float values[6] = {1, 2, 3, 4, 5, 6};
  const uint16_t halves[2] = {0x3f80, 0x4000};
  SafeTensors contents;
  contents.tensors["b"] = {"F32", {2, 3}, std::as_bytes(std::span(values))};
  contents.tensors["a"] = {"BF16", {2}, std::as_bytes(std::span(halves))};
  contents.tensors["empty"] = {"F32", {0, 3}, {}};
  contents.metadata["format"] = "pt";
  const std::string bytes = serialize_safetensors(contents);
  EXPECT_EQ(bytes, serialize_safetensors(contents));

  const Result<SafeTensors> back = parse_safetensors(as_bytes(bytes));
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(back->metadata.at("format"), "pt");
  EXPECT_EQ(back->tensors.at("b").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(std::memcmp(back->tensors.at("b").data.data(), values, sizeof values), 0);
  EXPECT_EQ(back->tensors.at("a").dtype, "BF16");
  EXPECT_EQ(back->tensors.at("empty").data.size(), 0u);
  EXPECT_EQ(serialize_safetensors(*back), bytes);
}

TEST(Safetensors, RefusesWhatTheFormatForbids) {
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "12345678"),
              HasSubstr("\"t\": data_offsets [0,4] hold 4 bytes, F32 [2] needs 8"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "12345678"),
              HasSubstr("begins at byte 4 of the data, expected 0"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "12345678"),
              HasSubstr("cover 4 of 8"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                           "u":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                       "1234"),
              HasSubstr("\"u\" begins at byte 0 of the data, expected 4"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}})", "1234"),
              HasSubstr("outside the 4 bytes"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}})", "1234"),
              HasSubstr("dtype \"Q4\""));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[4294967296,4294967296],
                           "data_offsets":[0,0]}})"),
              HasSubstr("overflows"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "1234"),
              HasSubstr("non-negative"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", "1234"),
              HasSubstr("outside"));
  EXPECT_THAT(error_of(R"({"t":{"dtype":"F32","shape":[1]}})"), HasSubstr("data_offsets"));
  EXPECT_THAT(error_of(R"({"t":7})"), HasSubstr("\"t\""));
  EXPECT_THAT(error_of(R"({"__metadata__":{"a":1}})"), HasSubstr("__metadata__"));
  EXPECT_THAT(error_of("[]"), HasSubstr("no JSON object"));
  EXPECT_THAT(error_of("{\"t\":"), HasSubstr("header: JSON at byte"));
  EXPECT_EQ(error_of("{}"), "accepted");
  EXPECT_THAT(parse_safetensors(as_bytes("short")).status().message(), HasSubstr("5 bytes"));
  EXPECT_THAT(parse_safetensors(as_bytes(test::raw(UINT64_MAX) + "{}")).status().message(),
              HasSubstr("header of 18446744073709551615 bytes"));
}

TEST(Safetensors, TruncationAnywhereIsAnError) {
  const std::string whole =
      file_of(R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  ASSERT_TRUE(parse_safetensors(as_bytes(whole)).ok());
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string cut = whole.substr(0, n);
    EXPECT_FALSE(parse_safetensors(as_bytes(cut)).ok()) << "cut at byte " << n;
  }
}

}  // namespace
}  // namespace ds
