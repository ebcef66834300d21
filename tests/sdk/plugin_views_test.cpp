// SPDX-License-Identifier: Apache-2.0
// What plugins read their arguments with: weights' memory, parameters, keys by position.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ds/plugin.hpp"

namespace {

using namespace ds::sdk;
using testing::ElementsAre;
using testing::HasSubstr;

template <class F>
std::pair<ds_code, std::string> outcome(F&& body) {
  ds_status st{};
  const ds_code code = guard(&st, body);
  return {code, {st.text, st.len}};
}

TEST(WeightMemory, IsBoundByItsFormat) {
  std::vector<std::int8_t> bytes(12);
  ds_qformat format{};
  format.size = sizeof format;
  format.packed_bytes = 12;
  ds_qweight q{};
  q.size = sizeof q;
  q.format = &format;
  q.packed = bytes.data();
  EXPECT_EQ(packed<std::int8_t>(q, 12).size(), 12u);
  EXPECT_EQ(
      outcome([&] { (void)packed<std::int8_t>(q, 13); }),
      std::pair(ds_code{DS_E_SHAPE}, std::string("packed: 12 bytes, expected 13 elements of 1")));
  EXPECT_EQ(outcome([&] { (void)packed<float>(q, 4); }).first, DS_E_SHAPE);
  EXPECT_EQ(outcome([&] { (void)scales<float>(q, 1); }).first, DS_E_SHAPE);
  format.scale_bytes = 4;
  EXPECT_EQ(outcome([&] { (void)scales<float>(q, 1); }).second, "scales: missing");
  q.format = nullptr;
  EXPECT_EQ(outcome([&] { (void)packed<std::int8_t>(q, 1); }).first, DS_E_SHAPE);
}

TEST(Trainable, ShowsItsMemoryToTheHost) {
  trainable w("gate.weight", {2, 3});
  const ds_parameter& p = *w.parameter();
  EXPECT_EQ(view(p.name), "gate.weight");
  EXPECT_EQ(p.size, sizeof p);
  flat<float>(p.value, "value", {2, 3})[5] = 4;
  flat<float>(p.gradient, "gradient", {2, 3})[0] = 2;
  EXPECT_EQ(w.value()[5], 4);
  EXPECT_EQ(w.gradient()[0], 2);
  EXPECT_EQ(outcome([] { trainable bad("b", {-1}); }).first, DS_E_SHAPE);
}

TEST(Workspace, IsBoundByWhatTheHostGave) {
  std::vector<double> memory(2);
  ds_call call{};
  call.workspace = memory.data();
  call.workspace_bytes = 16;
  EXPECT_EQ(workspace<float>(call, 4).size(), 4u);
  EXPECT_THAT(outcome([&] { (void)workspace<float>(call, 5); }).second,
              HasSubstr("workspace: 16 bytes, expected 5 elements of 4"));
  EXPECT_EQ(outcome([&] { (void)workspace<float>(call, -1); }).first, DS_E_SHAPE);
}

template <class T>
struct Tensor {
  std::vector<T> data;
  std::vector<std::int64_t> shape, strides;
  ds_tensor t{};
  Tensor(std::vector<std::int64_t> dims, std::vector<T> values)
      : data(std::move(values)), shape(std::move(dims)), strides(shape.size()) {
    std::int64_t count = 1;
    for (std::size_t i = shape.size(); i-- > 0; count *= shape[i]) strides[i] = count;
    data.resize(static_cast<std::size_t>(count));
    t.data = data.data();
    t.device = {DS_DEV_CPU, 0};
    t.ndim = static_cast<std::int32_t>(shape.size());
    t.dtype = dtype_of<T>();
    t.shape = shape.data();
    t.strides = strides.data();
    t.bytes = data.size() * sizeof(T);
  }
  Tensor(const Tensor&) = delete;
};

/// Two sequences, of 3 keys with 1 row and of 2 keys with 2 rows; 2 heads over 1, pages of 2
/// tokens. Element i of the key pages is i, of the value pages -i.
class AttentionView : public testing::Test {
 protected:
  AttentionView() {
    for (int i = 0; i < 12; ++i) {
      k.data[i] = static_cast<float>(i);
      v.data[i] = static_cast<float>(-i);
    }
    kv.size = sizeof kv;
    kv.page_tokens = 2;
    kv.k_pages = &k.t;
    kv.v_pages = &v.t;
    kv.block_table = &table.t;
    kv.lengths = &lengths.t;
    args.size = sizeof args;
    args.batch = 2;
    args.q = &q.t;
    args.rows = &rows.t;
    args.kv = &kv;
  }
  std::pair<ds_code, std::string> made() const {
    return outcome([&] { (void)attention_view(args); });
  }

  Tensor<float> q{{3, 2, 2}, {}}, k{{3, 1, 2, 2}, {}}, v{{3, 1, 2, 2}, {}};
  Tensor<std::int32_t> rows{{3}, {0, 1, 3}}, table{{2, 2}, {2, 0, 1, -1}}, lengths{{2}, {3, 2}};
  ds_kv_view kv{};
  ds_attn_args args{};
};

TEST_F(AttentionView, FindsPositionsInTheirPages) {
  const attention_view view(args);
  EXPECT_THAT((std::array{view.sequence_of(0), view.sequence_of(1), view.sequence_of(2)}),
              ElementsAre(0, 1, 1));
  EXPECT_THAT((std::array{view.position(0, 0), view.position(1, 1), view.position(1, 2)}),
              ElementsAre(2, 0, 1));
  float out[2];
  view.key(0, 1, 1, out);  // page 2, second token
  EXPECT_THAT(out, ElementsAre(10, 11));
  view.value(0, 0, 2, out);  // page 0, first token
  EXPECT_THAT(out, ElementsAre(0, -1));
  view.key(1, 0, 1, out);  // page 1, second token
  EXPECT_THAT(out, ElementsAre(6, 7));
}

TEST_F(AttentionView, ReadsBf16Pages) {
  Tensor<bf16> half({3, 1, 2, 2}, std::vector<bf16>(12, bf16{0x3fc0}));  // 1.5
  kv.k_pages = &half.t;
  float out[2];
  attention_view(args).key(0, 0, 0, out);
  EXPECT_THAT(out, ElementsAre(1.5f, 1.5f));
}

TEST_F(AttentionView, AnEmptySequenceHasNoRows) {
  rows.data = {0, 0, 3};
  lengths.data = {3, 3};
  table.data = {2, 0, 1, 0};
  const attention_view view(args);
  EXPECT_EQ(view.sequence_of(0), 1);
  EXPECT_EQ(view.position(1, 2), 2);
}

TEST_F(AttentionView, RefusesWhatDoesNotFitTogether) {
  EXPECT_EQ(made().first, DS_OK);
  lengths.data[0] = 5;
  EXPECT_EQ(made().second, "lengths[0]: 5 keys with 1 rows and 2 pages");
  lengths.data = {3, 1};
  EXPECT_EQ(made().second, "lengths[1]: 1 keys with 2 rows and 2 pages");
  lengths.data = {3, 2};
  rows.data = {0, 2, 1};
  EXPECT_THAT(made().second, HasSubstr("not ascending"));
  rows.data = {0, 1, 3};
  kv.k_scale = &q.t;
  EXPECT_EQ(made().first, DS_E_UNSUPPORTED);
  kv.k_scale = nullptr;
  v.shape[3] = 1;
  EXPECT_EQ(made().first, DS_E_SHAPE);
  v.shape[3] = 2;
  const ds_train_view train{};
  args.train = &train;
  EXPECT_THAT(made().second, HasSubstr("exactly one"));
  args.train = nullptr;
  args.kv = nullptr;
  EXPECT_EQ(made().first, DS_E_ARG);
}

TEST_F(AttentionView, RefusesAPageThatIsNotThere) {
  float out[2];
  for (const std::int32_t page : {-1, 3}) {
    table.data[1] = page;
    EXPECT_EQ(outcome([&] { attention_view(args).key(0, 0, 2, out); }).second,
              "block_table: page " + std::to_string(page) + " of 3");
  }
}

}  // namespace
