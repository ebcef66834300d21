// SPDX-License-Identifier: Apache-2.0
// Weights of 8 and 4 bits on every table of this machine, a GPU's among them: the promise of
// quantize, linear against double precision on the same codes, and the bits of a row alone and in
// company.
#include <cstdlib>
#include <numeric>

#include "kernels/pool.h"
#include "tests/kernels/quant_case.h"

namespace ds::test {
namespace {

constexpr float kLoraScale = 0.5f;
uint32_t random_seed() {
  const char* given = std::getenv("DS_SEED");
  const uint32_t seed = given != nullptr ? static_cast<uint32_t>(std::atoi(given)) : 7;
  std::printf("DS_SEED=%u\n", seed);
  return seed;
}

class QuantTest : public testing::TestWithParam<TestedBackend> {
 protected:
  const TestedBackend& at = GetParam();
  const QuantOps& quant = *at.quant;
};
#define DS_NEEDS_FEEDBACK() \
  if (quant.feedback_factor == nullptr) GTEST_SKIP() << at.ops->name << ": on a CPU alone"

/// Rows of every kind that has broken a quantizer: one row of each kind in turn.
Floats extreme_rows(int64_t n, int64_t k, uint32_t seed) {
  Floats w = random_floats(static_cast<size_t>(n * k), seed);
  std::mt19937 random(seed);
  for (int64_t r = 0; r < n; ++r) {
    float* row = &w[r * k];
    const auto any = static_cast<int64_t>(random() % static_cast<uint64_t>(k));
    switch (r % 11) {
      case 1:
        std::fill_n(row, k, 0.0f);
        break;
      case 2:
        row[any] = 1e6f;
        break;
      case 3:
        row[any] = -3e36f;
        break;
      case 4:
        for (int64_t j = 0; j < k; ++j) row[j] *= 1e-41f;
        break;
      case 5:
        for (int64_t j = 0; j < k; ++j) row[j] *= 1e-29f;
        break;
      case 6:
        std::fill_n(row, k, 0.37f);
        break;
      case 7:
        for (int64_t j = 0; j < k; ++j) row[j] = std::fabs(row[j]) + 5.0f;
        break;
      case 8:
        for (int64_t j = 0; j < k; ++j) row[j] = j % 2 == 0 ? 1e37f : -1e37f;
        break;
      case 9:
        std::fill_n(row, k, -0.0f);
        row[any] = -1.0f;
        break;
      case 10:
        for (int64_t j = 0; j < k; ++j) row[j] *= std::exp(4 * row[j]);
        break;
      default:
        break;
    }
  }
  return w;
}

TEST_P(QuantTest, KeepsItsPromiseOnRandomAndExtremeRows) {
  const uint32_t seed = random_seed();
  for (const QuantFormat f : kFormats) {
    for (const int64_t k : {1, 31, 33, 64, 576, 1000}) {
      const int64_t n = 37;
      const Floats w = extreme_rows(n, k, seed);
      const Floats got = Quantized(at, nullptr, f, n, k, w).weights(at);
      for (int64_t r = 0; r < n; ++r) {
        double largest = 0, error = 0;
        for (int64_t j = r * k; j < (r + 1) * k; ++j) {
          ASSERT_TRUE(std::isfinite(got[j])) << named(f) << " row " << r;
          largest = std::max(largest, std::fabs(double{w[j]}));
          error = std::max(error, std::fabs(double{w[j]} - double{got[j]}));
        }
        const double promise = largest < 1e-30 ? 1.0 : double{quant_rel_tol(f)};
        EXPECT_LE(error, promise * largest) << named(f) << " k " << k << " row " << r;
      }
    }
  }
}

/// Against the plain grid, 15 steps from the smallest to the largest weight of a group.
TEST_P(QuantTest, FourBitsFitBetterThanThePlainGrid) {
  std::mt19937 random(random_seed());
  std::normal_distribution<float> normal;
  const int64_t n = 32, k = 640;
  Floats w(static_cast<size_t>(n * k));
  for (float& v : w) v = normal(random);
  const Floats got = Quantized(at, nullptr, {4, 32}, n, k, w).weights(at);
  double squared = 0, plain = 0;
  for (size_t g = 0; g < w.size(); g += 32) {
    const auto [low, high] = std::minmax_element(&w[g], &w[g] + 32);
    const double step = (double{*high} - double{*low}) / 15;
    for (size_t j = g; j < g + 32; ++j) {
      const double u = std::nearbyint((double{w[j]} - double{*low}) / step);
      plain += std::pow(double{w[j]} - (double{*low} + u * step), 2);
      squared += std::pow(double{w[j]} - double{got[j]}, 2);
    }
  }
  std::printf("squared error %.3f of the plain grid's\n", squared / plain);
  EXPECT_LT(squared, 0.92 * plain);
}

/// Inputs that go together: a few hidden causes, mixed, and noise. [rows, k]
Floats related_inputs(int64_t rows, int64_t k, uint32_t seed) {
  constexpr int64_t kCauses = 9;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats mix(static_cast<size_t>(kCauses * k)), x(static_cast<size_t>(rows * k));
  for (float& v : mix) v = normal(random);
  for (int64_t r = 0; r < rows; ++r) {
    float cause[kCauses];
    for (float& c : cause) c = normal(random);
    for (int64_t j = 0; j < k; ++j) {
      float& v = x[static_cast<size_t>(r * k + j)] = 0.3f * normal(random);
      for (int64_t c = 0; c < kCauses; ++c) v += cause[c] * mix[static_cast<size_t>(c * k + j)];
    }
  }
  return x;
}

Floats gram_of(const Floats& x, int64_t k) {
  Vec sums(static_cast<size_t>(k * k));
  for (size_t at = 0; at < x.size(); at += static_cast<size_t>(k)) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j)
        sums[static_cast<size_t>(i * k + j)] += double{x[at + i]} * double{x[at + j]};
    }
  }
  return {sums.begin(), sums.end()};
}

/// What weights in codes do to the outputs of x: the sum of squared differences.
double output_error(const Floats& x, const Floats& w, const Floats& wq, int64_t n, int64_t k) {
  Vec difference(w.size());
  for (size_t i = 0; i < w.size(); ++i) difference[i] = double{w[i]} - double{wq[i]};
  const auto rows = static_cast<int64_t>(x.size()) / k;
  double error = 0;
  for (const double y : reference::matmul(rows, n, k, as_double(x), difference)) error += y * y;
  return error;
}

TEST_P(QuantTest, FeedbackFactorIsThatOfTheDampedSums) {
  DS_NEEDS_FEEDBACK();
  const uint32_t seed = random_seed();
  Pool three(3);
  for (const int64_t k : {1, 2, 31, 48, 49, 130, 200}) {
    const Floats gram = gram_of(related_inputs(k / 2 + 1, k, seed), k);  // of less than full rank
    double damping = 0;
    for (int64_t i = 0; i < k; ++i) damping += 0.01 * double{gram[i * k + i]} / double(k);
    Floats f(gram.size(), NAN), there(gram.size(), NAN);
    quant.feedback_factor({three.engine()}, k, gram.data(), f.data());
    cpu_quant_ops(CpuIsa::kScalar).feedback_factor({}, k, gram.data(), there.data());
    EXPECT_EQ(0, std::memcmp(f.data(), there.data(), f.size() * sizeof(float))) << "k " << k;
    const auto factor = [&](int64_t row, int64_t column) {  // of I + U
      return row == column ? 1.0 : double{f[static_cast<size_t>(column * k + row)]};
    };
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double got = 0;
        for (int64_t l = i; l < k; ++l) got += factor(i, l) * double{f[l * k + l]} * factor(j, l);
        const double expected = double{gram[i * k + j]} + (i == j ? damping : 0);
        EXPECT_NEAR(got, expected, 1e-3 * damping + 1e-5 * double{gram[i * k + i]})
            << "k " << k << " at " << i << ", " << j;
      }
    }
  }
  Floats nothing(9, 0), f(9, NAN);
  quant.feedback_factor({}, 3, nothing.data(), f.data());
  EXPECT_EQ(f[6], 0.0f);
  EXPECT_EQ(f[8], 1.0f);
}

TEST_P(QuantTest, FeedbackRoundsForTheInputsThatWereSeen) {
  DS_NEEDS_FEEDBACK();
  const uint32_t seed = random_seed();
  Pool two(2);
  for (const QuantFormat f : kFormats) {
    for (const int64_t k : {40, 161, 320}) {
      const int64_t n = 37;
      const Floats x = related_inputs(200, k, seed), gram = gram_of(x, k);
      const Floats w = random_floats(static_cast<size_t>(n * k), seed);
      Floats factor(gram.size());
      quant.feedback_factor({}, k, gram.data(), factor.data());
      const Quantized plain(at, nullptr, f, n, k, w);
      const Quantized fed(at, two.engine(), f, n, k, w, factor.data());
      EXPECT_TRUE(fed.equals(Quantized(kScalar, nullptr, f, n, k, w, factor.data()))) << named(f);
      const double before = output_error(x, w, plain.weights(at), n, k);
      const double after = output_error(x, w, fed.weights(at), n, k);
      EXPECT_LT(after, 0.35 * before) << named(f) << " k " << k;
      std::printf("%s, k %lld: %.3f\n", named(f).c_str(), static_cast<long long>(k),
                  after / before);
    }
  }
}

/// Column by column in double precision, on the grids that were chosen.
TEST_P(QuantTest, FeedbackIsWhatTheFormulaSays) {
  DS_NEEDS_FEEDBACK();
  const int64_t n = 16, k = 100;
  const QuantFormat f{4, 32};
  const Floats x = related_inputs(200, k, random_seed()), gram = gram_of(x, k);
  const Floats w = random_floats(static_cast<size_t>(n * k), 3);
  Floats factor(gram.size());
  quant.feedback_factor({}, k, gram.data(), factor.data());
  const Floats got = Quantized(at, nullptr, f, n, k, w, factor.data()).weights(at);
  int64_t nearest = 0, inside = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t g = 0; g < k; g += 32) {
      const int64_t end = std::min(k, g + 32);
      Floats levels(got.begin() + r * k + g, got.begin() + r * k + end);  // those in use
      std::ranges::sort(levels);
      const float step = (levels.back() - levels.front()) / 15;
      for (int64_t i = g; i < end; ++i) {
        double wanted = double{w[r * k + i]};
        for (int64_t j = 0; j < i; ++j)
          wanted += (double{w[r * k + j]} - double{got[r * k + j]}) * double{factor[i * k + j]};
        if (wanted < double{levels.front()} || wanted > double{levels.back()}) continue;
        ++inside;
        nearest += std::fabs(wanted - double{got[r * k + i]}) <= 0.51 * double{step} ? 1 : 0;
      }
    }
  }
  EXPECT_GT(inside, n * k * 8 / 10);
  EXPECT_GT(nearest, inside * 95 / 100);  // a group that uses fewer than 16 levels has wider steps
}

TEST_P(QuantTest, AllTablesAndThreadsChooseEqualCodes) {
  const int64_t n = 50, k = 167;
  const Floats w = extreme_rows(n, k, random_seed());
  Pool three(3);
  for (const QuantFormat f : kFormats) {
    const Quantized here(at, three.engine(), f, n, k, w);
    EXPECT_TRUE(here.equals(Quantized(at, nullptr, f, n, k, w))) << named(f);
    const Quantized there(kScalar, nullptr, f, n, k, w);
    EXPECT_TRUE(here.equals(there)) << named(f);
    EXPECT_EQ(here.weights(at), there.weights(kScalar)) << named(f);
  }
}

TEST_P(QuantTest, FakeGivesWhatTheCodesGiveAndItsGradientStopsOutside) {
  const int64_t n = 35, k = 150;
  Floats w = extreme_rows(n, k, random_seed());
  for (const QuantFormat f : kFormats) {
    Floats wq(w.size(), NAN), dw = random_floats(w.size(), 5);
    const Floats before = dw, dwq = random_floats(w.size(), 6);
    quant.fake(at.context, f, n, k, w.data(), wq.data());
    const Quantized q(at, nullptr, f, n, k, w);
    EXPECT_EQ(wq, q.weights(at)) << named(f);
    quant.fake_backward(at.context, f, n, k, w.data(), dwq.data(), dw.data());
    finish(at);
    int64_t inside = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      if (dw[i] == before[i] + dwq[i]) {
        ++inside;
      } else {  // only where rounding moved the weight by more than half a step of any neighbour
        EXPECT_EQ(dw[i], before[i]);
        EXPECT_GT(std::fabs(w[i] - wq[i]), 0.0f);
      }
    }
    EXPECT_GT(inside, static_cast<int64_t>(w.size() * 9 / 10)) << named(f);
    Floats same = w;
    quant.fake(at.context, f, n, k, same.data(), same.data());
    finish(at);
    EXPECT_EQ(same, wq) << named(f);
  }
}

/// One linear call on codes. The problem's weights are what is quantized.
struct QuantProblem {
  LinearProblem p;
  QuantFormat format;
  std::vector<Floats> wq;  // what the codes mean

  QuantProblem(const LinearShape& shape, QuantFormat f) : p(shape), format(f) {}

  /// Rows `rows` (all if empty) as [weights][rows][n]. `itself`: linear() rounds the input.
  Floats run(const TestedBackend& at, const ds_parallel* parallel, std::vector<int64_t> rows = {},
             bool itself = false) {
    const LinearShape& s = p.shape;
    const OpContext context = at.on(parallel);
    if (rows.empty()) {
      rows.resize(static_cast<size_t>(s.rows));
      std::iota(rows.begin(), rows.end(), 0);
    }
    const auto count = static_cast<int64_t>(rows.size());
    Floats x, residual;
    Ints slots;
    for (const int64_t r : rows) {
      x.insert(x.end(), p.x.begin() + r * s.k, p.x.begin() + (r + 1) * s.k);
      x.insert(x.end(), 3, NAN);  // stride
      residual.insert(residual.end(), p.residual.begin() + r * s.n[0],
                      p.residual.begin() + (r + 1) * s.n[0]);
      slots.push_back(p.slots[r]);
    }
    QuantLinearArgs q{format, {}, {}};
    LinearArgs& a = q.linear;
    a.rows = count;
    a.x = x.data();
    a.x_stride = s.k + 3;
    a.n_weights = static_cast<int>(s.n.size());
    a.epilogue = s.epilogue;
    a.residual = s.epilogue == Epilogue::kResidual ? residual.data() : nullptr;
    prepared = aligned(quant_prepared_bytes(count, s.k));
    at.quant->prepare(context, count, s.k, a.x, a.x_stride, prepared.get());
    a.x_prepared = itself ? nullptr : prepared.get();
    const auto outputs = s.epilogue == Epilogue::kSwiglu ? 1 : s.n.size();
    Floats out(static_cast<size_t>(count *
                                   std::accumulate(s.n.begin(), s.n.begin() + outputs, int64_t{0})),
               NAN);
    std::vector<Quantized> weights;
    wq.clear();
    float* y = out.data();
    for (size_t i = 0; i < s.n.size(); ++i) {
      weights.emplace_back(at, parallel, format, s.n[i], s.k, p.w[i]);
      wq.push_back(weights.back().weights(at));
      a.w[i] = {WeightFormat::kBF16, s.n[i], s.k, weights.back().packed.get()};
      q.scales[i] = weights.back().scales.get();
      a.bias[i] = s.bias ? p.b[i].data() : nullptr;
      a.y[i] = i < outputs ? y : nullptr;
      a.y_stride[i] = s.n[i];
      y += count * s.n[i];
    }
    std::vector<std::shared_ptr<char>> kept;
    LoraSlots lora;
    Floats t(s.n.size() * static_cast<size_t>(count * kLoraRank));
    if (s.lora_slots > 0) fill(lora, *at.ops, context, kept);
    lora.slot_of_row = slots.data();
    lora.t = t.data();
    if (s.lora_slots > 0) a.lora = &lora;
    at.quant->linear(context, q);
    finish(at);
    return out;
  }

  void fill(LoraSlots& lora, const Ops& ops, const OpContext& context,
            std::vector<std::shared_ptr<char>>& kept) const {
    const LinearShape& s = p.shape;
    const auto pack = [&](int64_t n, int64_t k, const Floats& w) {
      kept.push_back(aligned(ops.packed_bytes(s.format, n, k)));
      ops.pack(context, s.format, n, k, w.data(), false, kept.back().get());
      return WeightView{s.format, n, k, kept.back().get()};
    };
    lora.n_slots = s.lora_slots;
    for (int slot = 0; slot < s.lora_slots; ++slot) {
      for (size_t i = 0; i < s.n.size(); ++i) {
        lora.pair[slot][i] = {pack(kLoraRank, s.k, p.lora_a[slot][i]),
                              pack(s.n[i], kLoraRank, p.lora_b[slot][i]), kLoraScale};
      }
    }
  }

  /// After run() on all rows: double precision on the same codes of weights and input.
  Vec expect() const {
    const LinearShape& s = p.shape;
    Vec x(p.x.size());
    for (int64_t r = 0; r < s.rows; ++r) {
      const auto* row =
          reinterpret_cast<const QuantInput*>(prepared.get() + r * quant_prepared_bytes(1, s.k));
      for (int64_t j = 0; j < s.k; ++j) {
        x[r * s.k + j] = double{row[j / 32].scale} * row[j / 32].q[j % 32];
      }
    }
    LinearProblem exact = p;  // low-rank parts, bias: of the input as it is
    for (size_t i = 0; i < s.n.size(); ++i) std::fill(exact.w[i].begin(), exact.w[i].end(), 0.0f);
    exact.shape.epilogue = Epilogue::kNone;
    Vec y = exact.expect();
    size_t at = 0;
    for (size_t i = 0; i < s.n.size(); ++i) {
      for (const double v : reference::matmul(s.rows, s.n[i], s.k, x, as_double(wq[i])))
        y[at++] += v;
    }
    const auto first = static_cast<size_t>(s.rows * s.n[0]);
    for (size_t j = 0; j < first; ++j) {
      if (s.epilogue == Epilogue::kResidual) y[j] += double{p.residual[j]};
      if (s.epilogue == Epilogue::kSwiglu) y[j] = reference::silu(y[j]) * y[first + j];
    }
    if (s.epilogue == Epilogue::kSwiglu) y.resize(first);
    return y;
  }

  std::shared_ptr<char> prepared;
};

const LinearShape kShapes[] = {
    {.rows = 9, .k = 576, .n = {37, 70, 16}},
    {.rows = 5, .k = 33, .n = {17, 17}, .epilogue = Epilogue::kSwiglu},
    {.rows = 70, .k = 1536, .n = {50}, .epilogue = Epilogue::kResidual, .bias = true},
    {.rows = 1, .k = 7, .n = {1}},
    {.rows = 3, .k = 64, .n = {130, 130}, .epilogue = Epilogue::kSwiglu, .bias = true},
};
const LinearShape kLowRankShapes[] = {
    {.rows = 200, .k = 131, .n = {37, 70, 16}, .bias = true, .lora_slots = 3},
    {.rows = 200, .k = 576, .n = {100, 100}, .epilogue = Epilogue::kSwiglu, .lora_slots = 2},
    {.rows = 200,
     .k = 300,
     .n = {96},
     .format = WeightFormat::kF32,
     .epilogue = Epilogue::kResidual,
     .bias = true,
     .lora_slots = 1},
};

TEST_P(QuantTest, LinearEqualsDoublePrecisionOnTheSameCodes) {
  for (const QuantFormat f : kFormats) {
    for (const LinearShape& s : kShapes) {
      QuantProblem q(s, f);
      const Floats got = q.run(at, nullptr);
      EXPECT_LT(error_of(got, q.expect()), 2e-5) << named(f) << " k " << s.k;
      if (s.rows > quant.fused_rows) continue;
      const Floats itself = q.run(at, nullptr, {}, true);
      EXPECT_LT(error_of(itself, q.expect()), 2e-5) << named(f) << " k " << s.k << " unprepared";
    }
    for (LinearShape s : kLowRankShapes) {
      // B t is a product of BF16 pairs there.
      const bool rounds = s.format == WeightFormat::kBF16 && rounds_to_bf16(*at.ops);
      const double tolerance = rounds ? 2e-2 : 2e-5;
      QuantProblem q(s, f);
      const Floats got = q.run(at, nullptr);
      EXPECT_LT(error_of(got, q.expect()), tolerance) << named(f) << " k " << s.k;
      for (s.rows = quant.fused_rows; s.rows > 0; s.rows /= 2) {
        QuantProblem few(s, f);
        const Floats itself = few.run(at, nullptr, {}, true);
        EXPECT_LT(error_of(itself, few.expect()), tolerance)
            << named(f) << " k " << s.k << ", " << s.rows << " rows";
      }
    }
  }
}

TEST_P(QuantTest, RowsDoNotSeeEachOtherNorTheThreads) {
  Pool two(2);
  for (const QuantFormat f : kFormats) {
    for (const LinearShape& s : kLowRankShapes) {
      QuantProblem q(s, f);
      const Floats all = q.run(at, two.engine());
      EXPECT_EQ(all, q.run(at, nullptr)) << named(f);
      const size_t outputs = s.epilogue == Epilogue::kSwiglu ? 1 : s.n.size();
      for (int64_t count : {1, 2, 3, 4, 5, 7, 12, 97}) {
        std::vector<int64_t> rows;
        for (int64_t i = 0; i < count; ++i) rows.push_back((count + i * 37) % s.rows);
        const Floats some = q.run(at, two.engine(), rows);
        int64_t at_all = 0, at = 0;
        for (size_t w = 0; w < outputs; ++w) {
          for (const int64_t r : rows) {
            EXPECT_EQ(0, std::memcmp(&all[at_all + r * s.n[w]], &some[at],
                                     static_cast<size_t>(s.n[w]) * sizeof(float)))
                << named(f) << " weight " << w << " row " << r << " among " << count;
            at += s.n[w];
          }
          at_all += s.rows * s.n[w];
        }
      }
    }
  }
}

TEST_P(QuantTest, InputKeepsItsGroupsApartAndShowsWhatIsNotFinite) {
  const int64_t k = 100;
  Floats x = random_floats(static_cast<size_t>(k), random_seed());
  x[3] = 1e20f;  // only its own group pays
  const auto prepared = aligned(quant_prepared_bytes(1, k));
  quant.prepare(at.context, 1, k, x.data(), k, prepared.get());
  finish(at);
  const auto* groups = reinterpret_cast<const QuantInput*>(prepared.get());
  for (int64_t j = 0; j < k; ++j) {
    const QuantInput& g = groups[j / 32];
    EXPECT_LE(std::fabs(g.scale * static_cast<float>(g.q[j % 32]) - x[j]), 0.501f * g.scale);
    EXPECT_LT(j < 32 ? 0.0f : g.scale, 0.1f);
  }
  for (int64_t j = k; j < 128; ++j) EXPECT_EQ(groups[3].q[j % 32], 0);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    x[40] = bad;
    quant.prepare(at.context, 1, k, x.data(), k, prepared.get());
    finish(at);
    EXPECT_TRUE(std::isnan(groups[1].scale));
    EXPECT_FALSE(std::isnan(groups[2].scale));
  }
}

INSTANTIATE_TEST_SUITE_P(All, QuantTest, testing::ValuesIn(tested_backends()),
                         [](const auto& info) { return backend_label(info.param); });

}  // namespace
}  // namespace ds::test
