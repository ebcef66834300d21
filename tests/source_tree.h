// SPDX-License-Identifier: Apache-2.0
// The files of the repository as text, for tests that read them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ds::tidy {

struct Source {
  std::string path;                // from the top of the repository
  std::vector<std::string> lines;  // as written
  std::vector<std::string> code;   // C++ only: comments, texts and preprocessor lines blanked
};

Source source(const std::string& path, const std::string& text);
std::string read(const std::string& path);  ///< a whole file, from the top of the repository
std::vector<std::string> split_lines(std::string_view text);

/// Every source, script, CMake file and README; no test data, no build folders.
const std::vector<Source>& tree();

}  // namespace ds::tidy
