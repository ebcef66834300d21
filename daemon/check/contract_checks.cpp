// SPDX-License-Identifier: Apache-2.0
// Level 1: what every component owes its host, whatever it computes.
#include <dirent.h>
#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "check/allocations.h"
#include "check/check.h"
#include "check/child.h"

namespace ds::check {
namespace {

constexpr int kLifetimes = 1000, kWarmUp = 20;
constexpr int64_t kPromptCpuNs = 600'000'000, kPromptWallNs = 5'000'000'000;

int entries_of(const char* folder) {
  int out = 0;
  DIR* dir = opendir(folder);
  while (dir != nullptr && readdir(dir) != nullptr) ++out;
  if (dir != nullptr) closedir(dir);
  return out - 3;  // ".", ".." and, in /proc/self/fd, the folder itself
}
int open_files() { return entries_of("/proc/self/fd"); }
int threads() { return entries_of("/proc/self/task") + 1; }

/// Waits until `reached` or `wall_ms` have passed: a thread that ends needs a moment.
bool eventually(const std::function<bool()>& reached, int wall_ms) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(wall_ms);
  while (!reached()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

Verdict runs(Bench& bench) {
  std::string done;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace trace = trace_of(bench, operation);
    if (!trace.ok() && trace.code == DS_E_UNSUPPORTED) continue;
    if (!trace.ok()) return failed(std::string(operation.name) + ": " + outcome_text(trace));
    if (!trace.broken.empty()) return failed(std::string(operation.name) + ": " + trace.broken);
    done += (done.empty() ? "" : ", ") + std::string(operation.name);
  }
  if (done.empty()) return failed("no operation of its kind works with what the kit gives it");
  return pass(done);
}

/// How much `count` grows from one instance to the next, over kLifetimes of them.
Verdict grows(Bench& bench, const char* what, const std::function<int64_t()>& count,
              int64_t allowed) {
  for (int i = 0; i < kWarmUp; ++i) {
    if (const Instance instance(bench); !instance) return failed(instance.text());
  }
  const int64_t before = count();
  for (int i = 0; i < kLifetimes; ++i) {
    const Instance instance(bench);
    if (!instance) return failed("create " + std::to_string(i) + ": " + instance.text());
  }
  int64_t growth = 0;
  eventually([&] { return (growth = count() - before) <= allowed; }, 500);
  if (growth > allowed)
    return failed(std::to_string(growth) + " " + what +
                  " more after 1000 times create and destroy");
  return pass();
}

/// The same over the operations, each on an instance of its own.
Verdict work_grows(Bench& bench) {
  for (const Operation& operation : operations_of(bench.component)) {
    const auto once = [&] { (void)trace_of(bench, operation); };
    for (int i = 0; i < 5; ++i) once();
    const int64_t before = live_bytes();
    for (int i = 0; i < 30; ++i) once();
    const int64_t growth = live_bytes() - before;
    if (growth > 0)
      return failed(std::string(operation.name) + ": " + std::to_string(growth) +
                    " bytes more after 30 times");
  }
  return pass();
}

Verdict leaks_memory(Bench& bench) {
  if (!allocations_are_ours()) return skipped("not counted in a sanitizer's build");
  const Verdict lifetimes = grows(bench, "bytes", live_bytes, 4096);
  if (lifetimes.result != Outcome::kPass) return lifetimes;
  return work_grows(bench);
}

Verdict leaks_files(Bench& bench) { return grows(bench, "open files", open_files, 0); }
Verdict leaks_threads(Bench& bench) { return grows(bench, "threads", threads, 0); }

Verdict host_memory(Bench& bench) {
  HostTable host;
  ds_instance* out = nullptr;
  ds_status st{};
  const auto create = [&] {
    return bench.component.create(host.table(), bench.config.get(), {DS_DEV_CPU, 0}, &out, &st);
  };
  for (const Operation& operation : operations_of(bench.component)) {
    if (create() != DS_OK) return failed("create failed");
    (void)trace_on(bench, out, operation);
    ops_of(bench.component).destroy(out);
    if (host.allocated() != 0)
      return failed(std::string(operation.name) + ": " + std::to_string(host.allocated()) +
                    " blocks of host->alloc are not given back");
  }
  return pass();
}

Verdict registered_threads(Bench& bench) {
  const int before = threads();
  {
    const Instance instance(bench);
    if (!instance) return failed(instance.text());
    const auto all_said_so = [&] {
      return threads() - before == instance.host().threads_entered();
    };
    if (!eventually(all_said_so, 1000))
      return failed(std::to_string(threads() - before) + " threads run, " +
                    std::to_string(instance.host().threads_entered()) + " called thread_enter");
    for (const Operation& operation : operations_of(bench.component)) {
      (void)trace_on(bench, instance.get(), operation);
      if (!eventually(all_said_so, 1000))
        return failed(std::string(operation.name) + ": " + std::to_string(threads() - before) +
                      " threads run, " + std::to_string(instance.host().threads_entered()) +
                      " called thread_enter");
    }
  }
  if (!eventually([&] { return threads() == before; }, 1000))
    return failed(std::to_string(threads() - before) + " threads are left after destroy");
  return pass();
}

int64_t clock_ns(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

/// Large inputs with `options` that ask to stop at once.
Verdict stops(Bench& bench, TrialOptions options, ds_code expected) {
  options.scale = 12;
  for (const Operation& operation : operations_of(bench.component)) {
    const Instance instance(bench);
    if (!instance) return failed(instance.text());
    const int64_t cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID), wall = clock_ns(CLOCK_MONOTONIC);
    const Trace trace = trace_on(bench, instance.get(), operation, options);
    const int64_t cpu_used = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu,
                  wall_used = clock_ns(CLOCK_MONOTONIC) - wall;
    if (!trace.ok() && trace.code != expected && trace.code != DS_E_UNSUPPORTED)
      return failed(std::string(operation.name) + ": " + outcome_text(trace) + ", expected " +
                    std::to_string(expected));
    // Short work may end instead of stopping.
    if (cpu_used > kPromptCpuNs || wall_used > kPromptWallNs)
      return failed(std::string(operation.name) + " went on for " +
                    std::to_string(wall_used / 1'000'000) + " ms, " +
                    std::to_string(cpu_used / 1'000'000) + " ms of CPU");
  }
  return pass();
}

Verdict stops_when_cancelled(Bench& bench) {
  TrialOptions options;
  options.cancel = 1;
  return stops(bench, options, DS_E_CANCELLED);
}
Verdict stops_past_deadline(Bench& bench) {
  TrialOptions options;
  options.deadline_ns = 1;
  return stops(bench, options, DS_E_DEADLINE);
}

Verdict workspace_is_kept(Bench& bench) {
  TrialOptions options;
  options.exact_workspace = true;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace trace = trace_of(bench, operation, options);
    if (!trace.ok() && trace.code != DS_E_UNSUPPORTED)
      return failed(std::string(operation.name) +
                    " with exactly the planned workspace: " + outcome_text(trace));
    if (!trace.intact)
      return failed(std::string(operation.name) + " wrote outside the planned workspace");
  }
  return pass();
}

Verdict buffers_are_kept(Bench& bench) {
  TrialOptions options;
  options.guard_buffers = true;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace trace = trace_of(bench, operation, options);
    if (!trace.intact) return failed(std::string(operation.name) + " wrote outside a tensor");
  }
  return pass();
}

Verdict empty_input(Bench& bench) {
  TrialOptions options;
  options.empty = true;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace trace = trace_of(bench, operation, options);
    if (!trace.broken.empty()) return failed(std::string(operation.name) + ": " + trace.broken);
  }
  return pass();
}

}  // namespace

std::vector<Check> contract_checks() {
  return {
      {"contract.runs", 1, 0, {}, runs},
      {"contract.leaks-threads", 1, 0, {}, leaks_threads},
      {"contract.leaks-files", 1, 0, {}, leaks_files},
      {"contract.host-memory", 1, 0, {}, host_memory},
      {"contract.leaks-memory",
       1,
       0,
       {"contract.leaks-threads", "contract.host-memory"},
       leaks_memory},
      {"contract.threads", 1, 0, {"contract.leaks-threads"}, registered_threads},
      {"contract.cancel", 1, 0, {}, stops_when_cancelled},
      {"contract.deadline", 1, 0, {}, stops_past_deadline},
      {"contract.workspace", 1, 0, {}, workspace_is_kept},
      {"contract.buffers", 1, 0, {}, buffers_are_kept},
      {"contract.empty", 1, 0, {}, empty_input},
  };
}

}  // namespace ds::check
