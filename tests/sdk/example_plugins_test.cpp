// SPDX-License-Identifier: Apache-2.0
// The example plugins do what they say, called through their tables as a host calls them.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <random>

#include "ds/plugin.hpp"

namespace {

using namespace ds::sdk;
using testing::ElementsAre;

std::map<std::string, std::int64_t> config;  // what the host answers

ds_host a_host() {
  ds_host host{};
  host.size = sizeof host;
  host.config_int = [](const ds_config*, const char* path, std::int64_t* out) -> ds_code {
    const auto at = config.find(path);
    if (at == config.end()) return DS_E_CONFIG;
    *out = at->second;
    return DS_OK;
  };
  return host;
}

class Plugin {
 public:
  explicit Plugin(const std::string& name, std::map<std::string, std::int64_t> with = {})
      : host_(a_host()) {
    config = std::move(with);
    call.size = sizeof call;
    pool_.size = sizeof pool_;
    pool_.run = [](void*, std::int64_t n, ds_task_fn task, void* user) {
      for (std::int64_t i = n; i-- > 0;) task(user, i);  // any order must do
    };
    call.parallel = &pool_;
    const std::string file = DS_EXAMPLE_DIR "/example_" + name + ".so";
    void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) ADD_FAILURE() << dlerror();
    const auto entry = reinterpret_cast<ds_plugin_entry_fn>(dlsym(handle, DS_ENTRY_NAME));
    const ds_plugin* plugin = nullptr;
    EXPECT_EQ(entry(&host_, &plugin, &st), DS_OK);
    component = plugin->components[0];
    instance = make();
  }
  ~Plugin() { component->ops->destroy(instance); }
  Plugin(const Plugin&) = delete;

  ds_instance* make() {
    ds_instance* out = nullptr;
    const auto* any = reinterpret_cast<const ds_config*>(this);
    EXPECT_EQ(component->create(&host_, any, {DS_DEV_CPU, 0}, &out, &st), DS_OK) << text();
    return out;
  }
  template <class Table>
  const Table& table() const {
    return *static_cast<const Table*>(component->table);
  }
  std::string text() const { return {st.text, st.len}; }

  ds_status st{};
  ds_call call{};
  const ds_component* component = nullptr;
  ds_instance* instance = nullptr;

 private:
  ds_host host_;
  ds_parallel pool_{};
};

template <class T>
struct Tensor {
  std::vector<T> data;
  std::vector<std::int64_t> shape, strides;
  ds_tensor t{};
  explicit Tensor(std::vector<std::int64_t> dims, std::vector<T> values = {})
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

std::mt19937& random_source() {
  static std::mt19937 source = [] {
    const char* named = std::getenv("DS_SEED");
    const unsigned seed =
        named != nullptr ? std::strtoul(named, nullptr, 10) : std::random_device{}();
    std::printf("DS_SEED=%u\n", seed);
    return std::mt19937(seed);
  }();
  return source;
}
void fill(std::vector<float>& data) {
  std::normal_distribution<float> normal;
  for (float& v : data) v = normal(random_source());
}

// ---- Quantizers ----

void expect_promise_kept(const std::string& name, std::int64_t n, std::int64_t k) {
  Plugin p(name);
  const auto& table = p.table<ds_quantizer>();
  ds_qformat format{};
  format.size = sizeof format;
  ASSERT_EQ(table.format(p.instance, n, k, &format, &p.st), DS_OK) << p.text();
  std::vector<std::uint64_t> packed_words(format.packed_bytes / 8 + 1),
      scale_words(format.scale_bytes / 8 + 1);
  ds_qweight q{};
  q.size = sizeof q;
  q.n = n;
  q.k = k;
  q.format = &format;
  q.packed = packed_words.data();
  q.scales = scale_words.data();
  Tensor<float> w({n, k}), back({n, k});
  fill(w.data);
  std::fill_n(w.data.begin(), k, 0.0f);  // a row of zeros stays one
  ASSERT_EQ(table.quantize(p.instance, &p.call, str("w"), &w.t, &q, &p.st), DS_OK) << p.text();
  ASSERT_EQ(table.dequantize(p.instance, &p.call, &q, &back.t, &p.st), DS_OK) << p.text();
  for (std::int64_t row = 0; row < n; ++row) {
    float top = 0, off = 0;
    for (std::int64_t i = row * k; i < (row + 1) * k; ++i) {
      top = std::max(top, std::fabs(w.data[i]));
      off = std::max(off, std::fabs(w.data[i] - back.data[i]));
    }
    EXPECT_LE(off, format.rel_tol * top) << "row " << row;
    if (row > 0) {
      EXPECT_GT(off, 0.1f * format.rel_tol * top) << "the promise is far too wide";
    }
  }
  w.shape[1] = k - 1;
  EXPECT_EQ(table.quantize(p.instance, &p.call, str("w"), &w.t, &q, &p.st), DS_E_SHAPE);
  EXPECT_EQ(table.format(p.instance, 0, k, &format, &p.st), DS_E_SHAPE);
}

TEST(RowInt8, KeepsItsPromise) { expect_promise_kept("row_int8", 7, 67); }
TEST(BlockInt4, KeepsItsPromise) {
  expect_promise_kept("block_int4", 7, 96);
  Plugin p("block_int4");
  ds_qformat format{};
  format.size = sizeof format;
  EXPECT_EQ(p.table<ds_quantizer>().format(p.instance, 4, 33, &format, &p.st), DS_E_UNSUPPORTED);
  EXPECT_EQ(p.text(), "columns, a multiple is: 33, expected 32");
}

// ---- Attention ----

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDim = 8, kPage = 32, kWindow = 5;

/// One sequence of `n` tokens with its keys in FP32; every way to hand them over must agree.
struct Sequence {
  explicit Sequence(std::int64_t n)
      : n(n), q({n, kHeads, kDim}), k({n, kKvHeads, kDim}), v({n, kKvHeads, kDim}) {
    fill(q.data), fill(k.data), fill(v.data);
  }
  std::int64_t n;
  Tensor<float> q, k, v;

  /// In double precision, row by row over the keys in the window and `extra` before it.
  std::vector<double> oracle(std::int64_t row, std::int64_t head,
                             const std::vector<std::int32_t>& extra) const {
    std::vector<std::int64_t> keys;
    for (std::int64_t key = 0; key <= row; ++key) {
      const bool named = std::find(extra.begin(), extra.end(), key) != extra.end();
      if (key > row - kWindow || named) keys.push_back(key);
    }
    const std::int64_t kv_head = head * kKvHeads / kHeads;
    std::vector<double> out(kDim + 1);
    for (const std::int64_t key : keys) {
      double score = 0;
      for (std::int64_t i = 0; i < kDim; ++i)
        score += double(q.data[(row * kHeads + head) * kDim + i]) *
                 k.data[(key * kKvHeads + kv_head) * kDim + i];
      const double weight = std::exp(0.3 * score);
      out[kDim] += weight;
      for (std::int64_t i = 0; i < kDim; ++i)
        out[i] += weight * v.data[(key * kKvHeads + kv_head) * kDim + i];
    }
    for (std::int64_t i = 0; i < kDim; ++i) out[i] /= out[kDim];
    out[kDim] = std::log(out[kDim]);
    return out;
  }
};

struct AttentionRun {
  Tensor<float> out, lse;
  explicit AttentionRun(std::int64_t rows) : out({rows, kHeads, kDim}), lse({rows, kHeads}) {}
  void expect_oracle(const Sequence& s, std::int64_t first,
                     const std::vector<std::int32_t>& extra = {}) const {
    for (std::int64_t r = 0; r < out.shape[0]; ++r)
      for (std::int64_t h = 0; h < kHeads; ++h) {
        const auto want = s.oracle(first + r, h, extra);
        for (std::int64_t i = 0; i < kDim; ++i)
          ASSERT_NEAR(out.data[(r * kHeads + h) * kDim + i], want[i], 1e-5) << r << " " << h;
        ASSERT_NEAR(lse.data[r * kHeads + h], want[kDim], 1e-5);
      }
  }
};

ds_attn_args arguments(const ds_tensor& q, const ds_tensor& rows, const AttentionRun& run) {
  ds_attn_args a{};
  a.size = sizeof a;
  a.batch = 1;
  a.q = &q;
  a.rows = &rows;
  a.out = &run.out.t;
  a.lse = &run.lse.t;
  a.scale = 0.3f;
  return a;
}

class SlidingWindow : public testing::Test {
 protected:
  /// The last `rows` rows of the sequence, keys in shuffled pages.
  void serve(const Sequence& s, std::int64_t rows, const AttentionRun& run,
             const ds_tensor* globals = nullptr, const ds_tensor* read = nullptr) {
    const std::int64_t pages = (s.n + kPage - 1) / kPage;
    std::vector<std::int32_t> order(pages);
    for (std::int64_t i = 0; i < pages; ++i) order[i] = static_cast<std::int32_t>(pages - 1 - i);
    Tensor<float> k({pages, kKvHeads, kPage, kDim}), v({pages, kKvHeads, kPage, kDim});
    for (std::int64_t t = 0; t < s.n; ++t)
      for (std::int64_t h = 0; h < kKvHeads; ++h)
        for (std::int64_t i = 0; i < kDim; ++i) {
          const auto to = ((order[t / kPage] * kKvHeads + h) * kPage + t % kPage) * kDim + i;
          k.data[to] = s.k.data[(t * kKvHeads + h) * kDim + i];
          v.data[to] = s.v.data[(t * kKvHeads + h) * kDim + i];
        }
    Tensor<std::int32_t> table({1, pages}, order),
        rows_of({2}, {0, static_cast<std::int32_t>(rows)});
    Tensor<std::int32_t> lengths({1}, {static_cast<std::int32_t>(s.n)});
    Tensor<float> q({rows, kHeads, kDim}, {s.q.data.end() - rows * kHeads * kDim, s.q.data.end()});
    ds_kv_view kv{};
    kv.size = sizeof kv;
    kv.page_tokens = kPage;
    kv.k_pages = &k.t;
    kv.v_pages = &v.t;
    kv.block_table = &table.t;
    kv.lengths = &lengths.t;
    ds_attn_args a = arguments(q.t, rows_of.t, run);
    a.kv = &kv;
    a.global_idx = globals;
    const auto& attention = p.table<ds_attention>();
    ASSERT_EQ(read != nullptr ? attention.explain(p.instance, &p.call, &a, read, &p.st)
                              : attention.prefill(p.instance, &p.call, &a, &p.st),
              DS_OK)
        << p.text();
  }
  Plugin p{"sliding_window", {{"window", kWindow}}};
};

TEST_F(SlidingWindow, EqualsTheMaskedOracleHoweverTheTextIsCut) {
  const Sequence s(70);
  AttentionRun whole(70), last(3);
  serve(s, 70, whole);
  whole.expect_oracle(s, 0);
  serve(s, 3, last);
  EXPECT_TRUE(std::equal(last.out.data.begin(), last.out.data.end(),
                         whole.out.data.end() - std::ptrdiff_t(last.out.data.size())));
}

TEST_F(SlidingWindow, TrainsBehindAPrefixAsItServes) {
  const Sequence s(40);
  constexpr std::int64_t before = 6;
  const auto part = [&](const Tensor<float>& from, std::int64_t heads, bool prefix) {
    const auto cut = from.data.begin() + before * heads * kDim;
    return prefix ? std::vector<float>(from.data.begin(), cut)
                  : std::vector<float>(cut, from.data.end());
  };
  constexpr std::int64_t rows = 40 - before;
  Tensor<float> q({rows, kHeads, kDim}, part(s.q, kHeads, false));
  Tensor<float> k({rows, kKvHeads, kDim}, part(s.k, kKvHeads, false));
  Tensor<float> v({rows, kKvHeads, kDim}, part(s.v, kKvHeads, false));
  Tensor<float> prefix_k({before, kKvHeads, kDim}, part(s.k, kKvHeads, true));
  Tensor<float> prefix_v({before, kKvHeads, kDim}, part(s.v, kKvHeads, true));
  const ds_tensor *pk = &prefix_k.t, *pv = &prefix_v.t;
  const ds_train_view train{sizeof train, 0, &k.t, &v.t, &pk, &pv};
  Tensor<std::int32_t> rows_of({2}, {0, rows});
  AttentionRun run(rows);
  ds_attn_args a = arguments(q.t, rows_of.t, run);
  a.train = &train;
  ASSERT_EQ(p.table<ds_attention>().prefill(p.instance, &p.call, &a, &p.st), DS_OK) << p.text();
  run.expect_oracle(s, before);
}

TEST_F(SlidingWindow, ReadsTheWindowAndTheNamedPositionsAndNoMore) {
  const Sequence s(70);
  AttentionRun run(70);
  const Tensor<std::int32_t> globals({1, 3}, {0, 20, -1});
  serve(s, 70, run, &globals.t);
  run.expect_oracle(s, 0, {0, 20});
  const Tensor<std::uint8_t> read({70, kHeads, 70});
  serve(s, 70, run, &globals.t, &read.t);
  for (std::int64_t r = 0; r < 70; ++r)
    for (std::int64_t key = 0; key < 70; ++key) {
      const bool used = key <= r && (key > r - kWindow || key == 0 || key == 20);
      ASSERT_EQ(read.data[(r * kHeads + 1) * 70 + key], used) << r << " " << key;
    }
}

// ---- Encoder ----

TEST(PatchMean, ProjectsMeansAndItsGradientIsTheDerivative) {
  Plugin p("patch_mean", {{"patch", 4}, {"width", 6}});
  const auto& table = p.table<ds_encoder>();
  Tensor<std::uint8_t> image({10, 7, 3});  // 3 x 2 patches, cut off at the edges
  for (auto& pixel : image.data) pixel = static_cast<std::uint8_t>(random_source()());
  ds_media media{};
  media.size = sizeof media;
  media.modality = DS_MOD_IMAGE;
  media.data = &image.t;
  media.weight = 0.5f;
  ds_encode_args a{};
  a.size = sizeof a;
  a.media = &media;
  ds_plan plan{};
  plan.size = sizeof plan;
  ASSERT_EQ(table.plan(p.instance, &a, &plan, &p.st), DS_OK) << p.text();
  ASSERT_EQ(plan.shape[0], 6);
  ASSERT_EQ(plan.shape[1], 6);
  std::vector<double> workspace(plan.workspace_bytes / 8 + 1);
  p.call.workspace = workspace.data();
  p.call.workspace_bytes = plan.workspace_bytes;
  Tensor<float> out({6, 6}), dout({6, 6});
  fill(dout.data);
  a.out = &out.t;
  a.dout = &dout.t;
  const ds_parameter* const* parameters = nullptr;
  std::uint32_t count = 0;
  ASSERT_EQ(p.component->ops->parameters(p.instance, &parameters, &count, &p.st), DS_OK);
  ASSERT_EQ(count, 1u);
  const auto w = flat<float>(parameters[0]->value, "value", {6, 3});
  const auto loss = [&] {
    EXPECT_EQ(table.encode(p.instance, &p.call, &a, &p.st), DS_OK) << p.text();
    double sum = 0;
    for (std::size_t i = 0; i < out.data.size(); ++i) sum += double(out.data[i]) * dout.data[i];
    return sum;
  };
  ASSERT_EQ(table.backward(p.instance, &p.call, &a, &p.st), DS_OK) << p.text();
  const auto gradient = flat<const float>(parameters[0]->gradient, "gradient");
  for (std::size_t i = 0; i < w.size(); ++i) {
    const float at = w[i];
    w[i] = at + 0.5f;
    const double above = loss();
    w[i] = at - 0.5f;
    EXPECT_NEAR(gradient[i], above - loss(), 1e-4) << i;  // linear: a wide step is exact
    w[i] = at;
  }
  loss();  // token 5 is the corner patch: rows 8..9, columns 4..6
  double corner[3] = {};
  for (int y = 8; y < 10; ++y)
    for (int x = 4; x < 7; ++x)
      for (int c = 0; c < 3; ++c) corner[c] += image.data[(y * 7 + x) * 3 + c] / 255.0 / 6;
  EXPECT_NEAR(out.data[5 * 6], 0.5 * (w[0] * corner[0] + w[1] * corner[1] + w[2] * corner[2]),
              1e-5);
  media.modality = DS_MOD_AUDIO;
  EXPECT_EQ(table.encode(p.instance, &p.call, &a, &p.st), DS_E_UNSUPPORTED);
}

// ---- Learner, curriculum ----

ds_sample sample(std::uint64_t key, std::uint32_t pool, std::uint32_t flags, float loss,
                 std::uint32_t tokens = 0) {
  ds_sample s{};
  s.key = key;
  s.pool = pool;
  s.flags = flags;
  s.loss = loss;
  s.tokens = tokens;
  return s;
}

TEST(HardestFirst, DrawsUnseenThenHighestLossAndEndsWhenAllIsLearned) {
  Plugin p("hardest_first", {{"items", 3}});
  std::vector<ds_sample> samples{sample(1, DS_POOL_FRESH, DS_SAMPLE_SEEN, 2),
                                 sample(2, DS_POOL_FRESH, DS_SAMPLE_SEEN, 5),
                                 sample(3, DS_POOL_FRESH, 0, 0),
                                 sample(4, DS_POOL_FRESH, DS_SAMPLE_SEEN | DS_SAMPLE_LEARNED, 9),
                                 sample(5, DS_POOL_FRESH, DS_SAMPLE_SEEN, 1),
                                 sample(6, DS_POOL_REPLAY, 0, 9),
                                 sample(7, DS_POOL_ANCHOR, 0, 0),
                                 sample(8, DS_POOL_ANCHOR, 0, 0)};
  std::vector<std::pair<std::uint64_t, std::uint32_t>> drawn;
  const auto emit = [](void* ctx, const ds_draw* d) -> ds_code {
    static_cast<decltype(drawn)*>(ctx)->emplace_back(d->key, d->term);
    return DS_OK;
  };
  const auto draw = [&] {
    drawn.clear();
    EXPECT_EQ(p.table<ds_learner>().draws(p.instance, &p.call, samples.data(), samples.size(),
                                          &drawn, emit, &p.st),
              DS_OK);
  };
  using Draw = std::pair<std::uint64_t, std::uint32_t>;
  draw();
  EXPECT_THAT(drawn, ElementsAre(Draw(3, DS_TERM_CE), Draw(2, DS_TERM_CE), Draw(1, DS_TERM_CE),
                                 Draw(7, DS_TERM_KL_BASE)));
  p.call.step = 1;
  draw();
  EXPECT_EQ(drawn.back(), Draw(8, DS_TERM_KL_BASE));
  for (ds_sample& s : samples) s.flags |= DS_SAMPLE_LEARNED;
  draw();
  EXPECT_TRUE(drawn.empty());
}

TEST(ShortestFirst, PicksByLengthThenKeyWithinTheBudget) {
  Plugin p("shortest_first");
  const std::vector<ds_sample> samples{sample(9, 0, 0, 0, 30), sample(4, 0, 0, 0, 10),
                                       sample(3, 0, 0, 0, 10), sample(1, 0, 0, 0, 90)};
  std::vector<std::uint64_t> keys(3);
  std::uint64_t n = 0;
  ASSERT_EQ(p.table<ds_curriculum>().pick(p.instance, &p.call, samples.data(), 4, 3, keys.data(),
                                          &n, &p.st),
            DS_OK);
  EXPECT_EQ(n, 3u);
  EXPECT_THAT(keys, ElementsAre(3, 4, 9));
}

// ---- Retriever, tool ----

ds_code append(void* ctx, const void* bytes, std::uint64_t n) {
  static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
  return DS_OK;
}

std::vector<std::uint64_t> found(Plugin& p, ds_instance* in, std::string_view query) {
  std::vector<ds_hit> hits(3);
  std::uint64_t n = 0;
  EXPECT_EQ(p.table<ds_retriever>().search(in, &p.call, str(query), nullptr, {}, hits.data(), 3, &n,
                                           &p.st),
            DS_OK);
  std::vector<std::uint64_t> ids;
  for (std::uint64_t i = 0; i < n; ++i) ids.push_back(hits[i].id);
  return ids;
}

TEST(TokenOverlap, ShowsChangesAtCommitAndComesBackFromItsSavedForm) {
  Plugin p("token_overlap");
  const auto& table = p.table<ds_retriever>();
  const auto put = [&](std::uint64_t id, std::string_view text) {
    ASSERT_EQ(table.put(p.instance, id, str(text), nullptr, str("{}"), &p.st), DS_OK);
  };
  put(1, "The capital of France is Paris");
  put(2, "capital letters");
  put(3, "Paris: the capital");
  EXPECT_TRUE(found(p, p.instance, "capital").empty());
  std::uint64_t version = 0;
  ASSERT_EQ(table.commit(p.instance, &version, &p.st), DS_OK);
  EXPECT_EQ(version, 1u);
  EXPECT_THAT(found(p, p.instance, "CAPITAL of France"), ElementsAre(1, 2, 3));
  EXPECT_THAT(found(p, p.instance, "paris"), ElementsAre(1, 3));
  const std::uint64_t gone = 1;
  ASSERT_EQ(table.erase(p.instance, &gone, 1, &p.st), DS_OK);
  EXPECT_THAT(found(p, p.instance, "paris"), ElementsAre(1, 3));

  std::string saved;
  const ds_sink sink{sizeof sink, 0, &saved, &append};
  ASSERT_EQ(p.component->ops->save(p.instance, &sink, &p.st), DS_OK);
  ds_instance* other = p.make();
  const auto restore = [&](std::string_view bytes) {
    const ds_source source{
        sizeof source, 0, &bytes,
        [](void* ctx, void* to, std::uint64_t room, std::uint64_t* got) -> ds_code {
          auto& left = *static_cast<std::string_view*>(ctx);
          *got = left.copy(static_cast<char*>(to), room);
          left.remove_prefix(*got);
          return DS_OK;
        }};
    return p.component->ops->restore(other, &source, str("1.0.0"), &p.st);
  };
  for (std::size_t n = 0; n < saved.size(); ++n)
    ASSERT_EQ(restore(std::string_view(saved).substr(0, n)), DS_E_DATA) << n;
  EXPECT_EQ(restore(saved + "x"), DS_E_DATA);
  EXPECT_TRUE(found(p, other, "paris").empty()) << "a refused state changes nothing";
  ASSERT_EQ(restore(saved), DS_OK) << p.text();
  EXPECT_THAT(found(p, other, "paris"), ElementsAre(1, 3));
  std::string text;
  const ds_sink to{sizeof to, 0, &text, &append};
  ASSERT_EQ(table.fetch(other, 2, &to, nullptr, &p.st), DS_OK);
  EXPECT_EQ(text, "capital letters");
  EXPECT_EQ(table.fetch(other, 8, &to, nullptr, &p.st), DS_E_ARG);
  p.component->ops->destroy(other);
}

TEST(LineLength, FindsLongLinesByCharactersAndFollowsItsSetting) {
  Plugin p("line_length", {{"columns", 4}});
  std::vector<std::pair<std::uint32_t, std::string>> findings;
  const auto emit = [](void* ctx, const ds_finding* f) -> ds_code {
    static_cast<decltype(findings)*>(ctx)->emplace_back(f->line, view(f->message));
    return DS_OK;
  };
  const auto analyse = [&](std::string_view text) {
    findings.clear();
    return p.table<ds_tool>().analyse(p.instance, &p.call, str("c++"), str("a.cpp"), str(text),
                                      &findings, emit, &p.st);
  };
  using Finding = std::pair<std::uint32_t, std::string>;
  ASSERT_EQ(analyse("abcd\n\nabcdef\nääää\nabcde"), DS_OK);
  EXPECT_THAT(findings, ElementsAre(Finding(3, "6 columns, expected at most 4"),
                                    Finding(5, "5 columns, expected at most 4")));
  config["columns"] = 5;
  ASSERT_EQ(
      p.component->ops->reconfigure(p.instance, reinterpret_cast<const ds_config*>(&p), &p.st),
      DS_OK);
  ASSERT_EQ(analyse("abcde\nabcdef"), DS_OK);
  EXPECT_EQ(findings.size(), 1u);
  const std::uint32_t stop = 1;
  p.call.cancel = &stop;
  EXPECT_EQ(analyse("abcdef"), DS_E_CANCELLED);
}

}  // namespace
