// SPDX-License-Identifier: Apache-2.0
// Level 3: no memory at the k-th allocation, state streams full of noise, many instances at once.
#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "check/allocations.h"
#include "check/check.h"
#include "check/child.h"

namespace ds::check {
namespace {

constexpr uint64_t kMaxRefused = 2000;

/// Half of a check's time: what goes on for long stops there and says how far it came.
class TimeBox {
 public:
  explicit TimeBox(const Bench& bench)
      : end_(Clock::now() + std::chrono::milliseconds(bench.settings.timeout_ms / 2)) {}
  bool over() const { return Clock::now() > end_; }
  std::string note() const { return over() ? ", then the time was up" : ""; }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point end_;
};

/// Every allocation of every operation is refused once; and every one of create.
Verdict no_memory(Bench& bench) {
  if (!allocations_are_ours()) return skipped("not possible in a sanitizer's build");
  const TimeBox time(bench);
  uint64_t refused = 0;
  for (uint64_t k = 1; k <= kMaxRefused && !time.over(); ++k) {
    now_doing("create without its allocation " + std::to_string(k));
    HostTable host;
    ds_instance* out = nullptr;
    ds_status st{};
    bool hit = false;
    ds_code code = DS_OK;
    {
      const AllocationWatch watch(k);
      code = bench.component.create(host.table(), bench.config.get(), {DS_DEV_CPU, 0}, &out, &st);
      hit = AllocationWatch::refused();
    }
    if (code == DS_OK && out != nullptr) ops_of(bench.component).destroy(out);
    if (!hit) break;
    ++refused;
  }
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace whole = trace_of(bench, operation);
    for (uint64_t k = 1; k <= kMaxRefused && !time.over(); ++k) {
      TrialOptions options;
      options.refuse = k;
      const Trace trace = trace_of(bench, operation, options);
      if (!trace.refused) break;
      ++refused;
      if (trace.ok() && !trace.same_as(whole) && (bench.component.caps & DS_CAP_DETERMINISTIC) != 0)
        return failed(std::string(operation.name) + " without allocation " + std::to_string(k) +
                      ": it gave 0 and other results");
    }
  }
  return pass(std::to_string(refused) + " allocations refused" + time.note());
}

Verdict no_host_memory(Bench& bench) {
  uint64_t refused = 0;
  for (uint64_t k = 1; k <= kMaxRefused; ++k) {
    auto host = std::make_unique<HostTable>();
    host->refuse_alloc(k);
    const Instance instance(bench, std::move(host));
    if (instance) {
      for (const Operation& operation : operations_of(bench.component))
        (void)trace_on(bench, instance.get(), operation);
    }
    if (instance.host().allocs() < k) break;
    ++refused;
  }
  return pass(std::to_string(refused) + " blocks refused");
}

/// Random contents, sizes and damage; what is asked for is only that it stands.
Verdict noise(Bench& bench) {
  std::mt19937_64 rng(bench.settings.seed);
  const std::vector<Operation> operations = operations_of(bench.component);
  std::unique_ptr<Instance> instance;
  const TimeBox time(bench);
  uint64_t i = 0;
  for (; i < bench.settings.iterations && !time.over(); ++i) {
    // A new one now and then: what it remembers would only slow it down.
    if (i % 32 == 0) instance = std::make_unique<Instance>(bench);
    if (!*instance) return failed(instance->text());
    const Operation& operation = operations[rng() % operations.size()];
    TrialOptions options;
    options.content = rng();
    options.seed = rng();
    options.guard_buffers = true;
    options.scale = 1 + static_cast<int>(rng() % 3);
    options.empty = rng() % 16 == 0;
    options.cancel = rng() % 16 == 0;
    options.deadline_ns = rng() % 16 == 0;
    static constexpr Harm harms[] = {Harm::kNone,  Harm::kNone,  Harm::kDtype,
                                     Harm::kShape, Harm::kShort, Harm::kNull};
    options.damage = {harms[rng() % std::size(harms)], rng() % 12, 0};
    now_within("seed " + std::to_string(bench.settings.seed) + ", iteration " + std::to_string(i) +
               ", " + operation.name + ", damage " +
               std::to_string(static_cast<int>(options.damage.harm)) + " to tensor " +
               std::to_string(options.damage.index) + ", size " + std::to_string(options.scale));
    const Trace trace = trace_on(bench, instance->get(), operation, options);
    if (!trace.intact)
      return failed(std::string(operation.name) + " wrote outside a tensor (seed " +
                    std::to_string(bench.settings.seed) + ", iteration " + std::to_string(i) + ")");
  }
  return pass(std::to_string(i) + " iterations, seed " + std::to_string(bench.settings.seed) +
              time.note());
}

Verdict many_at_once(Bench& bench) {
  std::vector<Operation> operations = operations_of(bench.component);
  std::vector<Trace> expected;
  for (const Operation& operation : operations) expected.push_back(trace_of(bench, operation));
  // With state of its own, what one thread puts another one finds.
  const bool shared = (bench.component.caps & (DS_CAP_REENTRANT | DS_CAP_STATEFUL)) ==
                      static_cast<uint64_t>(DS_CAP_REENTRANT);
  const bool exact = (bench.component.caps & DS_CAP_DETERMINISTIC) != 0;
  const Instance one(bench);
  std::vector<std::string> wrong(4);
  std::vector<std::thread> threads;
  for (size_t number = 0; number < wrong.size(); ++number) {
    threads.emplace_back([&, number] {
      std::string& mine = wrong[number];
      TrialOptions options;
      options.layer = static_cast<int>(number);
      for (int round = 0; round < 25; ++round) {
        for (size_t i = 0; i < operations.size(); ++i) {
          const Trace trace = shared ? trace_on(bench, one.get(), operations[i], options)
                                     : trace_of(bench, operations[i], options);
          if (exact && !trace.same_as(expected[i])) mine = operations[i].name;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& name : wrong) {
    if (!name.empty()) return failed(name + ": other results when four threads call at once");
  }
  return pass(shared ? "one instance, 4 threads" : "an instance for each of 4 threads");
}

}  // namespace

std::vector<Check> hostile_checks() {
  return {
      {"hostile.allocation", 3, 0, {"numerics.determinism"}, no_memory},
      {"hostile.host-allocation", 3, 0, {}, no_host_memory},
      {"hostile.noise",
       3,
       0,
       {"contract.nulls", "contract.buffers", "contract.empty", "contract.wrong-dtype",
        "contract.wrong-shape", "contract.short-buffer", "contract.cancel", "contract.deadline"},
       noise},
      {"hostile.threads", 3, 0, {"numerics.determinism"}, many_at_once}};
}

}  // namespace ds::check
