// SPDX-License-Identifier: Apache-2.0
// Runs the checks of a file in order, each in its own child, and keeps what they said.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "check/check.h"

namespace ds::check {

struct Line {
  std::string component;  ///< empty: of the whole file
  std::string check;
  Verdict verdict;
  int64_t ms = 0;
};

struct Report {
  std::string path, sha256, id, version;
  uint32_t abi_minor = 0;
  int level = 0;
  uint64_t seed = 0;
  std::vector<Line> lines;

  bool passed() const;
  Json to_json() const;
};

/// `component`: only the one of this name; empty = all. `told` hears each line as it comes.
Report run_checks(const std::string& path, int level, const std::string& component,
                  const Settings& settings, const std::function<void(const Line&)>& told);

/// All checks of components, level after level.
std::vector<Check> all_checks();

}  // namespace ds::check
