// SPDX-License-Identifier: Apache-2.0
// What is done with recorded calls: a new generation answers them before it may serve, two
// components are compared on them, one is timed with them.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "plugin/plugins.h"
#include "plugin/replayed_calls.h"

namespace ds {
namespace {

constexpr int64_t kSecondNs = 1'000'000'000, kReplayNs = 10 * kSecondNs;

/// Where inputs come from and what they gave, oldest first.
struct Calls {
  RecordedCalls list;
  bool recorded = false;
};

/// Those that `from` was asked, else those of the self-test, which it then answers.
Calls calls_of(const PluginInstance& from, int64_t deadline_ns) {
  Calls out{from.recorded().calls(), true};
  if (!out.list.empty()) return out;
  out.recorded = false;
  for (CallInput& input : small_calls(from.component().kind)) {
    Result<CallOutput> output = replay(from, input, deadline_ns);
    if (!output.ok()) continue;
    out.list.push_back(std::make_shared<const RecordedCall>(
        RecordedCall{std::make_shared<const CallInput>(std::move(input)), std::move(*output)}));
  }
  return out;
}

const char* source_of(const Calls& calls) { return calls.recorded ? "recorded" : "self-test"; }

/// NaN and infinity are no JSON numbers: null, which a reader takes as "not finite".
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(); }
std::string text(double value) {
  char out[32];
  std::snprintf(out, sizeof out, "%.2g", value);
  return out;
}

std::string describe(const CallInput& input) {
  return std::string(input.name()) + " (" + input.size() + ")";
}

/// "1 finding is gone"
std::string findings(size_t n, const char* what) {
  return std::to_string(n) + (n == 1 ? " finding is " : " findings are ") + what;
}

/// "largest relative difference 0.3, allowed 0.005"
std::string what_differs(const Difference& d) {
  if (!d.gone.empty() || !d.added.empty())
    return findings(d.gone.size(), "gone") + ", " + findings(d.added.size(), "new");
  if (d.weights > d.promised)
    return "a weight differs by " + text(d.weights) + " of its row's largest, promised " +
           text(d.promised);
  return "largest relative difference " + text(d.largest) + ", allowed " + text(d.allowed);
}

/// The calls of one generation on another, added up.
struct Comparison {
  size_t calls = 0, differing = 0;
  double largest = 0, mean = 0;
  std::string first;  ///< what differs in the first that does
  Json gone = Json::array(), added = Json::array();

  void add(const CallInput& input, const Difference& d) {
    ++calls;
    largest = std::max(largest, d.largest);
    mean += (d.mean - mean) / static_cast<double>(calls);
    for (const Json& finding : d.gone) gone.push_back(finding);
    for (const Json& finding : d.added) added.push_back(finding);
    if (!d.within()) note(input, what_differs(d));
  }
  void add_failed(const CallInput& input, const Status& why) {
    ++calls;
    note(input, why.message());
  }
  void note(const CallInput& input, const std::string& what) {
    if (differing++ == 0) first = describe(input) + ": " + what;
  }
  std::string words(const char* source) const {
    if (calls == 0) return "no calls to compare";
    const std::string all = std::to_string(calls) + " " + source + " calls";
    if (differing == 0)
      return all + ": the same within what is promised, largest relative difference " +
             text(largest);
    return std::to_string(differing) + " of " + all + " differ, " + first;
  }
};

Json component_json(const PluginInstance& instance, uint64_t generation) {
  return {{"name", instance.name()}, {"generation", generation}};
}

/// In microseconds, ascending: the value below which a share of them lies.
double quantile(const std::vector<double>& sorted, double share) {
  const auto at = static_cast<size_t>(share * static_cast<double>(sorted.size()));
  return sorted[std::min(at, sorted.size() - 1)];
}

}  // namespace

Result<Shadow> shadow_of(std::string_view name) {
  if (name == "off") return Shadow::kOff;
  if (name == "report") return Shadow::kReport;
  if (name == "refuse") return Shadow::kRefuse;
  return invalid("shadow \"" + std::string(name) + "\": expected off, report or refuse");
}

void Plugins::set_shadow(Shadow shadow) {
  shadow_ = shadow;
  std::lock_guard lock(mutex_);
  for (auto& [key, slot] : slots_) {
    for (const Generation& g : slot.generations) {
      if (g.instance != nullptr) g.instance->recorded().turn(shadow != Shadow::kOff);
    }
  }
}

Status Plugins::replay_calls(const Slot& slot, Generation& next, Shadow shadow) const {
  const Generation& now = slot.generations[slot.serving];
  if (shadow == Shadow::kOff || now.instance == nullptr) return {};
  const int64_t deadline_ns = clock_.monotonic_ns() + kReplayNs;
  const Calls calls = calls_of(*now.instance, deadline_ns);
  Comparison all;
  for (const auto& call : calls.list) {
    if (clock_.monotonic_ns() > deadline_ns) break;
    double promised = 0;
    Result<CallOutput> got = replay(*next.instance, *call->input, deadline_ns, &promised);
    if (!got.ok()) {
      all.add_failed(*call->input, got.status());
      continue;
    }
    all.add(*call->input, difference(*call->input, call->output, *got, promised));
    // The next reload compares with what this generation answers.
    if (calls.recorded) next.instance->recorded().keep({call->input, std::move(*got)});
  }
  const std::string words = all.words(source_of(calls));
  next.shadow = {{"source", source_of(calls)}, {"calls", all.calls},
                 {"differing", all.differing}, {"largest", number(all.largest)},
                 {"mean", number(all.mean)},   {"text", words}};
  if (shadow == Shadow::kRefuse && all.differing > 0)
    return conflict("shadow replay: " + words + "; generation " + std::to_string(now.number) +
                    " goes on serving (--shadow report swaps all the same)");
  return {};
}

Result<Plugins::Serving> Plugins::instance_at(const std::string& name) {
  const size_t at = name.rfind('@');
  const std::string component = name.substr(0, at);
  Key key;
  {
    std::lock_guard lock(mutex_);
    DS_ASSIGN(const Slot* slot, slot_of(component, &key));
    const Generation& serving = slot->generations[slot->serving];
    const std::string wanted = at == name.npos ? "" : name.substr(at + 1);
    if (!wanted.empty() && wanted != std::to_string(serving.number)) {
      for (const Generation& g : slot->generations) {
        if (std::to_string(g.number) != wanted) continue;
        if (g.instance == nullptr)
          return conflict("plugin " + component + ": generation " + wanted + " is retired");
        return Serving{g.instance, g.number};
      }
      return not_found("plugin " + component + ": no generation \"" + wanted + "\"");
    }
  }
  return find(key.first, key.second);
}

Result<Plugins::Serving> Plugins::before(const std::string& name) {
  std::lock_guard lock(mutex_);
  DS_ASSIGN(const Slot* slot, slot_of(name));
  const Generation& before = slot->generations[slot->before];
  if (slot->before == slot->serving || before.instance == nullptr)
    return conflict("plugin " + name + ": no generation before " +
                    std::to_string(slot->generations[slot->serving].number) +
                    " is left to compare with; name another component");
  return Serving{before.instance, before.number};
}

Result<Json> Plugins::diff(const std::string& a, const std::string& b) {
  DS_ASSIGN(const Serving left, instance_at(a));
  DS_ASSIGN(const Serving right, b.empty() ? before(a) : instance_at(b));
  const uint32_t kind = left.instance->component().kind;
  if (kind != right.instance->component().kind)
    return invalid(a + " is a component of kind " + std::string(kind_name(kind)) + ", " + b +
                   " one of kind " + std::string(kind_name(right.instance->component().kind)));
  const int64_t deadline_ns = clock_.monotonic_ns() + 6 * kReplayNs;
  const Calls calls = calls_of(
      left.instance->recorded().calls().empty() ? *right.instance : *left.instance, deadline_ns);
  if (calls.list.empty())
    return unavailable(a + ": no call was recorded, and the self-test has none for kind " +
                       std::string(kind_name(kind)));
  Json rows = Json::array();
  Comparison all;
  for (const auto& call : calls.list) {
    const CallInput& input = *call->input;
    Json row = {{"call", input.name()}, {"size", input.size()}};
    double promised = 0;
    const auto one = replay(*left.instance, input, deadline_ns);
    const auto two = replay(*right.instance, input, deadline_ns, &promised);
    if (one.ok() && two.ok()) {
      const Difference d = difference(input, *one, *two, promised);
      all.add(input, d);
      row["largest"] = number(d.largest);
      row["mean"] = number(d.mean);
      row["within"] = d.within();
    } else {
      row["failed"] = (one.ok() ? two.status() : one.status()).message();
      row["within"] = false;
      all.add_failed(input, one.ok() ? two.status() : one.status());
    }
    rows.push_back(std::move(row));
  }
  return Json{{"kind", kind_name(kind)},
              {"a", component_json(*left.instance, left.generation)},
              {"b", component_json(*right.instance, right.generation)},
              {"source", source_of(calls)},
              {"calls", std::move(rows)},
              {"differing", all.differing},
              {"largest", number(all.largest)},
              {"mean", number(all.mean)},
              {"only_a", std::move(all.gone)},
              {"only_b", std::move(all.added)},
              {"text", all.words(source_of(calls))}};
}

Result<Json> Plugins::bench(const std::string& name, double seconds) {
  if (!(seconds > 0) || seconds > 60)
    return invalid("seconds: " + text(seconds) + ", expected more than 0 and at most 60");
  DS_ASSIGN(const Serving serving, instance_at(name));
  const PluginInstance& instance = *serving.instance;
  const auto total_ns = static_cast<int64_t>(seconds * static_cast<double>(kSecondNs));
  const int64_t deadline_ns = clock_.monotonic_ns() + total_ns + kReplayNs;
  const Calls calls = calls_of(instance, deadline_ns);
  if (calls.list.empty())
    return unavailable(name + ": no call was recorded, and the self-test has none for kind " +
                       std::string(kind_name(instance.component().kind)));
  constexpr size_t kMostRuns = 1'000'000;
  const int64_t each_ns = total_ns / static_cast<int64_t>(calls.list.size());
  Json rows = Json::array();
  for (const auto& recorded : calls.list) {
    DS_ASSIGN(const auto call, ReplayedCall::make(instance, *recorded->input, deadline_ns));
    DS_TRY(call->run());  // warm
    std::vector<double> us;
    const int64_t begin = clock_.monotonic_ns();
    int64_t now = begin;
    do {
      DS_TRY(call->run());
      const int64_t after = clock_.monotonic_ns();
      us.push_back(static_cast<double>(after - now) / 1e3);
      now = after;
    } while (now - begin < each_ns && us.size() < kMostRuns);
    const double per_s = static_cast<double>(us.size()) * 1e9 / static_cast<double>(now - begin);
    std::sort(us.begin(), us.end());
    rows.push_back({{"call", recorded->input->name()},
                    {"size", recorded->input->size()},
                    {"runs", us.size()},
                    {"median_us", quantile(us, 0.5)},
                    {"p99_us", quantile(us, 0.99)},
                    {"per_s", per_s}});
  }
  Json out = component_json(instance, serving.generation);
  out["kind"] = kind_name(instance.component().kind);
  out["source"] = source_of(calls);
  out["calls"] = std::move(rows);
  return out;
}

}  // namespace ds
