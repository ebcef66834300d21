// SPDX-License-Identifier: Apache-2.0
// The text encoder as a file, through its table: rows of the embedding in every layout that it
// reads, its gradient by finite differences, and what it says to ids that are no row.
#include <gmock/gmock.h>

#include <cmath>
#include <cstdlib>

#include "kernels/ops.h"
#include "tests/kernels/cases.h"
#include "tests/modules/module_file.h"

namespace ds::test {
namespace {

using testing::HasSubstr;

constexpr std::int64_t kVocab = 37, kWidth = 21;  // no multiples of a panel

struct View {
  std::vector<std::int64_t> shape, strides;
  ds_tensor t{};
  template <class T>
  View(T* data, std::vector<std::int64_t> dims) : shape(std::move(dims)), strides(shape.size()) {
    std::int64_t count = 1;
    for (std::size_t i = shape.size(); i-- > 0; count *= shape[i]) strides[i] = count;
    t.data = const_cast<std::remove_const_t<T>*>(data);
    t.device = {DS_DEV_CPU, 0};
    t.ndim = static_cast<std::int32_t>(shape.size());
    t.dtype = sdk::dtype_of<T>();
    t.shape = shape.data();
    t.strides = strides.data();
    t.bytes = static_cast<std::uint64_t>(count) * sizeof(T);
  }
  View(const View&) = delete;
};

std::uint32_t random_seed() {
  const char* given = std::getenv("DS_SEED");
  const auto seed = given != nullptr ? static_cast<std::uint32_t>(std::atoi(given)) : 7;
  std::printf("DS_SEED=%u\n", seed);
  return seed;
}

/// One call's arguments over an embedding in one of its layouts.
class TextEncoder : public ModuleFile, public testing::Test {
 protected:
  TextEncoder() : ModuleFile("encoder_text") {
    media.size = sizeof media;
    media.modality = DS_MOD_TEXT;
    media.data = &ids_t.t;
    args.size = sizeof args;
    args.media = &media;
    args.tensors = &tensor;
    args.out = &out_t.t;
    args.dout = &dout_t.t;
    args.dtensors = &dtensor;
  }
  void pack(WeightFormat format) {
    const Ops& ops = cpu_ops(best_cpu_isa());
    const std::int64_t bytes = ops.packed_bytes(format, kVocab, kWidth);
    packed = aligned(bytes);
    ops.pack({call.parallel, nullptr}, format, kVocab, kWidth, rows.data(), false, packed.get());
    rows_t.t.data = packed.get();
    rows_t.t.bytes = static_cast<std::uint64_t>(bytes);
    rows_t.t.packing = format == WeightFormat::kF32 ? DS_PACK_PANEL_F32 : DS_PACK_PANEL_BF16;
    if (format == WeightFormat::kF32) return;
    rows_t.t.dtype = {DS_BFLOAT, 16, 1};
    rows = as_bf16(rows);
  }
  ds_code plan() {
    planned = {};
    planned.size = sizeof planned;
    const ds_code code = table<ds_encoder>().plan(instance, &args, &planned, &st);
    workspace.assign(planned.workspace_bytes / sizeof(float), NAN);
    call.workspace = workspace.data();
    call.workspace_bytes = planned.workspace_bytes;
    return code;
  }
  ds_code encode() {
    std::fill(out.begin(), out.end(), NAN);
    return table<ds_encoder>().encode(instance, &call, &args, &st);
  }
  void expect_rows(float weight) {
    ASSERT_EQ(plan(), DS_OK) << text();
    EXPECT_EQ(planned.shape[0], std::ssize(ids));
    EXPECT_EQ(planned.shape[1], kWidth);
    ASSERT_EQ(encode(), DS_OK) << text();
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto id = static_cast<std::size_t>(ids[i / kWidth]);
      ASSERT_EQ(out[i], weight * rows[id * kWidth + i % kWidth]) << "element " << i;
    }
  }

  const std::uint32_t seed = random_seed();
  std::vector<std::int32_t> ids{0, 36, 15, 16, 0, 31, 32, 0, 7, 0};
  Floats rows = random_floats(kVocab * kWidth, seed), out = Floats(ids.size() * kWidth),
         dout = random_floats(out.size(), seed + 1), gradient = Floats(rows.size()), workspace;
  std::shared_ptr<char> packed;
  View ids_t{ids.data(), {std::ssize(ids)}}, rows_t{rows.data(), {kVocab, kWidth}},
      out_t{out.data(), {std::ssize(ids), kWidth}}, dout_t{dout.data(), {std::ssize(ids), kWidth}},
      gradient_t{gradient.data(), {kVocab, kWidth}};
  const ds_tensor* tensor = &rows_t.t;
  const ds_tensor* dtensor = &gradient_t.t;
  ds_media media{};
  ds_encode_args args{};
  ds_plan planned{};
};

TEST_F(TextEncoder, SaysWhatItReads) {
  const auto& encoder = table<ds_encoder>();
  EXPECT_EQ(sdk::view(component->name), "text");
  EXPECT_EQ(encoder.modalities, 1u << DS_MOD_TEXT);
  ASSERT_EQ(encoder.tensor_count, 1u);
  EXPECT_EQ(sdk::view(encoder.tensor_names[0]), "model.embed_tokens.weight");
}

TEST_F(TextEncoder, GivesPlainRows) { expect_rows(1); }
TEST_F(TextEncoder, GivesRowsOfPanelsInF32) {
  pack(WeightFormat::kF32);
  expect_rows(1);
}
TEST_F(TextEncoder, GivesRowsOfPanelsInBf16) {
  pack(WeightFormat::kBF16);
  expect_rows(1);
}

TEST_F(TextEncoder, MultipliesByTheWeightOfTheTask) {
  media.weight = -0.3f;
  expect_rows(-0.3f);
  pack(WeightFormat::kBF16);
  expect_rows(-0.3f);
  media.weight = 0;  // not set
  expect_rows(1);
  media.weight = 5;
  media.size = offsetof(ds_media, weight);  // an older host's: out of sight
  expect_rows(1);
  media.size = sizeof media;
  media.weight = NAN;
  EXPECT_EQ(encode(), DS_E_NUMERIC);
}

TEST_F(TextEncoder, ManyTokensOnThePoolAndNone) {
  std::vector<std::int32_t> many(1000);
  for (std::size_t i = 0; i < many.size(); ++i) many[i] = static_cast<std::int32_t>(i * 7 % kVocab);
  std::vector<float> wide(many.size() * kWidth, NAN);
  const View many_t(many.data(), {1000}), wide_t(wide.data(), {1000, kWidth});
  media.data = &many_t.t;
  media.weight = 2;
  args.out = &wide_t.t;
  ASSERT_EQ(encode(), DS_OK) << text();
  for (std::size_t i = 0; i < wide.size(); ++i)
    ASSERT_EQ(wide[i], 2 * rows[static_cast<std::size_t>(many[i / kWidth]) * kWidth + i % kWidth]);
  const View none(ids.data(), {0}), nothing(wide.data(), {0, kWidth});
  media.data = &none.t;
  args.out = &nothing.t;
  EXPECT_EQ(plan(), DS_OK) << text();
  EXPECT_EQ(encode(), DS_OK) << text();
}

/// The output is linear in the table, so a wide step loses nothing to its width.
TEST_F(TextEncoder, GradientIsTheDerivativeAndIsAdded) {
  for (const float weight : {0.0f, 0.7f}) {
    media.weight = weight;
    std::fill(gradient.begin(), gradient.end(), 3.0f);
    ASSERT_EQ(plan(), DS_OK) << text();
    ASSERT_EQ(table<ds_encoder>().backward(instance, &call, &args, &st), DS_OK) << text();
    const auto loss = [&] {
      EXPECT_EQ(encode(), DS_OK) << text();
      double sum = 0;
      for (std::size_t i = 0; i < out.size(); ++i) sum += double{out[i]} * dout[i];
      return sum;
    };
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const float at = rows[i];
      rows[i] = at + 0.5f;
      const double above = loss();
      rows[i] = at - 0.5f;
      ASSERT_NEAR(gradient[i] - 3, above - loss(), 1e-5) << "weight " << weight << " at " << i;
      rows[i] = at;
    }
  }
}

TEST_F(TextEncoder, AFrozenTableGetsNoGradient) {
  dtensor = nullptr;
  EXPECT_EQ(table<ds_encoder>().backward(instance, &call, &args, &st), DS_OK) << text();
  args.dtensors = nullptr;
  EXPECT_EQ(table<ds_encoder>().backward(instance, &call, &args, &st), DS_OK) << text();
}

TEST_F(TextEncoder, RefusesIdsThatAreNoRow) {
  for (const std::int32_t bad : {-1, 37, 2'000'000'000, -2'000'000'000}) {
    ids[3] = bad;
    for (const bool is_packed : {false, true}) {
      if (is_packed) pack(WeightFormat::kF32);
      EXPECT_EQ(encode(), DS_E_ARG);
      EXPECT_EQ(text(), "ids[3]: " + std::to_string(bad) + ", expected 0 to 36");
      EXPECT_EQ(table<ds_encoder>().backward(instance, &call, &args, &st), DS_E_ARG);
    }
  }
}

TEST_F(TextEncoder, RefusesWhatDoesNotFit) {
  const auto refused = [&](ds_code code) {
    EXPECT_EQ(encode(), code);
    return text();
  };
  const View narrow(out.data(), {std::ssize(ids), kWidth - 1});
  args.out = &narrow.t;
  EXPECT_EQ(refused(DS_E_SHAPE), "out: [10, 20], expected [10, 21]");
  args.out = &out_t.t;
  media.modality = DS_MOD_AUDIO;
  EXPECT_EQ(refused(DS_E_UNSUPPORTED), "modality 3, expected text (1)");
  media.modality = DS_MOD_TEXT;
  const View floats(out.data(), {3});
  media.data = &floats.t;
  EXPECT_THAT(refused(DS_E_DTYPE), HasSubstr("ids: type code 2"));
  media.data = &ids_t.t;
  rows_t.t.packing = DS_PACK_OWN + 0x820;
  EXPECT_THAT(refused(DS_E_UNSUPPORTED), HasSubstr("model.embed_tokens.weight: packing 67616"));
  pack(WeightFormat::kF32);
  rows_t.t.bytes -= 1;
  EXPECT_THAT(refused(DS_E_SHAPE), HasSubstr("too small"));
  tensor = nullptr;
  EXPECT_EQ(refused(DS_E_ARG), "model.embed_tokens.weight: missing");
  EXPECT_EQ(plan(), DS_E_ARG);
}

}  // namespace
}  // namespace ds::test
