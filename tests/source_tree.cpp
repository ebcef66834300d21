// SPDX-License-Identifier: Apache-2.0
#include "tests/source_tree.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>

namespace ds::tidy {
namespace {

namespace fs = std::filesystem;

// Length of the comment, text or raw text that starts at `at`; 0 if none does.
size_t inert_length(std::string_view text, size_t at) {
  const auto upto = [&](std::string_view end, size_t from) {
    const size_t found = text.find(end, from);
    return (found == text.npos ? text.size() : found + end.size()) - at;
  };
  if (text.substr(at, 2) == "//") return upto("\n", at) - 1;
  if (text.substr(at, 2) == "/*") return upto("*/", at + 2);
  if (text.substr(at, 2) == "R\"") {
    const std::string_view delimiter = text.substr(at + 2, text.find('(', at) - at - 2);
    return upto(")" + std::string(delimiter) + "\"", at + 2);
  }
  const bool digit_separator = text[at] == '\'' && at > 0 && std::isxdigit(text[at - 1]);
  if ((text[at] != '"' && text[at] != '\'') || digit_separator) return 0;
  size_t end = at + 1;
  while (end < text.size() && text[end] != text[at]) end += text[end] == '\\' ? 2 : 1;
  return std::min(end + 1, text.size()) - at;
}

std::vector<std::string> code_of(std::string text) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = inert_length(text, i);
    for (size_t k = i; k < i + length; ++k) {
      if (text[k] != '\n') text[k] = ' ';
    }
    i += std::max<size_t>(length, 1);
  }
  std::vector<std::string> lines = split_lines(text);
  bool continued = false;
  for (std::string& line : lines) {
    const size_t first = line.find_first_not_of(' ');
    const bool preprocessor = continued || (first != line.npos && line[first] == '#');
    continued = preprocessor && line.ends_with('\\');
    if (preprocessor) line.clear();
  }
  return lines;
}

}  // namespace

std::vector<std::string> split_lines(std::string_view text) {
  std::vector<std::string> lines(1);
  for (const char c : text) {
    if (c == '\n')
      lines.emplace_back();
    else
      lines.back() += c;
  }
  if (lines.back().empty()) lines.pop_back();
  return lines;
}

Source source(const std::string& path, const std::string& text) {
  return {path, split_lines(text), code_of(text)};
}

std::string read(const std::string& path) {
  std::ifstream file(fs::path(DS_SOURCE_DIR) / path);
  return {std::istreambuf_iterator<char>(file), {}};
}

const std::vector<Source>& tree() {
  static const std::vector<Source> files = [] {
    const fs::path top = DS_SOURCE_DIR;
    const std::regex text_file(R"(.*\.(h|hpp|cpp|cu|cuh|c|py|sh|md|txt|cmake|yml|json)|.*/run)");
    std::vector<Source> found;
    for (const char* folder : {".ci", ".github", "daemon", "examples", "kernels", "modules", "sdk",
                               "storage", "tests"}) {
      if (!fs::exists(top / folder)) continue;
      for (const auto& entry : fs::recursive_directory_iterator(top / folder)) {
        const std::string path = fs::relative(entry.path(), top);
        if (!entry.is_regular_file() || path.starts_with("tests/data/")) continue;
        if (std::regex_match(path, text_file)) found.push_back(source(path, read(path)));
      }
    }
    for (const char* name : {"CMakeLists.txt", "README.md"}) {
      found.push_back(source(name, read(name)));
    }
    return found;
  }();
  return files;
}

}  // namespace ds::tidy
