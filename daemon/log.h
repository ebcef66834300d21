// SPDX-License-Identifier: Apache-2.0
// One line per event worth telling, on stderr (spdlog behind log.cpp) and in a ring that `dsctl logs`
// reads as events of topic "log".
#pragma once

#include <string>

namespace ds {

class EventBus;
enum class LogLevel { kDebug, kInfo, kWarn, kError };

/// `unit`: serve, engine, learn, store, main. Never put user text or keys into `message`.
void log(LogLevel level, const char* unit, const std::string& message);

/// Lines at or above `level` are written; `bus` (may be null) gets each one.
void start_log(LogLevel level, EventBus* bus);
void stop_log();

}  // namespace ds
