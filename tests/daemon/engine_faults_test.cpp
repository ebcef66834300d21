// SPDX-License-Identifier: Apache-2.0
// The engine on a device that fails, or has not enough memory: requests end as they would have, on
// the CPU if need be. The device computes with the CPU's kernels, so answers agree to the bit.
#include <gtest/gtest.h>

#include <latch>
#include <map>

#include "faulty_device.h"
#include "served_model.h"

namespace ds {
namespace {

using test::FaultyDevice;
using test::Pending;
using test::ServedModel;
using test::submit;
using Phase = DeviceState::Phase;

constexpr int64_t kVersions = 6;

EngineOptions small_options() {
  EngineOptions options;
  options.context = 512;
  options.max_running = 16;
  options.prefill_chunk = 64;
  options.kv_pages = 128;
  options.kv_dtype = KvDtype::kF32;
  return options;
}

/// Greedy and sampled, of all versions, short prompts and long.
std::vector<GenerateRequest> some_requests() {
  std::vector<GenerateRequest> out;
  for (uint64_t i = 0; i < 10; ++i) {
    GenerateRequest r;
    r.id = "r" + std::to_string(i);
    r.model = "v" + std::to_string(1 + i % kVersions);
    Rng rng(i);
    std::vector<TokenId> prompt;
    for (uint64_t n = 0; n < 20 + 17 * i; ++n)
      prompt.push_back(static_cast<TokenId>(3 + rng.below(600)));
    r.prompt.push_back({std::move(prompt)});
    r.max_tokens = 24;
    r.sampling.temperature = i % 2 == 0 ? 0 : 1;
    r.sampling.seed = i;
    r.logprobs = 1;
    r.prompt_logprobs = i == 3;
    out.push_back(std::move(r));
  }
  return out;
}

struct Answer {
  std::string text, streamed, version;
  std::vector<TokenId> tokens;
  std::vector<float> prompt_logprobs;
  bool operator==(const Answer&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Answer& a) {
  return out << a.version << " \"" << a.text << "\" (" << a.tokens.size() << " tokens)";
}

Answer answer_of(Pending& pending) {
  EXPECT_TRUE(pending.refused.ok()) << pending.refused.message();
  const Finish done = pending.wait();
  EXPECT_TRUE(done.status.ok()) << done.status.message();
  Answer out{done.text, *pending.streamed, done.version, {}, {}};
  for (const TokenInfo& t : done.tokens) out.tokens.push_back(t.id);
  for (const TokenInfo& t : done.prompt_tokens) out.prompt_logprobs.push_back(t.logprob);
  EXPECT_EQ(pending.tokens->size(), done.tokens.size()) << "a token was sent twice, or not at all";
  return out;
}

std::vector<Answer> ask_all(Engine& engine) {
  std::vector<Pending> pending;
  for (GenerateRequest& r : some_requests()) pending.push_back(submit(engine, std::move(r)));
  std::vector<Answer> out;
  for (Pending& p : pending) out.push_back(answer_of(p));
  return out;
}

/// What the CPU answers when nothing fails.
const std::vector<Answer>& right_answers() {
  static const std::vector<Answer> once = [] {
    ServedModel served("untied-gqa", WeightFormat::kBF16);
    served.publish_up_to(kVersions);
    return ask_all(*served.engine(small_options()));
  }();
  return once;
}

/// A model on the faulty device, whose state is watched.
class Faulty {
 public:
  Faulty() {
    served.machine.compute.device = &state;
    served.publish_up_to(kVersions);
    for (int64_t n = 1; n <= kVersions; ++n)
      kept.push_back(*served.versions->find(version_name(n)));
  }
  std::unique_ptr<Engine> engine(const EngineOptions& options = small_options()) {
    return served.engine(options);
  }
  FaultyDevice device;
  std::vector<Phase> phases;  ///< as they were told
  DeviceState state{system_clock_seam(),
                    [this](const DeviceState::View& v) { phases.push_back(v.phase); }};
  ServedModel served{"untied-gqa", WeightFormat::kBF16};
  std::vector<std::shared_ptr<const Weights>> kept;  ///< in memory: requests load nothing
};

class EngineFaults : public testing::Test {
 protected:
  void SetUp() override { right_answers(); }  // before there is another device
};

TEST_F(EngineFaults, TheDeviceAnswersLikeTheCpuWhileItWorks) {
  Faulty faulty;
  EXPECT_EQ(ask_all(*faulty.engine()), right_answers());
  EXPECT_GT(faulty.device->calls, 1000);
  EXPECT_EQ(faulty.state.view().phase, Phase::kComputes);
}

TEST_F(EngineFaults, SequencesGoOnOnTheCpuWhereverItFails) {
  for (const int64_t call : {1, 7, 50, 100, 200, 333, 450}) {
    Faulty faulty;
    const auto engine = faulty.engine();
    faulty.device->fail_at_call = call;
    EXPECT_EQ(ask_all(*engine), right_answers()) << "call " << call;
    EXPECT_TRUE(faulty.device->failed) << "call " << call << " was never made";
    EXPECT_EQ(faulty.phases, (std::vector{Phase::kLost, Phase::kOnHost}));
    EXPECT_NE(faulty.state.view().reason.find("an illegal address"), std::string::npos);
    EXPECT_EQ(ask_all(*engine), right_answers()) << "what came after the failure";
  }
}

TEST_F(EngineFaults, EmbeddingsGoOn) {
  const auto mean_of = [](Engine& engine) {
    std::promise<std::vector<float>> done;
    std::vector<TokenId> ids(200);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<TokenId>(3 + i);
    const Status asked = engine.submit_embedding(
        "e", "v2", ids, [&](const Status& status, std::vector<float> mean, const std::string&) {
          EXPECT_TRUE(status.ok()) << status.message();
          done.set_value(std::move(mean));
        });
    EXPECT_TRUE(asked.ok()) << asked.message();
    return done.get_future().get();
  };
  ServedModel healthy("untied-gqa", WeightFormat::kBF16);
  healthy.publish_up_to(kVersions);
  const std::vector<float> want = mean_of(*healthy.engine(small_options()));
  Faulty faulty;
  const auto engine = faulty.engine();
  faulty.device->fail_at_call = 60;
  EXPECT_EQ(mean_of(*engine), want);
  EXPECT_TRUE(faulty.device->failed);
}

TEST_F(EngineFaults, AnIdleEngineLeavesWhenItIsTold) {
  Faulty faulty;
  const auto engine = faulty.engine();
  faulty.device->fail_at_call = 1;
  faulty.served.machine.compute.ops->zero(faulty.served.machine.compute.context, nullptr, 0);
  EXPECT_FALSE(finish(faulty.served.machine.compute).ok());  // another thread's call
  EXPECT_EQ(faulty.state.view().phase, Phase::kLost);
  engine->leave_device();
  EXPECT_EQ(ask_all(*engine), right_answers());
  EXPECT_EQ(faulty.state.view().phase, Phase::kOnHost);
}

TEST_F(EngineFaults, RunningSequencesKeepTheirVersionAndNewOnesTakeTheNext) {
  Faulty faulty;
  const auto engine = faulty.engine();
  std::latch begun(1), published(1);
  auto once = std::make_shared<std::once_flag>();
  Pending running = submit(*engine, some_requests()[5], [&, once] {
    std::call_once(*once, [&] {
      begun.count_down();
      published.wait();
    });
  });
  begun.wait();
  faulty.device->fail_at_call = 1;
  // As a learner's thread would that had just finished its candidate, for the CPU by now.
  VersionManifest m;
  m.model = "default";
  m.number = kVersions + 1;
  m.parent = kVersions;
  m.base_sha256 = faulty.served.model.base->sha256();
  m.method = "lora";
  m.weight_hash = weight_hash(m.base_sha256, {});
  const Compute host{&cpu_ops(best_cpu_isa()), {serial_parallel()}};
  const auto delta = test::random_delta(*faulty.served.model.base, host, m.number);
  const Status done = faulty.served.versions->publish(
      m, {}, {}, {}, make_weights(m, faulty.served.model.base, delta), true);
  EXPECT_TRUE(done.ok()) << done.message();
  published.count_down();
  EXPECT_EQ(answer_of(running), right_answers()[5]);
  EXPECT_TRUE(faulty.device->failed);
  GenerateRequest next = some_requests()[0];
  next.model.clear();
  Pending after = submit(*engine, next);
  EXPECT_EQ(answer_of(after).version, "v7");
}

TEST_F(EngineFaults, FewerPagesWhereThereIsNoMemoryForAll) {
  Faulty faulty;
  const int64_t page =
      static_cast<int64_t>(KvPages::page_bytes(faulty.served.model.base->config(), KvDtype::kF32));
  const int64_t workspace = int64_t{8} << 20;
  faulty.device->limit_bytes = faulty.device->bytes + 40 * page + workspace;
  EngineOptions options = small_options();
  options.kv_pages = 4096;
  const auto engine = faulty.engine(options);
  const int64_t pages = engine->stats()["kv_total"].get<int64_t>();
  EXPECT_GE(pages, 16);  // a whole context
  EXPECT_LT(pages, 4096);
  EXPECT_EQ(ask_all(*engine), right_answers());
  EXPECT_EQ(faulty.state.view().phase, Phase::kComputes);
}

TEST_F(EngineFaults, AStartFindsAWayAtEachRefusal) {
  Faulty faulty;
  for (int64_t n = 1;; ++n) {
    faulty.device->refuse_at_allocation = n;
    const auto engine = faulty.engine();
    const bool all_made = faulty.device->refuse_at_allocation > 0;
    faulty.device->refuse_at_allocation = 0;
    EXPECT_EQ(ask_all(*engine), right_answers()) << "allocation " << n;
    EXPECT_EQ(faulty.state.view().phase, Phase::kComputes) << "one refusal is no reason to leave";
    if (all_made) break;
    ASSERT_LT(n, 100);
  }
}

TEST_F(EngineFaults, WithoutMemoryForOneContextTheCpuServes) {
  Faulty faulty;
  faulty.device->limit_bytes = faulty.device->bytes + 4096;
  const auto engine = faulty.engine();
  EXPECT_EQ(faulty.phases, (std::vector{Phase::kLost, Phase::kOnHost}));
  EXPECT_NE(faulty.state.view().reason.find("no memory"), std::string::npos);
  EXPECT_EQ(ask_all(*engine), right_answers());
}

TEST_F(EngineFaults, AStepThatFindsNoMemoryIsTakenSmaller) {
  Faulty faulty;
  for (int64_t n = 1;; ++n) {
    const auto engine = faulty.engine();
    faulty.device->refuse_at_allocation = n;
    EXPECT_EQ(ask_all(*engine), right_answers()) << "allocation " << n;
    EXPECT_EQ(faulty.state.view().phase, Phase::kComputes);
    if (faulty.device->refuse_at_allocation > 0) break;
    ASSERT_LT(n, 100);
  }
}

TEST_F(EngineFaults, WithoutMemoryForOneRowTheCpuGoesOn) {
  Faulty faulty;
  const auto engine = faulty.engine();
  faulty.device->limit_bytes = 1;
  EXPECT_EQ(ask_all(*engine), right_answers());
  EXPECT_EQ(faulty.phases, (std::vector{Phase::kLost, Phase::kOnHost}));
  EXPECT_GT(faulty.device->refused, 3) << "it tried with fewer rows first";
}

TEST_F(EngineFaults, WeightsThatFindNoMemorySaySo) {
  Faulty faulty;
  const Compute& compute = faulty.served.machine.compute;
  const int64_t before = faulty.device->bytes;
  for (int64_t n = 1;; n += 3) {
    faulty.device->refuse_at_allocation = n;
    const auto base = BaseWeights::load(*faulty.served.model.file, compute, WeightFormat::kBF16);
    if (base.ok()) break;
    EXPECT_EQ(base.status().code(), Code::kResource);
    EXPECT_EQ(faulty.device->bytes, before) << "something was kept of allocations up to " << n;
    ASSERT_LT(n, 1000);
  }
  std::vector<LoraDelta::LayerFactors> factors(
      static_cast<size_t>(faulty.served.model.base->config().n_layers));
  for (auto& layer : factors) {
    const auto [rows, columns] = target_shape(faulty.served.model.base->config(), kUp);
    layer[kUp] = {std::vector<float>(static_cast<size_t>(columns), 0.5f),
                  std::vector<float>(static_cast<size_t>(rows), 0.5f)};
  }
  for (int64_t n = 1;; ++n) {
    faulty.device->refuse_at_allocation = n;
    const auto delta = LoraDelta::pack(*faulty.served.model.base, compute, 1, 1.0f, factors);
    if (delta.ok()) break;
    EXPECT_EQ(delta.status().code(), Code::kResource);
    ASSERT_LT(n, 1000);
  }
}

}  // namespace
}  // namespace ds
