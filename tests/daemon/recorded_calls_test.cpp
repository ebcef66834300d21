// SPDX-License-Identifier: Apache-2.0
// Recorded calls: what is kept of real ones, and its three uses: a reload that is refused because
// the new generation answers differently, diff, bench.
#include "plugin/recorded_calls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <random>

#include "engine/attention.h"
#include "engine/quantizer.h"
#include "kernels/pool.h"
#include "plugin/plugins.h"
#include "plugin/replayed_calls.h"
#include "plugin/tool_run.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 16;
constexpr uint64_t kSeed = 20261126;  // of all random numbers here

std::vector<float> noise(std::mt19937_64& rng, size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& v : out) v = normal(rng);
  return out;
}

/// A served sequence on scattered pages, the second of a batch of two.
class Serving {
 public:
  Serving(std::shared_ptr<const PluginInstance> plugin, int64_t n)
      : attention_(std::move(plugin), 1), n_(n), pages_n_((n + 31) / 32) {
    std::mt19937_64 rng(kSeed);
    const auto page = static_cast<size_t>(kKvHeads * kKvPageTokens * kDim);
    q_ = noise(rng, static_cast<size_t>((n + 1) * kHeads * kDim));
    k_ = noise(rng, static_cast<size_t>(pages_n_ + 1) * page);
    v_ = noise(rng, static_cast<size_t>(pages_n_ + 1) * page);
    for (int64_t i = 0; i < pages_n_; ++i) pages_.push_back(static_cast<int32_t>(pages_n_ - i));
    extra_.resize(static_cast<size_t>(pages_n_ + 1) * 4096);
  }
  /// The tokens [begin, end), with one token of another sequence before them.
  std::vector<float> rows(int64_t begin, int64_t end) {
    const std::vector<SequenceSpan> spans = {{0, 1, 0, &other_page_},
                                             {1, end - begin, begin, pages_.data()}};
    const KvView kv{KvDtype::kF32, kKvHeads, kDim, k_.data(), v_.data()};
    std::vector<float> out(static_cast<size_t>((end - begin + 1) * kHeads * kDim), NAN);
    const Ops& ops = cpu_ops(best_cpu_isa());
    const OpContext context{serial_parallel()};
    const std::vector<int32_t> ids(static_cast<size_t>(end - begin + 1));
    StepTables tables;
    DS_CHECK(tables.set(ops, context, ids, spans, ids, {}).ok());
    ServingAttention serving;
    Status done = serving.begin(attention_, ops, context, kHeads, 0.25f, tables, kv, pages_n_ + 1);
    if (done.ok())
      done = serving.layer(3, q_.data() + begin * kHeads * kDim, out.data(), {}, kv, extra_.data(),
                           serving.page_extra_bytes());
    EXPECT_TRUE(done.ok()) << done.message();
    return out;
  }
  void all_and_one_more() {
    rows(0, n_ - 1);
    rows(n_ - 1, n_);
  }

 private:
  const Attention attention_;
  const int64_t n_, pages_n_;
  std::vector<float> q_, k_, v_;
  std::vector<int32_t> pages_;
  const int32_t other_page_ = 0;
  std::vector<std::byte> extra_;
};

class RecordedCallsTest : public testing::Test {
 protected:
  RecordedCallsTest() {
    auto opened = Plugins::open(
        {std::string(DS_BIN_DIR) + "/../modules", folder_ / "plugins", Json::object()}, {},
        posix_file_system(), system_clock_seam());
    EXPECT_TRUE(opened.ok()) << opened.status().message();
    plugins_ = std::move(*opened);
  }
  std::shared_ptr<const PluginInstance> find(uint32_t kind, const std::string& name) {
    const auto found = plugins_->find(kind, name);
    EXPECT_TRUE(found.ok()) << found.status().message();
    return found->instance;
  }
  /// Serves a text of `n` tokens with an attention: a prefill and a decode are recorded.
  std::shared_ptr<const PluginInstance> serve(const std::string& attention, int64_t n) {
    const auto plugin = find(DS_KIND_ATTENTION, attention);
    Serving(plugin, n).all_and_one_more();
    return plugin;
  }
  /// The installed plugin "shadow", with a recorded call of each of its components.
  void load_shadow() {
    const auto loaded = plugins_->load(copy(DS_SHADOW_PLUGIN), true, Json());
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    serve("mean", 70);
    ToolRequest request;
    request.language = "c", request.path = "a.c", request.text = "int x;\n";
    const auto tool = find(DS_KIND_TOOL, "notes");
    const auto answer = run_tool(*tool, request);
    ASSERT_TRUE(answer.ok()) << answer.status().message();
    record_tool(*tool, request, *answer);
  }
  /// A trusted copy, so that a test can reload from it.
  std::string copy(const std::string& from) {
    const std::string to = folder_ / fs::path(from).filename();
    fs::copy_file(from, to, fs::copy_options::overwrite_existing);
    fs::permissions(to, fs::perms::owner_all);
    const auto file = read_plugin_file(to);
    EXPECT_TRUE(file.ok() && plugins_->trust().allow(*file, "test").ok());
    return to;
  }

  ScratchFolder folder_;
  std::unique_ptr<Plugins> plugins_;
};

TEST_F(RecordedCallsTest, AttentionAnswersARecordedCallBitForBit) {
  for (const char* name : {"dense", "window-global"}) {
    const auto plugin = serve(name, 301);
    const RecordedCalls calls = plugin->recorded().calls();
    ASSERT_EQ(calls.size(), 2u) << name;
    EXPECT_STREQ(calls[0]->input->name(), "prefill");
    EXPECT_EQ(calls[0]->input->size(), "64 rows, 300 keys");
    EXPECT_EQ(calls[1]->input->size(), "1 row, 301 keys");
    for (const auto& call : calls) {
      const auto got = replay(*plugin, *call->input, 0);
      ASSERT_TRUE(got.ok()) << got.status().message();
      EXPECT_EQ(got->values, call->output.values) << name << " " << call->input->name();
    }
  }
}

TEST_F(RecordedCallsTest, QuantizersAnswerTheProductOfARealRowBlock) {
  std::mt19937_64 rng(kSeed);
  constexpr int64_t kN = 100, kK = 128, kRows = 11;
  const auto w = noise(rng, kN * kK), x = noise(rng, kRows * kK);
  const Ops& ops = cpu_ops(best_cpu_isa());
  const OpContext context{serial_parallel(), nullptr};
  for (const char* name : {"int8", "int4"}) {
    const auto plugin = find(DS_KIND_QUANTIZER, name);
    const Quantizer quantizer(plugin, 1);
    const auto weight = quantizer.quantize(context, "w", kN, kK, w.data());
    ASSERT_TRUE(weight.ok()) << weight.status().message();
    std::vector<float> y(kRows * kN, 1.0f);
    LinearArgs args;
    args.rows = kRows, args.x = x.data(), args.x_stride = kK, args.n_weights = 1;
    args.w[0].n = kN, args.w[0].k = kK;
    args.y[0] = y.data(), args.y_stride[0] = kN;
    args.epilogue = Epilogue::kResidual, args.residual = y.data();  // not part of what is kept
    LinearScratch scratch;
    const QuantWeight* weights[] = {weight->get()};
    ASSERT_TRUE(quantizer.linear(ops, context, weights, args, scratch).ok());
    const RecordedCalls calls = plugin->recorded().calls();
    ASSERT_EQ(calls.size(), 1u) << name;
    EXPECT_EQ(calls[0]->input->size(), "8 rows, 64 x 128");
    EXPECT_NEAR(calls[0]->output.values[0] + 1.0f, y[0], 1e-4f * std::abs(y[0]) + 1e-5f);
    double promised = 0;
    const auto got = replay(*plugin, *calls[0]->input, 0, &promised);
    ASSERT_TRUE(got.ok()) << got.status().message();
    const Difference same = difference(*calls[0]->input, calls[0]->output, *got, promised);
    EXPECT_TRUE(same.within()) << name << " " << same.largest << " " << same.weights;
    EXPECT_LT(same.largest, 1e-3) << "its own weights lie on its grid";
    EXPECT_GT(promised, 0);
  }
  // Coarser weights are within what they promise; ones that are broken are not.
  const auto diff = plugins_->diff("int8", "int4");
  ASSERT_TRUE(diff.ok()) << diff.status().message();
  EXPECT_GT((*diff)["largest"].get<double>(), 1e-3);
  EXPECT_EQ((*diff)["differing"], 0) << dump_json(*diff);
  const RecordedCalls calls = find(DS_KIND_QUANTIZER, "int8")->recorded().calls();
  CallOutput broken = *replay(*find(DS_KIND_QUANTIZER, "int8"), *calls[0]->input, 0);
  broken.weights[5] += 1;
  EXPECT_FALSE(difference(*calls[0]->input, calls[0]->output, broken, 0.01).within());
}

TEST_F(RecordedCallsTest, AreFewAndBoundedAndNoneWhenOff) {
  CallRecorder recorder;
  EXPECT_FALSE(recorder.due(CallSort::kDecode)) << "off at first";
  recorder.turn(true);
  int due = 0;
  for (int i = 0; i < 100'000; ++i) due += recorder.due(CallSort::kDecode);
  EXPECT_GE(due, 8);
  EXPECT_LE(due, 20) << "one in sixteen thousand after the first";
  for (int64_t i = 1; i <= 10; ++i) {
    AttentionCall call;
    call.rows = i;
    call.q.resize(size_t{1} << 20);  // 4 MiB
    recorder.keep({std::move(call)}, {});
    recorder.keep({ToolCall{"c", "", std::to_string(i)}}, {});
  }
  size_t bytes = 0, tools = 0;
  for (const auto& call : recorder.calls()) {
    bytes += call->input->bytes();
    tools += call->input->sort() == CallSort::kAnalyse;
  }
  EXPECT_LE(bytes, CallRecorder::kMostBytes);
  EXPECT_GT(bytes, CallRecorder::kMostBytes / 2);
  EXPECT_LE(tools, CallRecorder::kMostOfASort);

  plugins_->set_shadow(Shadow::kOff);
  EXPECT_TRUE(serve("dense", 50)->recorded().calls().empty());
  plugins_->set_shadow(Shadow::kReport);
  EXPECT_EQ(serve("dense", 50)->recorded().calls().size(), 2u);
}

TEST_F(RecordedCallsTest, AReloadThatAnswersTheSameServes) {
  load_shadow();
  const auto reloaded = plugins_->reload("mean", copy(DS_SHADOW_SAME), Json(), Shadow::kRefuse);
  ASSERT_TRUE(reloaded.ok()) << reloaded.status().message();
  EXPECT_EQ((*reloaded)["generation"], 2);
  EXPECT_EQ((*reloaded)["version"], "1.0.1");
  EXPECT_EQ((*reloaded)["shadow"]["source"], "recorded");
  EXPECT_EQ((*reloaded)["shadow"]["calls"], 2);
  EXPECT_EQ((*reloaded)["shadow"]["differing"], 0);
  EXPECT_EQ((*plugins_->show("notes"))["shadow"]["calls"], 1);
  // The new generation has what it answered: the next reload has something to compare with.
  EXPECT_EQ(find(DS_KIND_ATTENTION, "mean")->recorded().calls().size(), 2u);
}

TEST_F(RecordedCallsTest, AReloadThatAnswersSomethingElseIsRefused) {
  load_shadow();
  const std::string other = copy(DS_SHADOW_OTHER);
  const auto refused = plugins_->reload("mean", other, Json(), Shadow::kRefuse);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), Code::kConflict);
  EXPECT_THAT(refused.status().message(),
              AllOf(HasSubstr("shadow replay: 2 of 2 recorded calls differ, prefill (64 rows, 69 "
                              "keys): largest relative difference 0.5, allowed 0.005"),
                    HasSubstr("generation 1 goes on serving")));
  EXPECT_EQ(plugins_->find(DS_KIND_ATTENTION, "mean")->generation, 1u);
  EXPECT_EQ(plugins_->find(DS_KIND_TOOL, "notes")->generation, 1u);

  const auto reported = plugins_->reload("mean", other, Json());
  ASSERT_TRUE(reported.ok()) << reported.status().message();
  EXPECT_EQ((*reported)["generation"], 2);
  EXPECT_EQ((*reported)["shadow"]["differing"], 2);
  EXPECT_NEAR((*reported)["shadow"]["largest"].get<double>(), 0.5, 1e-3);
  EXPECT_THAT(
      (*plugins_->show("notes"))["shadow"]["text"].get<std::string>(),
      HasSubstr("1 of 1 recorded calls differ, analyse (7 bytes): 1 finding is gone, 1 finding"));

  const auto silent = plugins_->reload("mean", copy(DS_SHADOW_SAME), Json(), Shadow::kOff);
  ASSERT_TRUE(silent.ok()) << silent.status().message();
  EXPECT_FALSE(silent->contains("shadow"));
}

TEST_F(RecordedCallsTest, WithoutRecordedCallsTheSelfTestsAreCompared) {
  ASSERT_TRUE(plugins_->load(copy(DS_SHADOW_PLUGIN), true, Json()).ok());
  find(DS_KIND_ATTENTION, "mean");  // in use, but never asked
  const auto refused = plugins_->load(copy(DS_SHADOW_OTHER), false, Json(), Shadow::kRefuse);
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.status().message(), HasSubstr("2 of 2 self-test calls differ"));
}

TEST_F(RecordedCallsTest, DiffTellsDenseFromWindowGlobalOnALongTextOnly) {
  serve("dense", 40);  // all of it is in the window and the globals
  const auto near = plugins_->diff("dense", "window-global");
  ASSERT_TRUE(near.ok()) << near.status().message();
  EXPECT_EQ((*near)["source"], "recorded");
  EXPECT_EQ((*near)["calls"].size(), 2u);
  EXPECT_EQ((*near)["differing"], 0) << dump_json(*near);
  EXPECT_LT((*near)["largest"].get<double>(), 1e-5);
  serve("dense", 600);
  const auto far = plugins_->diff("dense", "window-global");
  ASSERT_TRUE(far.ok()) << far.status().message();
  EXPECT_GE((*far)["differing"], 1) << dump_json(*far);
  EXPECT_GT((*far)["largest"].get<double>(), 1e-2);
  EXPECT_GT((*far)["largest"], (*far)["mean"]);
}

TEST_F(RecordedCallsTest, DiffComparesGenerationsAndNamesFindings) {
  load_shadow();
  EXPECT_THAT(plugins_->diff("mean", "").status().message(), HasSubstr("no generation before 1"));
  ASSERT_TRUE(plugins_->reload("mean", copy(DS_SHADOW_OTHER), Json()).ok());
  for (const char* one : {"mean@2", "mean"}) {
    const auto diff = plugins_->diff(one, "mean@1");
    ASSERT_TRUE(diff.ok()) << diff.status().message();
    EXPECT_EQ((*diff)["a"]["generation"], 2);
    EXPECT_EQ((*diff)["b"]["generation"], 1);
    EXPECT_EQ((*diff)["differing"], 2);
  }
  const auto notes = plugins_->diff("notes", "");
  ASSERT_TRUE(notes.ok()) << notes.status().message();
  ASSERT_EQ((*notes)["only_a"].size(), 1u);
  EXPECT_EQ((*notes)["only_a"][0]["rule"], "weight");
  EXPECT_EQ((*notes)["only_b"][0]["rule"], "size");
  EXPECT_THAT(plugins_->diff("mean", "notes").status().message(), HasSubstr("one of kind tool"));
  EXPECT_THAT(plugins_->diff("mean@7", "").status().message(), HasSubstr("no generation \"7\""));
  ASSERT_TRUE(plugins_->retire("mean").ok());
  EXPECT_THAT(plugins_->diff("mean", "mean@1").status().message(),
              HasSubstr("generation 1 is retired"));
}

TEST_F(RecordedCallsTest, BenchTimesEachCall) {
  serve("dense", 100);
  const auto bench = plugins_->bench("dense", 0.05);
  ASSERT_TRUE(bench.ok()) << bench.status().message();
  EXPECT_EQ((*bench)["source"], "recorded");
  ASSERT_EQ((*bench)["calls"].size(), 2u);
  for (const Json& call : (*bench)["calls"]) {
    EXPECT_GT(call["runs"], 1);
    EXPECT_GT(call["median_us"], 0);
    EXPECT_GE(call["p99_us"], call["median_us"]);
    EXPECT_GT(call["per_s"], 0);
  }
  EXPECT_EQ((*plugins_->bench("int8", 0.01))["source"], "self-test");
  EXPECT_THAT(plugins_->bench("bm25", 1).status().message(),
              HasSubstr("no call was recorded, and the self-test has none for kind retriever"));
  EXPECT_THAT(plugins_->bench("dense", 0).status().message(), HasSubstr("seconds: 0"));
}

}  // namespace
}  // namespace ds
