// SPDX-License-Identifier: Apache-2.0
// The quantizers int8 and int4 as files, through their tables: what they promise in format(), the
// fused linear, fake-quant and its gradient, and what they say to calls that make no sense.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "ds/plugin.h"
#include "ds/status.h"
#include "kernels/pool.h"
#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

using testing::HasSubstr;

struct Module {
  std::string name;
  int64_t group;
};

struct Matrix {
  int64_t shape[2], strides[2];
  ds_tensor tensor{};
  Matrix(const float* data, int64_t n, int64_t k) : shape{n, k}, strides{k, 1} {
    tensor.data = const_cast<float*>(data);
    tensor.device = {DS_DEV_CPU, 0};
    tensor.ndim = 2;
    tensor.dtype = {DS_FLOAT, 32, 1};
    tensor.shape = shape;
    tensor.strides = strides;
    tensor.bytes = static_cast<uint64_t>(n * k) * sizeof(float);
  }
  Matrix(const Matrix&) = delete;
};

class QuantizerTest : public testing::TestWithParam<Module> {
 protected:
  void SetUp() override {
    const std::string path = std::string(DS_MODULES_DIR) + "/quantizer_" + GetParam().name + ".so";
    void* file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // for the life of the program
    ASSERT_NE(file, nullptr) << dlerror();
    const auto entry = reinterpret_cast<ds_plugin_entry_fn>(dlsym(file, DS_ENTRY_NAME));
    ASSERT_NE(entry, nullptr);
    host_.size = sizeof host_;
    host_.abi_minor = DS_ABI_MINOR;
    host_.config_int = [](const ds_config* c, const char* key, int64_t* out) -> ds_code {
      if (std::string(key) != "group") return DS_E_CONFIG;
      *out = *reinterpret_cast<const int64_t*>(c);
      return DS_OK;
    };
    ASSERT_EQ(entry(&host_, &plugin_, &st_), DS_OK);
    component_ = plugin_->components[0];
    ASSERT_EQ(create(GetParam().group), DS_OK) << text();
    table_ = static_cast<const ds_quantizer*>(component_->table);
    call_.size = sizeof call_;
    call_.parallel = pool_.engine();
  }
  void TearDown() override {
    if (instance_ != nullptr) component_->ops->destroy(instance_);
  }
  ds_code create(int64_t group) {
    return component_->create(&host_, reinterpret_cast<const ds_config*>(&group), {DS_DEV_CPU, 0},
                              &instance_, &st_);
  }
  std::string text() const { return {st_.text, st_.len}; }

  ds_qformat format(int64_t n, int64_t k) {
    ds_qformat f{};
    f.size = sizeof f;
    EXPECT_EQ(table_->format(instance_, n, k, &f, &st_), DS_OK) << text();
    return f;
  }

  struct Weight {
    ds_qformat format;
    std::shared_ptr<char> packed, scales;
    ds_qweight view{};
  };
  ds_code observe(const std::string& name, const Floats& x, int64_t k) {
    const Matrix inputs(x.data(), static_cast<int64_t>(x.size()) / k, k);
    return table_->observe(instance_, &call_, {name.data(), name.size()}, &inputs.tensor, &st_);
  }
  std::unique_ptr<Weight> quantize(const Floats& w, int64_t n, int64_t k,
                                   const std::string& name = {}) {
    auto out = std::make_unique<Weight>();
    out->format = format(n, k);
    out->packed = aligned(static_cast<int64_t>(out->format.packed_bytes));
    out->scales = aligned(static_cast<int64_t>(out->format.scale_bytes));
    out->view.size = sizeof out->view;
    out->view.n = n, out->view.k = k;
    out->view.format = &out->format;
    out->view.packed = out->packed.get();
    out->view.scales = out->scales.get();
    const Matrix from(w.data(), n, k);
    EXPECT_EQ(table_->quantize(instance_, &call_, {name.data(), name.size()}, &from.tensor,
                               &out->view, &st_),
              DS_OK)
        << text();
    return out;
  }
  Floats dequantize(const Weight& q) {
    Floats out(static_cast<size_t>(q.view.n * q.view.k), NAN);
    const Matrix to(out.data(), q.view.n, q.view.k);
    EXPECT_EQ(table_->dequantize(instance_, &call_, &q.view, &to.tensor, &st_), DS_OK) << text();
    return out;
  }
  std::vector<char> prepare(const ds_qformat& f, const Floats& x, int64_t rows, int64_t k) {
    ds_plan plan{};
    plan.size = sizeof plan;
    EXPECT_EQ(table_->plan(instance_, &f, rows, k, &plan, &st_), DS_OK) << text();
    std::vector<char> out(plan.prepared_bytes);
    EXPECT_EQ(table_->prepare(instance_, &call_, &f, rows, k, x.data(), k, out.data(), &st_),
              DS_OK);
    return out;
  }

  ds_host host_{};
  ds_status st_{};
  const ds_plugin* plugin_ = nullptr;
  const ds_component* component_ = nullptr;
  const ds_quantizer* table_ = nullptr;
  ds_instance* instance_ = nullptr;
  Pool pool_{2};
  ds_call call_{};
};

TEST_P(QuantizerTest, SaysWhatItIs) {
  EXPECT_EQ(std::string(plugin_->id.ptr, plugin_->id.len),
            "org.driftstone.quantizer-" + GetParam().name);
  EXPECT_EQ(std::string(component_->name.ptr, component_->name.len), GetParam().name);
  EXPECT_EQ(component_->kind, static_cast<uint32_t>(DS_KIND_QUANTIZER));
  EXPECT_EQ(component_->caps, static_cast<uint64_t>(DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_REENTRANT |
                                                    DS_CAP_DETERMINISTIC | DS_CAP_OUT_OF_PROCESS));
  const ds_qformat f = format(576, 1536);
  EXPECT_EQ(f.group, static_cast<uint32_t>(GetParam().group));
  EXPECT_GE(f.layout_id, static_cast<uint32_t>(DS_PACK_OWN));
  EXPECT_EQ(f.packed_bytes, 576u * 1536u * f.bits / 8);
}

TEST_P(QuantizerTest, RefusesAnotherGroup) {
  component_->ops->destroy(instance_);
  instance_ = nullptr;
  EXPECT_EQ(create(64), DS_E_CONFIG);
  EXPECT_EQ(text(), "group: 64, expected 0 or 32");
}

TEST_P(QuantizerTest, KeepsEightBitsForAHead) {
  EXPECT_EQ(format(12 * 64, 64).bits, GetParam().name == "int8" ? 8u : 4u);
  EXPECT_EQ(format(12 * 64 + 1, 64).bits, 8u);
  EXPECT_EQ(format(12 * 64 + 1, 64).layout_id == format(1, 64).layout_id,
            GetParam().name == "int8");
}

TEST_P(QuantizerTest, KeepsItsPromiseAndFakeQuantGivesTheSame) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{50, 576}, {7, 45}, {500, 33}}) {
    const Floats w = random_floats(static_cast<size_t>(n * k), 11);
    const auto q = quantize(w, n, k);
    const Floats got = dequantize(*q);
    for (int64_t r = 0; r < n; ++r) {
      float largest = 0, error = 0;
      for (int64_t j = r * k; j < (r + 1) * k; ++j) {
        largest = std::max(largest, std::fabs(w[j]));
        error = std::max(error, std::fabs(w[j] - got[j]));
      }
      EXPECT_LE(error, q->format.rel_tol * largest) << "row " << r;
    }
    Floats fake(w.size(), NAN);
    const Matrix from(w.data(), n, k), to(fake.data(), n, k);
    ASSERT_EQ(table_->fake_quant(instance_, &call_, &from.tensor, &to.tensor, &st_), DS_OK);
    EXPECT_EQ(fake, got);
  }
}

/// Two hidden causes move all inputs, so that weights can make up for each other.
Floats two_causes(int64_t rows, int64_t k, uint32_t seed) {
  const Floats mix = random_floats(static_cast<size_t>(2 * k), 1),
               causes = random_floats(static_cast<size_t>(rows * 2), seed);
  Floats x = random_floats(static_cast<size_t>(rows * k), seed + 1);
  for (int64_t i = 0; i < rows * k; ++i) {
    x[i] = 0.1f * x[i] + causes[i / k * 2] * mix[i % k] + causes[i / k * 2 + 1] * mix[k + i % k];
  }
  return x;
}

TEST_P(QuantizerTest, MakesUpForWhatItsInputsShow) {
  if (GetParam().name == "int8") {
    EXPECT_EQ(table_->observe, nullptr);  // it loses next to nothing
    return;
  }
  const int64_t n = 24, k = 96;
  const Floats w = random_floats(static_cast<size_t>(n * k), 21), x = two_causes(128, k, 22),
               other = two_causes(128, k, 33), y = random_floats(static_cast<size_t>(50 * k), 44);
  const auto codes = [&](const std::string& name) {
    const auto q = quantize(w, n, k, name);
    return std::string(q->packed.get(), q->format.packed_bytes) +
           std::string(q->scales.get(), q->format.scale_bytes);
  };
  const auto error = [&](const std::string& name) {
    const Floats back = dequantize(*quantize(w, n, k, name));
    double squares = 0;
    for (int64_t r = 0; r < 128; ++r) {
      for (int64_t o = 0; o < n; ++o) {
        double lost = 0;
        for (int64_t i = 0; i < k; ++i)
          lost += (double{w[o * k + i]} - double{back[o * k + i]}) * double{x[r * k + i]};
        squares += lost * lost;
      }
    }
    return squares;
  };
  const double before = error("q");
  const std::string plain = codes("q");
  for (const char* name : {"q", "k"}) ASSERT_EQ(observe(name, x, k), DS_OK) << text();
  EXPECT_LT(error("q"), 0.3 * before);
  EXPECT_EQ(codes("q"), plain) << "what was shown is used once";

  // q and k go the same way for a time, then apart; each has its own history.
  ASSERT_EQ(observe("q", x, k), DS_OK);  // k still has it from above
  const std::string of_x = codes("k");
  EXPECT_EQ(codes("q"), of_x);
  for (const char* name : {"q", "k", "v"}) ASSERT_EQ(observe(name, x, k), DS_OK);
  for (const char* name : {"k", "v"}) ASSERT_EQ(observe(name, other, k), DS_OK);
  ASSERT_EQ(observe("v", y, k), DS_OK);
  EXPECT_EQ(codes("q"), of_x);
  const std::string of_k = codes("k"), of_v = codes("v");
  EXPECT_NE(of_k, of_x);
  EXPECT_NE(of_k, of_v);
  for (const Floats* shown : {&x, &other}) ASSERT_EQ(observe("alone", *shown, k), DS_OK);
  EXPECT_EQ(codes("alone"), of_k);

  // What q has taken already is not what k ends with.
  for (const char* name : {"q", "k"}) ASSERT_EQ(observe(name, x, k), DS_OK);
  EXPECT_EQ(codes("q"), of_x);
  ASSERT_EQ(observe("k", other, k), DS_OK);
  EXPECT_EQ(codes("k"), of_k);

  Floats bad = x;
  bad[5] = NAN;
  EXPECT_EQ(observe("q", bad, k), DS_E_NUMERIC);
  EXPECT_EQ(text(), "q: input 5 is nan, expected at most 1e15 in size");
  EXPECT_EQ(codes("q"), plain);
}

/// The range of a group is that of its codes: what they give at both ends, and half a step more.
/// Here it is found from outside: the weights that fake_quant moved by more than half of its widest
/// step.
TEST_P(QuantizerTest, GradientPassesStraightAndStopsOutsideTheRange) {
  const int64_t n = 16, k = 64;
  Floats w = random_floats(static_cast<size_t>(n * k), 12);
  Floats wq(w.size()), dwq = random_floats(w.size(), 13), dw = random_floats(w.size(), 14);
  const Floats before = dw;
  const Matrix w_t(w.data(), n, k), wq_t(wq.data(), n, k), dwq_t(dwq.data(), n, k),
      dw_t(dw.data(), n, k);
  ASSERT_EQ(table_->fake_quant(instance_, &call_, &w_t.tensor, &wq_t.tensor, &st_), DS_OK);
  ASSERT_EQ(table_->fake_quant_backward(instance_, &call_, &w_t.tensor, &dwq_t.tensor, &dw_t.tensor,
                                        &st_),
            DS_OK);
  const int64_t span = GetParam().group == 0 ? k : GetParam().group;
  int64_t stopped = 0;
  for (int64_t g = 0; g < n * k / span; ++g) {
    const auto [low, high] = std::minmax_element(&wq[g * span], &wq[g * span] + span);
    // Neighbouring codes may all be taken or not; the smallest distance between two is a step.
    Floats sorted(&wq[g * span], &wq[g * span] + span);
    std::sort(sorted.begin(), sorted.end());
    float step = INFINITY;
    for (size_t i = 1; i < sorted.size(); ++i) {
      if (sorted[i] - sorted[i - 1] > 1e-5f) step = std::min(step, sorted[i] - sorted[i - 1]);
    }
    for (int64_t j = g * span; j < (g + 1) * span; ++j) {
      const float past = std::max(*low - w[j], w[j] - *high) - step / 2;
      if (past > 1e-3f * step) {
        EXPECT_EQ(dw[j], before[j]);
        ++stopped;
      } else if (past < -1e-3f * step) {
        EXPECT_EQ(dw[j], before[j] + dwq[j]);
      }
    }
  }
  if (GetParam().name == "int4" && GetParam().group == 32) {
    EXPECT_GT(stopped, 0);
  }
}

std::shared_ptr<char> panels(const Floats& m, int64_t n, int64_t k) {
  const Ops& ops = cpu_ops(best_cpu_isa());
  auto out = aligned(ops.packed_bytes(WeightFormat::kF32, n, k));
  ops.pack({}, WeightFormat::kF32, n, k, m.data(), false, out.get());
  return out;
}

/// Bias, low-rank parts and epilogue in one call, against double precision on the dequantized
/// weights; the input is whole numbers of a step, so that its own rounding to 8 bits is exact.
TEST_P(QuantizerTest, LinearDoesAllThatItSaysItFuses) {
  const int64_t rows = 5, n = 40, k = 96;
  std::mt19937 random(21);
  Floats x(static_cast<size_t>(rows * k));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = i % 32 == 0 ? 127.0f / 64 : (static_cast<float>(random() % 255) - 127.0f) / 64;
  const Floats w0 = random_floats(static_cast<size_t>(n * k), 22, 0.1f),
               w1 = random_floats(static_cast<size_t>(n * k), 23, 0.1f),
               bias = random_floats(static_cast<size_t>(n), 24),
               a = random_floats(static_cast<size_t>(kLoraRank * k), 25, 0.1f),
               b = random_floats(static_cast<size_t>(n * kLoraRank), 26, 0.1f),
               residual = random_floats(static_cast<size_t>(rows * n), 27);
  const auto q0 = quantize(w0, n, k), q1 = quantize(w1, n, k);
  const auto a_packed = panels(a, kLoraRank, k), b_packed = panels(b, n, kLoraRank);
  Matrix a_t(reinterpret_cast<float*>(a_packed.get()), kLoraRank, k),
      b_t(reinterpret_cast<float*>(b_packed.get()), n, kLoraRank);
  a_t.tensor.packing = b_t.tensor.packing = DS_PACK_PANEL_F32;
  b_t.tensor.bytes =
      static_cast<uint64_t>(cpu_ops(best_cpu_isa()).packed_bytes(WeightFormat::kF32, n, kLoraRank));
  const ds_lora_pair pair{sizeof(ds_lora_pair), 0.5f, &a_t.tensor, &b_t.tensor};
  const ds_lora_pair none{sizeof(ds_lora_pair), 0.0f, nullptr, nullptr};
  const ds_lora_pair* pairs[] = {&pair, &none};
  const int32_t slots[] = {-1, 0, 0, -1, 0};
  Floats t(static_cast<size_t>(2 * rows * kLoraRank));
  const ds_lora_slots lora{sizeof lora, 1, slots, pairs, t.data()};

  const std::vector<char> prepared = prepare(q0->format, x, rows, k);
  Floats y(static_cast<size_t>(rows * n), NAN);
  float* ys[] = {y.data(), nullptr};
  const int64_t strides[] = {n, n};
  const ds_qweight* weights[] = {&q0->view, &q1->view};
  const float* biases[] = {bias.data(), nullptr};
  ds_linear_args args{};
  args.size = sizeof args;
  args.rows = rows;
  args.x = x.data(), args.x_stride = k, args.x_prepared = prepared.data();
  args.weights = weights, args.bias = biases;
  args.y = ys, args.y_stride = strides;
  args.residual = residual.data();
  args.lora = &lora;

  Vec low = reference::matmul(rows, kLoraRank, k, as_double(x), as_double(a));
  Vec first = reference::matmul(rows, n, k, as_double(x), as_double(dequantize(*q0)));
  const Vec second = reference::matmul(rows, n, k, as_double(x), as_double(dequantize(*q1)));
  const Vec up = reference::matmul(rows, n, kLoraRank, low, as_double(b));
  for (int64_t i = 0; i < rows * n; ++i)
    first[i] += double{bias[i % n]} + (slots[i / n] == 0 ? 0.5 * up[i] : 0.0);

  Vec expected = first;
  for (int64_t i = 0; i < rows * n; ++i) expected[i] += double{residual[i]};
  args.n_weights = 1;
  args.epilogue = DS_LINEAR_RESIDUAL;
  ASSERT_EQ(table_->linear(instance_, &call_, &args, &st_), DS_OK) << text();
  EXPECT_LT(error_of(y, expected), 2e-5);

  for (int64_t i = 0; i < rows * n; ++i) expected[i] = reference::silu(first[i]) * second[i];
  args.n_weights = 2;
  args.epilogue = DS_LINEAR_SWIGLU;
  ASSERT_EQ(table_->linear(instance_, &call_, &args, &st_), DS_OK) << text();
  EXPECT_LT(error_of(y, expected), 2e-5);

  const ds_lora_pair swapped{sizeof swapped, 0.5f, &b_t.tensor, &a_t.tensor};
  pairs[0] = &swapped;
  EXPECT_EQ(table_->linear(instance_, &call_, &args, &st_), DS_E_SHAPE);
  EXPECT_EQ(text(), "lora a: [40, 16], expected [16, 96]");
}

TEST_P(QuantizerTest, StructsCutAtEverySizeAreRefusedOrRight) {
  const int64_t n = 16, k = 32;
  const Floats w = random_floats(static_cast<size_t>(n * k), 31);
  const Floats x = random_floats(static_cast<size_t>(k), 32);
  const auto q = quantize(w, n, k);
  const std::vector<char> prepared = prepare(q->format, x, 1, k);
  Floats y(static_cast<size_t>(n)), expected;
  float* ys[] = {y.data()};
  const int64_t strides[] = {n};
  const ds_qweight* weights[] = {&q->view};
  ds_linear_args args{};
  args.size = sizeof args;
  args.rows = 1;
  args.x = x.data(), args.x_stride = k, args.x_prepared = prepared.data();
  args.weights = weights;
  args.y = ys, args.y_stride = strides;
  args.n_weights = 1;
  ASSERT_EQ(table_->linear(instance_, &call_, &args, &st_), DS_OK) << text();
  expected = y;
  for (uint32_t size = 8; size <= sizeof args + 64; ++size) {
    std::vector<char> room(sizeof args + 64, '\x7f');  // beyond `size` lies nonsense
    std::memcpy(room.data(), &args, std::min<size_t>(size, sizeof args));
    std::memcpy(room.data(), &size, sizeof size);
    std::fill(y.begin(), y.end(), NAN);
    const auto* cut = reinterpret_cast<const ds_linear_args*>(room.data());
    const ds_code code = table_->linear(instance_, &call_, cut, &st_);
    if (size >= sizeof args) {
      EXPECT_EQ(code, DS_OK) << size;
    }
    if (code == DS_OK && DS_SEES(ds_linear_args, cut, rows) && args.rows > 0 &&
        size >= DS_SIZE_TO(ds_linear_args, n_weights)) {
      EXPECT_EQ(y, expected) << size;
    }
  }
  ds_qweight view = q->view;
  for (uint32_t size = 8; size < sizeof view; size += 8) {  // whole fields
    view.size = size;
    weights[0] = &view;
    const ds_code code = table_->linear(instance_, &call_, &args, &st_);
    if (size < DS_SIZE_TO(ds_qweight, scales)) {
      EXPECT_NE(code, DS_OK) << size;
      EXPECT_NE(text(), "") << size;
    }
  }
  for (uint32_t size = 0; size <= sizeof(ds_qformat) + 16; size += 4) {
    std::vector<unsigned char> room(sizeof(ds_qformat) + 16, 0xab);
    std::memcpy(room.data(), &size, sizeof size);
    auto* out = reinterpret_cast<ds_qformat*>(room.data());
    ASSERT_EQ(table_->format(instance_, n, k, out, &st_), size < 4 ? DS_E_ARG : DS_OK);
    for (size_t i = std::max<size_t>(size, 4); i < room.size(); ++i) {
      EXPECT_EQ(room[i], 0xab) << "byte " << i << " of " << size;
    }
  }
}

TEST_P(QuantizerTest, SaysWhatIsWrong) {
  const int64_t n = 16, k = 32;
  Floats w = random_floats(static_cast<size_t>(n * k), 41);
  const auto q = quantize(w, n, k);
  const Matrix small(w.data(), n, k - 1), whole(w.data(), n, k);
  EXPECT_EQ(table_->quantize(instance_, &call_, {"down", 4}, &small.tensor, &q->view, &st_),
            DS_E_SHAPE);
  EXPECT_EQ(text(), "down: [16, 31], expected [16, 32]");
  w[5] = NAN;
  EXPECT_EQ(table_->quantize(instance_, &call_, {"down", 4}, &whole.tensor, &q->view, &st_),
            DS_E_NUMERIC);
  EXPECT_THAT(text(), HasSubstr("down: weight 5 is nan"));
  ds_qformat other = q->format;
  other.layout_id += 1;
  ds_qweight view = q->view;
  view.format = &other;
  EXPECT_EQ(table_->dequantize(instance_, &call_, &view, &whole.tensor, &st_), DS_E_UNSUPPORTED);
  EXPECT_THAT(text(), HasSubstr("weight: layout"));
  const uint32_t stop = 1;
  call_.cancel = &stop;
  w[5] = 0;
  EXPECT_EQ(table_->quantize(instance_, &call_, {}, &whole.tensor, &q->view, &st_), DS_E_CANCELLED);
}

INSTANTIATE_TEST_SUITE_P(All, QuantizerTest,
                         testing::Values(Module{"int8", 32}, Module{"int8", 0}, Module{"int4", 32},
                                         Module{"int4", 0}),
                         [](const auto& info) {
                           return info.param.name +
                                  (info.param.group == 0 ? "_per_channel" : "_group_32");
                         });

}  // namespace
}  // namespace ds::test
