// SPDX-License-Identifier: Apache-2.0
#include "ctl/plugin_new.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>

namespace ds::ctl {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class PluginNew : public testing::Test {
 protected:
  PluginNew() {
    char name[] = "/tmp/ds-plugin-new-XXXXXX";
    folder = ::mkdtemp(name);
  }
  ~PluginNew() override { fs::remove_all(folder); }

  NewPlugin wanted(const std::string& name, const std::string& kind) const {
    NewPlugin out;
    out.name = name;
    out.kind = kind;
    out.parent = folder;
    return out;
  }
  static std::string text_of(const fs::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  /// Output of a shell command if it fails, else empty.
  std::string complaint(const std::string& command) const {
    const std::string log = folder / "log";
    return std::system((command + " >" + log + " 2>&1").c_str()) == 0 ? "" : text_of(log);
  }

  fs::path folder;
};

TEST_F(PluginNew, WritesThreeFilesAndNamesTheNextCommands) {
  NewPlugin plugin = wanted("my-nf4", "quantizer");
  plugin.prefix = "/opt/drift stone";
  const auto next = plugin_new(plugin);
  ASSERT_TRUE(next.ok()) << next.status().message();
  const std::string at = folder / "my-nf4";
  EXPECT_EQ(*next, "cmake -S " + at + " -B " + at +
                       "/build -DCMAKE_PREFIX_PATH='/opt/drift stone'\n" + "cmake --build " + at +
                       "/build\n" + "dsctl plugin check " + at + "/build/my-nf4.so\n" +
                       "dsctl plugin load " + at + "/build/my-nf4.so --trust\n");
  EXPECT_THAT(text_of(at + "/my_nf4.cpp"),
              AllOf(HasSubstr("name = \"my-nf4\""), HasSubstr("struct my_nf4_plugin"),
                    HasSubstr("DS_PLUGIN(\"org.example.my-nf4\""), Not(HasSubstr("int8 {"))));
  EXPECT_THAT(text_of(at + "/CMakeLists.txt"),
              HasSubstr("ds_add_plugin(my-nf4 SOURCES my_nf4.cpp LIBS m CHECK 1)"));
  EXPECT_THAT(text_of(at + "/README.md"), HasSubstr("one quantizer, id `org.example.my-nf4`"));
  EXPECT_EQ(std::distance(fs::directory_iterator(at), {}), 3);
}

TEST_F(PluginNew, EveryTemplateCompilesUnderAnyName) {
  ASSERT_EQ(plugin_templates().sources.size(), 8u);
  for (const PluginSource& source : plugin_templates().sources) {
    // Keywords of C++ and namespaces that the code uses: the hardest names there are.
    const std::string name = source.language == "c" ? "ds-int" : "class";
    NewPlugin plugin = wanted(name, std::string(source.kind));
    plugin.language = source.language;
    plugin.id = "com.acme.thing";
    plugin.parent = folder / (std::string(source.kind) + "-" + std::string(source.language));
    fs::create_directory(plugin.parent);
    const auto next = plugin_new(plugin);
    ASSERT_TRUE(next.ok()) << next.status().message();
    const bool c = source.language == "c";
    const fs::path file = plugin.parent / name / (c ? "ds_int.c" : "class.cpp");
    const std::string stem = fs::path(source.file).stem();
    EXPECT_THAT(text_of(file),
                AllOf(HasSubstr("com.acme.thing"), Not(HasSubstr("driftstone.example")),
                      Not(HasSubstr(stem)), Not(HasSubstr("@NAME@"))));
    const std::string compiler = c ? "cc -std=c11" : "c++ -std=c++20";
    EXPECT_EQ(complaint(compiler + " -Wall -Wextra -Werror -fsyntax-only -I" DS_SDK_INCLUDE " " +
                        file.string()),
              "");
  }
}

TEST_F(PluginNew, TheCommandsItNamesBuildThePlugin) {
  const auto next = plugin_new(wanted("my-int4", "quantizer"));
  ASSERT_TRUE(next.ok()) << next.status().message();
  // The first two lines; this test's program stands in the build tree, whose SDK they name.
  const size_t second = next->find('\n', next->find('\n') + 1);
  ASSERT_THAT(next->substr(0, second), HasSubstr("-DCMAKE_PREFIX_PATH=" DS_BUILD_DIR));
  EXPECT_EQ(complaint("(set -e\n" + next->substr(0, second) + "\n)"), "");
  EXPECT_TRUE(fs::exists(folder / "my-int4/build/my-int4.so"));
}

TEST_F(PluginNew, LeavesWhatIsThereAlone) {
  fs::create_directory(folder / "mine");
  EXPECT_TRUE(plugin_new(wanted("mine", "tool")).ok());  // an empty folder is fine
  const std::string before = text_of(folder / "mine/README.md");
  const auto again = plugin_new(wanted("mine", "learner"));
  EXPECT_EQ(again.status().code(), Code::kConflict);
  EXPECT_THAT(again.status().message(), HasSubstr("mine: is there, and not empty"));
  EXPECT_EQ(text_of(folder / "mine/README.md"), before);
  std::ofstream(folder / "file") << "x";
  EXPECT_EQ(plugin_new(wanted("file", "tool")).status().code(), Code::kConflict);
  fs::create_directory(folder / "elsewhere");
  fs::create_directory_symlink(folder / "elsewhere", folder / "link");
  EXPECT_EQ(plugin_new(wanted("link", "tool")).status().code(), Code::kConflict);
  NewPlugin lost = wanted("lost", "tool");
  lost.parent = folder / "nowhere";
  EXPECT_EQ(plugin_new(lost).status().code(), Code::kIo);
}

TEST_F(PluginNew, RefusesNamesKindsAndIdsByName) {
  for (const char* name : {"", "My-nf4", "4nf", "a--b", "-a", "a-", "a_b", "a/b", "..", "a b"}) {
    EXPECT_EQ(plugin_new(wanted(name, "tool")).status().code(), Code::kInvalid) << name;
  }
  EXPECT_EQ(plugin_new(wanted(std::string(49, 'a'), "tool")).status().code(), Code::kInvalid);
  EXPECT_THAT(plugin_new(wanted("test", "tool")).status().message(), HasSubstr("CMake keeps it"));
  EXPECT_THAT(plugin_new(wanted("a", "quantiser")).status().message(),
              HasSubstr("expected one of encoder, attention, quantizer, learner, curriculum, "
                        "retriever, tool"));
  NewPlugin in_c = wanted("a", "tool");
  in_c.language = "c";
  EXPECT_THAT(plugin_new(in_c).status().message(), HasSubstr("kind tool is there in c++"));
  NewPlugin bad_id = wanted("a", "tool");
  for (const std::string& id : {std::string("acme"), std::string("Org.Acme"), std::string("a..b"),
                                std::string("a.\"b"), "a." + std::string(94, 'b')}) {
    bad_id.id = id;
    EXPECT_EQ(plugin_new(bad_id).status().code(), Code::kInvalid) << id;
  }
  EXPECT_TRUE(fs::is_empty(folder));
}

}  // namespace
}  // namespace ds::ctl
