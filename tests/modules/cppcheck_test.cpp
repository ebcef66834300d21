// SPDX-License-Identifier: Apache-2.0
// The cppcheck tool as a file, through its table: with the real program on code with known faults
// and on hostile text, and with programs of that name that misbehave.
#include <gmock/gmock.h>
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "storage/json.h"
#include "tests/modules/module_file.h"

namespace ds::test {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::IsEmpty;

struct Found {
  std::uint32_t severity, line, column;
  std::string rule, message;
  float confidence;
};

/// A folder that is TMPDIR, so that what a run leaves can be seen; PATH as it was, or only a folder
/// with a program named cppcheck, or nothing.
class CppcheckTest : public testing::Test {
 protected:
  CppcheckTest() {
    std::string name = (fs::temp_directory_path() / "cppcheck-test-XXXXXX").string();
    folder_ = mkdtemp(name.data());
    fs::create_directory(folder_ / "tmp");
    setenv("TMPDIR", (folder_ / "tmp").c_str(), 1);
  }
  ~CppcheckTest() override {
    setenv("PATH", path_.c_str(), 1);
    unsetenv("TMPDIR");
    fs::remove_all(folder_);
  }
  void SetUp() override { setenv("PATH", path_.c_str(), 1); }

  /// Whether the real one is there.
  static bool real() {
    if (std::system("command -v cppcheck >/dev/null") == 0) return true;
    if (std::getenv("DS_NO_SKIP") != nullptr) ADD_FAILURE() << "cppcheck is not installed";
    return false;
  }
  void fake(const std::string& script) {
    const fs::path file = folder_ / "bin" / "cppcheck";
    fs::create_directory(file.parent_path());
    std::ofstream(file) << "#!/bin/sh\n" << script;
    fs::permissions(file, fs::perms::owner_all);
    setenv("PATH", file.parent_path().c_str(), 1);
  }
  std::string content(const std::string& file) const {
    std::ostringstream out;
    out << std::ifstream(folder_ / file).rdbuf();
    return out.str();
  }
  bool nothing_left() const { return fs::is_empty(folder_ / "tmp"); }

  static ds_code analyse(ModuleFile& tool, std::string_view text, std::vector<Found>& out,
                         std::string_view language = "c++") {
    out.clear();
    const auto emit = [](void* ctx, const ds_finding* f) -> ds_code {
      static_cast<std::vector<Found>*>(ctx)->push_back(
          {f->severity, f->line, f->column, std::string(sdk::view(f->rule)),
           std::string(sdk::view(f->message)), f->confidence});
      return DS_OK;
    };
    return tool.table<ds_tool>().analyse(tool.instance, &tool.call, sdk::str(language),
                                         sdk::str("a.cpp"), sdk::str(text), &out, emit, &tool.st);
  }
  static const Found* with_rule(const std::vector<Found>& all, std::string_view rule) {
    for (const Found& f : all) {
      if (f.rule == rule) return &f;
    }
    return nullptr;
  }

  fs::path folder_;
  const std::string path_ = std::getenv("PATH");
};

constexpr std::string_view kFaults =
    "int null_pointer() {\n"
    "  int* q = nullptr;\n"
    "  return *q;\n"
    "}\n"
    "int uninitialised() {\n"
    "  int x;\n"
    "  return x + 1;\n"
    "}\n";

TEST_F(CppcheckTest, FindsFaultsWhereTheyAre) {
  if (!real()) GTEST_SKIP() << "cppcheck is not installed";
  ModuleFile tool("tool_cppcheck");
  std::vector<Found> found;
  ASSERT_EQ(analyse(tool, kFaults, found), DS_OK) << tool.text();
  const Found* null_pointer = with_rule(found, "nullPointer");
  ASSERT_NE(null_pointer, nullptr);
  EXPECT_EQ(null_pointer->severity, static_cast<std::uint32_t>(DS_SEVERITY_ERROR));
  EXPECT_EQ(null_pointer->line, 3u);
  EXPECT_EQ(null_pointer->column, 11u);
  EXPECT_EQ(null_pointer->confidence, 1.0f);
  EXPECT_THAT(null_pointer->message, HasSubstr("q"));
  const Found* uninitialised = with_rule(found, "uninitvar");
  ASSERT_NE(uninitialised, nullptr);
  EXPECT_EQ(uninitialised->line, 7u);
  EXPECT_TRUE(std::is_sorted(found.begin(), found.end(),
                             [](const Found& x, const Found& y) { return x.line < y.line; }));
  EXPECT_TRUE(nothing_left());

  ASSERT_EQ(analyse(tool, "int twice(int x) {\n  return 2 * x;\n}\n", found), DS_OK);
  EXPECT_THAT(found, IsEmpty());
  ASSERT_EQ(analyse(tool, "", found), DS_OK) << tool.text();
  EXPECT_THAT(found, IsEmpty());
}

TEST_F(CppcheckTest, TheLanguageCounts) {
  if (!real()) GTEST_SKIP() << "cppcheck is not installed";
  ModuleFile tool("tool_cppcheck");
  std::vector<Found> found;
  const std::string_view code = "struct T { T(); int x; };\nT::T() {}\n";
  ASSERT_EQ(analyse(tool, code, found, "c"), DS_OK) << tool.text();
  EXPECT_NE(with_rule(found, "syntaxError"), nullptr);
  ASSERT_EQ(analyse(tool, code, found), DS_OK) << tool.text();
  EXPECT_EQ(with_rule(found, "syntaxError"), nullptr);
  EXPECT_NE(with_rule(found, "uninitMemberVar"), nullptr);
  EXPECT_EQ(analyse(tool, code, found, "python"), DS_E_UNSUPPORTED);
  EXPECT_EQ(tool.text(), "language \"python\", expected \"c\" or \"c++\"");
}

TEST_F(CppcheckTest, AnswersJson) {
  if (!real()) GTEST_SKIP() << "cppcheck is not installed";
  ModuleFile tool("tool_cppcheck");
  const auto invoke = [&](const std::string& arguments, std::string& out) {
    out.clear();
    const ds_sink sink = ModuleFile::sink_into(out);
    return tool.table<ds_tool>().invoke(tool.instance, &tool.call, sdk::str(arguments), &sink,
                                        &tool.st);
  };
  std::string answer;
  const Json arguments = {{"language", "c++"}, {"path", "src/\"a\".cpp"}, {"text", kFaults}};
  ASSERT_EQ(invoke(arguments.dump(), answer), DS_OK) << tool.text();
  const Json findings = Json::parse(answer).at("findings");
  ASSERT_GE(findings.size(), 2u);
  EXPECT_EQ(findings[0]["path"], "src/\"a\".cpp");
  EXPECT_EQ(findings[0]["line"], 3);
  EXPECT_EQ(findings[0]["severity"], "error");
  EXPECT_EQ(findings[0]["rule"], "nullPointer");
  EXPECT_EQ(findings[0]["confidence"], 1.0);
  EXPECT_EQ(invoke("[]", answer), DS_E_ARG);
  EXPECT_EQ(invoke("{", answer), DS_E_ARG);
  EXPECT_EQ(invoke(R"({"language":"c"})", answer), DS_E_ARG);
  EXPECT_EQ(tool.text(), "text: missing, expected a string");
  EXPECT_EQ(invoke(R"({"language":"c","text":3})", answer), DS_E_ARG);
  EXPECT_EQ(tool.text(), "text: number, expected a string");
}

/// The text may name files of this machine; none is opened. This one would give a finding.
TEST_F(CppcheckTest, OpensNoFileThatTheTextNames) {
  if (!real()) GTEST_SKIP() << "cppcheck is not installed";
  const std::string file = (folder_ / "secret.h").string(), quoted = '"' + file + '"';
  std::ofstream(file) << kFaults << "#define LEAK *(int*)0\n";
  ModuleFile tool("tool_cppcheck");
  std::vector<Found> found;
  const std::string use = "int use() { return 1; }\n";
  for (const std::string& line :
       {"#include " + quoted, "#  include " + quoted, "#include <" + file + ">",
        "#inc\\\nlude " + quoted, "#inc\\ \r\nlude " + quoted, "#/**/include " + quoted,
        "%:include " + quoted, "#define NAME " + quoted + "\n#include NAME",
        "#include_next " + quoted, "#\\\ninclude\\\n" + quoted,
        "#include \"../../.." + file + '"'}) {
    ASSERT_EQ(analyse(tool, line + "\n" + use, found), DS_OK) << line << tool.text();
    EXPECT_EQ(with_rule(found, "nullPointer"), nullptr) << line;
    EXPECT_EQ(with_rule(found, "uninitvar"), nullptr) << line;
  }
  std::string wide = "\xff\xfe";
  for (const char c : "#include " + quoted + "\n" + use) wide += {c, '\0'};
  const ds_code code = analyse(tool, wide, found);
  EXPECT_TRUE(code == DS_OK || code == DS_E_INTERNAL) << tool.text();
  EXPECT_EQ(with_rule(found, "nullPointer"), nullptr);
  // Without the directive the places are the text's own.
  ASSERT_EQ(analyse(tool, "#include <vector>\n" + std::string(kFaults), found), DS_OK);
  ASSERT_NE(with_rule(found, "nullPointer"), nullptr);
  EXPECT_EQ(with_rule(found, "nullPointer")->line, 4u);
}

TEST_F(CppcheckTest, TheProgramGetsNoIncludeDirective) {
  fake("cat text.cpp >" + (folder_ / "seen").string() +
       "\nprintf '<results version=\"2\"><errors/></results>' >&2\n");
  ModuleFile tool("tool_cppcheck");
  std::vector<Found> found;
  const auto seen = [&](std::string_view text) {
    EXPECT_EQ(analyse(tool, text, found), DS_OK) << tool.text();
    return content("seen");
  };
  EXPECT_EQ(seen("#include <a>\n# include_next \"b\""), "#Include <a>\n# Include_next \"b\"");
  EXPECT_EQ(seen("#in\\\nclu\\ \r\nde <a>"), "#In\\\nclu\\ \r\nde <a>");
  EXPECT_EQ(seen("#i\?\?/\nnclude <a>"), "#I\?\?/\nnclude <a>");
  EXPECT_EQ(seen("in clude inc\\lude inclu"), "in clude inc\\lude inclu");
  EXPECT_EQ(seen("\xff\xfe#\0i\0"), "  #");
}

TEST_F(CppcheckTest, HostileTextEndsInTime) {
  if (!real()) GTEST_SKIP() << "cppcheck is not installed";
  const char* given = std::getenv("DS_SEED");
  const unsigned seed = given != nullptr ? static_cast<unsigned>(std::atoi(given)) : 7;
  std::printf("DS_SEED=%u\n", seed);
  std::mt19937 random(seed);
  constexpr std::size_t kSize = 2 << 20;
  std::string noise(kSize, 0), nested, pieces;
  for (char& c : noise) c = static_cast<char>(random());
  while (nested.size() < kSize) nested += "int f(){if(a[(b<{";
  const char* const words[] = {"#if ",      "#define f(x) x##x f(x)\n",
                               "template<", "\"",
                               "/*",        "class ",
                               "}",         ">>",
                               "R\"x(",     "\\\n",
                               "\0",        "for("};
  while (pieces.size() < kSize) pieces += words[random() % std::size(words)];
  ModuleFile tool("tool_cppcheck", {{"timeout_s", 3}});
  std::vector<Found> found;
  for (const std::string& text :
       {noise, nested, pieces, std::string(kSize, '('), std::string(kSize, '\0'),
        std::string(kSize, '"'), "int f() { return 0; }" + std::string("\0\0}{", 4)}) {
    const auto begin = std::chrono::steady_clock::now();
    const ds_code code = analyse(tool, text, found);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
    EXPECT_THAT(code, testing::AnyOf(DS_OK, DS_E_DEADLINE, DS_E_INTERNAL)) << tool.text();
    for (const Found& f : found) EXPECT_LE(f.line, kSize + 1);
    EXPECT_TRUE(nothing_left());
  }
  EXPECT_EQ(analyse(tool, std::string((16 << 20) + 1, ' '), found), DS_E_ARG);
  EXPECT_THAT(tool.text(), HasSubstr("expected at most 16777216"));
}

TEST_F(CppcheckTest, SaysThatTheProgramIsMissing) {
  for (const char* path : {"", "/nonexistent", ".:bin", "relative/bin"}) {
    setenv("PATH", path, 1);
    ModuleFile tool("tool_cppcheck");
    std::vector<Found> found;
    EXPECT_EQ(analyse(tool, kFaults, found), DS_E_UNSUPPORTED) << path;
    EXPECT_THAT(tool.text(), HasSubstr("cppcheck is not installed"));
    EXPECT_THAT(tool.text(), HasSubstr("apt-get install cppcheck"));
  }
}

/// Gone, or dead and not yet collected by whoever inherited it.
bool has_died(const std::string& process) {
  std::ifstream stat("/proc/" + process + "/stat");
  std::string id, name, state;
  return !(stat >> id >> name >> state) || state == "Z" || state == "X";
}

TEST_F(CppcheckTest, EndsASlowProgramAndAllThatItStarted) {
  const std::string note = (folder_ / "child").string();
  fake("sleep 1000 & echo $! >" + note + ".new; mv " + note + ".new " + note + "; wait\n");
  setenv("PATH", (folder_ / "bin").c_str(), 1);
  ModuleFile tool("tool_cppcheck", {{"timeout_s", 2}});
  std::vector<Found> found;
  const auto expect_dead = [&] {
    const std::string process = content("child");
    ASSERT_FALSE(process.empty()) << "the machine is too slow for this test's timeout";
    const std::string id = process.substr(0, process.find('\n'));
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!has_died(id) && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    EXPECT_TRUE(has_died(id));
    EXPECT_TRUE(nothing_left());
    fs::remove(note);
  };
  EXPECT_EQ(analyse(tool, kFaults, found), DS_E_DEADLINE);
  EXPECT_THAT(tool.text(), HasSubstr("not done within 2.0"));
  expect_dead();

  ASSERT_EQ(tool.reconfigure({}), DS_OK);  // 30 s: what ends it is the call's own
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  tool.call.deadline_ns = (now.tv_sec + 2) * std::int64_t{1'000'000'000};
  EXPECT_EQ(analyse(tool, kFaults, found), DS_E_DEADLINE);
  EXPECT_THAT(tool.text(), HasSubstr("by the call's deadline"));
  expect_dead();

  tool.call.deadline_ns = 0;
  std::uint32_t cancel = 0;
  tool.call.cancel = &cancel;
  std::thread other([&] {
    while (!fs::exists(note)) std::this_thread::yield();
    __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED);
  });
  EXPECT_EQ(analyse(tool, kFaults, found), DS_E_CANCELLED);
  other.join();
  expect_dead();
}

TEST_F(CppcheckTest, RunsItInAPrivateFolderWithoutAShell) {
  const std::string note = (folder_ / "note").string();
  fake("{ stat -c %a .; ls; printf '[%s]' \"$@\"; env; } >" + note +
       "\nprintf '<results version=\"2\"><errors/></results>' >&2\n");
  ModuleFile tool("tool_cppcheck");
  std::vector<Found> found;
  setenv("DS_SECRET", "sesame", 1);
  ASSERT_EQ(analyse(tool, "text", found, "c"), DS_OK) << tool.text();
  unsetenv("DS_SECRET");
  EXPECT_THAT(content("note"), HasSubstr("700\ntext.c\n[-q][--xml][--xml-version=2]"));
  EXPECT_THAT(content("note"), testing::Not(HasSubstr("sesame")));
  EXPECT_TRUE(nothing_left());
}

TEST_F(CppcheckTest, ReadsWhatTheProgramReports) {
  const auto report = [](const std::string& errors) {
    return "cat >&2 <<'END'\n<results version=\"2\"><errors>" + errors +
           "</errors></results>\nEND\n";
  };
  const auto error = [](const std::string& id, const std::string& severity, const std::string& rest,
                        const std::string& place) {
    return "<error id=\"" + id + "\" severity=\"" + severity + "\" " + rest + "><location " +
           place + "/></error>";
  };
  fake(report(error("b", "style", R"(msg="&lt;two&gt;" inconclusive="true")",
                    R"(file="text.cpp" line="2" column="5")") +
              error("a", "portability", "", R"(file="text.cpp" line="1" column="0")") +
              error("c", "warning", "", R"(file="text.cpp" line="9" column="1")") +
              error("d", "performance", "", R"(file="/etc/x.h" line="1" column="1")") +
              R"(<error id="e" severity="information"/><error id="f" severity="error"/>)"));
  ModuleFile tool("tool_cppcheck");
  std::vector<Found> found;
  ASSERT_EQ(analyse(tool, "1\n2", found), DS_OK) << tool.text();
  ASSERT_EQ(found.size(), 5u);
  std::string order;
  for (const Found& f : found) order += f.rule + std::to_string(f.line) + " ";
  EXPECT_EQ(order, "c0 d0 f0 a1 b2 ");
  EXPECT_EQ(found[4].message, "<two>");
  EXPECT_EQ(found[4].confidence, 0.5f);
  EXPECT_EQ(found[4].severity, static_cast<std::uint32_t>(DS_SEVERITY_NOTE));
  EXPECT_EQ(found[3].severity, static_cast<std::uint32_t>(DS_SEVERITY_WARNING));

  fake("echo not xml >&2\n");
  EXPECT_EQ(analyse(tool, "", found), DS_E_DATA);
  EXPECT_THAT(tool.text(), HasSubstr("not xml"));
  fake("echo dear me >&2; exit 3\n");
  EXPECT_EQ(analyse(tool, "", found), DS_E_INTERNAL);
  EXPECT_THAT(tool.text(), HasSubstr("exit status 3: dear me"));
  fake("kill -SEGV $$\n");
  EXPECT_EQ(analyse(tool, "", found), DS_E_INTERNAL);
  EXPECT_THAT(tool.text(), HasSubstr("signal"));
  fake(
      "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >&2; "
      "done\n");
  EXPECT_EQ(analyse(tool, "", found), DS_E_DATA);
  EXPECT_THAT(tool.text(), HasSubstr("wrote more than"));
  EXPECT_TRUE(nothing_left());
}

TEST_F(CppcheckTest, RefusesASenselessTimeout) {
  ModuleFile tool("tool_cppcheck");
  EXPECT_EQ(tool.create({{"timeout_s", 0}}), DS_E_CONFIG);
  EXPECT_EQ(tool.create({{"timeout_s", 1e9}}), DS_E_CONFIG);
}

}  // namespace
}  // namespace ds::test
