// SPDX-License-Identifier: Apache-2.0
// spdlog is used here and nowhere else. Before start_log() lines go to stderr from `info` on.
#include "log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "events.h"

namespace ds {
namespace {

spdlog::level::level_enum native(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

const char* level_name(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarn:
      return "warn";
    case LogLevel::kError:
      return "error";
  }
  return "info";
}

// Logging is the one thing that any line of the program may do, so its sink is process-wide.
struct Sink {
  spdlog::logger out{"dsd", std::make_shared<spdlog::sinks::stderr_sink_mt>()};
  std::mutex mutex;
  EventBus* bus = nullptr;
  std::atomic<LogLevel> least{LogLevel::kInfo};
  Sink() {
    out.set_pattern("%Y-%m-%dT%H:%M:%S.%e %l %v");
    out.set_level(spdlog::level::debug);
  }
};

Sink& sink() {
  static Sink sink;
  return sink;
}

// A line is a line: what would start another one is made visible.
std::string one_line(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else {
      out += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
    }
  }
  return out;
}

}  // namespace

void log(LogLevel level, const char* unit, const std::string& message) {
  if (level < sink().least.load()) return;
  const std::string line = one_line(message);
  sink().out.log(native(level), "{}: {}", unit, line);
  EventBus* bus = nullptr;
  {
    const std::lock_guard lock(sink().mutex);
    bus = sink().bus;
  }
  if (bus) bus->publish("log", {{"level", level_name(level)}, {"unit", unit}, {"message", line}});
}

void start_log(LogLevel level, EventBus* bus) {
  const std::lock_guard lock(sink().mutex);
  sink().least = level;
  sink().bus = bus;
}

void stop_log() {
  const std::lock_guard lock(sink().mutex);
  sink().bus = nullptr;
  sink().out.flush();
}

}  // namespace ds
