// SPDX-License-Identifier: Apache-2.0
#include "ctl/output.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>

namespace ds::ctl {
namespace {

/// Decodes one code point and advances; invalid bytes are U+FFFD, one at a time.
char32_t next_code_point(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(at);
  const int more = lead < 0x80   ? 0
                   : lead < 0xC2 ? -1
                   : lead < 0xE0 ? 1
                   : lead < 0xF0 ? 2
                   : lead < 0xF5 ? 3
                                 : -1;
  char32_t code = more <= 0 ? lead : lead & (0x3F >> more);
  if (more < 0 || at + static_cast<size_t>(more) >= text.size() + (more == 0)) {
    ++at;
    return 0xFFFD;
  }
  for (int i = 1; i <= more; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) {
      ++at;
      return 0xFFFD;
    }
    code = code << 6 | (byte(at + i) & 0x3F);
  }
  at += static_cast<size_t>(more) + 1;
  return code;
}

/// East Asian wide blocks and the pictographs that terminals draw two columns wide.
bool is_wide(char32_t c) {
  return (c >= 0x1100 && c <= 0x115F) || (c >= 0x2E80 && c <= 0xA4CF && c != 0x303F) ||
         (c >= 0xAC00 && c <= 0xD7A3) || (c >= 0xF900 && c <= 0xFAFF) ||
         (c >= 0xFE30 && c <= 0xFE6F) || (c >= 0xFF00 && c <= 0xFF60) ||
         (c >= 0x1F300 && c <= 0x1FAFF) || (c >= 0x20000 && c <= 0x3FFFD);
}

bool is_combining(char32_t c) {
  return (c >= 0x0300 && c <= 0x036F) || (c >= 0x200B && c <= 0x200F) ||
         (c >= 0xFE00 && c <= 0xFE0F);
}

size_t columns_of(char32_t c) { return is_combining(c) ? 0 : is_wide(c) ? 2 : 1; }

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

}  // namespace

std::string paint(std::string_view text, Colour colour, bool on) {
  if (!on || colour == Colour::kNone) return std::string(text);
  const char* code = colour == Colour::kGreen    ? "32"
                     : colour == Colour::kYellow ? "33"
                     : colour == Colour::kRed    ? "31"
                     : colour == Colour::kDim    ? "2"
                                                 : "1";
  return "\033[" + std::string(code) + "m" + std::string(text) + "\033[0m";
}

Colour state_colour(std::string_view state) {
  for (std::string_view good : {"current", "served", "published", "healthy", "running", "decode"}) {
    if (state.starts_with(good)) return Colour::kGreen;
  }
  for (std::string_view bad : {"held", "quarantined", "failed", "dropped", "degraded"}) {
    if (state.starts_with(bad)) return Colour::kRed;
  }
  for (std::string_view under_way :
       {"candidate", "training", "gating", "paused", "waiting", "prefill"}) {
    if (state.starts_with(under_way)) return Colour::kYellow;
  }
  return Colour::kNone;
}

std::string printable(std::string_view text, bool multiline) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = next_code_point(text, at);
    const bool space = c == '\n' || c == '\t' || c == '\r';
    const bool bidi = (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
    if (space && (!multiline || c == '\r')) {
      out += ' ';
    } else if ((!space && (c < 0x20 || (c >= 0x7F && c < 0xA0))) || bidi || c == 0xFFFD) {
      out += "\xEF\xBF\xBD";
    } else {
      out += text.substr(begin, at - begin);
    }
  }
  return out;
}

size_t display_width(std::string_view text) {
  size_t width = 0;
  for (size_t at = 0; at < text.size();) width += columns_of(next_code_point(text, at));
  return width;
}

std::string shortened(std::string_view text, size_t columns) {
  if (display_width(text) <= columns) return std::string(text);
  size_t width = 0, kept = 0;
  for (size_t at = 0; at < text.size(); kept = at) {
    width += columns_of(next_code_point(text, at));
    if (width + 1 > columns) break;
  }
  return std::string(text.substr(0, kept)) + (columns > 0 ? "…" : "");
}

std::string age_text(int64_t ms) {
  const int64_t seconds = std::max<int64_t>(ms, 0) / 1000;
  if (seconds < 60) return std::to_string(seconds) + "s";
  if (seconds < 3600) return std::to_string(seconds / 60) + "m";
  if (seconds < 86400) return std::to_string(seconds / 3600) + "h";
  return std::to_string(seconds / 86400) + "d";
}

std::string uptime_text(double seconds) {
  const auto s = static_cast<int64_t>(std::max(seconds, 0.0));
  const auto pair = [](int64_t a, const char* unit_a, int64_t b, const char* unit_b) {
    return std::to_string(a) + unit_a + (b ? " " + std::to_string(b) + unit_b : "");
  };
  if (s < 60) return std::to_string(s) + "s";
  if (s < 3600) return pair(s / 60, "m", s % 60, "s");
  if (s < 86400) return pair(s / 3600, "h", s % 3600 / 60, "m");
  return pair(s / 86400, "d", s % 86400 / 3600, "h");
}

std::string duration_text(double seconds) {
  if (seconds < 0.9995) return format("%.0fms", seconds * 1000);
  if (seconds < 9.95) return format("%.1fs", seconds);
  if (seconds < 60) return format("%.0fs", seconds);
  return uptime_text(seconds);
}

std::string size_text(double bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit < 4) bytes /= 1024, ++unit;
  return format(unit > 0 && bytes < 9.95 ? "%.1f " : "%.0f ", bytes) + kUnits[unit];
}

std::string count_text(int64_t n) {
  std::string digits = std::to_string(n);
  for (int64_t at = static_cast<int64_t>(digits.size()) - 3; at > (n < 0 ? 1 : 0); at -= 3) {
    digits.insert(static_cast<size_t>(at), 1, ' ');
  }
  return digits;
}

std::string percent_text(double ratio) { return format("%.0f%%", ratio * 100); }

std::string number_text(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

std::string clock_text(int64_t unix_ms) {
  const auto seconds = static_cast<time_t>(unix_ms / 1000);
  tm local = {};
  localtime_r(&seconds, &local);
  char text[16];
  std::strftime(text, sizeof text, "%H:%M:%S", &local);
  return text;
}

int64_t wall_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
}

Table::Table(std::vector<std::string> headings) {
  for (std::string& heading : headings) {
    right_.push_back(heading.starts_with('>'));
    headings_.push_back(right_.back() ? heading.substr(1) : std::move(heading));
  }
}

void Table::row(std::vector<std::string> cells, Colour colour, size_t coloured) {
  for (std::string& cell : cells) cell = printable(cell);
  rows_.push_back({std::move(cells), colour, coloured});
}

std::string Table::text(bool colour) const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < headings_.size(); ++c) {
    widths.push_back(display_width(headings_[c]));
    for (const Row& row : rows_) widths[c] = std::max(widths[c], display_width(row.cells[c]));
  }
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells, Colour cell_colour, size_t which) {
    for (size_t c = 0; c < cells.size(); ++c) {
      const std::string pad(widths[c] - display_width(cells[c]), ' ');
      if (right_[c]) out += pad;
      out += paint(cells[c], c == which ? cell_colour : Colour::kNone, colour);
      if (c + 1 == cells.size()) break;
      out += (right_[c] ? "" : pad) + "  ";
    }
    while (out.ends_with(' ')) out.pop_back();
    out += '\n';
  };
  line(headings_, Colour::kNone, 0);
  for (const Row& row : rows_) line(row.cells, row.colour, row.coloured);
  return out;
}

const Json* dig(const Json& document, std::string_view path) {
  const Json* at = &document;
  while (at && !path.empty()) {
    const size_t dot = path.find('.');
    at = find(*at, path.substr(0, dot));
    path = dot == path.npos ? "" : path.substr(dot + 1);
  }
  return at;
}

std::string text_at(const Json& document, std::string_view path, std::string_view fallback) {
  const Json* value = dig(document, path);
  if (!value) return std::string(fallback);
  if (value->is_string()) return printable(value->get_ref<const std::string&>());
  return printable(dump_json(*value));
}

std::optional<double> number_at(const Json& document, std::string_view path) {
  const Json* value = dig(document, path);
  if (!value || !value->is_number()) return std::nullopt;
  return value->get<double>();
}

int64_t integer_at(const Json& document, std::string_view path, int64_t fallback) {
  const auto value = number_at(document, path);
  return value && std::abs(*value) < 9.0e18 ? static_cast<int64_t>(*value) : fallback;
}

bool flag_at(const Json& document, std::string_view path, bool fallback) {
  const Json* value = dig(document, path);
  return value && value->is_boolean() ? value->get<bool>() : fallback;
}

const Json& list_at(const Json& document, std::string_view path) {
  static const Json kEmpty = Json::array();
  const Json* value = dig(document, path);
  return value && value->is_array() ? *value : kEmpty;
}

std::string age_at(const Json& document, const Json& item, std::string_view path) {
  const auto then = number_at(item, path);
  if (!then || *then <= 0) return "-";
  return age_text(integer_at(document, "now_ms", wall_ms()) - static_cast<int64_t>(*then));
}

std::string key_values(const std::vector<std::pair<std::string, std::string>>& lines) {
  size_t width = 0;
  for (const auto& [key, value] : lines) width = std::max(width, display_width(key));
  std::string out;
  for (const auto& [key, value] : lines) {
    out += key + std::string(width - display_width(key) + 2, ' ') + printable(value) + "\n";
  }
  return out;
}

}  // namespace ds::ctl
