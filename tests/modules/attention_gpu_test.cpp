// SPDX-License-Identifier: Apache-2.0
// The attention modules on a GPU: serving in chunks and token by token, and training, agree with
// the CPU; and their calls are pure functions of the stream: recorded once and replayed with other
// lengths, pages and values they do what direct calls do. Skipped where there is no GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "daemon/reference_model.h"
#include "engine/bf16.h"
#include "engine/step_recordings.h"
#include "tests/kernels/cases.h"

namespace ds {
namespace {

constexpr int64_t kHeads = 6, kKvHeads = 2, kDim = 64, kPages = 120;
constexpr float kScale = 0.125f;
constexpr uint64_t kSeed = 20261127;  // of all random numbers here

struct Place {
  const Ops* ops;
  OpContext context;

  Buffer room(size_t bytes) const {
    Buffer out = Buffer::make(*ops, bytes).value();
    ops->zero(context, out.data(), static_cast<int64_t>(bytes));
    return out;
  }
  template <typename T>
  void put(const Buffer& to, const std::vector<T>& x) const {
    ops->upload(context, to.data(), x.data(), static_cast<int64_t>(x.size() * sizeof(T)));
  }
  template <typename T>
  Buffer sent(const std::vector<T>& x) const {
    Buffer out = room(x.size() * sizeof(T));
    put(out, x);
    return out;
  }
  std::vector<float> floats(const Buffer& from, size_t n) const {
    std::vector<float> out(n);
    ops->download(context, out.data(), from.data(), static_cast<int64_t>(n * sizeof(float)));
    const char* failed = ops->finish(context);
    EXPECT_EQ(failed, nullptr) << failed;
    return out;
  }
};

/// Multiples of 1/4, so that sums of squares are exact and both devices choose the same keys.
std::vector<float> coarse(Rng& rng, int64_t n) {
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = static_cast<float>(std::round(12 * rng.uniform() - 6)) / 4;
  return out;
}

std::shared_ptr<const Attention> attention_of(const std::string& name, const Json& config) {
  const auto found = test::module_of(DS_KIND_ATTENTION, name);
  const std::shared_ptr<const PluginLibrary> shared(found, &found->library());
  auto made = PluginInstance::create(shared, found->component(), config);
  DS_CHECK(made.ok());
  return std::make_shared<Attention>(*made, 1);
}

struct Variant {
  const char* name;
  Json config;
};
std::vector<Variant> variants() {
  return {{"dense", Json::object()},
          {"window-global", Json::object()},
          {"window-global", {{"window", 8}, {"globals", 6}, {"sinks", 2}}},
          {"window-global", {{"window", 70}, {"globals", 40}}}};
}

class AttentionOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    const test::TestedBackend& last = test::tested_backends().back();
    if (last.ops->host_memory) GTEST_SKIP() << "no GPU";
    gpu = {last.ops, last.context};
  }
  Place gpu{}, cpu{&cpu_ops(best_cpu_isa()), {serial_parallel()}};
};

/// Three sequences of a model of one layer, on one device.
class Served {
 public:
  Served(const Place& place, const Variant& v, KvDtype dtype)
      : place_(place),
        attention_(attention_of(v.name, v.config)),
        recordings_(*place.ops, place.context) {
    Rng rng(kSeed);
    const int64_t n = kPages * kKvHeads * kKvPageTokens * kDim;
    for (Buffer* pages : {&k_, &v_}) {
      const std::vector<float> values = coarse(rng, n);
      if (dtype == KvDtype::kF32) {
        *pages = place.sent(values);
      } else {
        std::vector<uint16_t> bits;
        for (const float x : values) bits.push_back(to_bf16(x));
        *pages = place.sent(bits);
      }
    }
    kv_ = {dtype, kKvHeads, kDim, k_.data(), v_.data()};
    extra_ = place.room(static_cast<size_t>(kPages * kStride));
    for (int32_t p = 0; p < kPages; ++p) pages_.push_back((p * 37 + 11) % kPages);
  }

  /// The next `rows` of each sequence; `recorded` after two plain steps of the same sizes.
  std::vector<float> step(const std::vector<int64_t>& rows, bool recorded) {
    std::vector<SequenceSpan> spans;
    int64_t row0 = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      spans.push_back({row0, rows[i], done_[i], pages_.data() + i * kPages / 3});
      done_[i] += rows[i];
      row0 += rows[i];
    }
    const std::vector<int32_t> ids(static_cast<size_t>(row0));
    const Ops& ops = *place_.ops;
    Status done = tables_.set(ops, place_.context, ids, spans, ids, {}, true);
    Rng rng(kSeed + static_cast<uint64_t>(done_[0]));
    const auto n = static_cast<size_t>(row0 * kHeads * kDim);
    if (q_.bytes() < n * 4) {
      for (Buffer* b : {&q_, &out_, &out_16_}) *b = place_.room(n * 4);
    }
    place_.put(q_, coarse(rng, static_cast<int64_t>(n)));
    const auto enqueue = [&] {
      Status begun =
          serving_.begin(*attention_, ops, place_.context, kHeads, kScale, tables_, kv_, kPages);
      EXPECT_LE(serving_.page_extra_bytes(), kStride);
      if (!begun.ok()) return begun;
      const auto layer = [&](const PreparedRows& out_16) {
        return serving_.layer(0, q_.as<float>(), out_.as<float>(), out_16, kv_, extra_.data(),
                              kStride);
      };
      if (ops.rows_side_by_side) begun = layer({.data = out_16_.data()});
      return begun.ok() ? layer({}) : begun;
    };
    if (done.ok()) {
      done = recorded ? recordings_.run({static_cast<uint64_t>(row0)}, enqueue) : enqueue();
    }
    EXPECT_TRUE(done.ok()) << done.message();
    const std::vector<float> out = place_.floats(out_, n);
    if (ops.rows_side_by_side) {
      const Buffer unpacked = place_.room(n * 4);
      ops.unpack(place_.context, {WeightFormat::kBF16, row0, kHeads * kDim, out_16_.data()},
                 unpacked.as<float>());
      std::vector<float> rounded = out;
      for (float& x : rounded) x = round_to_bf16(x);
      EXPECT_EQ(place_.floats(unpacked, n), rounded);
    }
    return out;
  }

 private:
  static constexpr int64_t kStride = 1024;  // more than is planned: rows need not touch

  Place place_;
  std::shared_ptr<const Attention> attention_;
  StepRecordings recordings_;
  Buffer k_, v_, extra_, q_, out_, out_16_;
  KvView kv_;
  std::vector<int32_t> pages_;
  std::vector<int64_t> done_ = {0, 0, 0};
  StepTables tables_;
  ServingAttention serving_;
};

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::abs(double{a[i]} - b[i]);
    if (!(d <= worst)) worst = d;
  }
  return a.size() == b.size() ? worst : INFINITY;
}

TEST_F(AttentionOnGpu, ServesAsTheCpuDoesAndWhenItIsReplayed) {
  for (const Variant& v : variants()) {
    for (const KvDtype dtype : {KvDtype::kBF16, KvDtype::kF32}) {
      SCOPED_TRACE(std::string(v.name) + v.config.dump() +
                   (dtype == KvDtype::kF32 ? " f32" : " bf16"));
      Served direct(gpu, v, dtype), replayed(gpu, v, dtype), host(cpu, v, dtype);
      // Values are up to 1.5; a prompt over BF16 pages rounds q and the factors.
      const double tolerance = dtype == KvDtype::kF32 ? 1e-4 : 2e-2;
      const auto compare = [&](const std::vector<int64_t>& rows, bool recorded) {
        const std::vector<float> out = direct.step(rows, false), wanted = host.step(rows, false);
        EXPECT_LE(difference(out, wanted), tolerance) << rows[0] << " rows";
        const std::vector<float> again = replayed.step(rows, recorded);
        EXPECT_EQ(std::memcmp(out.data(), again.data(), out.size() * sizeof(float)), 0)
            << rows[0] << " rows, replayed";
      };
      compare({300, 33, 520}, false);
      for (int i = 0; i < 4; ++i) compare({40, 7, 50}, true);
      for (int i = 0; i < 40; ++i) compare({1, 1, 1}, true);
      compare({1, 60, 3}, false);
      for (int i = 0; i < 4; ++i) compare({1, 1, 1}, true);
      if (testing::Test::HasFailure()) return;
    }
  }
}

/// One batch of training: out, dq, dk, dv.
class Trained {
 public:
  Trained(const Place& place, const Variant& v, WeightFormat operands)
      : place_(place), recordings_(*place.ops, place.context) {
    const std::vector<TrainingAttention::Sequence> sequences = {{70, 21}, {130, 0}, {1, 64}};
    const Status begun = pass_.begin(attention_of(v.name, v.config), *place.ops, place.context,
                                     kHeads, kKvHeads, kDim, kScale, sequences, kRows, operands);
    EXPECT_TRUE(begun.ok()) << begun.message();
    for (Buffer* b : {&q_, &out_, &dout_, &dq_}) *b = place.room(kRows * kHeads * kDim * 4);
    for (Buffer* b : {&k_, &v_, &dk_, &dv_, &prefix_k_, &prefix_v_})
      *b = place.room(kRows * kKvHeads * kDim * 4);
    saved_ = place.room(pass_.saved_bytes());
  }

  std::vector<float> step(uint64_t seed, bool recorded) {
    Rng rng(seed);
    for (const Buffer* b : {&q_, &dout_}) place_.put(*b, coarse(rng, kRows * kHeads * kDim));
    for (const Buffer* b : {&k_, &v_, &prefix_k_, &prefix_v_})
      place_.put(*b, coarse(rng, kRows * kKvHeads * kDim));
    const TrainingAttention::Pointers at{q_.as<float>(),   k_.as<float>(),  v_.as<float>(),
                                         out_.as<float>(), saved_.data(),   dout_.as<float>(),
                                         dq_.as<float>(),  dk_.as<float>(), dv_.as<float>()};
    const float *pk = prefix_k_.as<float>(), *pv = prefix_v_.as<float>();
    const std::vector<const float*> prefix_k = {pk, nullptr, pk}, prefix_v = {pv, nullptr, pv};
    const auto enqueue = [&] {
      const Status forward = pass_.forward(0, at, prefix_k, prefix_v);
      return forward.ok() ? pass_.backward(0, at, prefix_k, prefix_v) : forward;
    };
    const Status done = recorded ? recordings_.run({1}, enqueue) : enqueue();
    EXPECT_TRUE(done.ok()) << done.message();
    std::vector<float> all;
    for (const Buffer* b : {&out_, &dq_, &dk_, &dv_}) {
      const std::vector<float> part = place_.floats(*b, b->bytes() / sizeof(float));
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }

 private:
  static constexpr int64_t kRows = 201;

  Place place_;
  StepRecordings recordings_;
  TrainingAttention pass_;
  Buffer q_, k_, v_, prefix_k_, prefix_v_, out_, dout_, dq_, dk_, dv_, saved_;
};

TEST_F(AttentionOnGpu, TrainsAsTheCpuDoesAndWhenItIsReplayed) {
  for (const Variant& v : variants()) {
    for (const WeightFormat operands :
         {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kF16}) {
      const bool round = !is_f32(operands);
      SCOPED_TRACE(std::string(v.name) + v.config.dump() + " " +
                   std::to_string(static_cast<int>(operands)));
      Trained direct(gpu, v, operands), replayed(gpu, v, operands), host(cpu, v, operands);
      for (uint64_t i = 0; i < 4; ++i) {
        const std::vector<float> out = direct.step(kSeed + i, false);
        EXPECT_LE(difference(out, host.step(kSeed + i, false)), round ? 0.1 : 1e-3);
        const std::vector<float> again = replayed.step(kSeed + i, true);
        EXPECT_EQ(std::memcmp(out.data(), again.data(), out.size() * sizeof(float)), 0)
            << "replayed, " << i;
      }
    }
  }
}

}  // namespace
}  // namespace ds
