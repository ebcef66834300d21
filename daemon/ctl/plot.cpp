// SPDX-License-Identifier: Apache-2.0
#include "ctl/plot.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ds::ctl {
namespace {

/// U+2800 + bits; dot (x, y) of a cell, y downwards (Unicode 15, "Braille Patterns").
constexpr uint8_t kDots[4][2] = {{0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}};

std::string braille(uint8_t dots) {
  return {'\xE2', static_cast<char>(0xA0 | dots >> 6), static_cast<char>(0x80 | (dots & 0x3F))};
}

}  // namespace

std::vector<std::string> braille_plot(const std::vector<double>& values, int columns, int rows,
                                      double& low, double& high) {
  const size_t width = static_cast<size_t>(columns) * 2;
  const int height = rows * 4;
  const size_t first = values.size() > width ? values.size() - width : 0;
  low = INFINITY, high = -INFINITY;
  for (size_t i = first; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) continue;
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  if (low > high) low = high = 0;
  std::vector<std::vector<uint8_t>> cells(rows, std::vector<uint8_t>(columns, 0));
  int last_y = -1;
  for (size_t i = first; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      last_y = -1;
      continue;
    }
    const double share = high > low ? (values[i] - low) / (high - low) : 0.5;
    const int y = height - 1 - static_cast<int>(std::lround(share * (height - 1)));
    const size_t x = width - (values.size() - i);
    // Joined to the value before, so that a steep fall stays one curve.
    const int from = last_y < 0 ? y : last_y < y ? last_y + 1 : last_y > y ? last_y - 1 : y;
    for (int at = std::min(from, y); at <= std::max(from, y); ++at) {
      cells[at / 4][x / 2] |= kDots[at % 4][x % 2];
    }
    last_y = y;
  }
  std::vector<std::string> lines(rows);
  for (int r = 0; r < rows; ++r) {
    for (const uint8_t cell : cells[r]) lines[r] += braille(cell);
  }
  return lines;
}

}  // namespace ds::ctl
