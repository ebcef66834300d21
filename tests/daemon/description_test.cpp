// SPDX-License-Identifier: Apache-2.0
// Plugin files that are described by a helper process: the same as when they are loaded, none of
// their code in this process, and no trust in what the helper says.
#include "plugin/description.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "plugin/abi.h"
#include "plugin/library.h"
#include "tests/storage/scratch_folder.h"

namespace ds {
namespace {

using testing::HasSubstr;

const PluginServices kServices;

IsolationOptions options() {
  IsolationOptions out;
  out.program = std::string(DS_BIN_DIR) + "/ds-plugin-helper";
  out.arena_bytes = 1 << 22;
  return out;
}

std::string flat(const Description& description) {
  FlatWriter to;
  put_description(to, description);
  return to.bytes();
}

TEST(DescriptionTest, AHelperSaysOfEachModuleWhatLoadingItSays) {
  size_t modules = 0;
  for (const auto& entry : std::filesystem::directory_iterator(DS_MODULES_DIR)) {
    if (entry.path().extension() != ".so") continue;
    const auto file = read_plugin_file(entry.path());
    ASSERT_TRUE(file.ok()) << file.status().message();
    const auto told = PluginLibrary::describe(*file, kServices, options());
    ASSERT_TRUE(told.ok()) << told.status().message();
    EXPECT_FALSE((*told)->runs_here());
    const auto loaded = PluginLibrary::load(*file, kServices);
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    EXPECT_TRUE((*loaded)->runs_here());
    EXPECT_EQ(flat((*told)->said()), flat((*loaded)->said())) << entry.path();
    ++modules;
  }
  EXPECT_GE(modules, 8u);
}

class UntrustedTest : public testing::Test {
 protected:
  void SetUp() override { setenv("TMPDIR", folder_.path().c_str(), 1); }
  void TearDown() override { unsetenv("TMPDIR"); }
  Result<std::shared_ptr<const PluginLibrary>> describe(const std::string& path) {
    const auto file = read_plugin_file(path);
    return file.ok() ? PluginLibrary::describe(*file, kServices, isolation_) : file.status();
  }
  /// The processes in which the plugin's constructor has run.
  std::vector<pid_t> constructed() const {
    std::ifstream in(folder_.path() + "/constructed");
    std::vector<pid_t> out;
    for (pid_t pid = 0; in >> pid;) out.push_back(pid);
    return out;
  }

  ScratchFolder folder_;
  IsolationOptions isolation_ = options();
};

TEST_F(UntrustedTest, NoneOfItsCodeRunsHere) {
  const auto library = describe(DS_UNTRUSTED_PLUGIN);
  ASSERT_TRUE(library.ok()) << library.status().message();
  const ds_component& component = (*library)->components()[0];
  EXPECT_EQ(text_of(component.name), "untrusted");
  EXPECT_EQ(text_of(component.summary), "says which process it is");
  EXPECT_THAT(std::string(text_of(component.config_schema)), HasSubstr("x-ds-live"));
  const auto tool = full_struct(static_cast<const ds_tool*>(component.table));
  EXPECT_EQ(text_of(tool.input_schema), R"({"type":"object"})");
  EXPECT_NE(tool.analyse, nullptr);
  EXPECT_EQ(tool.invoke, nullptr);
  const IsolationOptions isolation = options();
  const auto made = PluginInstance::create(*library, component, Json::object(), &isolation);
  ASSERT_TRUE(made.ok()) << made.status().message();
  EXPECT_EQ((*made)->config()["word"], "hello");
  EXPECT_EQ(constructed().size(), 2u) << "for the description, for the instance";
  EXPECT_THAT(constructed(), testing::Not(testing::Contains(getpid())));
}

TEST_F(UntrustedTest, ItIsNotCreatedHere) {
  const auto library = describe(DS_UNTRUSTED_PLUGIN);
  ASSERT_TRUE(library.ok()) << library.status().message();
  const auto made = PluginInstance::create(*library, (*library)->components()[0], Json::object());
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kPermission);
  EXPECT_THAT(made.status().message(), HasSubstr("untrusted: nobody trusts its file"));
  ds_instance* out = nullptr;
  EXPECT_NE((*library)->components()[0].create(nullptr, nullptr, {}, &out, nullptr), DS_OK);
}

TEST_F(UntrustedTest, ItsConfigIsJudgedInTheHelper) {
  const auto library = describe(DS_UNTRUSTED_PLUGIN);
  ASSERT_TRUE(library.ok()) << library.status().message();
  const IsolationOptions isolation = options();
  const auto bad = PluginInstance::create(*library, (*library)->components()[0],
                                          Json{{"word", "NO"}}, &isolation);
  ASSERT_FALSE(bad.ok());
  EXPECT_EQ(bad.status().code(), Code::kInvalid);
  EXPECT_THAT(bad.status().message(), testing::StartsWith("untrusted: config"));
  const auto made =
      PluginInstance::create(*library, (*library)->components()[0], Json::object(), &isolation);
  ASSERT_TRUE(made.ok()) << made.status().message();
  EXPECT_TRUE((*made)->reconfigure({{"word", "bye"}}).ok());
  EXPECT_FALSE((*made)->reconfigure({{"word", "NO"}}).ok());
  EXPECT_EQ((*made)->config()["word"], "bye");
}

TEST_F(UntrustedTest, AConstructorThatKillsItsProcessIsAnError) {
  std::string died;
  isolation_.on_death = [&](std::string_view who, std::string_view why) {
    died = std::string(who) + ": " + std::string(why);
  };
  const auto library = describe(DS_UNTRUSTED_ENDS);
  ASSERT_FALSE(library.ok());
  EXPECT_EQ(library.status().code(), Code::kPlugin);
  EXPECT_EQ(
      library.status().message(),
      std::string(DS_UNTRUSTED_ENDS) + ": its helper process died while it loaded it (signal 9)");
  EXPECT_EQ(died, "org.driftstone.untrusted: signal 9");
  ASSERT_EQ(constructed().size(), 1u);
  EXPECT_NE(constructed()[0], getpid());
}

TEST_F(UntrustedTest, AConstructorThatHangsEndsAtTheDeadline) {
  isolation_.call_timeout_ns = isolation_.grace_ns = 20'000'000;
  const auto library = describe(DS_UNTRUSTED_HANGS);
  ASSERT_FALSE(library.ok());
  EXPECT_EQ(library.status().code(), Code::kDeadline);
  EXPECT_THAT(library.status().message(), HasSubstr("did not load it within 20 ms and was killed"));
}

/// What hostile bytes say of a tool "t", then the same with one thing wrong.
struct Said {
  std::string id = "org.acme.t", version = "1", summary = "s", schema, name = "t";
  uint32_t kind = DS_KIND_TOOL, host_minor = 0;
  uint64_t count = 1, caps = DS_CAP_CPU;
  uint8_t destroy = 1, analyse = 1;
  std::string tail;

  std::string bytes() const {
    FlatWriter to;
    for (const std::string& text : {id, version, std::string("Apache-2.0")}) to.put_text(text);
    to.put<uint32_t>(0);
    to.put(count);
    for (uint64_t i = 0; i < std::min<uint64_t>(count, 100); ++i) {
      to.put(kind);
      for (const std::string& text : {name, summary, schema}) to.put_text(text);
      to.put(caps);
      to.put<uint32_t>(0);
      to.put(host_minor);
      for (int f = 0; f < 8; ++f) to.put<uint8_t>(f == 0 ? destroy : 0);
      to.put(analyse);
      to.put<uint8_t>(0);
      to.put_text("");
    }
    to.put_raw(tail);
    return to.bytes();
  }
};

std::string verdict(std::string bytes) {
  DescribedPlugin described(std::move(bytes));
  const auto given = described.read();
  if (!given.ok()) return given.status().message();
  PluginFile note;
  note.id = "org.acme.t";
  note.kinds = 1u << DS_KIND_TOOL | 1u << DS_KIND_ENCODER;
  const auto checked = check_description(**given, note, "t.so", Schemas::kParse);
  return checked.ok() ? "fine" : checked.status().message();
}

TEST(HostileDescriptionTest, EachThingThatIsWrongIsNamed) {
  EXPECT_EQ(verdict(Said{}.bytes()), "fine");
  const auto wrong = [](auto&& change) {
    Said said;
    change(said);
    return verdict(said.bytes());
  };
  EXPECT_THAT(wrong([](Said& s) { s.id = "org.acme.u\n"; }),
              HasSubstr("t.so: id \"org.acme.u?\", the file's note says \"org.acme.t\""));
  EXPECT_THAT(wrong([](Said& s) { s.version = ""; }), HasSubstr("version is empty"));
  EXPECT_THAT(wrong([](Said& s) { s.version = "\xff"; }), HasSubstr("version is not UTF-8"));
  EXPECT_THAT(wrong([](Said& s) { s.version.assign(65, '1'); }),
              HasSubstr("version has 65 bytes, at most 64"));
  EXPECT_THAT(wrong([](Said& s) { s.name = "T\n"; }), HasSubstr("component name \"T?\""));
  EXPECT_THAT(wrong([](Said& s) { s.summary = "\xc0\x80"; }), HasSubstr("t: summary is not UTF-8"));
  EXPECT_THAT(wrong([](Said& s) { s.summary.assign(5000, 'x'); }),
              HasSubstr("t: summary has 5000 bytes"));
  EXPECT_THAT(wrong([](Said& s) { s.schema = "[]"; }), HasSubstr("expected an object"));
  EXPECT_THAT(wrong([](Said& s) { s.schema.assign(100, '['); }), HasSubstr("nested deeper"));
  EXPECT_THAT(wrong([](Said& s) { s.schema.assign(300'000, ' '); }),
              HasSubstr("config schema has 300000 bytes"));
  EXPECT_THAT(wrong([](Said& s) { s.kind = 99; }), HasSubstr("kind is not known here"));
  EXPECT_THAT(wrong([](Said& s) { s.kind = DS_KIND_TOOL, s.count = 2; }),
              HasSubstr("tool t is there twice"));
  EXPECT_THAT(wrong([](Said& s) { s.count = 100; }), HasSubstr("too many components"));
  EXPECT_THAT(wrong([](Said& s) { s.count = uint64_t{1} << 60; }), HasSubstr("beyond its end"));
  EXPECT_THAT(wrong([](Said& s) { s.count = 0; }), HasSubstr("0 components, expected 1 to 64"));
  EXPECT_THAT(wrong([](Said& s) { s.host_minor = 9; }), HasSubstr("t needs plugin ABI 1.9"));
  EXPECT_THAT(wrong([](Said& s) { s.caps = DS_CAP_CUDA; }), HasSubstr("does not run on a CPU"));
  EXPECT_THAT(wrong([](Said& s) { s.destroy = 0; }), HasSubstr("destroy is missing"));
  EXPECT_THAT(wrong([](Said& s) { s.analyse = 0; }), HasSubstr("a function that every tool has"));
  EXPECT_THAT(wrong([](Said& s) { s.analyse = 2; }), HasSubstr("neither there nor missing"));
  EXPECT_THAT(wrong([](Said& s) { s.tail = "x"; }), HasSubstr("something follows it"));
  EXPECT_THAT(wrong([](Said& s) { s.tail.assign(kMostDescriptionBytes, 'x'); }),
              HasSubstr("bytes, at most 1048576"));
  // It would run for ever, or use up the stack, if it were run.
  EXPECT_EQ(wrong([](Said& s) { s.schema = R"({"allOf":[{"$ref":"#"}]})"; }), "fine");
}

TEST(HostileDescriptionTest, NoPieceOfOneIsOne) {
  const std::string whole = Said{}.bytes();
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_NE(verdict(whole.substr(0, n)), "fine") << n;
}

}  // namespace
}  // namespace ds
