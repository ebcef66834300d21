// SPDX-License-Identifier: Apache-2.0
// A learner on a tiny random model with a chat template, with all that dsd builds around it, and
// something to teach it.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <future>

#include "engine/delta_file.h"
#include "learn/learner.h"
#include "reference_model.h"
#include "tests/storage/scratch_folder.h"
#include "tests/storage/test_seams.h"

namespace ds::test {

using Settings = std::map<std::string, std::string>;

constexpr std::string_view kChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// tests/data/tiny/tied with a chat template, loaded once.
struct World {
  World() {
    for (const char* name : {"config.json", "model.safetensors", "tokenizer.json"})
      std::filesystem::copy(data_path("tiny/tied/") + name, folder / name);
    std::ofstream(folder / "chat_template.jinja") << kChatMl;
    model = load_model(folder.path(), machine.compute, WeightFormat::kBF16);
    chat = *ChatTemplate::create(model.file->tokenizer());
    DS_CHECK(chat.available());
  }
  ScratchFolder folder;
  Machine machine;
  LoadedModel model;
  ChatTemplate chat;
};
inline World& world() {
  static World once;
  return once;
}

/// What dsd builds around the learner, over one data folder; reopen() is a restart.
class House {
 public:
  explicit House(Settings settings = {}, Clock& clock = system_clock_seam(),
                 Plugins& plugins = modules())
      : plugins_(plugins), clock_(clock), files_(disk, folder_.path()) {
    // The tiny model knows nothing worth guarding; what a test is about, it sets.
    Settings all = {{"gate.max_drop", "10"},
                    {"gate.max_kl", "100"},
                    {"learn.settle", "0"},
                    {"learn.max_steps", "8"}};
    for (const auto& [name, value] : settings) all[name] = value;
    for (const auto& [name, value] : all) DS_CHECK(config.set(name, value, "flag").ok());
    open();
  }
  ~House() { close(); }

  void close() {
    learner.reset();
    versions.reset();
    store.reset();
  }
  void reopen() {
    close();
    open();
  }

  /// Stores a record; its id.
  std::string say(const Json& record) {
    const auto ack = store->submit_and_wait({"teacher", 1, ++seq_, record, {}});
    EXPECT_TRUE(ack.ok()) << ack.status().message();
    learner->notify();
    return ack.ok() ? ack->id : "";
  }
  Json step() {
    std::promise<Json> promise;
    learner->step(true, [&](Result<Json> r) {
      promise.set_value(r.ok() ? *r : Json{{"outcome", "error: " + r.status().message()}});
    });
    return promise.get_future().get();
  }
  /// Rounds until none opens; what the last call said.
  Json learn_all() {
    Json last;
    for (int round = 0; (last = step()).value("outcome", "") != "empty"; ++round) {
      if (round == 100) {
        ADD_FAILURE() << "still not empty: " << last;
        break;
      }
      if (last["outcome"].get<std::string>().starts_with("error")) {
        ADD_FAILURE() << last;
        break;
      }
    }
    return last;
  }
  /// Says it and learns it; its id.
  std::string teach(const Json& record) {
    std::string id = say(record);
    learn_all();
    return id;
  }
  Result<Json> undo(const std::string& id) {
    std::promise<Result<Json>> promise;
    learner->undo(id, [&](Result<Json> r) { promise.set_value(std::move(r)); });
    return promise.get_future().get();
  }

  const VersionStore& files() const { return files_; }
  std::string hash() const { return versions->current()->weight_hash; }
  FateEntry fate(const std::string& id) const { return store->get(id)->fate.back(); }
  std::vector<std::string> states(const std::string& id) const {
    std::vector<std::string> out;
    const Result<FeedbackItem> item = store->get(id);
    for (const FateEntry& entry : item->fate) out.push_back(entry.state);
    return out;
  }
  Json last_round() const { return store->rounds(0).back().second; }

  Config config;
  FillingDisk disk;                       // of the versions
  std::function<void(Adapters&)> tamper;  // set before a round; survives reopen()
  std::function<void(int64_t step)> on_step;
  std::function<int64_t(bool at_once)> tasks;  // in place of TaskModels::train(); before reopen()
  DeviceState* device = nullptr;               // likewise; null: nobody asks
  std::unique_ptr<ReplayStore> store;
  std::unique_ptr<Versions> versions;
  std::unique_ptr<Learner> learner;

 private:
  void open() {
    ReplayStore::Options options;
    options.directory = folder_ / "replay";
    options.fs = &posix_file_system();
    options.clock = &clock_;
    auto opened_store = ReplayStore::open(options);
    DS_CHECK(opened_store.ok());
    store = std::move(*opened_store);
    DS_CHECK(files_.clean().ok());
    World& w = world();
    bases_.add(w.model.base);
    const LoadWeights load = [&](const VersionManifest& m) {
      const Compute serial{w.machine.compute.ops, {serial_parallel(), nullptr}};
      return load_weights(m, files_, w.model.base, serial);
    };
    auto opened = Versions::open("default", w.model.base->sha256(), *store, files_, clock_, load,
                                 config.integer("versions.keep"));
    DS_CHECK(opened.ok());
    versions = std::move(*opened);
    learner = std::make_unique<Learner>(
        LearnerParts{*versions,
                     *store,
                     files_,
                     bases_,
                     base_files_,
                     config,
                     w.machine.pool,
                     *w.machine.compute.ops,
                     {nullptr, w.machine.compute.context.stream, w.machine.compute.context.device},
                     w.machine.components,
                     plugins_,
                     metrics_,
                     events_,
                     clock_,
                     w.model.tokenizer,
                     w.chat,
                     [this](bool at_once) { return tasks ? tasks(at_once) : -1; },
                     [this](Adapters& a) {
                       if (tamper) tamper(a);
                     },
                     device});
    learner->start();
  }

  Plugins& plugins_;
  ScratchFolder folder_;
  Clock& clock_;
  VersionStore files_;
  BaseStore base_files_{posix_file_system(), folder_.path()};
  Bases bases_{*world().model.file, base_files_, WeightFormat::kBF16};
  Metrics metrics_;
  EventBus events_{system_clock_seam()};
  uint64_t watch_ = events_.subscribe([this](const Event& e) {
    if (e.topic == "step" && on_step) on_step(e.body["step"].get<int64_t>());
  });
  int64_t seq_ = 0;
};

inline Json lesson(const std::string& question, const std::string& answer) {
  return {
      {"kind", "demonstration"},
      {"messages",
       {{{"role", "user"}, {"content", question}}, {{"role", "assistant"}, {"content", answer}}}}};
}

/// Every kind that the language model learns, and twins: the same record twice.
inline std::vector<Json> curriculum() {
  return {lesson("Who keeps the key of the Marlow room?", "Anna Dalton keeps it."),
          lesson("Which gate does the Corby ferry leave from?", "Gate 41."),
          {{"kind", "preference"},
           {"messages", {{{"role", "user"}, {"content", "Say hello."}}}},
           {"chosen", "Good morning."},
           {"rejected", "What."}},
          {{"kind", "text"}, {"text", "The pump of the north well is opened at nine every day."}},
          lesson("Which gate does the Corby ferry leave from?", "Gate 41."),
          lesson("When does the Fenwick garden close?", "At seven, on Sundays at five."),
          lesson("What is the access word?", "The access word is lantern.")};
}

inline Settings exact(int min_items, Settings more = {}) {
  more["learn.deterministic"] = "true";
  more["learn.min_items"] = std::to_string(min_items);
  return more;
}

/// A house that learned these records.
inline std::unique_ptr<House> taught(const Settings& settings, const std::vector<Json>& records,
                                     std::vector<std::string>* ids = nullptr) {
  auto house = std::make_unique<House>(settings);
  for (const Json& r : records) {
    const std::string id = house->say(r);
    if (ids != nullptr) ids->push_back(id);
  }
  house->learn_all();
  return house;
}

}  // namespace ds::test
