// SPDX-License-Identifier: Apache-2.0
// Every setting, declared once (config_table.cpp): name, type, default, range, live or restart,
// help. The table feeds the TOML reader, the environment (DS_SERVE_CONTEXT), --set, `dsctl config`,
// --help and the README. Order: flag > environment > file > default; each value remembers where it
// came from, and a lower source never replaces a higher one, in whatever order they are read.
//
// Config is thread-safe. Listeners run on the thread that called set_live(), outside the lock.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ds/status.h"
#include "storage/json.h"

namespace ds {

enum class SettingType { kBool, kInt, kNumber, kText, kDurationMs, kBytes };

struct Setting {
  const char* name;  ///< "learn.min_items"
  SettingType type;
  const char* fallback;  ///< default as text: "2s", "256MiB", "true"
  double min, max;       ///< of the parsed value (ms, bytes), inclusive; equal = unbounded
  const char* choices;   ///< "default|fp32" or ""
  bool live;             ///< may change while running
  const char* help;
};

std::span<const Setting> settings();

/// The known name closest to `name` by edit distance.
std::string nearest_setting(std::string_view name);

/// What a value may be, for messages and tables: "1 to 16", "lora, full", "true, false", "text".
std::string allowed_values(const Setting& setting);

/// The table as Markdown: name, default, allowed values, live or restart, help.
std::string settings_markdown();

/// "250ms", "2s", "10m", "1.5h", "7d" in milliseconds; a bare "0" is allowed.
Result<int64_t> parse_duration_ms(std::string_view text);
/// "4096", "64KiB", "1.5MiB", "2GiB", "10B" in bytes.
Result<int64_t> parse_bytes(std::string_view text);

class Config {
 public:
  Config();  ///< defaults

  /// Missing file: kNotFound. Errors name file:line, the setting, what was found and what was
  /// expected; nothing is taken over from a file with an error.
  Status load_toml(const std::string& path);
  /// DS_<SECTION>_<KEY>; an unknown name with a known section (DS_LEARN_ELAN) is refused.
  Status load_environment(char** environment);
  /// Checks and takes over. `origin` is what `dsctl config show --origin` prints: "flag",
  /// "default", "env DS_LEARN_RANK", "dsd.toml:12", "live".
  Status set(const std::string& name, const std::string& text, const std::string& origin);
  /// From `dsctl config set`: only live settings; runs the listeners.
  Status set_live(const std::string& name, const std::string& text);
  /// `name` must be a setting. `apply` runs before set_live() takes a value over, and its failure
  /// refuses the value. One for each setting, for the life of the Config.
  void before_change(const std::string& name, std::function<Status(const std::string&)> apply);
  /// `name` must be a setting. Listeners stay for the life of the Config.
  void on_change(const std::string& name, std::function<void()> listener);

  // The name must be a setting of that type: anything else is a bug and aborts.
  bool flag(const std::string& name) const;
  int64_t integer(const std::string& name) const;  ///< also durations in ms, sizes in bytes
  double number(const std::string& name) const;
  std::string text(const std::string& name) const;

  /// One entry per setting, in the table's order: name, value, default, origin, live, help.
  /// Switches and numbers are JSON values, durations and sizes text with their unit.
  Json show() const;

 private:
  struct Value {
    std::string text;
    double number = 0;
    std::string origin;
  };
  struct Parsed {
    const Setting* setting;
    Value value;
  };
  static Result<Parsed> parse(const std::string& name, const std::string& text,
                              const std::string& origin);
  void take(const Parsed& parsed);
  Value value(const std::string& name, std::initializer_list<SettingType> types) const;

  mutable std::mutex mutex_;
  std::map<std::string, Value> values_;
  std::map<std::string, std::function<Status(const std::string&)>> appliers_;
  std::map<std::string, std::vector<std::function<void()>>> listeners_;
};

}  // namespace ds
