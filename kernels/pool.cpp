// SPDX-License-Identifier: Apache-2.0
// One job slot per master. A slot is a count of tickets not yet taken: taking one is a
// compare-and-swap from n to n - 1, so a ticket always belongs to the job published now, and a job
// cannot be replaced while a ticket of it is out. All parking goes through one event counter,
// bumped by every change that somebody may wait for.
#include "kernels/pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "ds/status.h"
#include "kernels/gpu_share.h"

namespace ds {

constinit thread_local const char* on_behalf_of = nullptr;

namespace {

constexpr int64_t kSpinNs = 40'000;  // a futex wake costs 5-50 us; engine phases follow closely
constexpr int64_t kIdleGraceNs = 100'000;  // the trainer's serial code between two runs

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

thread_local bool inside_task = false;

struct Job {
  ds_task_fn task = nullptr;  // written only while no ticket is out
  void* user = nullptr;
  const char* behalf = nullptr;
  int64_t count = 0;
  alignas(64) std::atomic<int64_t> tickets{0};  // not yet taken
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<bool> busy{false};

  void publish(int64_t n, ds_task_fn fn, void* arg) {
    task = fn;
    user = arg;
    behalf = on_behalf_of;
    count = n;
    done.store(0, std::memory_order_relaxed);
    tickets.store(n, std::memory_order_release);
  }

  enum class Taken { kNone, kRan, kRanLast };

  /// Takes and runs one task. kRanLast: all tasks of the job are done.
  Taken run_one() {
    int64_t left = tickets.load(std::memory_order_acquire);
    do {
      if (left == 0) return Taken::kNone;
    } while (!tickets.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel,
                                            std::memory_order_acquire));
    const int64_t total = count;
    const char* const own = on_behalf_of;
    on_behalf_of = behalf;
    inside_task = true;
    task(user, total - left);
    inside_task = false;
    on_behalf_of = own;
    // After this increment the caller may return and publish again: the job is not touched any
    // more.
    return done.fetch_add(1, std::memory_order_acq_rel) + 1 == total ? Taken::kRanLast
                                                                     : Taken::kRan;
  }
};

}  // namespace

struct Pool::State {
  int threads = 1;
  Job engine_job, background_job;
  ds_parallel engine_table{}, background_table{};
  std::vector<std::thread> workers;
  std::atomic<bool> stop{false};

  std::atomic<uint32_t> events{0};

  // Dekker pair: a background task counts itself in, then looks for a step; a step announces
  // itself, then looks for tasks. One of the two always sees the other.
  std::atomic<bool> step_active{false};
  std::atomic<int> background_in_flight{0};

  GpuShare gpu_share;
  std::atomic<double> share{0.0};
  std::atomic<int64_t> stretch_start_ns{0};  // 0: background not running now
  std::atomic<int64_t> stretch_total_ns{0};
  std::atomic<int64_t> background_idle_since_ns{0};  // 0: inside a run
  int64_t step_start_ns = 0;                         // engine thread only, as the next two
  int64_t owed_ns = 0;
  int64_t paid_base_ns = 0;

  std::atomic<int64_t> engine_ns{0}, background_ns{0}, background_tasks{0}, yields{0},
      wait_ns_max{0};

  void bump() {
    events.fetch_add(1, std::memory_order_acq_rel);
    events.notify_all();
  }

  /// Spins, then parks, until ready() holds. Whoever makes it true bumps afterwards.
  template <typename Ready>
  void wait_until(Ready ready) {
    const int64_t spin_end = now_ns() + kSpinNs;
    for (int i = 0;; ++i) {
      if (ready()) return;
      relax();
      if (i % 32 == 31 && now_ns() > spin_end) break;
    }
    for (;;) {
      const uint32_t seen = events.load(std::memory_order_acquire);
      if (ready()) return;
      events.wait(seen, std::memory_order_acquire);
    }
  }

  bool background_allowed() const { return !step_active.load(std::memory_order_seq_cst); }

  /// One background task, unless an engine step waits or runs.
  Job::Taken run_background_one() {
    if (!background_allowed()) return Job::Taken::kNone;
    background_in_flight.fetch_add(1, std::memory_order_seq_cst);
    Job::Taken taken = Job::Taken::kNone;
    if (background_allowed() && background_job.tickets.load(std::memory_order_relaxed) > 0) {
      const int64_t start = now_ns();
      taken = background_job.run_one();
      if (taken != Job::Taken::kNone) {
        background_ns.fetch_add(now_ns() - start, std::memory_order_relaxed);
        background_tasks.fetch_add(1, std::memory_order_relaxed);
      }
    }
    const bool last_out = background_in_flight.fetch_sub(1, std::memory_order_seq_cst) == 1;
    if (taken == Job::Taken::kRanLast || (last_out && !background_allowed())) bump();
    return taken;
  }

  void work() {
    auto something = [this] {
      return stop.load(std::memory_order_acquire) ||
             engine_job.tickets.load(std::memory_order_acquire) > 0 ||
             (background_allowed() && background_job.tickets.load(std::memory_order_acquire) > 0);
    };
    while (!stop.load(std::memory_order_acquire)) {
      const Job::Taken taken = engine_job.run_one();
      if (taken == Job::Taken::kRanLast) bump();
      if (taken != Job::Taken::kNone) continue;
      if (run_background_one() == Job::Taken::kNone) wait_until(something);
    }
  }

  void begin_stretch() { stretch_start_ns.store(now_ns(), std::memory_order_release); }
  void end_stretch() {
    const int64_t start = stretch_start_ns.exchange(0, std::memory_order_acq_rel);
    stretch_total_ns.fetch_add(now_ns() - start, std::memory_order_acq_rel);
  }
  int64_t background_wall_ns() const {
    const int64_t total = stretch_total_ns.load(std::memory_order_acquire);
    const int64_t start = stretch_start_ns.load(std::memory_order_acquire);
    return total + (start > 0 ? now_ns() - start : 0);
  }

  void run_engine(Pool* pool, int64_t count, ds_task_fn task, void* user) {
    DS_CHECK(!inside_task);  // tasks do not call run()
    if (count <= 0) return;
    DS_CHECK(!engine_job.busy.exchange(true, std::memory_order_acquire));  // one engine caller
    const bool own_step = !step_active.load(std::memory_order_relaxed);
    if (own_step) pool->begin_engine_step();
    engine_job.publish(count, task, user);
    if (count > 1 && threads > 1) bump();
    while (engine_job.run_one() != Job::Taken::kNone) {
    }
    wait_until([&] { return engine_job.done.load(std::memory_order_acquire) == count; });
    if (own_step) pool->end_engine_step();
    engine_job.busy.store(false, std::memory_order_release);
  }

  void run_background(int64_t count, ds_task_fn task, void* user) {
    DS_CHECK(!inside_task);
    if (count <= 0) return;
    DS_CHECK(!background_job.busy.exchange(true, std::memory_order_acquire));  // one trainer
    background_idle_since_ns.store(0, std::memory_order_release);
    begin_stretch();
    background_job.publish(count, task, user);
    if (count > 1 && threads > 1) bump();
    while (background_job.tickets.load(std::memory_order_acquire) > 0) {
      if (run_background_one() != Job::Taken::kNone || background_allowed()) continue;
      yields.fetch_add(1, std::memory_order_relaxed);
      end_stretch();
      wait_until([this] { return background_allowed(); });
      begin_stretch();
    }
    wait_until([&] { return background_job.done.load(std::memory_order_acquire) == count; });
    end_stretch();
    background_idle_since_ns.store(now_ns(), std::memory_order_release);
    background_job.busy.store(false, std::memory_order_release);
  }

  /// The trainer is in a run, or so shortly out of one that its next is about to come.
  bool background_has_work() const {
    const int64_t idle_since = background_idle_since_ns.load(std::memory_order_acquire);
    return idle_since == 0 ? background_job.busy.load(std::memory_order_acquire)
                           : now_ns() - idle_since < kIdleGraceNs;
  }

  void pay_background() {
    const int64_t target = paid_base_ns + owed_ns;
    while (background_has_work() && background_wall_ns() < target) {
      for (int i = 0; i < 64; ++i) relax();
      std::this_thread::yield();
    }
    owed_ns = 0;
  }
};

namespace {

std::vector<int> allowed_cores() {
  std::vector<int> cores;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cores;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) cores.push_back(i);
  }
  return cores;
}

}  // namespace

Pool::Pool(int threads) : state_(std::make_unique<State>()) {
  const std::vector<int> cores = allowed_cores();
  if (threads <= 0) threads = cores.empty() ? 1 : static_cast<int>(cores.size());
  State* s = state_.get();
  s->threads = threads;
  s->background_idle_since_ns.store(1);
  struct Masters {
    static void engine(void* pool, int64_t count, ds_task_fn task, void* user) {
      auto* p = static_cast<Pool*>(pool);
      p->state_->run_engine(p, count, task, user);
    }
    static void background(void* pool, int64_t count, ds_task_fn task, void* user) {
      static_cast<Pool*>(pool)->state_->run_background(count, task, user);
    }
  };
  const auto n = static_cast<uint32_t>(threads);
  s->engine_table = {sizeof(ds_parallel), n, this, &Masters::engine};
  s->background_table = {sizeof(ds_parallel), n, this, &Masters::background};
  // Core 0 of the list is left to the calling threads. Threads that would share cores float
  // instead.
  const bool pin = cores.size() >= static_cast<size_t>(threads);
  for (int i = 1; i < threads; ++i) {
    s->workers.emplace_back([s] { s->work(); });
    if (!pin) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cores[static_cast<size_t>(i)], &one);
    pthread_setaffinity_np(s->workers.back().native_handle(), sizeof(one), &one);
  }
}

Pool::~Pool() {
  state_->stop.store(true, std::memory_order_release);
  state_->bump();
  for (std::thread& worker : state_->workers) worker.join();
}

int Pool::threads() const { return state_->threads; }
const ds_parallel* Pool::engine() { return &state_->engine_table; }
const ds_parallel* Pool::background() { return &state_->background_table; }
GpuShare& Pool::gpu_share() { return state_->gpu_share; }

void Pool::begin_engine_step(int64_t waiting) {
  State& s = *state_;
  DS_CHECK(!s.step_active.load(std::memory_order_relaxed));
  if (s.owed_ns > 0) s.pay_background();
  const int64_t start = now_ns();
  s.gpu_share.begin_step(start, waiting);
  s.step_active.store(true, std::memory_order_seq_cst);
  s.wait_until([&s] { return s.background_in_flight.load(std::memory_order_seq_cst) == 0; });
  s.step_start_ns = now_ns();
  const int64_t waited = s.step_start_ns - start;
  if (waited > s.wait_ns_max.load(std::memory_order_relaxed)) {
    s.wait_ns_max.store(waited, std::memory_order_relaxed);
  }
}

void Pool::end_engine_step() {
  State& s = *state_;
  DS_CHECK(s.step_active.load(std::memory_order_relaxed));
  const int64_t end = now_ns(), elapsed = end - s.step_start_ns;
  s.gpu_share.end_step(end);
  s.engine_ns.fetch_add(elapsed, std::memory_order_relaxed);
  const double share = s.share.load(std::memory_order_relaxed);
  s.owed_ns = static_cast<int64_t>(static_cast<double>(elapsed) * share / (1.0 - share));
  s.paid_base_ns = s.background_wall_ns();
  s.step_active.store(false, std::memory_order_seq_cst);
  s.bump();
}

void Pool::set_background_share(double share) {
  DS_CHECK(share >= 0.0 && share < 1.0);
  state_->share.store(share, std::memory_order_relaxed);
  state_->gpu_share.set_min_share(share);
}

Pool::Times Pool::times() const {
  const State& s = *state_;
  return {s.engine_ns.load(), s.background_ns.load(), s.background_tasks.load(), s.yields.load(),
          s.wait_ns_max.load()};
}

const ds_parallel* serial_parallel() {
  static constexpr ds_parallel kTable = {sizeof(ds_parallel), 1, nullptr,
                                         [](void*, int64_t count, ds_task_fn task, void* user) {
                                           for (int64_t i = 0; i < count; ++i) task(user, i);
                                         }};
  return &kTable;
}

}  // namespace ds
