// SPDX-License-Identifier: Apache-2.0
// Serving and training on one GPU at once: decode steps at a fixed rate, which takes 30 % of the
// time when nothing else runs, beside a thread that trains without end. One line per way of
// sharing.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#include "engine/model.h"
#include "kernels/cuda/backend.h"
#include "kernels/gpu_share.h"
#include "kernels/pool.h"

namespace ds {

class ShareBench {
 public:
  /// Makes what does one step on a stream.
  using Make = std::function<std::function<void()>(const Compute&)>;

  /// `tokens` of a training step.
  ShareBench(const char* row, const Compute& gpu, Make decode, Make train, int64_t tokens)
      : row_(row),
        gpu_(gpu),
        cuda_(*loaded_cuda_backend()),
        decode_(std::move(decode)),
        tokens_(tokens),
        trainer_(stream(false)),
        train_(train(trainer_)) {}
  ~ShareBench() {
    train_ = nullptr;
    cuda_.stream_destroy(trainer_.context.stream);
  }

  void run() {
    train_();
    const double tokens_per_s = train_for(std::chrono::milliseconds(1500));
    std::printf("%s: training alone %.0f tok/s\n", row_, tokens_per_s);
    // Alone twice: first as fast as it goes, for the rate.
    const Times busy = serve({.trains = false}, 0);
    const double period_us = busy.p50 / kLoad;
    const Times alone = serve({.trains = false}, period_us);
    std::printf("%s: decode alone p50 %.0f us, p99 %.0f us, every %.0f us\n", row_, alone.p50,
                alone.p99, period_us);
    const Variant variants[] = {
        {.name = "naive", .urgent = false, .gated = false},
        {.name = "priority", .gated = false},
        {.name = "priority, short queue", .held = GpuPart::kWhole},
        {.name = "all but 16 SMs", .held = GpuPart::kMost},
        {.name = "all but 32 SMs", .held = GpuPart::kThreeQuarters},
        {.name = "all but 64 SMs", .held = GpuPart::kHalf},
        {.name = "paused in steps", .held = GpuPart::kNone},
        {.name = "by load"},
        {.name = "32 SMs for each step, training on the others",
         .confined = true,
         .held = GpuPart::kThreeQuarters},
    };
    for (const Variant& v : variants) {
      const Times t = serve(v, period_us);
      std::printf(
          "%s: %s: decode p50 %.0f us (%.2fx), p99 %.0f us (%.2fx), training %.0f tok/s "
          "(%.0f %%)\n",
          row_, v.name, t.p50, t.p50 / alone.p50, t.p99, t.p99 / alone.p99, t.trained,
          100 * t.trained / tokens_per_s);
      std::fflush(stdout);
    }
  }

 private:
  using Steady = std::chrono::steady_clock;
  static constexpr double kLoad = 0.3;
  static constexpr int kWarm = 100, kSteps = 400;  // 100: the load's window is 100 ms

  struct Variant {
    const char* name = "";
    bool trains = true;
    bool urgent = true;             ///< serving goes first where both have work
    bool gated = true;              ///< training asks before each op
    bool confined = false;          ///< serving has the 32 SMs that training leaves, no more
    std::optional<GpuPart> held{};  ///< none: by load
  };
  /// Training's gate, and how long after the beginning of a step training came to it and waited:
  /// from then on it adds nothing. It comes late where it waits for a result of its own.
  struct Gate {
    GpuShare share;
    std::atomic<int64_t> begun_ns{0};
    int64_t seen = 0;
    std::vector<double> stopped_us;

    static GpuPart pass(void* user) {
      Gate& gate = *static_cast<Gate*>(user);
      const int64_t begun = gate.begun_ns, now = now_ns();
      if (begun != gate.seen && gate.share.part(now) == GpuPart::kNone) {
        gate.seen = begun;
        gate.stopped_us.push_back(double(now - begun) * 1e-3);
      }
      return gate.share.pass();
    }
  };

  struct Times {
    double p50 = 0, p99 = 0;  ///< us of a decode step
    double trained = 0;       ///< tokens per second meanwhile
  };

  static int64_t now_ns() { return Steady::now().time_since_epoch() / std::chrono::nanoseconds(1); }

  Compute stream(bool urgent) const {
    Compute out = gpu_;
    out.context.parallel = serial_parallel();
    out.context.stream = cuda_.stream_create(urgent);
    DS_CHECK(out.context.stream != nullptr);
    return out;
  }

  /// Tokens per second in the steps that end before `over`.
  double train_until(const std::function<bool()>& over) const {
    const auto start = Steady::now();
    double tokens = 0, seconds = 1;
    for (train_(); !over(); train_()) {
      tokens += double(tokens_);
      seconds = std::chrono::duration<double>(Steady::now() - start).count();
    }
    return tokens / seconds;
  }
  double train_for(Steady::duration time) const {
    return train_until([end = Steady::now() + time] { return Steady::now() > end; });
  }

  Times serve(const Variant& variant, double period_us) const {
    Gate gate;
    if (variant.held) gate.share.hold(*variant.held);
    const Compute server = stream(variant.urgent);
    if (variant.confined) {
      cuda_.stream_give_way(server.context.stream, {[](void*) { return GpuPart::kQuarter; }});
    }
    const char* why = cuda_.stream_give_way(
        trainer_.context.stream, variant.gated ? StreamGate{Gate::pass, &gate} : StreamGate{});
    if (why != nullptr) std::printf("%s: on every SM: %s\n", row_, why);
    Times out;
    {
      const std::function<void()> step = decode_(server);
      std::atomic<bool> over{false};
      std::thread trainer;
      if (variant.trains)
        trainer = std::thread([&] { out.trained = train_until([&] { return over.load(); }); });
      const std::vector<double> took = steps(step, gate, period_us);
      over = true;
      if (trainer.joinable()) trainer.join();
      out.p50 = took[took.size() / 2];
      out.p99 = took[took.size() * 99 / 100];
    }
    std::sort(gate.stopped_us.begin(), gate.stopped_us.end());
    if (const size_t n = gate.stopped_us.size(); n > 0)
      std::printf("%s: %s: training stopped p50 %.0f us, p99 %.0f us after a step began (%zu)\n",
                  row_, variant.name, gate.stopped_us[n / 2], gate.stopped_us[n * 99 / 100], n);
    // The gate ends here.
    cuda_.stream_give_way(trainer_.context.stream, {});
    cuda_.stream_destroy(server.context.stream);
    return out;
  }

  /// Sorted. A step that is late moves those after it: the load stays below what was asked for.
  static std::vector<double> steps(const std::function<void()>& step, Gate& gate,
                                   double period_us) {
    const auto period = std::chrono::nanoseconds(static_cast<int64_t>(period_us * 1e3));
    std::vector<double> took;
    auto due = Steady::now();
    for (int i = 0; i < kWarm + kSteps; ++i) {
      std::this_thread::sleep_until(due);
      const auto start = Steady::now();
      due = std::max(due + period, start);
      const int64_t begun = now_ns();
      gate.begun_ns = begun;
      gate.share.begin_step(begun, 0);
      step();
      gate.share.end_step(now_ns());
      if (i >= kWarm)
        took.push_back(std::chrono::duration<double, std::micro>(Steady::now() - start).count());
    }
    std::sort(took.begin(), took.end());
    return took;
  }

  const char* row_;
  const Compute gpu_;
  const CudaBackend& cuda_;
  const Make decode_;
  const int64_t tokens_;
  const Compute trainer_;
  std::function<void()> train_;
};

}  // namespace ds
