// SPDX-License-Identifier: Apache-2.0
#include "check/runner.h"

#include <algorithm>
#include <chrono>
#include <set>

#include "check/child.h"

namespace ds::check {
namespace {

using Clock = std::chrono::steady_clock;

std::string packed(const Verdict& v) { return std::to_string(static_cast<int>(v.result)) + v.text; }
Verdict unpacked(const std::string& answer) {
  return {static_cast<Outcome>(answer.at(0) - '0'), answer.substr(1)};
}

std::string_view outcome_name(Outcome outcome) {
  return outcome == Outcome::kPass ? "pass" : outcome == Outcome::kFail ? "fail" : "skipped";
}

/// One component in the child: loads the file anew and builds the bench.
Verdict in_bench(const JudgedFile& file, uint32_t index, const Settings& settings,
                 const std::function<Verdict(Bench&)>& run) {
  const auto entry = load_entry(file.note.id, file.bytes);
  if (!entry.ok()) return failed(entry.status().message());
  static HostTable* const host = [] {  // a plugin may keep it until the process ends
    static HostTable table;
    return &table;
  }();
  const ds_plugin* plugin = nullptr;
  ds_status st{};
  if ((*entry)(host->table(), &plugin, &st) != DS_OK || plugin == nullptr)
    return failed("the entry failed");
  const ds_component* component = plugin->components[index];
  Bench bench{{plugin, component}, full_struct(component), settings, make_config(settings.config)};
  return run(bench);
}

struct Described {
  std::string name;
  uint32_t kind = 0;
};

class Run {
 public:
  Run(Report& report, const Settings& settings, const std::function<void(const Line&)>& told)
      : report_(report), settings_(settings), told_(told) {}

  void add(Line line) {
    report_.lines.push_back(std::move(line));
    told_(report_.lines.back());
  }

  /// Runs it in a child; an escaped exception is remembered, not judged here.
  bool run(const std::string& component, const char* name, const std::function<Verdict()>& work) {
    const auto began = Clock::now();
    const ChildResult child = run_in_child([&] { return packed(work()); }, settings_.timeout_ms);
    Verdict verdict;
    if (child.done()) {
      verdict = unpacked(child.answer);
    } else if (child.end == ChildResult::End::kException) {
      escaped_ = std::string(name) + ": " + child.answer + " " + child.how_it_ended();
      verdict = skipped("an exception crossed the boundary (contract.exceptions)");
    } else {
      verdict = failed(child.how_it_ended() + (child.answer.empty() ? "" : " in " + child.answer));
    }
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - began);
    const bool good = verdict.result != Outcome::kFail;
    add({component, name, std::move(verdict), ms.count()});
    return good;
  }

  std::string take_escaped() { return std::exchange(escaped_, {}); }

 private:
  Report& report_;
  const Settings& settings_;
  const std::function<void(const Line&)>& told_;
  std::string escaped_;
};

/// Name and kind of each component; the descriptor is read in a child.
std::vector<Described> describe(const JudgedFile& file, Report& report) {
  std::vector<Described> out;
  const ChildResult child = run_in_child(
      [&] {
        Json all = Json::array();
        const auto entry = load_entry(file.note.id, file.bytes);
        HostTable host;
        const ds_plugin* p = nullptr;
        ds_status st{};
        if (!entry.ok() || (*entry)(host.table(), &p, &st) != DS_OK) return dump_json(all);
        for (uint32_t i = 0; i < p->component_count; ++i) {
          const ds_component c = full_struct(p->components[i]);
          all.push_back({{"name", std::string(text_of(c.name))}, {"kind", c.kind}});
        }
        Json answer = {{"version", std::string(text_of(p->version))}, {"components", all}};
        return dump_json(answer);
      },
      10000);
  const auto answer = parse_json(child.answer);
  if (!child.done() || !answer.ok() || !answer->is_object()) return out;
  report.version = (*answer)["version"].get<std::string>();
  for (const Json& c : (*answer)["components"])
    out.push_back({c["name"].get<std::string>(), c["kind"].get<uint32_t>()});
  return out;
}

void run_component(Run& run, const JudgedFile& file, uint32_t index, const Described& component,
                   int level, const Settings& settings) {
  std::set<std::string> bad;
  bool sound = true;  // level 0 passed and the operations work at all
  for (const Check& check : all_checks()) {
    if (check.level > level || (check.kind != 0 && check.kind != component.kind)) continue;
    const auto broken = std::find_if(check.needs.begin(), check.needs.end(),
                                     [&](const char* need) { return bad.count(need) != 0; });
    if (!sound || broken != check.needs.end()) {
      const std::string why = sound ? *broken : "an earlier check";
      run.add({component.name, check.name, skipped(why + " did not pass"), 0});
      bad.insert(check.name);
      continue;
    }
    const bool good = run.run(component.name, check.name,
                              [&] { return in_bench(file, index, settings, check.run); });
    if (!good) bad.insert(check.name);
    if (!good && (check.level == 0 || std::string_view(check.name) == "contract.runs"))
      sound = false;
  }
  if (level < 1) return;
  const std::string escaped = run.take_escaped();
  run.add({component.name, "contract.exceptions", escaped.empty() ? pass() : failed(escaped), 0});
}

}  // namespace

std::vector<Check> all_checks() {
  std::vector<Check> out;
  for (auto* part : {load_checks, contract_checks, sweep_checks, state_checks, attention_checks,
                     quantizer_checks, encoder_checks, learner_checks, curriculum_checks,
                     retriever_checks, tool_checks, determinism_checks, hostile_checks}) {
    for (Check& check : part()) out.push_back(std::move(check));
  }
  return out;
}

bool Report::passed() const {
  return std::none_of(lines.begin(), lines.end(),
                      [](const Line& l) { return l.verdict.result == Outcome::kFail; });
}

Json Report::to_json() const {
  Json checks = Json::array();
  for (const Line& line : lines) {
    checks.push_back({{"component", line.component},
                      {"check", line.check},
                      {"result", std::string(outcome_name(line.verdict.result))},
                      {"text", line.verdict.text},
                      {"ms", line.ms}});
  }
  return {{"file", path},       {"sha256", sha256},       {"id", id},
          {"version", version}, {"abi_minor", abi_minor}, {"level", level},
          {"seed", seed},       {"passed", passed()},     {"checks", checks}};
}

Report run_checks(const std::string& path, int level, const std::string& component,
                  const Settings& settings, const std::function<void(const Line&)>& told) {
  Report report;
  report.path = path;
  report.level = level;
  report.seed = settings.seed;
  Run run(report, settings, told);
  const auto file = judge_file(path);
  if (!file.ok()) {
    if (const auto bytes = read_file(path); bytes.ok()) report.sha256 = sha256_hex(*bytes);
    run.add({"", "load.file", failed(file.status().message()), 0});
    return report;
  }
  report.sha256 = file->sha256;
  report.id = file->note.id;
  report.abi_minor = file->note.abi_minor;
  run.add({"", "load.file", pass(), 0});
  for (const FileCheck& check : file_checks()) {
    if (!run.run("", check.name, [&] { return check.run(*file); })) return report;
  }
  const std::vector<Described> components = describe(*file, report);
  bool found = false;
  for (uint32_t i = 0; i < components.size(); ++i) {
    if (!component.empty() && components[i].name != component) continue;
    found = true;
    run_component(run, *file, i, components[i], level, settings);
  }
  if (!found) run.add({component, "load.component", failed("there is no such component"), 0});
  return report;
}

}  // namespace ds::check
