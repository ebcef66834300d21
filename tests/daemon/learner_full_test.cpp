// SPDX-License-Identifier: Apache-2.0
// Rounds of full fine-tuning by the learner itself, on a tiny model: a new base on disk and in
// memory, taken back, served again after a restart, trained anew without an item.
#include <gtest/gtest.h>

#include <future>

#include "engine/delta_file.h"
#include "learn/learner.h"
#include "served_model.h"
#include "tests/storage/test_seams.h"

namespace ds {
namespace {

const char* const kFirst = "The ferry leaves from the northern pier at seven in the evening.";
const char* const kSecond = "Lanterns are kept in the third drawer of the green cupboard.";
const char* const kThird = "Visitors ring the bell twice and wait beside the old fountain.";
const char* const kFourth = "The baker keeps two loaves for whoever carries the water up the hill.";

/// The parts of a daemon around one data folder; opening again is a restart.
class Workshop {
 public:
  explicit Workshop(const std::string& method, std::map<std::string, std::string> settings = {})
      : settings_(std::move(settings)) {
    settings_.insert({{"learn.enabled", "false"},
                      {"learn.lr", "0.04"},
                      {"learn.deterministic", "true"},
                      {"gate.max_kl", "100"},
                      {"gate.max_drop", "10"}});
    open(method);
  }
  ~Workshop() { close(); }

  void close() {
    learner.reset();
    versions.reset();
    bases.reset();
    store.reset();
  }
  void open(const std::string& method) {
    close();
    config_ = std::make_unique<Config>();
    settings_["learn.method"] = method;
    for (const auto& [name, value] : settings_) DS_CHECK(config_->set(name, value, "test").ok());
    ReplayStore::Options options;
    options.directory = folder / "replay";
    options.fs = &posix_file_system();
    options.clock = &system_clock_seam();
    store = value_of(ReplayStore::open(options));
    bases = std::make_unique<Bases>(*model.file, base_files, WeightFormat::kF32);
    const LoadWeights load = [this](const VersionManifest& m) {
      auto base = bases->find(m.base_sha256, serial());
      return base.ok() ? load_weights(m, files, *base, serial())
                       : Result<std::shared_ptr<const Weights>>(base.status());
    };
    versions =
        value_of(Versions::open("default", model.file->sha256(), *store, files, system_clock_seam(),
                                load, config_->integer("versions.keep")));
    DS_CHECK(base_files.keep_only(versions->bases()).ok());
    LearnerParts parts{*versions,
                       *store,
                       files,
                       *bases,
                       base_files,
                       *config_,
                       machine.pool,
                       *machine.compute.ops,
                       {},
                       machine.components,
                       test::modules(),
                       metrics,
                       events,
                       system_clock_seam(),
                       model.tokenizer,
                       *ChatTemplate::create(model.file->tokenizer()),
                       {},
                       {}};
    learner = std::make_unique<Learner>(std::move(parts));
    learner->start();
  }

  std::string tell(const std::string& text) {
    const auto ack =
        store->submit_and_wait({"client", 1, ++seq_, {{"kind", "text"}, {"text", text}}, {}});
    DS_CHECK(ack.ok());
    return ack->id;
  }
  Json learn() {
    return answer([&](OutcomeCallback done) { learner->step(true, std::move(done)); });
  }
  Json learn(const std::string& text) {
    tell(text);
    return learn();
  }
  Json undo(const std::string& id) {
    return answer([&](OutcomeCallback done) { learner->undo(id, std::move(done)); });
  }

  VersionManifest manifest(int64_t number) { return value_of(versions->manifest(number)); }
  std::shared_ptr<const Weights> weights(int64_t number) {
    return value_of(versions->find(version_name(number)));
  }
  /// Mean log-probability of the text's tokens after the first.
  double likes(const Weights& weights, const std::string& text) {
    const std::vector<TokenId> ids = model.tokenizer->encode(text, false);
    BatchDecoder decoder(bases->config(), machine.compute, KvDtype::kF32);
    const int64_t first = 1, vocab = bases->config().vocab;
    double sum = 0;
    const auto add = [&](size_t, int64_t target, const float* row) {
      double total = 0;
      for (int64_t i = 0; i < vocab; ++i) total += std::exp(row[i]);
      sum += row[ids[static_cast<size_t>(target)]] - std::log(total);
    };
    DS_CHECK(decoder.score(*weights.base, weights.delta.get(), {&ids, 1}, {&first, 1}, add).ok());
    return sum / static_cast<double>(ids.size() - 1);
  }
  std::vector<std::string> bases_on_disk() {
    const auto names = posix_file_system().list(folder / "bases");
    return names.ok() ? *names : std::vector<std::string>();
  }
  Compute serial() const { return {machine.compute.ops, {serial_parallel(), nullptr}}; }
  template <typename T>
  static T value_of(Result<T> result) {
    if (!result.ok()) std::fprintf(stderr, "%s\n", result.status().message().c_str());
    DS_CHECK(result.ok());
    return std::move(result).value();
  }

  test::Machine machine;
  test::LoadedModel model{
      test::load_model(test::data_path("tiny/tied"), machine.compute, WeightFormat::kF32)};
  ScratchFolder folder;
  VersionStore files{posix_file_system(), folder.path()};
  FillingDisk disk;  // of the bases
  BaseStore base_files{disk, folder.path()};
  Metrics metrics;
  EventBus events{system_clock_seam()};
  std::unique_ptr<ReplayStore> store;
  std::unique_ptr<Bases> bases;
  std::unique_ptr<Versions> versions;
  std::unique_ptr<Learner> learner;

 private:
  Json answer(const std::function<void(OutcomeCallback)>& ask) {
    std::promise<Result<Json>> promise;
    ask([&](Result<Json> result) { promise.set_value(std::move(result)); });
    Json json = value_of(promise.get_future().get());
    if (json.contains("reason")) std::printf("%s\n", json["reason"].dump().c_str());
    return json;
  }

  std::map<std::string, std::string> settings_;
  std::unique_ptr<Config> config_;
  int64_t seq_ = 0;
};

TEST(LearnerFull, ARoundMakesABaseThatServes) {
  Workshop w("full");
  const double before = w.likes(*w.weights(1), kFirst);
  const Json outcome = w.learn(kFirst);
  ASSERT_EQ(outcome["outcome"], "published") << outcome.dump();
  const VersionManifest m = w.manifest(2);
  EXPECT_EQ(m.method, "full");
  EXPECT_NE(m.base_sha256, w.manifest(1).base_sha256);
  EXPECT_EQ(m.weight_hash, weight_hash(m.base_sha256, {}));
  EXPECT_EQ(w.bases_on_disk(), std::vector<std::string>{m.base_sha256});
  const auto now = w.versions->current();
  EXPECT_EQ(now->version, "v2");
  EXPECT_EQ(now->base->sha256(), m.base_sha256);
  EXPECT_EQ(now->delta, nullptr);
  EXPECT_GT(w.likes(*now, kFirst), before + 1.0);
  EXPECT_NE(now->execution_id, w.weights(1)->execution_id);
}

TEST(LearnerFull, ARestartServesTheSameAndGoesOnFromTheMasters) {
  Workshop w("full"), straight("full");
  for (Workshop* one : {&w, &straight}) ASSERT_EQ(one->learn(kFirst)["outcome"], "published");
  const double liked = w.likes(*w.versions->current(), kFirst);
  const uint64_t execution = w.versions->current()->execution_id;
  w.open("full");
  EXPECT_EQ(w.versions->current()->version, "v2");
  EXPECT_EQ(w.versions->current()->weight_hash, w.manifest(2).weight_hash);
  EXPECT_EQ(w.versions->current()->execution_id, execution);
  EXPECT_EQ(w.likes(*w.versions->current(), kFirst), liked);
  // The second round gives the same weights whether or not a restart lay between.
  for (Workshop* one : {&w, &straight}) ASSERT_EQ(one->learn(kSecond)["outcome"], "published");
  EXPECT_EQ(w.manifest(3).weight_hash, straight.manifest(3).weight_hash);
}

TEST(LearnerFull, RollbackGivesTheOldAnswersAndTheThirdBasePushesOutTheFirst) {
  Workshop w("full");
  const double before = w.likes(*w.weights(1), kFirst);
  const std::weak_ptr<const BaseWeights> first = w.weights(1)->base;
  ASSERT_EQ(w.learn(kFirst)["outcome"], "published");
  EXPECT_FALSE(first.expired()) << "two bases stay";
  const std::weak_ptr<const BaseWeights> second = w.weights(2)->base;
  ASSERT_EQ(w.learn(kSecond)["outcome"], "published");
  EXPECT_EQ(w.bases->kept(), 2u);
  EXPECT_TRUE(first.expired()) << "the oldest goes once nobody decodes with it";
  EXPECT_FALSE(second.expired());
  ASSERT_TRUE(w.versions->rollback(1, "test").ok());
  EXPECT_EQ(w.versions->current()->base->sha256(), w.model.file->sha256());
  EXPECT_EQ(w.likes(*w.versions->current(), kFirst), before) << "read again";
  EXPECT_LE(w.bases->kept(), 2u);
  ASSERT_TRUE(w.versions->promote(3).ok());
  EXPECT_GT(w.likes(*w.versions->current(), kSecond), before + 1.0);
}

TEST(LearnerFull, ABaseThatIsDecodedWithLivesUntilItsLastSequenceEnds) {
  Workshop w("full");
  auto running = w.weights(1);
  const std::weak_ptr<const BaseWeights> first = running->base;
  for (const char* text : {kFirst, kSecond, kThird})
    ASSERT_EQ(w.learn(text)["outcome"], "published");
  EXPECT_FALSE(first.expired());
  EXPECT_EQ(w.weights(1)->base, running->base) << "found, not read a second time";
  for (const int64_t n : {2, 3, 4}) w.weights(n);
  running.reset();
  for (const int64_t n : {2, 3, 4}) w.weights(n);
  EXPECT_TRUE(first.expired());
}

TEST(LearnerFull, UndoGivesTheWeightsOfAStoreThatNeverHadTheItem) {
  Workshop w("full"), without("full");
  const std::string item = w.tell(kFirst);
  ASSERT_EQ(w.learn()["outcome"], "published");
  for (const char* text : {kSecond, kThird}) {
    ASSERT_EQ(w.learn(text)["outcome"], "published");
    ASSERT_EQ(without.learn(text)["outcome"], "published");
  }
  const Json undone = w.undo(item);
  EXPECT_EQ(undone["version"], "v5") << undone.dump();
  EXPECT_EQ(w.manifest(5).parent, 1);
  EXPECT_EQ(w.manifest(5).weight_hash, without.manifest(3).weight_hash);
  EXPECT_EQ(w.store->get(item)->fate.back().state, "reverted");
}

TEST(LearnerFull, WhatIsNotPublishedLeavesNoBase) {
  Workshop strict("full", {{"gate.max_kl", "0"}});
  EXPECT_EQ(strict.learn(kFirst)["outcome"], "held");
  EXPECT_EQ(strict.bases_on_disk(), std::vector<std::string>());

  Workshop w("full");  // the base is written, then the version cannot be
  ASSERT_TRUE(posix_file_system().make_directories(w.folder / "models/default/versions/v2").ok());
  EXPECT_EQ(w.learn(kFirst)["outcome"], "held");
  EXPECT_EQ(w.bases_on_disk(), std::vector<std::string>());
  EXPECT_EQ(w.versions->current()->version, "v1");
}

TEST(LearnerFull, ABaseThatTheDiskRefusesIsTriedAgain) {
  Workshop w("full");
  w.disk.full = true;
  const std::string item = w.tell(kFirst);
  EXPECT_EQ(w.learn()["outcome"], "held");
  EXPECT_EQ(w.store->get(item)->fate.back().state, "queued");
  EXPECT_EQ(w.bases_on_disk(), std::vector<std::string>()) << "nor a part of one";
  w.disk.full = false;
  EXPECT_EQ(w.learn()["outcome"], "published");
  EXPECT_EQ(w.store->get(item)->fate.back().state, "served");
}

TEST(LearnerFull, ABaseWithoutAVersionGoesAtStart) {
  Workshop w("full");
  ASSERT_EQ(w.learn(kFirst)["outcome"], "published");
  w.close();  // as a kill between the two leaves it
  const std::string stray(64, 'e');
  ASSERT_TRUE(w.base_files.write(stray, "x").ok());
  ASSERT_TRUE(posix_file_system().make_directories(w.folder / ("bases/" + stray + ".tmp")).ok());
  w.open("full");
  EXPECT_EQ(w.bases_on_disk(), std::vector<std::string>{w.manifest(2).base_sha256});
  EXPECT_EQ(w.versions->current()->version, "v2");
}

TEST(LearnerFull, ABaseGoesWithTheLastVersionThatStandsOnIt) {
  Workshop w("full", {{"versions.keep", "2"}});
  ASSERT_EQ(w.learn(kFirst)["outcome"], "published");
  const std::string first = w.manifest(2).base_sha256;
  w.open("lora");
  ASSERT_EQ(w.learn(kSecond)["outcome"], "published");
  ASSERT_EQ(w.manifest(3).base_sha256, first);
  w.open("full");
  ASSERT_EQ(w.learn(kThird)["outcome"], "published");
  ASSERT_FALSE(w.versions->manifest(2).ok());
  std::vector<std::string> expected = {first, w.manifest(4).base_sha256};
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(w.bases_on_disk(), expected) << "v3 stands on it still";
  ASSERT_EQ(w.learn(kFourth)["outcome"], "published");
  ASSERT_FALSE(w.versions->manifest(3).ok());
  expected = {w.manifest(4).base_sha256, w.manifest(5).base_sha256};
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(w.bases_on_disk(), expected);
  w.open("full");
  EXPECT_EQ(w.bases_on_disk(), expected);
  EXPECT_EQ(w.versions->current()->version, "v5");
  ASSERT_TRUE(w.versions->rollback(4, "test").ok());
}

TEST(LearnerFull, FactorsAreMergedAndMethodsFollowEachOther) {
  Workshop w("lora", {{"learn.lr", "0.01"}});
  ASSERT_EQ(w.learn(kFirst)["outcome"], "published");
  const auto low_rank = w.weights(2);
  ASSERT_NE(low_rank->delta, nullptr);
  const auto merged =
      trained_from(w.manifest(2), *low_rank, {true, 8, 0}, w.files, *w.bases, w.serial());
  ASSERT_TRUE(merged.ok()) << merged.status().message();
  Weights start;
  start.base = merged->base;
  const double base = w.likes(*w.weights(1), kFirst), factors = w.likes(*low_rank, kFirst);
  EXPECT_GT(factors, base + 0.5);
  // What serves has its factors rounded to BF16, the merged masters have not.
  EXPECT_NEAR(w.likes(start, kFirst), factors, 0.02 * (factors - base));

  w.open("full");
  ASSERT_EQ(w.learn(kSecond)["outcome"], "published");
  EXPECT_EQ(w.manifest(3).parent, 2);
  EXPECT_GT(w.likes(*w.weights(3), kFirst), base + 0.5) << "the round went on from the factors";
  w.open("lora");
  ASSERT_EQ(w.learn(kThird)["outcome"], "published");
  EXPECT_EQ(w.manifest(4).method, "lora");
  EXPECT_EQ(w.manifest(4).base_sha256, w.manifest(3).base_sha256);
  EXPECT_EQ(w.versions->current()->base->sha256(), w.manifest(3).base_sha256);
  for (const int64_t n : {2, 1, 3, 4}) {
    ASSERT_TRUE(w.versions->rollback(n, "test").ok());
    EXPECT_EQ(w.versions->current()->weight_hash, w.manifest(n).weight_hash);
  }
}

TEST(LearnerFull, BasesShareNoPagesAndMayRunInOneStep) {
  Workshop w("full");
  ASSERT_EQ(w.learn(kFirst)["outcome"], "published");
  EngineOptions options;
  options.context = 128;
  options.kv_dtype = KvDtype::kF32;
  Engine engine(options, w.machine.compute, w.machine.pool, *w.versions, w.model.tokenizer,
                w.metrics, system_clock_seam());
  int number = 0;
  const auto ask = [&](const std::string& version) {
    GenerateRequest request;
    request.id = "r" + std::to_string(++number);
    request.model = version;
    request.max_tokens = 12;
    std::vector<TokenId> prompt = w.model.tokenizer->encode(
        "A long enough beginning that it fills more than one page of keys and values. " +
            std::string(kSecond),
        false);
    EXPECT_GT(prompt.size(), 33u);
    request.prompt = {{std::move(prompt)}};
    return test::submit(engine, std::move(request));
  };
  const Finish old = ask("v1").wait();
  const Finish fresh = ask("v2").wait();
  EXPECT_EQ(fresh.cached_count, 0) << "pages of v1 are of another base";
  EXPECT_NE(old.text, fresh.text);
  std::vector<test::Pending> together;
  for (int i = 0; i < 6; ++i) together.push_back(ask(i % 2 ? "v1" : "v2"));
  for (int i = 0; i < 6; ++i) {
    const Finish finish = together[static_cast<size_t>(i)].wait();
    EXPECT_EQ(finish.text, (i % 2 ? old : fresh).text);
    EXPECT_GT(finish.cached_count, 0);
  }
}

}  // namespace
}  // namespace ds
