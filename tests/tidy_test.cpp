// SPDX-License-Identifier: Apache-2.0
// Lint as a test: the promises of the README files that a compiler does not check. A rule reads one
// file (or all of them) and says what breaks it; the test of a rule first shows on a small example
// that it bites, then expects the source tree to be free of findings.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <regex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config.h"
#include "tests/source_tree.h"

namespace ds::tidy {
namespace {

namespace fs = std::filesystem;
using testing::IsEmpty;
using testing::SizeIs;

constexpr size_t kFileLines = 600, kFunctionLines = 70, kLineColumns = 110;

using Findings = std::vector<std::string>;
using Rule = std::function<Findings(const Source&)>;

bool in(std::string_view path, std::string_view folder) { return path.starts_with(folder); }
std::string extension(const Source& file) { return fs::path(file.path).extension(); }
bool is_header(const Source& file) {
  return extension(file) == ".h" || extension(file) == ".hpp" || extension(file) == ".cuh";
}
bool is_unit(const Source& file) { return extension(file) == ".cpp" || extension(file) == ".cu"; }
bool is_cpp(const Source& file) { return is_header(file) || is_unit(file); }
bool is_product(const Source& file) {
  return is_cpp(file) && !in(file.path, "tests/") && !in(file.path, "examples/");
}

std::string at(const Source& file, size_t index, const std::string& what) {
  return file.path + ":" + std::to_string(index + 1) + ": " + what;
}

std::string as_text(const Findings& findings) {
  std::string text;
  for (const std::string& finding : findings) text += "\n" + finding;
  return text;
}

std::string over_tree(const Rule& rule) {
  std::string all;
  for (const Source& file : tree()) all += as_text(rule(file));
  return all;
}

// --- Who may include whom ---

struct Include {
  size_t line;
  bool quoted;
  std::string target;
};

std::vector<Include> includes_of(const Source& file) {
  static const std::regex pattern(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"].*)");
  std::vector<Include> found;
  for (size_t i = 0; i < file.lines.size(); ++i) {
    std::smatch match;
    if (std::regex_match(file.lines[i], match, pattern)) {
      found.push_back({i, match[1] == "\"", match[2]});
    }
  }
  return found;
}

struct Direction {
  std::string_view from;
  std::vector<std::string_view> to;  // beginnings of what may be included in quotes
};

// The first that fits decides. Headers directly in daemon/ are written without a folder.
const std::vector<Direction>& directions() {
  static const std::vector<std::string_view> top = {"config.h",  "events.h",       "log.h",
                                                    "metrics.h", "plugin_setup.h", "device.h",
                                                    "machine.h", "restart.h"};
  const auto with_top = [](std::vector<std::string_view> folders) {
    folders.insert(folders.end(), top.begin(), top.end());
    return folders;
  };
  static const std::vector<Direction> all = {
      {"sdk/", {"ds/"}},
      {"kernels/", {"ds/", "kernels/"}},
      {"storage/", {"ds/", "storage/"}},
      {"modules/", {"ds/", "kernels/", "modules/"}},
      {"daemon/serve/", with_top({"ds/", "kernels/", "storage/", "plugin/", "engine/", "serve/"})},
      {"daemon/learn/", with_top({"ds/", "kernels/", "storage/", "plugin/", "engine/", "learn/"})},
      {"daemon/engine/", with_top({"ds/", "kernels/", "storage/", "plugin/", "engine/"})},
      {"daemon/plugin/", {"ds/", "kernels/", "storage/", "plugin/"}},
      {"daemon/ctl/", with_top({"ds/", "storage/", "ctl/"})},
      {"daemon/plugin/", with_top({"ds/", "kernels/", "storage/", "plugin/"})},
      {"daemon/check/", {"ds/", "kernels/", "storage/", "plugin/", "check/"}},
      {"daemon/", with_top({"ds/", "kernels/", "storage/", "plugin/", "engine/", "serve/", "learn/",
                            "fleet/"})},
  };
  return all;
}

Findings include_direction(const Source& file) {
  Findings found;
  const auto rule = std::find_if(directions().begin(), directions().end(),
                                 [&](const Direction& d) { return in(file.path, d.from); });
  if (rule == directions().end() || !is_cpp(file)) return found;
  for (const Include& include : includes_of(file)) {
    const bool ours = include.quoted || in(include.target, "ds/");
    const bool allowed = std::any_of(rule->to.begin(), rule->to.end(),
                                     [&](std::string_view to) { return in(include.target, to); });
    if (ours && !allowed) {
      found.push_back(at(file, include.line,
                         std::string(rule->from) + " may not include \"" + include.target + "\""));
    }
  }
  return found;
}

// A library's headers stay in the files that wrap it.
Findings library_wrapped(const Source& file) {
  static const std::vector<std::pair<std::regex, std::regex>> homes = [] {
    std::vector<std::pair<std::regex, std::regex>> list;
    for (const auto& [header, home] : std::vector<std::pair<const char*, const char*>>{
             {"rocksdb/.*", "storage/column_store\\.cpp"},
             {"zmq\\.h(pp)?", "daemon/serve/(data|event)_socket\\.cpp"},
             {"nlohmann/.*", "storage/json\\.(h|cpp)|modules/json_members\\.h"},
             {"boost/beast/.*", "daemon/serve/http_(server|connection)\\.(h|cpp)"},
             {"boost/.*", "daemon/(serve/.*|main\\.cpp)"},
             {"spdlog/.*", "daemon/log\\.cpp"},
             {"toml.*", "daemon/config\\.cpp"},
             {"CLI/.*", "daemon/(main|check/main|ctl/(main|arguments))\\.cpp"},
             {"openssl/.*", "storage/(hash|signature)\\.cpp"},
             {"valijson/.*", "daemon/plugin/plugin_config\\.cpp"},
             {"pugixml\\.hpp", "modules/tools/.*\\.cpp"},
             {"xxhash\\.h", "storage/.*\\.cpp|modules/retrievers/.*\\.cpp"},
             {"utf8proc\\.h", "daemon/engine/.*\\.cpp"},
             {"histedit\\.h", "daemon/ctl/line_editor\\.cpp"},
             {"(cuda|cublas|cudnn|nccl|cooperative_groups|mma).*", "kernels/cuda/.*"},
             {"(nats|mpi).*", "daemon/fleet/.*"},
             {"immintrin\\.h", "kernels/cpu/.*"}}) {
      list.emplace_back(header, home);
    }
    return list;
  }();
  Findings found;
  if (!is_product(file)) return found;
  for (const Include& include : includes_of(file)) {
    if (include.quoted) continue;
    for (const auto& [header, home] : homes) {
      if (!std::regex_match(include.target, header)) continue;
      if (!std::regex_match(file.path, home)) {
        found.push_back(at(file, include.line, "<" + include.target + "> belongs elsewhere"));
      }
      break;
    }
  }
  return found;
}

TEST(Tidy, FoldersIncludeOnlyWhatTheyMay) {
  EXPECT_THAT(include_direction(source("kernels/a.cpp", "#include \"storage/json.h\"\n")),
              SizeIs(1));
  EXPECT_THAT(include_direction(source("daemon/serve/a.h", "#include \"learn/gate.h\"\n")),
              SizeIs(1));
  EXPECT_THAT(include_direction(source("daemon/learn/a.h", "#include \"serve/server.h\"\n")),
              SizeIs(1));
  EXPECT_THAT(include_direction(source("daemon/ctl/a.h", "#include \"engine/model.h\"\n")),
              SizeIs(1));
  EXPECT_THAT(include_direction(source("sdk/include/ds/a.h", "#include \"kernels/ops.h\"\n")),
              SizeIs(1));
  EXPECT_THAT(include_direction(source("daemon/learn/a.h",
                                       "#include \"engine/model.h\"\n#include <ds/status.h>\n")),
              IsEmpty());
  EXPECT_EQ(over_tree(include_direction), "");
}

TEST(Tidy, LibrariesStayInTheirWrappers) {
  EXPECT_THAT(library_wrapped(source("daemon/learn/a.cpp", "#include <rocksdb/db.h>\n")),
              SizeIs(1));
  EXPECT_THAT(library_wrapped(source("daemon/engine/a.cpp", "#include <cuda_runtime.h>\n")),
              SizeIs(1));
  EXPECT_THAT(library_wrapped(source("daemon/serve/openai.cpp", "#include <nlohmann/json.hpp>\n")),
              SizeIs(1));
  EXPECT_THAT(library_wrapped(source("kernels/cuda/a.cu", "#include <cuda_runtime.h>\n")),
              IsEmpty());
  EXPECT_EQ(over_tree(library_wrapped), "");
}

// --- Sizes ---

size_t columns(const std::string& line) {
  return std::count_if(line.begin(), line.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

Findings sizes(const Source& file) {
  Findings found;
  if (!is_cpp(file)) return found;
  if (file.lines.size() > kFileLines) {
    found.push_back(
        at(file, file.lines.size() - 1, "more than " + std::to_string(kFileLines) + " lines"));
  }
  for (size_t i = 0; i < file.lines.size(); ++i) {
    const std::string& line = file.lines[i];
    if (columns(line) > kLineColumns) {
      found.push_back(at(file, i,
                         std::to_string(columns(line)) + " columns, expected at most " +
                             std::to_string(kLineColumns)));
    }
    if (line.find('\t') != line.npos || line.ends_with(' ') || line.ends_with('\r')) {
      found.push_back(at(file, i, "tab or space at the end"));
    }
  }
  return found;
}

// Whether a brace after `head`, the text back to the last ; { or }, opens a function.
bool opens_function(const std::string& head) {
  static const std::regex type_or_namespace(
      R"(^(template\s*<[^{]*>\s*)?(typedef\s+)?(class|struct|union|enum|namespace|extern)\b.*)");
  const size_t paren = head.find('(');
  if (paren == head.npos || std::regex_match(head, type_or_namespace)) return false;
  const bool initialiser = head.substr(0, paren).find('=') != head.npos;
  return !initialiser || head.find("operator") != head.npos;
}

// Whether it begins the value of a member in a constructor's list instead: `S() : a_{1}`.
bool opens_member_value(const std::string& head) {
  static const std::regex list(R"(.*\)\s*(noexcept\s*)?:[^:].*[\w>])");
  return std::regex_match(head, list);
}

Findings function_lengths(const Source& file) {
  Findings found;
  if (!is_cpp(file)) return found;
  std::string head;
  size_t head_line = 0, function_line = 0;
  int depth = 0, function_depth = -1;  // of the brace that opened the function; -1 = outside
  int value_depth = 0;                 // braces open in a member's value
  for (size_t i = 0; i < file.code.size(); ++i) {
    for (const char c : file.code[i]) {
      if (value_depth > 0) {
        value_depth += c == '{' ? 1 : c == '}' ? -1 : 0;
        continue;
      }
      if (head.empty()) {
        if (std::isspace(c)) continue;
        head_line = i;
      }
      if (c == '{' && function_depth < 0 && opens_member_value(head)) {
        value_depth = 1;
        continue;
      }
      if (c == '{') {
        if (function_depth < 0 && opens_function(head)) {
          function_depth = depth;
          function_line = head_line;
        }
        ++depth;
      } else if (c == '}' && --depth == function_depth) {
        function_depth = -1;
        if (const size_t length = i - function_line + 1; length > kFunctionLines) {
          found.push_back(
              at(file, function_line, "a function of " + std::to_string(length) + " lines"));
        }
      }
      if (c == '{' || c == '}' || c == ';')
        head.clear();
      else
        head += c;
    }
    if (!head.empty()) head += ' ';
  }
  return found;
}

TEST(Tidy, SizesStayReadable) {
  EXPECT_THAT(sizes(source("a.cpp", std::string(kLineColumns + 1, 'x') + "\n")), SizeIs(1));
  EXPECT_THAT(sizes(source("a.cpp", std::string(kFileLines + 1, '\n'))), SizeIs(1));
  EXPECT_THAT(sizes(source("a.cpp", "int a; \n")), SizeIs(1));
  EXPECT_EQ(over_tree(sizes), "");
}

TEST(Tidy, FunctionsStayShort) {
  const std::string body(kFunctionLines - 1, '\n');
  EXPECT_THAT(
      function_lengths(source("a.cpp", "namespace n {\nint f(int a) {" + body + "\n}\n}\n")),
      SizeIs(1));
  EXPECT_THAT(function_lengths(source("a.cpp", "bool operator==(S a) {" + body + "\n}\n")),
              SizeIs(1));
  EXPECT_THAT(
      function_lengths(source("a.cpp", "struct S {\n  S() : a_{1}, b(2) {" + body + "\n}\n};\n")),
      SizeIs(1));
  EXPECT_THAT(function_lengths(source("a.cpp", "int f() {" + body + "}\n")), IsEmpty());
  EXPECT_THAT(function_lengths(source("a.cpp", "class C {\n  void f();" + body + "\n};\n")),
              IsEmpty());
  EXPECT_THAT(function_lengths(source("a.cpp", "const int k = f({\n" + body + "\n}, '{');\n")),
              IsEmpty());
  EXPECT_EQ(over_tree(function_lengths), "");
}

// --- Words ---

struct Banned {
  std::regex pattern;
  const char* what;
  std::regex allowed;  // paths
};

Findings banned_words(const Source& file) {
  static const std::vector<Banned> list = [] {
    std::vector<Banned> banned;
    const auto ban = [&](const char* pattern, const char* what, const char* allowed) {
      banned.push_back({std::regex(pattern), what, std::regex(allowed)});
    };
    ban(R"(.*\bthrow\b.*)", "throw: return a Status", "modules/.*|sdk/.*\\.hpp");
    ban(R"(.*\bcatch\s*\(\s*\.\.\.\s*\).*)", "catch (...)",
        "daemon/(main|ctl/main)\\.cpp|sdk/.*\\.hpp");
    ban(R"((?!.*(unique_ptr|shared_ptr)\b).*\bnew\s+\w.*)", "naked new", "sdk/.*\\.hpp");
    ban(R"((?!.*=\s*delete).*\bdelete\b.*)", "delete", "sdk/.*\\.hpp");
    ban(R"(.*\b(secure_)?getenv\b.*)", "getenv: use Config",
        "(daemon/(config|main|ctl/.*)|modules/tools/.*)\\.?.*");
    ban(R"(.*\bstd::(cout|cerr)\b.*)", "iostream: use log.h", "daemon/ctl/.*");
    ban(R"(.*\busing namespace\b.*)", "using namespace in a header", ".*\\.cpp");
    ban(R"(.*\b(malloc|realloc|strcpy|sprintf|atoi|rand)\s*\(.*)", "unsafe C function",
        "daemon/check/allocations\\.cpp");
    return banned;
  }();
  Findings found;
  if (!is_product(file)) return found;
  for (size_t i = 0; i < file.code.size(); ++i) {
    for (const Banned& word : list) {
      if (!std::regex_match(file.code[i], word.pattern)) continue;
      if (!std::regex_match(file.path, word.allowed)) found.push_back(at(file, i, word.what));
    }
  }
  return found;
}

Findings unfinished(const Source& file) {
  static const std::regex marker(std::string(".*\\b(TO") + "DO|FIX" + "ME|XX" + "X|HA" +
                                 "CK)\\b.*");
  Findings found;
  for (size_t i = 0; i < file.lines.size(); ++i) {
    if (std::regex_match(file.lines[i], marker)) found.push_back(at(file, i, "unfinished"));
  }
  return found;
}

Findings vague_name(const Source& file) {
  static const std::regex vague("(.*_)?(utils?|common|manager|helpers?|misc)(_.*)?");
  if (!std::regex_match(fs::path(file.path).stem().string(), vague)) return {};
  return {file.path + ": the name says nothing"};
}

TEST(Tidy, WordsThatWeDoWithout) {
  const auto in_product = [](const std::string& line) {
    return banned_words(source("storage/a.cpp", "int f() {\n  " + line + "\n}\n"));
  };
  EXPECT_THAT(in_product("throw 1;"), SizeIs(1));
  EXPECT_THAT(in_product("auto* p = new Thing();"), SizeIs(1));
  EXPECT_THAT(in_product("delete p;"), SizeIs(1));
  EXPECT_THAT(in_product("const char* home = std::getenv(\"HOME\");"), SizeIs(1));
  EXPECT_THAT(in_product("std::cout << 1;"), SizeIs(1));
  EXPECT_THAT(in_product("} catch (...) {"), SizeIs(1));
  EXPECT_THAT(in_product("std::unique_ptr<Thing> p(new Thing());  // a new word, throw"),
              IsEmpty());
  EXPECT_THAT(in_product("log(\"we throw nothing\"); S(const S&) = delete;"), IsEmpty());
  EXPECT_EQ(over_tree(banned_words), "");
}

TEST(Tidy, NothingIsLeftUnfinished) {
  EXPECT_THAT(unfinished(source("a.md", std::string("// TO") + "DO: later\n")), SizeIs(1));
  EXPECT_EQ(over_tree(unfinished), "");
  EXPECT_THAT(vague_name(source("daemon/string_utils.h", "")), SizeIs(1));
  EXPECT_THAT(vague_name(source("daemon/commonplace.h", "")), IsEmpty());
  EXPECT_EQ(over_tree(vague_name), "");
}

// --- Form ---

Findings file_form(const Source& file) {
  static const std::regex license(R"((//|#|/\*) SPDX-License-Identifier: Apache-2\.0( \*/)?)");
  static const std::regex guard(R"(#pragma once|#ifndef DS_\w+_H_?)");
  const auto matches = [](const std::regex& wanted) {
    return [&wanted](const std::string& line) { return std::regex_match(line, wanted); };
  };
  Findings found;
  const bool script =
      extension(file) == ".py" || extension(file) == ".sh" || file.path == ".ci/run";
  if (!is_cpp(file) && !script) return found;
  const size_t first = !file.lines.empty() && in(file.lines[0], "#!") ? 1 : 0;
  if (file.lines.size() <= first || !matches(license)(file.lines[first])) {
    found.push_back(at(file, first, "expected the SPDX line: Apache-2.0"));
  }
  if (is_header(file) && std::none_of(file.lines.begin(), file.lines.end(), matches(guard))) {
    found.push_back(file.path + ": neither #pragma once nor a guard");
  }
  return found;
}

std::string escaped(const std::string& path) {
  return std::regex_replace(path, std::regex("\\."), "\\.");
}

// Whether a CMakeLists.txt names it: relative to itself, or from ${CMAKE_SOURCE_DIR}. ds_fuzz(x
// ...) means x.cpp.
Findings listed_in_cmake(const Source& file, const std::vector<Source>& all) {
  if (!is_unit(file)) return {};
  for (const Source& list : all) {
    if (fs::path(list.path).filename() != "CMakeLists.txt") continue;
    const fs::path name = fs::path(file.path).lexically_relative(fs::path(list.path).parent_path());
    const std::regex named(R"((^|[\s(]|LIST_DIR\}/))" + escaped(name) +
                           R"(($|[\s)])|CMAKE_SOURCE_DIR\}/)" + escaped(file.path) +
                           R"(($|[\s)])|ds_fuzz\()" + escaped(name.stem()) + R"([\s)])");
    for (const std::string& line : list.lines) {
      if (std::regex_search(line, named)) return {};
    }
  }
  return {file.path + ": no CMakeLists.txt names it"};
}

TEST(Tidy, FilesBeginAsTheyShould) {
  EXPECT_THAT(file_form(source("a.cpp", "int a;\n")), SizeIs(1));
  EXPECT_THAT(file_form(source("a.h", "// SPDX-License-Identifier: Apache-2.0\n")), SizeIs(1));
  EXPECT_THAT(file_form(source("a.sh", "#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n")),
              IsEmpty());
  EXPECT_EQ(over_tree(file_form), "");
}

TEST(Tidy, EverySourceIsBuilt) {
  const std::vector<Source> example = {
      source("a/CMakeLists.txt", "add_library(x b/c.cpp\n  d.cpp)\n")};
  EXPECT_THAT(listed_in_cmake(source("a/b/c.cpp", ""), example), IsEmpty());
  EXPECT_THAT(listed_in_cmake(source("a/d.cpp", ""), example), IsEmpty());
  EXPECT_THAT(listed_in_cmake(source("a/dead.cpp", ""), example), SizeIs(1));
  EXPECT_THAT(listed_in_cmake(source("a/b/d.cpp", ""), example), SizeIs(1));
  EXPECT_THAT(
      listed_in_cmake(source("a/f.cpp", ""), {source("a/CMakeLists.txt", "ds_fuzz(f x)\n")}),
      IsEmpty());
  EXPECT_THAT(listed_in_cmake(source("e/d.cpp", ""), example), SizeIs(1));
  EXPECT_EQ(over_tree([](const Source& file) { return listed_in_cmake(file, tree()); }), "");
}

// --- Lists that must agree ---

Findings untested_ops(const Source& ops, const std::vector<Source>& tests) {
  static const std::regex entry(R"(\(\*(\w+)\)\()");
  Findings found;
  for (const std::string& line : ops.code) {
    std::smatch match;
    if (!std::regex_search(line, match, entry)) continue;
    const std::regex name("\\b" + match[1].str() + "\\b");
    const bool tested = std::any_of(tests.begin(), tests.end(), [&](const Source& test) {
      if (!in(test.path, "tests/kernels/")) return false;
      return std::any_of(test.code.begin(), test.code.end(),
                         [&](const std::string& l) { return std::regex_search(l, name); });
    });
    if (!tested)
      found.push_back("op " + match[1].str() + " appears in no test under tests/kernels");
  }
  return found;
}

TEST(Tidy, EveryOpIsTested) {
  const Source ops =
      source("kernels/ops.h", "struct Ops {\n  void (*relu)(int);\n  void (*rope)(int);\n};\n");
  EXPECT_THAT(untested_ops(ops, {source("tests/kernels/a.cpp", "ops.relu(1); // rope\n")}),
              SizeIs(1));
  const auto real = std::find_if(tree().begin(), tree().end(),
                                 [](const Source& file) { return file.path == "kernels/ops.h"; });
  ASSERT_NE(real, tree().end());
  EXPECT_EQ(as_text(untested_ops(*real, tree())), "");
}

// The table in README.md is the one that `dsctl config doc` prints: line by line, nothing else
// between.
Findings settings_differ(const std::string& readme, const std::string& table) {
  Findings found;
  for (const std::string& line : split_lines(table)) {
    if (readme.find(line + "\n") == readme.npos) found.push_back("README.md lacks: " + line);
  }
  if (found.empty() && readme.find(table) == readme.npos)
    found.push_back("README.md: in another order");
  return found;
}

TEST(Tidy, EverySettingIsInTheReadme) {
  EXPECT_THAT(settings_differ("| a |\n| c |\n", "| a |\n| b |\n"), SizeIs(1));
  EXPECT_THAT(settings_differ("| b |\n| a |\n", "| a |\n| b |\n"), SizeIs(1));
  const std::string readme = read("README.md");
  EXPECT_EQ(as_text(settings_differ(readme, settings_markdown())), "");
}

Findings strangers(const std::vector<std::string>& names) {
  static const std::vector<std::string> known = {"CMakeLists.txt",
                                                 "CMakePresets.json",
                                                 "LICENSE",
                                                 "README.md",
                                                 "build",
                                                 "compile_commands.json",
                                                 "daemon",
                                                 "examples",
                                                 "kernels",
                                                 "modules",
                                                 "sdk",
                                                 "storage",
                                                 "tests"};
  Findings found;
  for (const std::string& name : names) {
    const bool fine = in(name, ".") || std::find(known.begin(), known.end(), name) != known.end();
    if (!fine) found.push_back(name + ": not a name of the top level");
  }
  return found;
}

TEST(Tidy, TheTopLevelIsFixed) {
  EXPECT_THAT(strangers({"scripts", "daemon", ".ci"}), SizeIs(1));
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(DS_SOURCE_DIR)) {
    names.push_back(entry.path().filename());
  }
  EXPECT_EQ(as_text(strangers(names)), "");
}

}  // namespace
}  // namespace ds::tidy
