// SPDX-License-Identifier: Apache-2.0
// Reading settings from text, TOML and the environment. toml++ runs without exceptions, in this
// file only.
#include "config.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

namespace ds {
namespace {

const Setting* find_setting(std::string_view name) {
  for (const Setting& setting : settings()) {
    if (name == setting.name) return &setting;
  }
  return nullptr;
}

Status unknown_setting(std::string_view name) {
  return invalid("unknown setting " + std::string(name) + ", the nearest known one is " +
                 nearest_setting(name));
}

/// How high a source ranks: flag > environment > file > default; a live change outranks all.
int rank(std::string_view origin) {
  if (origin == "default") return 0;
  if (origin.starts_with("env ")) return 2;
  if (origin == "flag") return 3;
  if (origin == "live") return 4;
  return 1;
}

Result<double> parse_plain_number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    return invalid("not a number");
  }
  return value;
}

struct Unit {
  std::string_view name;
  double factor;
};

Result<int64_t> parse_with_unit(std::string_view text, std::span<const Unit> units,
                                std::string_view expected) {
  const size_t digits = text.find_first_not_of("0123456789.");
  const std::string_view unit = digits == text.npos ? "" : text.substr(digits);
  const auto number = parse_plain_number(text.substr(0, digits));
  for (const Unit& known : units) {
    if (!number.ok() || unit != known.name) continue;
    if (unit.empty() && known.factor == 0 && *number != 0) continue;  // bare numbers: only 0
    const double value = *number * known.factor;
    if (value < 9.0e15) return static_cast<int64_t>(std::llround(value));
  }
  return invalid("got \"" + std::string(text) + "\", expected " + std::string(expected));
}

const char* type_name(SettingType type) {
  switch (type) {
    case SettingType::kBool:
      return "true or false";
    case SettingType::kInt:
      return "an integer";
    case SettingType::kNumber:
      return "a number";
    case SettingType::kText:
      return "text";
    case SettingType::kDurationMs:
      return "a duration like 250ms, 2s, 10m, 1h or 7d";
    case SettingType::kBytes:
      return "a size like 64KiB, 256MiB or 2GiB";
  }
  return "";
}

bool is_choice(std::string_view choices, std::string_view text) {
  while (!choices.empty()) {
    const size_t bar = choices.find('|');
    if (choices.substr(0, bar) == text) return true;
    choices = bar == choices.npos ? "" : choices.substr(bar + 1);
  }
  return false;
}

/// The value as a number: milliseconds, bytes, 0 or 1; 0 for text.
Result<double> numeric_value(const Setting& setting, const std::string& text) {
  const Status mismatch = invalid("got \"" + text + "\", expected " + type_name(setting.type));
  switch (setting.type) {
    case SettingType::kText:
      return 0.0;
    case SettingType::kBool:
      if (text == "true") return 1.0;
      if (text == "false") return 0.0;
      return mismatch;
    case SettingType::kInt: {
      const auto value = parse_plain_number(text);
      if (!value.ok() || *value != std::floor(*value)) return mismatch;
      return *value;
    }
    case SettingType::kNumber: {
      const auto value = parse_plain_number(text);
      return value.ok() ? value : Result<double>(mismatch);
    }
    case SettingType::kDurationMs: {
      DS_ASSIGN(const int64_t ms, parse_duration_ms(text));
      return static_cast<double>(ms);
    }
    case SettingType::kBytes: {
      DS_ASSIGN(const int64_t bytes, parse_bytes(text));
      return static_cast<double>(bytes);
    }
  }
  return mismatch;
}

/// A TOML leaf as the text that set() reads. Arrays of strings join with commas.
Result<std::string> toml_text(const Setting& setting, const toml::node& node) {
  const auto wrong = [&](std::string_view found) {
    return invalid("got " + std::string(found) + ", expected " + type_name(setting.type));
  };
  const SettingType type = setting.type;
  if (const auto value = node.as_boolean()) {
    if (type != SettingType::kBool) return wrong("a boolean");
    return std::string(value->get() ? "true" : "false");
  }
  if (const auto value = node.as_integer()) {
    if (type == SettingType::kBool || type == SettingType::kText) return wrong("an integer");
    return std::to_string(value->get());
  }
  if (const auto value = node.as_floating_point()) {
    if (type != SettingType::kNumber) return wrong("a number with a fraction");
    return dump_json(Json(value->get()));
  }
  if (const auto value = node.as_string()) {
    const bool quoted = type == SettingType::kText || type == SettingType::kDurationMs ||
                        type == SettingType::kBytes;
    if (!quoted) return wrong("the string \"" + value->get() + "\"");
    return value->get();
  }
  const toml::array* list = node.as_array();
  if (!list || type != SettingType::kText || *setting.choices) {
    return wrong(list ? "an array" : "a date or time");
  }
  std::string joined;
  for (const toml::node& item : *list) {
    const auto* text = item.as_string();
    if (!text) return wrong("an array with something else than strings");
    joined += (joined.empty() ? "" : ",") + text->get();
  }
  return joined;
}

struct TomlLeaf {
  std::string name;
  const toml::node* node;
  int64_t line;
};

/// Tables become dotted names; a key above its table or `a.b = 1` at the top are the same setting.
void collect(const toml::table& table, const std::string& prefix, std::vector<TomlLeaf>& leaves) {
  for (const auto& [key, node] : table) {
    const std::string name = prefix + std::string(key.str());
    if (const toml::table* inner = node.as_table()) {
      collect(*inner, name + ".", leaves);
    } else {
      leaves.push_back({name, &node, static_cast<int64_t>(key.source().begin.line)});
    }
  }
}

}  // namespace

Result<int64_t> parse_duration_ms(std::string_view text) {
  static constexpr Unit kUnits[] = {{"ms", 1},       {"s", 1000},       {"m", 60'000},
                                    {"h", 3600'000}, {"d", 86'400'000}, {"", 0}};
  return parse_with_unit(text, kUnits, type_name(SettingType::kDurationMs));
}

Result<int64_t> parse_bytes(std::string_view text) {
  static constexpr Unit kUnits[] = {{"KiB", 1024},
                                    {"MiB", 1024.0 * 1024},
                                    {"GiB", 1024.0 * 1024 * 1024},
                                    {"TiB", 1024.0 * 1024 * 1024 * 1024},
                                    {"B", 1},
                                    {"", 1}};
  return parse_with_unit(text, kUnits, type_name(SettingType::kBytes));
}

Config::Config() {
  for (const Setting& setting : settings()) {
    const Status status = set(setting.name, setting.fallback, "default");
    DS_CHECK(status.ok());
  }
}

Result<Config::Parsed> Config::parse(const std::string& name, const std::string& text,
                                     const std::string& origin) {
  const Setting* setting = find_setting(name);
  if (!setting) return unknown_setting(name);
  const auto number = numeric_value(*setting, text);
  if (!number.ok()) return number.status().in(name);
  const bool chosen = !*setting->choices || is_choice(setting->choices, text);
  const bool bounded = setting->min != setting->max;
  if (!chosen || (bounded && (*number < setting->min || *number > setting->max))) {
    return invalid(name + ": got " + (text.empty() ? "an empty text" : text) + ", expected " +
                   allowed_values(*setting));
  }
  return Parsed{setting, {text, *number, origin}};
}

void Config::take(const Parsed& parsed) {
  const std::lock_guard lock(mutex_);
  Value& present = values_[parsed.setting->name];
  if (rank(parsed.value.origin) >= rank(present.origin.empty() ? "default" : present.origin)) {
    present = parsed.value;
  }
}

Status Config::set(const std::string& name, const std::string& text, const std::string& origin) {
  DS_ASSIGN(const Parsed parsed, parse(name, text, origin));
  take(parsed);
  return {};
}

Status Config::set_live(const std::string& name, const std::string& text) {
  DS_ASSIGN(const Parsed parsed, parse(name, text, "live"));
  if (!parsed.setting->live) {
    return conflict(name + " takes effect at start only, restart dsd with --set " + name + "=" +
                    text);
  }
  std::function<Status(const std::string&)> apply;
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = appliers_.find(name); it != appliers_.end()) apply = it->second;
  }
  if (apply) DS_TRY(apply(parsed.value.text).in(name));
  take(parsed);
  std::vector<std::function<void()>> listeners;
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = listeners_.find(name); it != listeners_.end()) listeners = it->second;
  }
  for (const auto& listener : listeners) listener();
  return {};
}

void Config::before_change(const std::string& name,
                           std::function<Status(const std::string&)> apply) {
  DS_CHECK(find_setting(name) != nullptr);
  const std::lock_guard lock(mutex_);
  appliers_[name] = std::move(apply);
}

void Config::on_change(const std::string& name, std::function<void()> listener) {
  DS_CHECK(find_setting(name) != nullptr);
  const std::lock_guard lock(mutex_);
  listeners_[name].push_back(std::move(listener));
}

Status Config::load_toml(const std::string& path) {
  std::ifstream file(path);
  if (!file) return not_found(path + ": no such readable file");
  std::stringstream text;
  text << file.rdbuf();
  const toml::parse_result result = toml::parse(text.str(), path);
  if (!result) {
    const auto& error = result.error();
    return invalid(path + ":" + std::to_string(error.source().begin.line) + ": " +
                   std::string(error.description()));
  }
  std::vector<TomlLeaf> leaves;
  collect(result.table(), "", leaves);
  std::vector<Parsed> parsed;
  for (const TomlLeaf& leaf : leaves) {
    const std::string at = path + ":" + std::to_string(leaf.line);
    const Setting* setting = find_setting(leaf.name);
    if (!setting) return unknown_setting(leaf.name).in(at);
    const auto value = toml_text(*setting, *leaf.node);
    if (!value.ok()) return value.status().in(leaf.name).in(at);
    auto one = parse(leaf.name, *value, at);
    if (!one.ok()) return one.status().in(at);
    parsed.push_back(std::move(one).value());
  }
  for (const Parsed& one : parsed) take(one);
  return {};
}

Status Config::load_environment(char** environment) {
  for (char** entry = environment; *entry; ++entry) {
    const std::string_view line = *entry;
    const size_t equals = line.find('=');
    if (!line.starts_with("DS_") || equals == line.npos) continue;
    const std::string variable(line.substr(0, equals));
    std::string name = variable.substr(3);
    for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    const size_t underscore = name.find('_');
    if (underscore == name.npos) continue;
    name[underscore] = '.';
    const std::string section = name.substr(0, underscore + 1);
    const bool ours = std::any_of(settings().begin(), settings().end(), [&](const Setting& s) {
      return std::string_view(s.name).starts_with(section);
    });
    if (!ours) continue;
    const Status status = set(name, std::string(line.substr(equals + 1)), "env " + variable);
    if (!status.ok()) return status.in(variable);
  }
  return {};
}

Config::Value Config::value(const std::string& name,
                            std::initializer_list<SettingType> types) const {
  const Setting* setting = find_setting(name);
  DS_CHECK(setting != nullptr);
  DS_CHECK(std::find(types.begin(), types.end(), setting->type) != types.end());
  const std::lock_guard lock(mutex_);
  return values_.at(name);
}

bool Config::flag(const std::string& name) const {
  return value(name, {SettingType::kBool}).number != 0;
}

int64_t Config::integer(const std::string& name) const {
  return static_cast<int64_t>(
      value(name, {SettingType::kInt, SettingType::kDurationMs, SettingType::kBytes}).number);
}

double Config::number(const std::string& name) const {
  return value(name, {SettingType::kNumber, SettingType::kInt}).number;
}

std::string Config::text(const std::string& name) const {
  return value(name, {SettingType::kText}).text;
}

Json Config::show() const {
  const auto shown = [](const Setting& setting, const std::string& text) -> Json {
    switch (setting.type) {
      case SettingType::kBool:
        return text == "true";
      case SettingType::kInt:
      case SettingType::kNumber: {
        const auto parsed = parse_json(text);
        return parsed.ok() ? *parsed : Json(text);
      }
      default:
        return text;
    }
  };
  Json items = Json::array();
  const std::lock_guard lock(mutex_);
  for (const Setting& setting : settings()) {
    const Value& value = values_.at(setting.name);
    items.push_back({{"name", setting.name},
                     {"value", shown(setting, value.text)},
                     {"default", shown(setting, setting.fallback)},
                     {"origin", value.origin},
                     {"live", setting.live},
                     {"help", setting.help}});
  }
  return items;
}

}  // namespace ds
