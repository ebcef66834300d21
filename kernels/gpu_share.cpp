// SPDX-License-Identifier: Apache-2.0
#include "kernels/gpu_share.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace ds {
namespace {

constexpr double kWindowNs = 100e6;

// Loads at which serving gets more SMs of its own. Below kSome training has the whole GPU between
// steps; from there on it stays on its part, as what it enqueues on the whole runs into the next
// step.
constexpr double kIdle = 0.05, kSome = 0.4, kMuch = 0.8, kAll = 0.9;

/// What is left of a moment's weight after this long. A reader's "now" may be older than a change
/// that it sees.
double faded(int64_t ns) {
  return std::exp(-static_cast<double>(std::max<int64_t>(ns, 0)) / kWindowNs);
}

}  // namespace

double share_of(GpuPart part) {
  switch (part) {
    case GpuPart::kNone:
      return 0;
    case GpuPart::kQuarter:
      return 0.25;
    case GpuPart::kHalf:
      return 0.5;
    case GpuPart::kThreeQuarters:
      return 0.75;
    case GpuPart::kMost:
      return 0.875;
    case GpuPart::kWhole:
      return 1;
  }
  return 0;
}

GpuPart training_part(const ServingLoad& load, double min_share) {
  const bool light = load.waiting == 0 && load.busy < kSome;
  if (light && !load.in_step) return GpuPart::kWhole;
  GpuPart part =
      light || load.waiting > 0 || load.busy >= kMuch ? GpuPart::kHalf : GpuPart::kThreeQuarters;
  if (load.in_step && load.waiting > 0 && load.busy >= kAll) part = GpuPart::kNone;
  if (min_share <= 0) return part;
  for (const GpuPart owed : {GpuPart::kHalf, GpuPart::kThreeQuarters, GpuPart::kMost}) {
    if (part < owed && share_of(part) < min_share) part = owed;
  }
  return part;
}

void GpuShare::begin_step(int64_t now_ns, int64_t waiting) {
  busy_.store(load(now_ns).busy);
  since_ns_.store(now_ns);
  waiting_.store(waiting);
  in_step_.store(true);
  changed();
}

void GpuShare::end_step(int64_t now_ns) {
  busy_.store(load(now_ns).busy);
  since_ns_.store(now_ns);
  in_step_.store(false);
  changed();
}

void GpuShare::set_min_share(double share) {
  min_share_.store(share);
  changed();
}

void GpuShare::hold(GpuPart part) {
  held_.store(static_cast<int>(part));
  changed();
}

void GpuShare::changed() {
  changes_.fetch_add(1);
  changes_.notify_all();
}

ServingLoad GpuShare::load(int64_t now_ns) const {
  ServingLoad out;
  out.in_step = in_step_.load();
  out.waiting = waiting_.load();
  const double left = faded(now_ns - since_ns_.load());
  out.busy = busy_.load() * left + (out.in_step ? 1 - left : 0);
  // Who waited either runs now or gave up: nothing tells when the last step is long over.
  if (!out.in_step && out.busy < kIdle) out.waiting = 0;
  return out;
}

GpuPart GpuShare::part(int64_t now_ns) const {
  const ServingLoad now = load(now_ns);
  const int held = held_.load();
  if (held < 0) return training_part(now, min_share_.load());
  const auto part = static_cast<GpuPart>(held);
  return part == GpuPart::kNone && !now.in_step ? GpuPart::kWhole : part;
}

GpuPart GpuShare::pass() const {
  for (;;) {
    const uint32_t seen = changes_.load();
    const GpuPart now =
        part(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
    if (now != GpuPart::kNone) return now;
    changes_.wait(seen);
  }
}

StreamGate GpuShare::gate() {
  return {[](void* share) { return static_cast<const GpuShare*>(share)->pass(); }, this};
}

}  // namespace ds
