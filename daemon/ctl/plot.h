// SPDX-License-Identifier: Apache-2.0
// A curve in braille dots: 2 x 4 dots per terminal cell.
#pragma once

#include <string>
#include <vector>

namespace ds::ctl {

/// `rows` lines of `columns` braille cells, newest value at the right edge, at most 2 * columns
/// values shown (the last ones). Non-finite values leave a gap. `low` and `high` get the range
/// shown.
std::vector<std::string> braille_plot(const std::vector<double>& values, int columns, int rows,
                                      double& low, double& high);

}  // namespace ds::ctl
