// SPDX-License-Identifier: Apache-2.0
// Components in helper processes: the same results as in this one, and what happens when the helper
// dies, hangs or lies.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "kernels/pool.h"
#include "plugin/flat.h"
#include "plugin/plugins.h"
#include "plugin/tensor_view.h"
#include "plugin/tool_run.h"
#include "plugin/utf8.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

using testing::HasSubstr;

const std::string kHelper = std::string(DS_BIN_DIR) + "/ds-plugin-helper";
const std::string kModules = std::string(DS_BIN_DIR) + "/../modules/";
const PluginServices kServices;

size_t open_files() {
  size_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    (void)entry;
    ++n;
  }
  return n;
}

size_t children() {
  std::error_code none;
  size_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", none)) {
    std::ifstream stat(entry.path() / "stat");
    std::string text;
    std::getline(stat, text);
    const size_t end = text.rfind(") ");
    if (end == std::string::npos) continue;
    if (std::atol(text.c_str() + end + 4) == getpid()) ++n;
  }
  return n;
}

std::shared_ptr<const PluginLibrary> library(const std::string& path) {
  const auto file = read_plugin_file(path);
  if (!file.ok()) return nullptr;
  auto loaded = PluginLibrary::load(*file, kServices);
  return loaded.ok() ? *loaded : nullptr;
}

IsolationOptions options() {
  IsolationOptions out;
  out.program = kHelper;
  out.arena_bytes = 1 << 22;
  return out;
}

std::shared_ptr<PluginInstance> make(const std::shared_ptr<const PluginLibrary>& from,
                                     const IsolationOptions* isolation) {
  auto made = PluginInstance::create(from, from->components()[0], Json::object(), isolation);
  EXPECT_TRUE(made.ok()) << made.status().message();
  return made.ok() ? *made : nullptr;
}

Result<Json> analyse(const PluginInstance& tool, const std::string& text, int64_t deadline_ns = 0,
                     const uint32_t* stop = nullptr) {
  ToolRequest request;
  request.language = "c++";
  request.path = "a.cpp";
  request.text = text;
  request.deadline_ns = deadline_ns;
  request.stop = stop;
  return run_tool(tool, request);
}

std::string error_of(const Result<Json>& result) {
  return result.ok() ? "ok: " + dump_json(*result) : result.status().message();
}

TEST(FlatTest, ReadsOnlyWhatIsThere) {
  FlatWriter out;
  out.put<uint32_t>(7);
  out.put_text("seven");
  for (size_t n = 0; n <= out.bytes().size(); ++n) {
    FlatReader from(std::string_view(out.bytes()).substr(0, n));
    const auto number = from.get<uint32_t>();
    const std::string_view text = from.get_text();
    const bool whole = n == out.bytes().size();
    EXPECT_EQ(from.ok(), whole) << n;
    EXPECT_EQ(number, n >= 4 ? 7u : 0u);
    EXPECT_EQ(text, whole ? "seven" : "");
  }
}

TEST(FlatTest, ACountIsNeverMoreThanFits) {
  FlatWriter out;
  out.put<uint64_t>(3);
  out.put_raw("0123456789ab");
  FlatReader fits(out.bytes()), beyond(out.bytes());
  EXPECT_EQ(fits.get_count(4), 3u);
  EXPECT_TRUE(fits.ok());
  EXPECT_EQ(beyond.get_count(5), 0u);
  EXPECT_FALSE(beyond.ok());
}

TEST(FlatTest, TellsUtf8FromOtherBytes) {
  for (const std::string_view good : {"", "a", "\xc2\x80", "\xe2\x82\xac", "\xf0\x9f\x98\x80"})
    EXPECT_TRUE(valid_utf8(good));
  for (const std::string_view bad :
       {std::string_view("\0", 1), std::string_view("\x80"), std::string_view("\xc0\x80"),
        std::string_view("\xe0\x80\x80"), std::string_view("\xed\xa0\x80"),
        std::string_view("\xf0\x9f"), std::string_view("\xf4\x90\x80\x80")})
    EXPECT_FALSE(valid_utf8(bad));
}

TEST(RestartPolicyTest, WaitsTwiceAsLongEachTimeUpToALimit) {
  RestartLimits limits;
  limits.deaths = 100;
  limits.first_wait_ns = 10, limits.longest_wait_ns = 50, limits.window_ns = 1'000'000;
  RestartPolicy policy(limits);
  std::vector<int64_t> waits;
  for (int64_t now = 1; now <= 6; ++now) {
    policy.died(now);
    waits.push_back(policy.wait_ns(now));
  }
  EXPECT_THAT(waits, testing::ElementsAre(0, 10, 20, 40, 50, 50));
  EXPECT_EQ(policy.wait_ns(1'000), 0);
  policy.died(3'000'000);  // the others are outside the window
  EXPECT_EQ(policy.wait_ns(3'000'000), 0);
}

TEST(RestartPolicyTest, OpensAfterTooManyDeathsThenGivesOneTry) {
  RestartLimits limits;  // 3 in 60 s, then 30 s
  RestartPolicy policy(limits);
  constexpr int64_t kSecond = 1'000'000'000;
  policy.died(0);
  policy.died(30 * kSecond);
  EXPECT_STREQ(policy.breaker(31 * kSecond), "closed");
  policy.died(59 * kSecond);
  EXPECT_TRUE(policy.open(59 * kSecond));
  EXPECT_EQ(policy.wait_ns(60 * kSecond), 29 * kSecond);
  EXPECT_STREQ(policy.breaker(89 * kSecond), "half-open");
  EXPECT_EQ(policy.wait_ns(89 * kSecond), 0);
  policy.died(90 * kSecond);  // the try failed
  EXPECT_TRUE(policy.open(119 * kSecond));
  EXPECT_STREQ(policy.breaker(121 * kSecond), "half-open");
  policy.served();
  EXPECT_STREQ(policy.breaker(121 * kSecond), "closed");
  EXPECT_EQ(policy.deaths(), 4u);
}

TEST(IsolationTest, CppcheckFindsTheSameInAHelper) {
  const auto from = library(kModules + "tool_cppcheck.so");
  ASSERT_NE(from, nullptr);
  const auto here = make(from, nullptr);
  const IsolationOptions isolation = options();
  const auto there = make(from, &isolation);
  ASSERT_TRUE(here && there);
  EXPECT_NE(there->isolated()->state().pid, getpid());
  const std::string text = "int f() {\n  int a[2];\n  return a[3];\n}\n";
  const Result<Json> ours = analyse(*here, text), theirs = analyse(*there, text);
  ASSERT_TRUE(ours.ok() && theirs.ok()) << error_of(theirs);
  EXPECT_FALSE((*ours)["findings"].empty());
  EXPECT_EQ(*ours, *theirs);
}

/// What a search for `text` gives: ids and scores.
std::vector<std::pair<uint64_t, float>> hits(const PluginInstance& store, const std::string& text) {
  const auto table = store.table<ds_retriever>();
  ds_call call{};
  call.size = sizeof call;
  std::vector<ds_hit> found(10);
  uint64_t n = 0;
  ds_status st{};
  const ds_code code = table.search(store.handle(), &call, abi_str(text), nullptr, {}, found.data(),
                                    found.size(), &n, &st);
  EXPECT_EQ(code, DS_OK) << plugin_status("search", code, st).message();
  std::vector<std::pair<uint64_t, float>> out;
  for (uint64_t i = 0; i < n; ++i) out.emplace_back(found[i].id, found[i].score);
  return out;
}

TEST(IsolationTest, ARetrieverKnowsAfterADeathWhatItKnewBefore) {
  const auto from = library(kModules + "retriever_bm25.so");
  ASSERT_NE(from, nullptr);
  IsolationOptions isolation = options();
  isolation.arena_bytes = 1 << 26;
  isolation.restart.deaths = 1000;
  isolation.restart.first_wait_ns = 0;
  const auto here = make(from, nullptr), there = make(from, &isolation);
  ASSERT_TRUE(here && there);
  // Long texts: some of the deaths come after the changes have become a saved state.
  for (uint64_t id = 1; id <= 12; ++id) {
    std::string text = "river stone " + std::string(id % 3, 'x') + " ";
    while (text.size() < 120'000) text += "w" + std::to_string(text.size() * id) + " ";
    for (const PluginInstance* store : {here.get(), there.get()}) {
      const auto table = store->table<ds_retriever>();
      ds_status st{};
      uint64_t version = 0;
      ASSERT_EQ(table.put(store->handle(), id, abi_str(text), nullptr, abi_str("{}"), &st), DS_OK);
      if (id % 4 == 0) {
        const uint64_t gone = id - 1;
        ASSERT_EQ(table.erase(store->handle(), &gone, 1, &st), DS_OK);
      }
      if (id % 2 == 0) {
        ASSERT_EQ(table.commit(store->handle(), &version, &st), DS_OK);
      }
    }
    const pid_t before = there->isolated()->state().pid;
    kill(before, SIGKILL);
    ds_status st{};
    uint64_t n = 0;
    ds_hit one{};
    const auto table = there->table<ds_retriever>();
    ds_call call{};
    call.size = sizeof call;
    EXPECT_NE(table.search(there->handle(), &call, abi_str("stone"), nullptr, {}, &one, 1, &n, &st),
              DS_OK);
    EXPECT_EQ(hits(*there, "river"), hits(*here, "river")) << id;
    EXPECT_NE(there->isolated()->state().pid, before);
  }
  EXPECT_FALSE(hits(*there, "river").empty());
  const auto ours = here->save(), theirs = there->save();
  ASSERT_TRUE(ours.ok() && theirs.ok()) << theirs.status().message();
  EXPECT_EQ(*ours, *theirs);
}

TEST(IsolationTest, AQuantizerGivesTheSameWeightsButDoesNotMultiply) {
  const auto from = library(kModules + "quantizer_int8.so");
  ASSERT_NE(from, nullptr);
  const IsolationOptions isolation = options();
  const auto here = make(from, nullptr), there = make(from, &isolation);
  ASSERT_TRUE(here && there);
  EXPECT_EQ(there->table<ds_quantizer>().linear, nullptr);
  constexpr int64_t kN = 32, kK = 128;
  std::vector<float> w(kN * kK), back[2];
  for (size_t i = 0; i < w.size(); ++i) w[i] = std::sin(0.37f * static_cast<float>(i));
  const TensorView w_t(w.data(), kAbiF32, {kN, kK});
  for (const int which : {0, 1}) {
    const PluginInstance& q = which == 0 ? *here : *there;
    const auto table = q.table<ds_quantizer>();
    ds_qformat format{};
    format.size = sizeof format;
    ds_status st{};
    ASSERT_EQ(table.format(q.handle(), kN, kK, &format, &st), DS_OK);
    std::vector<double> packed(format.packed_bytes / 8 + 8), scales(format.scale_bytes / 8 + 8),
        zeros(format.zero_bytes / 8 + 8);
    ds_qweight weight{sizeof weight, 0,           kN, kK, &format, packed.data(),
                      scales.data(), zeros.data()};
    ds_call call{};
    call.size = sizeof call;
    call.parallel = serial_parallel();
    back[which].assign(w.size(), NAN);
    const TensorView back_t(back[which].data(), kAbiF32, {kN, kK});
    ASSERT_EQ(table.quantize(q.handle(), &call, abi_str("w"), w_t.get(), &weight, &st), DS_OK);
    ASSERT_EQ(table.dequantize(q.handle(), &call, &weight, back_t.get(), &st), DS_OK);
  }
  EXPECT_EQ(back[0], back[1]);
}

/// The tokens of an image, or what plan or encode say.
Result<std::vector<float>> encoded(const PluginInstance& encoder,
                                   const std::vector<uint8_t>& pixels, float weight,
                                   uint32_t flags = 0, int64_t tokens = 6) {
  const TensorView image(pixels.data(), kAbiU8, {40, 24, 3});
  ds_media media{};
  media.size = sizeof media;
  media.modality = DS_MOD_IMAGE;
  media.data = image.get();
  media.weight = weight;
  ds_encode_args args{};
  args.size = sizeof args;
  args.flags = flags;
  args.media = &media;
  const auto table = encoder.table<ds_encoder>();
  ds_status st{};
  ds_plan plan{};
  plan.size = sizeof plan;
  ds_code code = table.plan(encoder.handle(), &args, &plan, &st);
  if (code != DS_OK) return plugin_status("plan", code, st);
  EXPECT_EQ(plan.shape[0], 6);
  EXPECT_EQ(plan.shape[1], 576);
  std::vector<float> out(static_cast<size_t>(tokens * plan.shape[1]), NAN);
  const TensorView out_t(out.data(), kAbiF32, {tokens, plan.shape[1]});
  args.out = out_t.get();
  std::vector<double> workspace(plan.workspace_bytes / 8 + 1);
  ds_call call = host_call(serial_parallel());
  call.workspace = workspace.data();
  call.workspace_bytes = plan.workspace_bytes;
  code = table.encode(encoder.handle(), &call, &args, &st);
  if (code != DS_OK) return plugin_status("encode", code, st);
  return out;
}

TEST(IsolationTest, AnEncoderGivesTheSameInAHelper) {
  const auto from = library(DS_PATCH_MEAN);
  ASSERT_NE(from, nullptr);
  const IsolationOptions isolation = options();
  const auto here = make(from, nullptr), there = make(from, &isolation);
  ASSERT_TRUE(here && there);
  EXPECT_EQ(there->table<ds_encoder>().backward, nullptr);
  EXPECT_EQ(there->table<ds_encoder>().modalities, 1u << DS_MOD_IMAGE);
  std::vector<uint8_t> pixels(40 * 24 * 3);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<uint8_t>(37 * i);
  const auto ours = encoded(*here, pixels, 0.5f), theirs = encoded(*there, pixels, 0.5f);
  ASSERT_TRUE(ours.ok() && theirs.ok()) << theirs.status().message();
  EXPECT_EQ(*ours, *theirs);
  const auto infinite = encoded(*there, pixels, INFINITY);
  EXPECT_THAT(infinite.status().message(), HasSubstr("a value of the output is NaN or infinity"));
  EXPECT_EQ(there->isolated()->state().deaths, 1u);
  EXPECT_THAT(encoded(*there, pixels, 1, DS_ENCODE_TRAIN).status().message(),
              HasSubstr("does not train in a helper process"));
  EXPECT_THAT(encoded(*there, pixels, 1, 0, 5).status().message(),
              HasSubstr("out: [5, 576], expected [6, 576]"));
  EXPECT_EQ(there->isolated()->state().deaths, 1u);
}

TEST(IsolationTest, WhatCannotRunIsolatedSaysWhy) {
  const auto from = library(kModules + "attention_dense.so");
  ASSERT_NE(from, nullptr);
  const IsolationOptions isolation = options();
  const auto made = PluginInstance::create(from, from->components()[0], Json::object(), &isolation);
  ASSERT_FALSE(made.ok());
  EXPECT_THAT(made.status().message(), HasSubstr("dense: cannot run isolated: attention reads"));
  const auto text = library(kModules + "encoder_text.so");
  ASSERT_NE(text, nullptr);
  EXPECT_EQ(IsolatedInstance::cannot(text->components()[0]),
            "it reads the model's tensors, which a helper process does not have");
}

class HangTest : public testing::Test {
 protected:
  void start() {
    from_ = library(DS_HANG_PLUGIN);
    ASSERT_NE(from_, nullptr);
    isolation_.on_death = [this](std::string_view, std::string_view why) {
      ++deaths_;
      last_ = why;
    };
    tool_ = make(from_, &isolation_);
    ASSERT_NE(tool_, nullptr);
  }
  IsolationOptions isolation_ = options();
  std::shared_ptr<const PluginLibrary> from_;
  std::shared_ptr<PluginInstance> tool_;
  std::atomic<int> deaths_{0};
  std::string last_;
};

TEST_F(HangTest, ARoundTripIsShort) {
  ASSERT_NO_FATAL_FAILURE(start());
  std::vector<int64_t> times(2000);
  for (int64_t& time : times) {
    const int64_t from = system_clock_seam().monotonic_ns();
    ASSERT_TRUE(tool_->health().ok());
    time = system_clock_seam().monotonic_ns() - from;
  }
  std::sort(times.begin(), times.end());
  std::printf("round trip: median %.1f us, 99%% %.1f us\n",
              static_cast<double>(times[times.size() / 2]) / 1e3,
              static_cast<double>(times[times.size() * 99 / 100]) / 1e3);
  EXPECT_LT(times[times.size() / 2], 2'000'000);  // the figure depends on the machine
}

TEST_F(HangTest, ADeathFailsOnlyItsCallAndIsTold) {
  ASSERT_NO_FATAL_FAILURE(start());
  const auto dead = analyse(*tool_, "abort");
  EXPECT_THAT(error_of(dead), HasSubstr("hang: its helper process died in the call (signal 6)"));
  EXPECT_EQ(dead.status().code(), Code::kPlugin);
  EXPECT_EQ(deaths_, 1);
  EXPECT_TRUE(analyse(*tool_, "fine").ok());
}

TEST_F(HangTest, TheBreakerOpensAndClosesByTheClock) {
  int64_t now = 1;
  isolation_.now = [&] { return now; };
  ASSERT_NO_FATAL_FAILURE(start());
  for (int i = 0; i < 3; ++i) {
    EXPECT_THAT(error_of(analyse(*tool_, "abort")), HasSubstr("died in the call"));
    now += 1'000'000'000;
  }
  EXPECT_THAT(error_of(analyse(*tool_, "fine")),
              HasSubstr("hang: its helper process died (signal 6) and did so too often; next"));
  EXPECT_STREQ(tool_->isolated()->state().breaker, "open");
  EXPECT_EQ(tool_->isolated()->state().pid, -1);
  now += 30'000'000'000;
  EXPECT_TRUE(analyse(*tool_, "fine").ok());
  EXPECT_STREQ(tool_->isolated()->state().breaker, "closed");
}

TEST(FallBackTest, TheBuiltInOneAnswersWhileTheBreakerIsOpen) {
  const ScratchFolder folder;
  std::filesystem::create_directories(folder / "modules");
  std::filesystem::permissions(folder / "modules", std::filesystem::perms::owner_all);
  std::filesystem::copy_file(DS_HANG_PLUGIN, folder / "modules/hang.so");
  std::filesystem::permissions(folder / "modules/hang.so", std::filesystem::perms::owner_all);
  std::atomic<int64_t> now{1};
  PluginOptions with;
  with.modules = folder / "modules";
  with.data = folder / "plugins";
  with.isolation = options();
  with.isolation.now = [&] { return now.load(); };
  const auto plugins = Plugins::open(with, {}, posix_file_system(), system_clock_seam());
  ASSERT_TRUE(plugins.ok()) << plugins.status().message();
  const auto ask = [&](const std::string& text, uint64_t generation) {
    const auto found = (*plugins)->find(DS_KIND_TOOL, "hang");
    EXPECT_TRUE(found.ok() && found->generation == generation) << text;
    return analyse(*found->instance, text).ok();
  };
  ASSERT_TRUE(ask("fine", 1));
  const auto loaded = (*plugins)->load(DS_HANG_PLUGIN, true, Json());
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  ASSERT_TRUE(ask("fine", 2));
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(ask("abort", 2));
    now += 1'000'000'000;
  }
  EXPECT_TRUE(ask("fine", 1));
  now += 30'000'000'000;
  EXPECT_TRUE(ask("fine", 2));
}

TEST_F(HangTest, FiftyHangsEndAtTheirDeadline) {
  isolation_.restart.deaths = 1000;
  isolation_.restart.first_wait_ns = 0;
  isolation_.grace_ns = 20'000'000;
  ASSERT_NO_FATAL_FAILURE(start());
  for (int i = 0; i < 50; ++i) {
    const int64_t deadline = system_clock_seam().monotonic_ns() + 20'000'000;
    const auto late = analyse(*tool_, "hang", deadline);
    ASSERT_EQ(late.status().code(), Code::kDeadline) << error_of(late);
    EXPECT_THAT(error_of(late), HasSubstr("hang: no answer until 20 ms after the deadline"));
    ASSERT_TRUE(analyse(*tool_, "fine").ok());
  }
  EXPECT_EQ(deaths_, 50);
}

TEST_F(HangTest, ACallWithoutDeadlineHasTheDefaultOne) {
  // Making the instance is a call as well, and starts a process: seconds are for that.
  isolation_.call_timeout_ns = 3'000'000'000;
  isolation_.grace_ns = 20'000'000;
  ASSERT_NO_FATAL_FAILURE(start());
  EXPECT_EQ(analyse(*tool_, "hang").status().code(), Code::kDeadline);
}

TEST_F(HangTest, CancellingReachesTheHelper) {
  isolation_.grace_ns = 60'000'000'000;
  ASSERT_NO_FATAL_FAILURE(start());
  const uint32_t stop = 1;
  EXPECT_THAT(error_of(analyse(*tool_, "stop", 0, &stop)), HasSubstr("stopped as told"));
  EXPECT_EQ(deaths_, 0);
}

TEST_F(HangTest, WhatDoesNotStopIsKilled) {
  isolation_.grace_ns = 20'000'000;
  ASSERT_NO_FATAL_FAILURE(start());
  const uint32_t stop = 1;
  EXPECT_EQ(analyse(*tool_, "hang", 0, &stop).status().code(), Code::kCancelled);
  EXPECT_EQ(deaths_, 1);
}

TEST_F(HangTest, TwoHundredKillsUnderLoadFailOnlyTheCallsInFlight) {
  isolation_.restart.deaths = 1'000'000;  // the breaker would, rightly, end this test
  isolation_.restart.first_wait_ns = 0;
  const size_t files_before = (from_ = library(DS_HANG_PLUGIN), open_files());
  ASSERT_NO_FATAL_FAILURE(start());
  std::atomic<bool> done{false};
  std::atomic<int> served{0}, failed{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      while (!done) {
        const auto result = analyse(*tool_, "fine");
        if (result.ok()) {
          ++served;
        } else {
          ++failed;
          EXPECT_THAT(error_of(result), HasSubstr("died in the call (signal 9)"));
        }
      }
    });
  }
  int64_t slowest = 0;
  for (int i = 0; i < 200; ++i) {
    pid_t pid = -1;
    while ((pid = tool_->isolated()->state().pid) < 0) std::this_thread::yield();
    const int before_deaths = deaths_;
    const int64_t from = system_clock_seam().monotonic_ns();
    kill(pid, SIGKILL);
    while (deaths_ == before_deaths) std::this_thread::yield();
    for (const int before = served; served == before;) std::this_thread::yield();
    slowest = std::max(slowest, system_clock_seam().monotonic_ns() - from);
  }
  done = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(deaths_, 200);
  EXPECT_LE(failed, 200);
  EXPECT_LT(slowest, 1'000'000'000);
  RecordProperty("slowest_ms", static_cast<int>(slowest / 1'000'000));
  tool_.reset();
  EXPECT_EQ(children(), 0u);
  EXPECT_LE(open_files(), files_before + 1);  // the library's own file, loaded again by start()
}

/// A component whose helper lies as `what` says.
std::string lied(const std::string& what) {
  ds_tool table{};
  table.size = sizeof table;
  table.analyse = [](ds_instance*, const ds_call*, ds_str, ds_str, ds_str, void*,
                     ds_code (*)(void*, const ds_finding*),
                     ds_status*) -> ds_code { return DS_OK; };
  ds_instance_ops ops{};
  ops.size = sizeof ops;
  ds_component component{};
  component.size = sizeof component;
  component.kind = DS_KIND_TOOL;
  component.name = abi_str("liar");
  component.ops = &ops;
  component.table = &table;
  IsolationOptions isolation = options();
  isolation.program = DS_HOSTILE_HELPER;
  HelperLaunch launch;
  launch.program = DS_HOSTILE_HELPER;
  launch.file = 0;
  launch.kind = "tool", launch.component = what, launch.arena_bytes = isolation.arena_bytes;
  auto made = IsolatedInstance::create(isolation, launch, component, "{}", {});
  if (!made.ok()) return made.status().message();
  IsolatedTable proxies;
  IsolatedInstance::proxied(component, proxies);
  ds_status st{};
  int findings = 0;
  const auto emit = [](void* ctx, const ds_finding*) -> ds_code {
    ++*static_cast<int*>(ctx);
    return DS_OK;
  };
  const ds_code code = proxies.tool.analyse(reinterpret_cast<ds_instance*>(made->get()), nullptr,
                                            {}, {}, {}, &findings, emit, &st);
  if (code == DS_OK) return "ok";
  EXPECT_EQ((*made)->state().pid, -1) << what;
  return plugin_status("liar", code, st).message();
}

TEST(HostileHelperTest, GarbageIsRefusedWithTheReason) {
  for (const auto& [what, why] : std::vector<std::pair<std::string, std::string>>{
           {"code", "its code is none of the ABI's"},
           {"text", "its text is broken"},
           {"logs", "a count is beyond its end"},
           {"count", "a count is beyond its end"},
           {"short", "it ends too early"},
           {"severity", "severity is none of the ABI's"},
           {"utf8", "a finding's text is not UTF-8"},
           {"nul", "a finding's text is not UTF-8"},
           {"nan", "confidence is not within 0 and 1"},
           {"tail", "something follows it"},
           {"length", "a length is beyond its end"},
           {"sequence", "its reply is to request"},
           {"size", "its reply has 18446744073709551615 bytes"}})
    EXPECT_THAT(lied(what),
                testing::AllOf(HasSubstr("liar: garbage from its helper process"), HasSubstr(why)))
        << what;
}

TEST(HostileHelperTest, FiftyRandomRepliesAreRefused) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const size_t before = open_files();
  for (uint64_t i = 0; i < 50; ++i)
    EXPECT_THAT(lied("random-" + std::to_string(seed + i)), HasSubstr("garbage")) << i;
  EXPECT_EQ(open_files(), before);
  EXPECT_EQ(children(), 0u);
}

}  // namespace
}  // namespace ds
