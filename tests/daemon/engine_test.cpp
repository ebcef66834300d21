// SPDX-License-Identifier: Apache-2.0
// The engine on tiny models: references, the bits rule through batching, chunks, cache and setting
// back, versions side by side, and every way a request can end.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <latch>
#include <map>
#include <set>
#include <thread>

#include "served_model.h"

namespace ds {
namespace {

using test::Pending;
using test::ServedModel;
using test::submit;

EngineOptions small_options() {
  EngineOptions options;
  options.context = 512;
  options.max_running = 16;
  options.prefill_chunk = 128;
  options.kv_pages = 256;
  options.kv_dtype = KvDtype::kF32;
  return options;
}

GenerateRequest request(std::string id, std::vector<TokenId> prompt, int64_t max_tokens) {
  GenerateRequest r;
  r.id = std::move(id);
  r.prompt.push_back({std::move(prompt)});
  r.max_tokens = max_tokens;
  r.sampling.temperature = 0;
  return r;
}

std::vector<TokenId> random_prompt(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<TokenId> ids;
  for (size_t i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>(3 + rng.below(600)));
  return ids;
}

/// Sampled with log probabilities: everything that must not depend on company.
GenerateRequest probe(std::string id, uint64_t seed, size_t prompt = 150, int64_t max_tokens = 60) {
  GenerateRequest r = request(std::move(id), random_prompt(prompt, seed), max_tokens);
  r.sampling.temperature = 1;
  r.sampling.seed = seed;
  r.logprobs = 3;
  return r;
}

std::vector<uint32_t> bits_of(const std::vector<TokenInfo>& tokens) {
  std::vector<uint32_t> bits;
  for (const TokenInfo& t : tokens) {
    bits.push_back(static_cast<uint32_t>(t.id));
    bits.push_back(std::bit_cast<uint32_t>(t.logprob));
    for (const auto& [id, logprob] : t.top) {
      bits.push_back(static_cast<uint32_t>(id));
      bits.push_back(std::bit_cast<uint32_t>(logprob));
    }
  }
  return bits;
}

void expect_same(const Finish& got, const Finish& want) {
  EXPECT_TRUE(got.status.ok()) << got.status.message();
  EXPECT_EQ(got.text, want.text);
  EXPECT_EQ(got.finish_reason, want.finish_reason);
  EXPECT_EQ(bits_of(got.tokens), bits_of(want.tokens));
  EXPECT_EQ(bits_of(got.prompt_tokens), bits_of(want.prompt_tokens));
}

class EveryTinyModel : public testing::TestWithParam<const char*> {};

TEST_P(EveryTinyModel, GreedyTokensMatchTheReference) {
  ServedModel served(GetParam());
  const Json reference =
      test::read_json(test::data_path(std::string("tiny/") + GetParam() + "/reference.json"));
  std::vector<TokenId> prompt, want;
  for (size_t i = 0; i < 20; ++i) prompt.push_back(reference["ids"][i].get<int>());
  for (const Json& id : reference["greedy_12"]) want.push_back(id.get<int>());
  const auto engine = served.engine(small_options());
  GenerateRequest r = request("a", prompt, 12);
  r.logprobs = 0;
  const Finish done = submit(*engine, r).wait();
  ASSERT_TRUE(done.status.ok()) << done.status.message();
  std::vector<TokenId> got;
  for (const TokenInfo& token : done.tokens) got.push_back(token.id);
  EXPECT_EQ(got, want);
  EXPECT_EQ(done.finish_reason, "length");
  EXPECT_EQ(done.prompt_count, 20);
  EXPECT_EQ(done.completion_count, 12);
  EXPECT_EQ(done.version, "v1");
}

INSTANTIATE_TEST_SUITE_P(All, EveryTinyModel,
                         testing::Values("tied", "untied-gqa", "bias", "headdim-llama3",
                                         "linear-rope"));

class EngineTest : public testing::Test {
 protected:
  /// Shared by the tests of this file: publishing again and again costs synced writes.
  static void SetUpTestSuite() {
    served = new ServedModel("untied-gqa", WeightFormat::kBF16);
    served->publish_up_to(12);
  }
  static void TearDownTestSuite() {
    delete served;
    served = nullptr;
  }
  /// Needs the pool: no other engine may be busy.
  static Finish alone(const GenerateRequest& r, EngineOptions options = small_options()) {
    options.prefix_cache = false;
    const auto engine = served->engine(options);
    return submit(*engine, r).wait();
  }
  static ServedModel* served;
};
ServedModel* EngineTest::served = nullptr;

TEST_F(EngineTest, PromptLogprobsAreThoseOfTheModel) {
  GenerateRequest r = request("a", random_prompt(150, 1), 0);
  r.prompt_logprobs = true;
  r.logprobs = 2;
  r.model = "v1";
  const Finish done = alone(r);
  ASSERT_TRUE(done.status.ok()) << done.status.message();
  EXPECT_EQ(done.finish_reason, "length");
  EXPECT_EQ(done.completion_count, 0);
  ASSERT_EQ(done.prompt_tokens.size(), 150u);
  EXPECT_FALSE(done.prompt_tokens[0].has_logprob);
  const std::vector<TokenId>& ids = r.prompt[0].ids;
  const std::vector<float> logits = test::serve_logits(served->machine.compute, *served->model.base,
                                                       nullptr, ids, 150, KvDtype::kF32);
  const auto vocab = static_cast<size_t>(served->model.base->config().vocab);
  SampleScratch scratch;
  for (size_t i = 1; i < ids.size(); ++i) {
    const TokenInfo& entry = done.prompt_tokens[i];
    EXPECT_EQ(entry.id, ids[i]);
    const auto want = score_token({logits.data() + (i - 1) * vocab, vocab}, ids[i], 2, scratch);
    if (!served->machine.compute.ops->host_memory) {
      // There bits depend on how the prompt is cut; tops that are as near change places.
      EXPECT_NEAR(entry.logprob, want->logprob, 5e-2) << i;
      continue;
    }
    EXPECT_EQ(std::bit_cast<uint32_t>(entry.logprob), std::bit_cast<uint32_t>(want->logprob)) << i;
    EXPECT_EQ(entry.top, want->top);
  }
}

TEST_F(EngineTest, CompanyAndChunksDoNotChangeBits) {
  GenerateRequest scored = request("scored", random_prompt(150, 9), 0);
  scored.prompt_logprobs = true;
  const Finish want = alone(probe("p", 1)), want_scored = alone(scored);
  ASSERT_EQ(want.tokens.size(), 60u);
  for (const int64_t chunk : {1, 7, 128}) {
    SCOPED_TRACE(chunk);
    EngineOptions options = small_options();
    options.prefill_chunk = chunk;
    const auto engine = served->engine(options);
    std::latch all_submitted(1);
    Pending first = submit(*engine, probe("first", 100, 40, 100), [&] { all_submitted.wait(); });
    std::vector<Pending> others;
    for (uint64_t i = 0; i < 7; ++i) {
      GenerateRequest r = probe("o" + std::to_string(i), 200 + i, 20 + 30 * i, 80);
      r.model = "v" + std::to_string(1 + i);
      others.push_back(submit(*engine, r));
    }
    Pending p = submit(*engine, probe("p", 1)), s = submit(*engine, scored);
    all_submitted.count_down();
    expect_same(p.wait(), want);
    expect_same(s.wait(), want_scored);
    first.wait();
    for (Pending& other : others) EXPECT_TRUE(other.wait().status.ok());
  }
}

TEST_F(EngineTest, WarmEqualsColdAndVersionsDoNotShare) {
  const auto engine = served->engine(small_options());
  const Finish cold = submit(*engine, probe("p", 2)).wait();
  EXPECT_EQ(cold.cached_count, 0);
  const Finish warm = submit(*engine, probe("p", 2)).wait();
  EXPECT_EQ(warm.cached_count, 128);  // 150 prompt tokens: four full pages
  expect_same(warm, cold);
  GenerateRequest other = probe("p", 2);
  other.model = "v3";
  const Finish first_on_v3 = submit(*engine, other).wait();
  EXPECT_EQ(first_on_v3.cached_count, 0);
  EXPECT_EQ(first_on_v3.version, "v3");
  expect_same(first_on_v3, alone(other));
  EXPECT_NE(first_on_v3.text, cold.text);
}

TEST_F(EngineTest, APromptOfFullPagesIsNeverAllCached) {
  const auto engine = served->engine(small_options());
  const Finish cold = submit(*engine, probe("p", 2, 64)).wait();
  const Finish warm = submit(*engine, probe("p", 2, 64)).wait();
  EXPECT_EQ(warm.cached_count, 32);
  EXPECT_TRUE(warm.status.ok()) << warm.status.message();
  // On a GPU bits depend on how a prompt is cut: kernels/ops.h.
  if (served->machine.compute.ops->host_memory) expect_same(warm, cold);
}

TEST_F(EngineTest, SetBackSequencesContinueWithEqualBits) {
  EngineOptions options = small_options();
  options.kv_pages = 18;  // two of the three start, all would grow to 16 pages
  const auto engine = served->engine(options);
  std::latch all_submitted(1);
  std::vector<Pending> pending;
  for (uint64_t i = 0; i < 3; ++i) {
    pending.push_back(
        submit(*engine, probe("p" + std::to_string(i), i, 20, 480),
               i == 0 ? std::function<void()>([&] { all_submitted.wait(); }) : nullptr));
  }
  all_submitted.count_down();
  std::vector<Finish> done;
  for (Pending& p : pending) {
    done.push_back(p.wait());
    EXPECT_EQ(*p.streamed, done.back().text);
  }
  EXPECT_GT(engine->stats()["preemptions"].get<int>(), 0);
  for (uint64_t i = 0; i < 3; ++i) expect_same(done[i], alone(probe("x", i, 20, 480)));
}

TEST_F(EngineTest, MoreVersionsThanSlotsInOneStep) {
  const auto engine = served->engine(small_options());
  std::latch all_submitted(1);
  std::vector<Pending> pending;
  for (int64_t v = 1; v <= 12; ++v) {
    GenerateRequest r = probe("p" + std::to_string(v), 5);
    r.model = "v" + std::to_string(v);
    pending.push_back(submit(*engine, r, [&] { all_submitted.wait(); }));
  }
  all_submitted.count_down();
  std::vector<Finish> all;
  for (Pending& p : pending) all.push_back(p.wait());
  std::set<std::string> texts;
  for (int64_t v = 1; v <= 12; ++v) {
    const Finish& done = all[static_cast<size_t>(v - 1)];
    EXPECT_EQ(done.version, "v" + std::to_string(v));
    GenerateRequest r = probe("x", 5);
    r.model = done.version;
    expect_same(done, alone(r));
    texts.insert(done.text);
  }
  EXPECT_EQ(texts.size(), 12u);  // the deltas do change the text
}

TEST_F(EngineTest, SwapsUnderStreamsKeepEachStreamOnItsVersion) {
  const auto engine = served->engine(small_options());
  constexpr int kSwaps = 20, kStreams = 4;
  std::vector<Pending> pending;
  std::vector<std::string> versions;
  for (int swap = 0; swap < kSwaps; ++swap) {
    const int64_t to = 11 + swap % 2;
    ASSERT_TRUE(served->versions->rollback(to, "test").ok());
    for (int i = 0; i < kStreams; ++i) {
      const std::string id = std::to_string(swap) + "-" + std::to_string(i);
      pending.push_back(submit(*engine, probe(id, static_cast<uint64_t>(i), 50, 40)));
      versions.push_back("v" + std::to_string(to));
    }
  }
  std::vector<Finish> all;
  for (Pending& p : pending) all.push_back(p.wait());
  std::map<std::string, Finish> expected;
  for (const std::string version : {"v11", "v12"}) {
    for (int i = 0; i < kStreams; ++i) {
      GenerateRequest r = probe("x", static_cast<uint64_t>(i), 50, 40);
      r.model = version;
      expected[version + std::to_string(i)] = alone(r);
    }
  }
  for (size_t i = 0; i < pending.size(); ++i) {
    const Finish& done = all[i];
    EXPECT_EQ(done.version, versions[i]);
    EXPECT_EQ(*pending[i].streamed, done.text);
    expect_same(done, expected[versions[i] + std::to_string(i % kStreams)]);
  }
  ASSERT_TRUE(served->versions->promote(12).ok());
}

TEST_F(EngineTest, SeedsDecideTheText) {
  const auto engine = served->engine(small_options());
  GenerateRequest r = probe("p", 1);
  const Finish a = submit(*engine, r).wait(), b = submit(*engine, r).wait();
  expect_same(a, b);
  r.sampling.seed = 999;
  EXPECT_NE(submit(*engine, r).wait().text, a.text);
}

/// Without log-probabilities a GPU draws tokens itself; with them the sampler does, from the same
/// logits.
TEST_F(EngineTest, TokensThatTheBackendDrawsAreTheSamplers) {
  for (const float temperature : {0.0f, 0.7f, 1.0f}) {
    GenerateRequest drawn = probe("drawn", 5), sampled = probe("sampled", 5);
    drawn.sampling.temperature = sampled.sampling.temperature = temperature;
    drawn.logprobs = -1;
    const Finish got = alone(drawn), want = alone(sampled);
    ASSERT_TRUE(got.status.ok() && want.status.ok());
    EXPECT_EQ(got.text, want.text) << "temperature " << temperature;
    EXPECT_EQ(got.completion_count, 60);
  }
}

TEST_F(EngineTest, StopStringsEndTheTextAcrossTokens) {
  GenerateRequest plain = probe("p", 3);
  for (TokenId id = 0; id < 640; ++id) {  // whole characters only, so that bytes of tokens add up
    for (const char c : served->model.tokenizer->bytes(id)) {
      if ((c & 0x80) != 0) plain.sampling.logit_bias.emplace_back(id, -100.0f);
    }
  }
  const Finish full = alone(plain);
  // A stop string from the middle of one token into the next but one.
  std::string text;
  size_t begin = 0, end = 0;
  for (size_t i = 0; i < full.tokens.size(); ++i) {
    if (i == 20) begin = text.size() + full.tokens[i].bytes.size() - 1;
    if (i == 22) end = text.size() + 1;
    text += full.tokens[i].bytes;
  }
  GenerateRequest r = plain;
  const std::string stop = text.substr(begin, end - begin);
  ASSERT_EQ(full.text, text);
  r.stop = {"never in the text", stop};
  const auto engine = served->engine(small_options());
  Pending pending = submit(*engine, r);
  const Finish done = pending.wait();
  EXPECT_EQ(done.finish_reason, "stop");
  EXPECT_EQ(done.text, text.substr(0, text.find(stop)));
  EXPECT_EQ(*pending.streamed, done.text);
  EXPECT_EQ(bits_of(*pending.tokens), bits_of(done.tokens));
  EXPECT_LT(done.completion_count, full.completion_count);
}

TEST_F(EngineTest, StopIdsEndWithoutText) {
  const Finish full = alone(probe("p", 4));
  GenerateRequest r = probe("p", 4);
  r.stop_ids = {full.tokens[10].id};
  size_t first = 0;
  while (full.tokens[first].id != r.stop_ids[0]) ++first;
  const Finish done = alone(r);
  EXPECT_EQ(done.finish_reason, "stop");
  EXPECT_EQ(done.tokens.size(), first);
  EXPECT_EQ(done.completion_count, static_cast<int64_t>(first) + 1);
}

TEST_F(EngineTest, CancelEndsWaitingAndRunningRequests) {
  EngineOptions options = small_options();
  options.max_running = 1;
  const auto engine = served->engine(options);
  std::latch go(1), started(1);
  int chunks = 0;
  Pending running = submit(*engine, probe("running", 1, 20, 400), [&] {
    if (++chunks == 1) started.count_down();
    go.wait();
  });
  Pending waiting = submit(*engine, probe("waiting", 2));
  Pending last = submit(*engine, probe("last", 1));
  started.wait();
  EXPECT_TRUE(engine->cancel("running"));
  EXPECT_TRUE(engine->cancel("waiting"));
  EXPECT_FALSE(engine->cancel("unheard of"));
  const Json ps = engine->ps();
  ASSERT_EQ(ps.size(), 3u);
  go.count_down();
  const Finish a = running.wait(), b = waiting.wait();
  EXPECT_EQ(a.finish_reason, "cancelled");
  EXPECT_TRUE(a.status.ok());
  EXPECT_LT(a.completion_count, 3);
  EXPECT_EQ(b.finish_reason, "cancelled");
  EXPECT_EQ(b.completion_count, 0);
  const Finish c = last.wait();
  expect_same(c, alone(probe("last", 1)));
  engine->drain(60'000);
  EXPECT_FALSE(engine->cancel("running"));
  EXPECT_EQ(engine->stats()["kv_used"], 0);
}

TEST_F(EngineTest, BusyWhenTheQueueIsFull) {
  EngineOptions options = small_options();
  options.max_running = 1;
  options.max_waiting = 2;
  const auto engine = served->engine(options);
  std::latch go(1), started(1);
  int chunks = 0;
  Pending running = submit(*engine, probe("r", 1), [&] {
    if (++chunks == 1) started.count_down();
    go.wait();
  });
  started.wait();
  Pending a = submit(*engine, probe("a", 1)), b = submit(*engine, probe("b", 1));
  EXPECT_EQ(submit(*engine, probe("c", 1)).refused.code(), Code::kBusy);
  EXPECT_EQ(submit(*engine, probe("a", 1)).refused.code(), Code::kBusy);
  go.count_down();
  running.wait();
  expect_same(a.wait(), b.wait());
}

TEST_F(EngineTest, InteractiveGoesBeforeBatch) {
  EngineOptions options = small_options();
  options.max_running = 1;
  const auto engine = served->engine(options);
  std::latch go(1);
  Pending first = submit(*engine, probe("first", 1, 20, 5), [&] { go.wait(); });
  GenerateRequest batch = probe("batch", 2, 20, 5);
  batch.latency = LatencyClass::kBatch;
  Pending later = submit(*engine, batch), sooner = submit(*engine, probe("interactive", 3, 20, 5));
  go.count_down();
  first.wait();
  const Finish i = sooner.wait(), b = later.wait();
  EXPECT_LT(i.queue_us, b.queue_us);
}

TEST_F(EngineTest, RefusesWhatCannotRun) {
  const auto engine = served->engine(small_options());
  const auto code = [&](auto change) {
    GenerateRequest r = probe("p", 1);
    change(r);
    Pending pending = submit(*engine, r);
    if (pending.refused.ok()) pending.wait();
    return std::pair(pending.refused.code(), pending.refused.message());
  };
  EXPECT_EQ(code([](auto& r) { r.model = "v99"; }).first, Code::kNotFound);
  EXPECT_EQ(code([](auto& r) { r.prompt.clear(); }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.prompt[0].ids[3] = 640; }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.prompt[0].ids[3] = -1; }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.max_tokens = -2; }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.stop = {""}; }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.logprobs = kMaxLogprobs + 1; }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.sampling.temperature = -1; }).first, Code::kInvalid);
  EXPECT_EQ(code([](auto& r) { r.id = ""; }).first, Code::kInvalid);
  const auto [long_code, message] = code([](auto& r) { r.prompt[0].ids.assign(512, 5); });
  EXPECT_EQ(long_code, Code::kInvalid);
  EXPECT_NE(message.find("512 tokens"), std::string::npos) << message;
  EXPECT_EQ(code([](auto& r) { r.prompt[0].ids.assign(511, 5), r.max_tokens = -1; }).first,
            Code::kOk);
  EXPECT_EQ(code([](auto& r) { r.prompt[0].ids.assign(512, 5), r.max_tokens = 0; }).first,
            Code::kOk);
}

TEST_F(EngineTest, DefaultLengthIsTheRestOfTheContext) {
  EngineOptions options = small_options();
  options.context = 64;
  const auto engine = served->engine(options);
  const Finish done = submit(*engine, request("a", random_prompt(20, 1), -1)).wait();
  EXPECT_EQ(done.finish_reason, "length");
  EXPECT_EQ(done.completion_count, 44);
}

TEST_F(EngineTest, EmbeddingsAreMeansOfHiddenStates) {
  const auto embed = [](Engine& engine, std::vector<TokenId> ids) {
    std::promise<std::vector<float>> promise;
    const Status status =
        engine.submit_embedding("e", "v3", std::move(ids), [&](Status s, auto mean, auto version) {
          EXPECT_TRUE(s.ok()) << s.message();
          EXPECT_EQ(version, "v3");
          promise.set_value(std::move(mean));
        });
    EXPECT_TRUE(status.ok());
    return promise.get_future().get();
  };
  EngineOptions options = small_options();
  const auto whole = served->engine(options);
  options.prefill_chunk = 7;
  const auto chunked = served->engine(options);
  const std::vector<TokenId> ids = random_prompt(100, 4);
  submit(*whole, request("warm the cache", ids, 2)).wait();
  const std::vector<float> a = embed(*whole, ids), b = embed(*chunked, ids);
  ASSERT_EQ(a.size(), 64u);
  EXPECT_EQ(a, b);
  EXPECT_NE(embed(*whole, random_prompt(100, 5)), a);
}

TEST_F(EngineTest, DrainFinishesOrCancelsAndRefusesNewOnes) {
  const auto engine = served->engine(small_options());
  Pending a = submit(*engine, probe("a", 1));
  engine->drain(60'000);
  EXPECT_EQ(a.future.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  EXPECT_EQ(a.wait().finish_reason, "length");
  EXPECT_EQ(submit(*engine, probe("b", 1)).refused.code(), Code::kUnavailable);

  const auto hasty = served->engine(small_options());
  std::latch go(1), started(1);
  int chunks = 0;
  Pending b = submit(*hasty, probe("b", 1, 20, 400), [&] {
    if (++chunks == 1) started.count_down();
    go.wait();
  });
  started.wait();
  std::thread drains([&] { hasty->drain(0); });
  while (submit(*hasty, probe("c", 1, 20, 1)).refused.ok()) {
  }
  go.count_down();
  drains.join();
  EXPECT_EQ(b.wait().finish_reason, "cancelled");
}

TEST_F(EngineTest, DestructionAnswersEverybody) {
  EngineOptions options = small_options();
  options.max_running = 2;
  auto engine = served->engine(options);
  std::vector<Pending> pending;
  for (int i = 0; i < 10; ++i)
    pending.push_back(submit(*engine, probe(std::to_string(i), 1, 20, 450)));
  engine.reset();
  for (Pending& p : pending) {
    const Finish done = p.wait();
    EXPECT_TRUE(done.finish_reason == "cancelled" || done.finish_reason == "length");
  }
}

TEST(PoisonedVersion, EndsItsOwnSequenceOnly) {
  ServedModel served("tied");
  served.publish_up_to(test::kPoisonedVersion);
  const auto engine = served.engine(small_options());
  std::latch both(1);
  GenerateRequest good = probe("good", 1), bad = probe("bad", 1);
  good.model = "v1";
  Pending g = submit(*engine, good, [&] { both.wait(); });
  Pending b = submit(*engine, bad);  // the current version
  both.count_down();
  const Finish failed = b.wait();
  EXPECT_EQ(failed.status.code(), Code::kCorrupt);
  EXPECT_NE(failed.status.message().find("v13"), std::string::npos) << failed.status.message();
  EXPECT_EQ(failed.finish_reason, "");
  EXPECT_TRUE(g.wait().status.ok());
  // Its pages are used again and carry nothing over.
  const Finish after = submit(*engine, good).wait();
  EXPECT_TRUE(after.status.ok());
  EXPECT_FALSE(submit(*engine, bad).wait().status.ok());
}

}  // namespace
}  // namespace ds
