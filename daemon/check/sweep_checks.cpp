// SPDX-License-Identifier: Apache-2.0
// Level 1: structs of every length that another version of the header could give them, and tensors
// that are not what they should be. Each variant runs in a grandchild, so that one crash is one
// line.
#include <algorithm>

#include "check/check.h"
#include "check/child.h"

namespace ds::check {
namespace {

constexpr int kVariantMs = 10000;

/// A trace as bytes, to hand it from the grandchild: code, then the output.
std::string packed(const Trace& trace) {
  std::string out(reinterpret_cast<const char*>(&trace.code), sizeof trace.code);
  out.append(reinterpret_cast<const char*>(trace.output.data()), trace.output.size());
  return out;
}
ds_code code_in(const std::string& answer) {
  ds_code code = 0;
  std::memcpy(&code, answer.data(), std::min(answer.size(), sizeof code));
  return code;
}

ChildResult variant(Bench& bench, const Operation& operation, const TrialOptions& options) {
  return run_in_child([&] { return packed(trace_of(bench, operation, options)); }, kVariantMs);
}

/// The undamaged trace; empty optional text = fine, else why nothing can be compared with it.
std::string baseline(Bench& bench, const Operation& operation, Trace& out) {
  out = trace_of(bench, operation);
  if (!out.ok()) return outcome_text(out);
  if (!out.same_as(trace_of(bench, operation))) return "its output differs from run to run";
  return "";
}

/// Below this a struct lacks what no version went without: the pool of a call, the host's
/// functions.
uint32_t shortest(const PlacedStruct& item) {
  if (item.name == "ds_call") return DS_SIZE_TO(ds_call, parallel);
  const bool functions = item.name == "ds_sink" || item.name == "ds_vectors";
  return functions ? item.ends.back() : 8;
}

/// Calls `f` with the damage for each place where each input struct could end.
Verdict for_each_cut(
    Bench& bench,
    const std::function<std::string(const Operation&, const PlacedStruct&, Damage)>& f) {
  int variants = 0;
  for (const Operation& operation : operations_of(bench.component)) {
    Trace whole;
    const std::string why_not = baseline(bench, operation, whole);
    if (!why_not.empty()) {
      if (whole.code == DS_E_UNSUPPORTED) continue;
      return skipped(std::string(operation.name) + ": " + why_not);
    }
    for (size_t i = 0; i < whole.structs.size(); ++i) {
      for (const uint32_t end : whole.structs[i].ends) {
        if (end == whole.structs[i].bytes.size() || end < shortest(whole.structs[i])) continue;
        ++variants;
        const std::string wrong = f(operation, whole.structs[i], {Harm::kCut, i, end});
        if (!wrong.empty())
          return failed(std::string(operation.name) + ", " + whole.structs[i].name + " of " +
                        std::to_string(end) + " bytes: " + wrong);
      }
    }
  }
  return pass(std::to_string(variants) + " lengths");
}

Verdict short_structs(Bench& bench) {
  return for_each_cut(bench, [&](const Operation& operation, const PlacedStruct& item, Damage cut) {
    const bool held_zeros = std::all_of(item.bytes.begin() + cut.bytes, item.bytes.end(),
                                        [](std::byte b) { return b == std::byte{0}; });
    TrialOptions options;
    options.damage = cut;
    options.damage.harm = Harm::kZero;
    const ChildResult zero = variant(bench, operation, options);
    if (!zero.done()) return std::string();  // contract.nulls tells of it
    for (const Harm harm : {Harm::kCut, Harm::kCutAtGuard}) {
      if (harm == Harm::kCutAtGuard && cut.bytes % 8 != 0) continue;  // would be misaligned
      options.damage.harm = harm;
      const ChildResult result = variant(bench, operation, options);
      if (!result.done())
        return result.how_it_ended() + " in " + result.answer + "; with zeros there it does not";
      const bool refused = code_in(result.answer) != DS_OK && !held_zeros;
      if (result.answer != zero.answer && !refused)
        return "gave code " + std::to_string(code_in(result.answer)) +
               " and other results than with zeros there (code " +
               std::to_string(code_in(zero.answer)) + ")";
    }
    return std::string();
  });
}

Verdict nulls(Bench& bench) {
  Verdict fields =
      for_each_cut(bench, [&](const Operation& operation, const PlacedStruct&, Damage cut) {
        TrialOptions options;
        options.damage = cut;
        options.damage.harm = Harm::kZero;
        const ChildResult result = variant(bench, operation, options);
        return result.done()
                   ? std::string()
                   : "with zeros behind, it " + result.how_it_ended() + " in " + result.answer;
      });
  if (fields.result == Outcome::kFail) return fields;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace whole = trace_of(bench, operation);
    for (size_t i = 0; i < whole.tensors.size(); ++i) {
      TrialOptions options;
      options.damage = {Harm::kNull, i, 0};
      const ChildResult result = variant(bench, operation, options);
      if (!result.done())
        return failed(std::string(operation.name) + ", " + whole.tensors[i].name +
                      " is NULL: " + result.how_it_ended() + " in " + result.answer);
    }
  }
  return fields;
}

bool one_of(ds_code code, std::initializer_list<ds_code> allowed) {
  return std::find(allowed.begin(), allowed.end(), code) != allowed.end();
}

/// Damage to a tensor that the operation uses has to be answered with a code of the right class.
Verdict wrong_tensors(Bench& bench, Harm harm, const char* what,
                      std::initializer_list<ds_code> allowed) {
  int variants = 0;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace whole = trace_of(bench, operation);
    if (!whole.ok()) continue;
    for (size_t i = 0; i < whole.tensors.size(); ++i) {
      TrialOptions options;
      options.damage = {harm, i, 0};
      const ChildResult result = variant(bench, operation, options);
      const std::string where =
          std::string(operation.name) + ", " + whole.tensors[i].name + " " + what + ": ";
      ++variants;
      if (!result.done()) return failed(where + result.how_it_ended() + " in " + result.answer);
      const ds_code code = code_in(result.answer);
      if (code == DS_OK ? whole.tensors[i].judged : !one_of(code, allowed))
        return failed(where + "it gave " + std::to_string(code) + ", expected " +
                      std::to_string(*allowed.begin()));
    }
  }
  return pass(std::to_string(variants) + " variants");
}

Verdict wrong_dtype(Bench& bench) {
  return wrong_tensors(bench, Harm::kDtype, "of another dtype", {DS_E_DTYPE, DS_E_UNSUPPORTED});
}
Verdict wrong_shape(Bench& bench) {
  return wrong_tensors(bench, Harm::kShape, "one element longer than its buffer",
                       {DS_E_SHAPE, DS_E_ARG, DS_E_UNSUPPORTED});
}
Verdict short_buffer(Bench& bench) {
  return wrong_tensors(bench, Harm::kShort, "in a buffer one byte too short",
                       {DS_E_SHAPE, DS_E_ARG});
}
Verdict missing_tensor(Bench& bench) {
  return wrong_tensors(bench, Harm::kNull, "NULL", {DS_E_ARG, DS_E_SHAPE, DS_E_UNSUPPORTED});
}

/// Failures of every sort that is easy to provoke: each comes with a sound status.
Verdict status_text(Bench& bench) {
  int failures = 0;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace whole = trace_of(bench, operation);
    for (size_t i = 0; i < whole.tensors.size(); ++i) {
      for (const Harm harm : {Harm::kNull, Harm::kDtype, Harm::kShape}) {
        TrialOptions options;
        options.damage = {harm, i, 0};
        const ChildResult result = run_in_child(
            [&] {
              const Trace trace = trace_of(bench, operation, options);
              return (trace.ok() ? "0" : "1") + trace.bad_status;
            },
            kVariantMs);
        if (!result.done()) continue;  // another check's matter
        failures += result.answer[0] == '1';
        if (result.answer.size() > 1) return failed(result.answer.substr(1));
      }
    }
  }
  return pass(std::to_string(failures) + " failures looked at");
}

Verdict output_room(Bench& bench) {
  int variants = 0;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace whole = trace_of(bench, operation);
    if (!whole.ok()) continue;
    for (size_t i = 0; i < whole.outputs.size(); ++i) {
      for (const uint32_t end : whole.outputs[i].ends) {
        if (end % 8 != 0 || end == whole.outputs[i].bytes.size()) continue;
        TrialOptions options;
        options.damage = {Harm::kRoom, i, end};
        const ChildResult result = run_in_child(
            [&] {
              const Trace trace = trace_of(bench, operation, options);
              return trace.intact ? packed(trace) : std::string();
            },
            kVariantMs);
        const std::string where = std::string(operation.name) + ", " + whole.outputs[i].name +
                                  " with room for " + std::to_string(end) + " bytes: ";
        ++variants;
        if (!result.done()) return failed(where + result.how_it_ended() + " in " + result.answer);
        if (result.answer.empty()) return failed(where + "it wrote outside");
      }
    }
  }
  return pass(std::to_string(variants) + " lengths");
}

/// All operations with this host table: their traces, one after the other.
std::string with_host(Bench& bench, uint32_t bytes, uint32_t extra, bool at_guard) {
  std::string out;
  for (const Operation& operation : operations_of(bench.component)) {
    const Instance instance(bench, std::make_unique<HostTable>(bytes, extra, at_guard));
    if (!instance) return "create: " + std::to_string(instance.code());
    out += packed(trace_on(bench, instance.get(), operation));
  }
  return out;
}

Verdict host_table(Bench& bench) {
  const auto run = [&](uint32_t bytes, uint32_t extra, bool at_guard) {
    return run_in_child([&] { return with_host(bench, bytes, extra, at_guard); },
                        bench.settings.timeout_ms);
  };
  const ChildResult whole = run(sizeof(ds_host), 0, false);
  if (!whole.done()) return skipped("it " + whole.how_it_ended());
  if (whole.answer != run(sizeof(ds_host), 0, false).answer)
    return skipped("its output differs from run to run");
  const bool configured = !bench.config->values.empty();
  const auto judge = [&](uint32_t bytes, uint32_t extra, bool guard) -> std::string {
    const ChildResult result = run(bytes, extra, guard);
    if (!result.done()) return "it " + result.how_it_ended() + " in " + result.answer;
    const bool too_old = result.answer == "create: " + std::to_string(DS_E_VERSION);
    const bool needs_config = configured && bytes < sizeof(ds_host);
    if (result.answer != whole.answer && !too_old && !needs_config)
      return result.answer.starts_with("create") ? result.answer : "other results";
    return "";
  };
  for (const uint32_t end : Fields<ds_host>::ends) {
    for (const bool guard : {false, true}) {
      const std::string wrong = judge(end, 0, guard);
      if (!wrong.empty())
        return failed("a host table of " + std::to_string(end) + " bytes: " + wrong);
    }
  }
  const std::string wrong = judge(sizeof(ds_host), 64, false);
  if (!wrong.empty()) return failed("a host table 64 bytes longer: " + wrong);
  return pass();
}

}  // namespace

std::vector<Check> sweep_checks() {
  return {
      {"contract.nulls", 1, 0, {"contract.runs"}, nulls},
      {"contract.missing-tensor", 1, 0, {"contract.nulls"}, missing_tensor},
      {"contract.wrong-dtype", 1, 0, {"contract.nulls"}, wrong_dtype},
      {"contract.wrong-shape", 1, 0, {"contract.nulls"}, wrong_shape},
      {"contract.short-buffer", 1, 0, {"contract.nulls", "contract.wrong-shape"}, short_buffer},
      {"contract.status", 1, 0, {"contract.nulls"}, status_text},
      {"contract.short-structs", 1, 0, {}, short_structs},
      {"contract.output-structs", 1, 0, {}, output_room},
      {"contract.host-table", 1, 0, {}, host_table},
  };
}

}  // namespace ds::check
