// SPDX-License-Identifier: Apache-2.0
// What a check is. Every check runs in a child process of its own with the plugin freshly loaded.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "check/allocations.h"
#include "check/host_table.h"
#include "check/loaded_plugin.h"
#include "check/trial.h"

namespace ds::check {

enum class Outcome { kPass, kFail, kSkip };
struct Verdict {
  Outcome result = Outcome::kPass;
  std::string text;
};
inline Verdict pass(std::string text = "") { return {Outcome::kPass, std::move(text)}; }
inline Verdict failed(std::string text) { return {Outcome::kFail, std::move(text)}; }
inline Verdict skipped(std::string text) { return {Outcome::kSkip, std::move(text)}; }

/// What all checks of a run share.
struct Settings {
  Json config = Json::object();
  uint64_t seed = 1;
  uint64_t iterations = 2000;  ///< of the hostile checks
  int timeout_ms = 120000;     ///< of a check
};

/// A component in the child that checks it.
struct Bench {
  Subject subject;
  ds_component component;  ///< widened
  const Settings& settings;
  std::unique_ptr<ds_config> config;
};

struct Check {
  const char* name;
  int level;
  uint32_t kind;                   ///< 0 = every kind
  std::vector<const char*> needs;  ///< checks whose failure would only show again here
  std::function<Verdict(Bench&)> run;
};

/// For ds_sink: `ctx` is the std::string that it appends to.
inline ds_code collect(void* ctx, const void* bytes, uint64_t n) {
  const AllocationPause ours;
  static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
  return DS_OK;
}

/// An instance with its host; destroyed in the end.
class Instance {
 public:
  explicit Instance(Bench& bench) : Instance(bench, std::make_unique<HostTable>()) {}
  Instance(Bench& bench, std::unique_ptr<HostTable> host);
  ~Instance();
  Instance(const Instance&) = delete;

  explicit operator bool() const { return instance_ != nullptr; }
  ds_instance* get() const { return instance_; }
  HostTable& host() const { return *host_; }
  ds_code code() const { return code_; }
  const std::string& text() const { return text_; }

 private:
  Bench& bench_;
  std::unique_ptr<HostTable> host_;
  ds_instance* instance_ = nullptr;
  ds_code code_ = DS_OK;
  std::string text_;
};

/// f(Trial&) on an instance that did nothing before.
template <class F>
auto on_fresh(Bench& bench, F&& f) {
  const Instance instance(bench);
  Trial trial(bench.component, instance.get(), {});
  return f(trial);
}

/// What a trial of `operation` on a fresh instance gave.
struct Trace {
  ds_code code = DS_OK;
  std::string call, text, bad_status, broken;
  std::vector<std::byte> output;
  std::vector<PlacedStruct> structs, outputs;
  std::vector<PlacedTensor> tensors;
  bool intact = true;
  uint64_t allocations = 0;
  bool refused = false;
  bool ok() const { return code == DS_OK; }
  bool same_as(const Trace& other) const { return code == other.code && output == other.output; }
};
Trace trace_of(Bench& bench, const Operation& operation, const TrialOptions& options = {});
Trace trace_on(Bench& bench, ds_instance* instance, const Operation& operation,
               const TrialOptions& options = {});
/// "prefill gave 2: q: [3, 4], expected ..."
std::string outcome_text(const Trace& trace);

/// A check of the whole file: judged, not yet known to have sound components.
struct FileCheck {
  const char* name;
  std::function<Verdict(const JudgedFile&)> run;
};
std::vector<FileCheck> file_checks();  ///< level 0, in this order; the first failure ends the run
/// Of one component; these too end its run.
std::vector<Check> load_checks();
std::vector<Check> contract_checks();  ///< level 1
std::vector<Check> sweep_checks();
std::vector<Check> state_checks();
std::vector<Check> attention_checks();  ///< level 2
std::vector<Check> quantizer_checks();
std::vector<Check> encoder_checks();
std::vector<Check> learner_checks();
std::vector<Check> curriculum_checks();
std::vector<Check> retriever_checks();
std::vector<Check> tool_checks();
std::vector<Check> determinism_checks();
std::vector<Check> hostile_checks();  ///< level 3

std::vector<Operation> attention_operations();
std::vector<Operation> quantizer_operations();
std::vector<Operation> encoder_operations();
std::vector<Operation> learner_operations();
std::vector<Operation> curriculum_operations();
std::vector<Operation> retriever_operations();
std::vector<Operation> tool_operations();

}  // namespace ds::check
