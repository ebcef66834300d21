// SPDX-License-Identifier: Apache-2.0
// The attention modules through their tables, as the engine calls them: against a masked oracle in
// double precision whose mask is what explain() says was read, and how much that is.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "daemon/reference_model.h"
#include "kernels/pool.h"
#include "tests/kernels/reference.h"

namespace ds {
namespace {

using reference::Vec;

constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 16, kGroup = kHeads / kKvHeads;
constexpr float kScale = 0.25f;

std::vector<float> random_floats(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> out(n);
  for (float& x : out) x = static_cast<float>(3.0 * rng.uniform() - 1.5);
  return out;
}

std::shared_ptr<const PluginInstance> attention_plugin(const std::string& name,
                                                       const Json& config) {
  const auto found = test::modules().find(DS_KIND_ATTENTION, name);
  DS_CHECK(found.ok());
  const auto& library = found->instance->library();
  const std::shared_ptr<const PluginLibrary> shared(found->instance, &library);
  auto made = PluginInstance::create(shared, found->instance->component(), config);
  DS_CHECK(made.ok());
  return *made;
}

/// One sequence of n tokens: q, k, v and a cache of FP32 pages in reverse order.
struct Problem {
  int64_t n;
  std::vector<float> q, k, v, k_pages, v_pages;
  std::vector<int32_t> pages;
  std::vector<uint8_t> extra;

  explicit Problem(int64_t tokens)
      : n(tokens),
        q(random_floats(static_cast<size_t>(n * kHeads * kDim), 1)),
        k(random_floats(static_cast<size_t>(n * kKvHeads * kDim), 2)),
        v(random_floats(static_cast<size_t>(n * kKvHeads * kDim), 3)) {
    const int64_t n_pages = (n + 31) / 32;
    for (int64_t i = 0; i < n_pages; ++i) pages.push_back(static_cast<int32_t>(n_pages - 1 - i));
    k_pages.assign(static_cast<size_t>(n_pages * kKvHeads * 32 * kDim), NAN);
    v_pages = k_pages;
    extra.assign(static_cast<size_t>(n_pages * 4096), 0);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t h = 0; h < kKvHeads; ++h) {
        const int64_t to =
            ((pages[static_cast<size_t>(t / 32)] * kKvHeads + h) * 32 + t % 32) * kDim;
        std::copy_n(&k[static_cast<size_t>((t * kKvHeads + h) * kDim)], kDim,
                    &k_pages[static_cast<size_t>(to)]);
        std::copy_n(&v[static_cast<size_t>((t * kKvHeads + h) * kDim)], kDim,
                    &v_pages[static_cast<size_t>(to)]);
      }
    }
  }
};

/// The rows [begin, end) of a problem, served.
struct Call {
  TensorView q, out, rows, k, v, table, lengths, extra, read;
  int32_t row_bounds[2], length;
  ds_kv_view kv{};
  ds_attn_args args{};
  ds_call call{};
  std::vector<double> workspace;
  std::vector<float> output;

  Call(const PluginInstance& plugin, Problem& p, int64_t begin, int64_t end,
       const ds_parallel* pool) {
    const int64_t rows_n = end - begin, n_pages = std::ssize(p.pages);
    output.assign(static_cast<size_t>(rows_n * kHeads * kDim), NAN);
    row_bounds[0] = 0, row_bounds[1] = static_cast<int32_t>(rows_n);
    length = static_cast<int32_t>(end);
    q.set(p.q.data() + begin * kHeads * kDim, kAbiF32, {rows_n, kHeads, kDim});
    out.set(output.data(), kAbiF32, {rows_n, kHeads, kDim});
    rows.set(row_bounds, kAbiI32, {2});
    lengths.set(&length, kAbiI32, {1});
    table.set(p.pages.data(), kAbiI32, {1, n_pages});
    k.set(p.k_pages.data(), kAbiF32, {n_pages, kKvHeads, 32, kDim});
    v.set(p.v_pages.data(), kAbiF32, {n_pages, kKvHeads, 32, kDim});
    kv.size = sizeof kv;
    kv.page_tokens = 32;
    kv.k_pages = k.get(), kv.v_pages = v.get();
    kv.block_table = table.get(), kv.lengths = lengths.get(), kv.page_extra = extra.get();
    args.size = sizeof args;
    args.batch = 1;
    args.max_rows = static_cast<uint32_t>(rows_n), args.max_keys = static_cast<uint32_t>(end);
    args.q = q.get(), args.out = out.get(), args.rows = rows.get();
    args.kv = &kv;
    args.scale = kScale;
    ds_plan plan{};
    plan.size = sizeof plan;
    ds_status st{};
    DS_CHECK(plugin.table<ds_attention>().plan(plugin.handle(), &args, &plan, &st) == DS_OK);
    const auto planned = static_cast<int64_t>(plan.page_extra_bytes);
    DS_CHECK(planned <= 4096);
    extra.set(p.extra.data(), kAbiU8, {n_pages, planned});
    extra.set_row_stride(4096, static_cast<uint64_t>((n_pages - 1) * 4096 + planned));
    workspace.resize(plan.workspace_bytes / 8 + 9);
    call.size = sizeof call;
    call.parallel = pool;
    call.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    call.workspace_bytes = plan.workspace_bytes;
  }
  const std::vector<float>& prefill(const PluginInstance& plugin) {
    ds_status st{};
    const ds_code code = plugin.table<ds_attention>().prefill(plugin.handle(), &call, &args, &st);
    EXPECT_EQ(code, DS_OK) << std::string(st.text, st.len);
    return output;
  }
  /// [rows, heads, keys]
  std::vector<uint8_t> explain(const PluginInstance& plugin) {
    std::vector<uint8_t> seen(static_cast<size_t>(row_bounds[1] * kHeads) * args.max_keys);
    read.set(seen.data(), kAbiU8, {row_bounds[1], kHeads, int64_t{args.max_keys}});
    ds_status st{};
    const ds_code code =
        plugin.table<ds_attention>().explain(plugin.handle(), &call, &args, read.get(), &st);
    EXPECT_EQ(code, DS_OK) << std::string(st.text, st.len);
    return seen;
  }
};

class AttentionModules : public testing::Test {
 protected:
  Pool pool{2};
  std::vector<float> whole(const PluginInstance& plugin, Problem& p) {
    return Call(plugin, p, 0, p.n, pool.engine()).prefill(plugin);
  }
};

Vec doubles(const std::vector<float>& x) { return Vec(x.begin(), x.end()); }

TEST_F(AttentionModules, WindowGlobalIsDenseWhenTheWindowCoversTheText) {
  Problem p(300);
  const auto dense = attention_plugin("dense", {});
  const auto wide = attention_plugin("window-global", {{"window", 300}});
  const std::vector<float> a = whole(*dense, p), b = whole(*wide, p);
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5) << i;
}

TEST_F(AttentionModules, AtTwoThousandTokensAQueryReadsWindowAndGlobals) {
  constexpr int64_t kTokens = 2048, kWindow = 32, kGlobals = 24;
  Problem p(kTokens);
  const auto sparse =
      attention_plugin("window-global", {{"window", kWindow}, {"globals", kGlobals}});
  Call call(*sparse, p, 0, kTokens, pool.engine());
  const std::vector<float> out = call.prefill(*sparse);
  const std::vector<uint8_t> read = call.explain(*sparse);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const uint8_t* row = &read[static_cast<size_t>((t * kHeads + h) * kTokens)];
      const int64_t count = std::accumulate(row, row + kTokens, int64_t{0});
      ASSERT_EQ(count, std::min(t + 1, kWindow + kGlobals)) << "row " << t;
      ASSERT_EQ(std::accumulate(row + t + 1, row + kTokens, int64_t{0}), 0) << "causality, " << t;
      for (int64_t j = std::max<int64_t>(0, t - kWindow + 1); j <= t; ++j) ASSERT_EQ(row[j], 1);
    }
  }
  reference::Heads heads{kHeads, kKvHeads, kDim, kScale};
  heads.reads = [&](int64_t position, int64_t kv_head, int64_t key) {
    return read[static_cast<size_t>((position * kHeads + kv_head * kGroup) * kTokens + key)] == 1;
  };
  const Vec wanted =
      reference::attention(heads, kTokens, 0, doubles(p.q), doubles(p.k), doubles(p.v));
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], wanted[i], 2e-5) << i;
  const std::vector<float> dense = whole(*attention_plugin("dense", {}), p);
  double difference = 0;
  for (size_t i = 0; i < out.size(); ++i) difference += std::abs(out[i] - dense[i]);
  EXPECT_GT(difference / static_cast<double>(out.size()), 0.01);
}

TEST_F(AttentionModules, TheChoiceIsTheFirstKeysAndThoseOfSmallestNorm) {
  constexpr int64_t kTokens = 200;
  Problem p(kTokens);
  const auto sparse =
      attention_plugin("window-global", {{"window", 8}, {"globals", 6}, {"sinks", 2}});
  Call call(*sparse, p, 0, kTokens, pool.engine());
  call.prefill(*sparse);
  const std::vector<uint8_t> read = call.explain(*sparse);
  for (int64_t t = 20; t < kTokens; t += 17) {
    for (int64_t h = 0; h < kHeads; ++h) {
      std::vector<std::pair<float, int64_t>> ranked;
      for (int64_t j = 2; j <= t - 8; ++j) {
        float norm = 0;
        for (int64_t i = 0; i < kDim; ++i) {
          const float x = p.k[static_cast<size_t>((j * kKvHeads + h / kGroup) * kDim + i)];
          norm += x * x;
        }
        ranked.emplace_back(norm, j);
      }
      std::sort(ranked.begin(), ranked.end());
      const uint8_t* row = &read[static_cast<size_t>((t * kHeads + h) * kTokens)];
      EXPECT_EQ(row[0] + row[1], 2);
      for (size_t i = 0; i < ranked.size(); ++i)
        EXPECT_EQ(row[ranked[i].second], i < 4 ? 1 : 0)
            << "row " << t << " key " << ranked[i].second;
    }
  }
}

TEST_F(AttentionModules, BitsDoNotDependOnHowASequenceArrives) {
  for (const Json& config : {Json(), Json::object(), Json{{"window", 5}, {"globals", 40}}}) {
    Problem p(150);
    const char* name = config.is_null() ? "dense" : "window-global";
    const auto plugin = attention_plugin(name, config.is_null() ? Json::object() : config);
    const std::vector<float> all = whole(*plugin, p);
    for (const int64_t step : {1, 37}) {
      Problem again(150);
      std::vector<float> pieces;
      for (int64_t at = 0; at < again.n; at += step) {
        Call call(*plugin, again, at, std::min(at + step, again.n), serial_parallel());
        const auto& out = call.prefill(*plugin);
        pieces.insert(pieces.end(), out.begin(), out.end());
      }
      EXPECT_EQ(std::memcmp(all.data(), pieces.data(), all.size() * sizeof(float)), 0)
          << name << " in steps of " << step;
    }
  }
}

/// Summed dout . out of a training pass and its gradients, behind a prefix.
struct Training {
  static constexpr int64_t kRows = 70, kPrefix = 21;
  std::vector<float> q = random_floats(kRows * kHeads * kDim, 5),
                     k = random_floats(kRows * kKvHeads * kDim, 6),
                     v = random_floats(kRows * kKvHeads * kDim, 7),
                     dout = random_floats(kRows * kHeads * kDim, 8),
                     prefix_k = random_floats(kPrefix * kKvHeads * kDim, 9),
                     prefix_v = random_floats(kPrefix * kKvHeads * kDim, 10), out = q, dq = q,
                     dk = k, dv = v;

  double run(const std::shared_ptr<const PluginInstance>& plugin, Pool& pool, bool back) {
    TrainingAttention pass;
    const TrainingAttention::Sequence sequence{kRows, kPrefix};
    const Status begun =
        pass.begin(std::make_shared<Attention>(plugin, 1), cpu_ops(best_cpu_isa()), {pool.engine()},
                   kHeads, kKvHeads, kDim, kScale, {&sequence, 1}, kRows, WeightFormat::kF32);
    EXPECT_TRUE(begun.ok()) << begun.message();
    std::vector<double> saved(pass.saved_bytes() / 8 + 1);
    TrainingAttention::Pointers at;
    at.q = q.data(), at.k = k.data(), at.v = v.data(), at.out = out.data(), at.saved = saved.data();
    at.dout = dout.data(), at.dq = dq.data(), at.dk = dk.data(), at.dv = dv.data();
    const float *pk = prefix_k.data(), *pv = prefix_v.data();
    Status ran = pass.forward(0, at, {&pk, 1}, {&pv, 1});
    if (ran.ok() && back) ran = pass.backward(0, at, {&pk, 1}, {&pv, 1});
    EXPECT_TRUE(ran.ok()) << ran.message();
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += double{dout[i]} * out[i];
    return sum;
  }
};

TEST_F(AttentionModules, GradientsMatchFiniteDifferences) {
  for (const char* name : {"dense", "window-global"}) {
    const Json config =
        std::string(name) == "dense" ? Json::object() : Json{{"window", 16}, {"globals", 8}};
    const auto plugin = attention_plugin(name, config);
    Training t;
    t.run(plugin, pool, true);
    const Training at = t;
    double worst = 0;
    for (auto [values, gradient] :
         {std::pair(&Training::q, &Training::dq), std::pair(&Training::k, &Training::dk),
          std::pair(&Training::v, &Training::dv)}) {
      for (size_t i = 5; i < (at.*values).size(); i += 97) {
        constexpr float kStep = 2e-3f;  // small enough that the choice of keys stays
        Training moved = at;
        (moved.*values)[i] += kStep;
        const double up = moved.run(plugin, pool, false);
        (moved.*values)[i] -= 2 * kStep;
        const double down = moved.run(plugin, pool, false);
        worst = std::max(worst, std::abs((up - down) / (2 * kStep) - (at.*gradient)[i]));
      }
    }
    EXPECT_LT(worst, 4e-3) << name;
  }
}

TEST_F(AttentionModules, WrongShapesAreRefusedByName) {
  Problem p(40);
  for (const char* name : {"dense", "window-global"}) {
    const auto plugin = attention_plugin(name, {});
    const auto refusal = [&](const std::function<void(Call&)>& spoil) {
      Call call(*plugin, p, 0, 40, serial_parallel());
      spoil(call);
      ds_status st{};
      const ds_code code =
          plugin->table<ds_attention>().prefill(plugin->handle(), &call.call, &call.args, &st);
      return code == DS_OK ? "accepted" : std::string(st.text, st.len);
    };
    EXPECT_NE(refusal([](Call& c) { c.length = 400; }).find("lengths[0]: 400 keys"),
              std::string::npos);
    EXPECT_NE(refusal([](Call& c) {
                c.args.train = nullptr, c.args.kv = nullptr;
              }).find("exactly one of"),
              std::string::npos);
    EXPECT_NE(refusal([](Call& c) { c.args.softcap = 3; }).find("softcap"), std::string::npos);
    EXPECT_NE(refusal([](Call& c) { c.row_bounds[1] = 7; }).find("rows"), std::string::npos);
    if (name == std::string_view("window-global")) {  // the other one plans none
      EXPECT_NE(refusal([](Call& c) { c.call.workspace_bytes = 1; }).find("workspace"),
                std::string::npos);
      EXPECT_NE(refusal([](Call& c) { c.args.max_keys = 39; }).find("expected 40 to 39"),
                std::string::npos);
      EXPECT_NE(refusal([](Call& c) { c.kv.page_extra = nullptr; }).find("page_extra: missing"),
                std::string::npos);
      EXPECT_NE(refusal([&p](Call& c) {
                  c.extra.set(p.extra.data(), kAbiU8, {2, 16});
                }).find("page_extra: [2, 16]"),
                std::string::npos);
    }
    EXPECT_NE(refusal([](Call& c) { c.args.out = nullptr; }).find("out: missing"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace ds
