// SPDX-License-Identifier: Apache-2.0
#include "ctl/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <optional>
#include <thread>

#include "ctl/output.h"

namespace ds::ctl {
namespace {

constexpr int64_t kRedrawMs = 80;
constexpr int64_t kPlainLineMs = 5000;
constexpr auto kTick = std::chrono::milliseconds(400);

int64_t monotonic_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

int terminal_columns() {
  winsize size = {};
  const bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}

}  // namespace

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)),
      total_(total),
      started_ms_(monotonic_ms()),
      terminal_(isatty(STDERR_FILENO)) {}

std::string Progress::bar(int64_t done, const std::string& note, int columns) const {
  const double seconds = static_cast<double>(monotonic_ms() - started_ms_) / 1000;
  std::string tail = "  " + duration_text(seconds) + (note.empty() ? "" : "  " + note);
  if (total_ <= 0) return shortened(label_ + (done ? "  " + count_text(done) : "") + tail, columns);
  const double share =
      std::clamp(static_cast<double>(done) / static_cast<double>(total_), 0.0, 1.0);
  const std::string numbers =
      "  " + count_text(done) + "/" + count_text(total_) + "  " + percent_text(share);
  const size_t width = 20, full = static_cast<size_t>(share * width);
  std::string cells;
  for (size_t i = 0; i < width; ++i) cells += i < full ? "━" : "╌";
  return shortened(label_ + "  " + cells + numbers + tail, columns);
}

void Progress::update(int64_t done, const std::string& note) {
  const int64_t now = monotonic_ms();
  if (terminal_) {
    if (drawn_ && now - drawn_ms_ < kRedrawMs && done != total_) return;
    std::fprintf(stderr, "\r\033[K%s", bar(done, printable(note), terminal_columns() - 1).c_str());
  } else {
    if (now - (drawn_ ? drawn_ms_ : started_ms_) < kPlainLineMs) return;
    const std::string of = total_ > 0 ? "/" + count_text(total_) : "";
    const std::string count = done > 0 || total_ > 0 ? "  " + count_text(done) + of : "";
    const double seconds = static_cast<double>(now - started_ms_) / 1000;
    std::fprintf(stderr, "%s%s  %s%s\n", label_.c_str(), count.c_str(),
                 duration_text(seconds).c_str(),
                 note.empty() ? "" : ("  " + printable(note)).c_str());
  }
  std::fflush(stderr);
  drawn_ = true;
  drawn_ms_ = now;
}

void Progress::clear() {
  if (terminal_ && drawn_) std::fprintf(stderr, "\r\033[K");
  drawn_ = false;
}

Result<Json> watched(const std::function<Result<Json>()>& work, const std::function<void()>& tick) {
  std::mutex mutex;
  std::condition_variable ended;
  std::optional<Result<Json>> result;
  std::thread thread([&] {
    Result<Json> outcome = work();
    const std::lock_guard lock(mutex);
    result = std::move(outcome);
    ended.notify_one();
  });
  {
    std::unique_lock lock(mutex);
    while (!ended.wait_for(lock, kTick, [&] { return result.has_value(); })) {
      lock.unlock();
      tick();
      lock.lock();
    }
  }
  thread.join();
  return std::move(*result);
}

}  // namespace ds::ctl
