// SPDX-License-Identifier: Apache-2.0
// How dsctl shows things: tables, ages, sizes, counts, colour. Strings from outside pass
// printable() before they reach a terminal, so that no model output and no client name can move its
// cursor.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "storage/json.h"

namespace ds::ctl {

enum class Colour { kNone, kGreen, kYellow, kRed, kDim, kBold };

/// `text` in that colour if `on`.
std::string paint(std::string_view text, Colour colour, bool on);
/// Colour of a version's, item's or round's state.
Colour state_colour(std::string_view state);

/// Control characters become U+FFFD; newline and tab stay if `multiline`, else become spaces.
std::string printable(std::string_view text, bool multiline = false);
/// Terminal columns of UTF-8 text: code points, wide East Asian ones twice, combining ones not.
size_t display_width(std::string_view text);
/// At most `columns` wide, with an ellipsis where cut.
std::string shortened(std::string_view text, size_t columns);

std::string age_text(int64_t ms);                       ///< "3s", "12m", "5h", "3d"
std::string uptime_text(double seconds);                ///< "3d 4h", "12m 5s"
std::string duration_text(double seconds);              ///< "84ms", "2.1s", "38s", "3m 10s"
std::string size_text(double bytes);                    ///< "512 B", "2.4 MiB", "81 MiB"
std::string count_text(int64_t n);                      ///< "48 210"
std::string percent_text(double ratio);                 ///< "31%"
std::string number_text(double value, int digits = 3);  ///< significant digits
std::string clock_text(int64_t unix_ms);                ///< local "14:03:09"
int64_t wall_ms();

/// Columns with capitals, two spaces between, no rules.
class Table {
 public:
  /// A heading that starts with '>' makes its column right-aligned.
  explicit Table(std::vector<std::string> headings);
  void row(std::vector<std::string> cells, Colour colour = Colour::kNone, size_t coloured = 0);
  std::string text(bool colour) const;
  bool empty() const { return rows_.empty(); }

 private:
  struct Row {
    std::vector<std::string> cells;
    Colour colour;
    size_t coloured;  ///< which cell
  };
  std::vector<std::string> headings_;
  std::vector<bool> right_;
  std::vector<Row> rows_;
};

// Lenient reading of the daemon's JSON: `path` is dotted ("serving.version").
const Json* dig(const Json& document, std::string_view path);
/// Strings as they are (printable), numbers and booleans as text; `fallback` when absent or null.
std::string text_at(const Json& document, std::string_view path, std::string_view fallback = "-");
std::optional<double> number_at(const Json& document, std::string_view path);
int64_t integer_at(const Json& document, std::string_view path, int64_t fallback = 0);
bool flag_at(const Json& document, std::string_view path, bool fallback = false);
/// The array at `path`, or an empty one.
const Json& list_at(const Json& document, std::string_view path);

/// "12m" since `path` (unix ms), by the document's own "now_ms" if it has one; "-" when absent.
std::string age_at(const Json& document, const Json& item, std::string_view path);

/// "key  value" lines of a flat object; nested values as compact JSON.
std::string key_values(const std::vector<std::pair<std::string, std::string>>& lines);

}  // namespace ds::ctl
