// SPDX-License-Identifier: Apache-2.0
#include "ctl/plugin_new.h"

#include <algorithm>
#include <fstream>
#include <regex>
#include <set>
#include <system_error>
#include <utility>

namespace ds::ctl {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxName = 48, kMaxId = 95;  // the ELF note has room for an id of 95 bytes

std::string replaced(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != text.npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

std::string with_underscores(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

/// For a shell, quoted only where it must be.
std::string quoted(const std::string& word) {
  static const std::regex plain("[A-Za-z0-9_./+-]+");
  return std::regex_match(word, plain) ? word : "'" + replaced(word, "'", "'\\''") + "'";
}

Status check_name(const std::string& name) {
  static const std::regex form("[a-z][a-z0-9]*(-[a-z0-9]+)*");
  // CMake has targets of these names.
  static const std::set<std::string> taken = {"all",     "clean",      "help", "install",
                                              "package", "preinstall", "test"};
  if (name.size() > kMaxName)
    return invalid("name: " + std::to_string(name.size()) + " characters, expected at most " +
                   std::to_string(kMaxName));
  if (!std::regex_match(name, form))
    return invalid("name \"" + name +
                   "\": expected lower-case letters and digits with single hyphens between, "
                   "beginning with a letter, as in my-nf4");
  if (taken.contains(name)) return invalid("name " + name + ": CMake keeps it for itself");
  return {};
}

Status check_id(const std::string& id) {
  static const std::regex form("[a-z0-9][a-z0-9_-]*(\\.[a-z0-9][a-z0-9_-]*)+");
  if (id.size() > kMaxId)
    return invalid("id: " + std::to_string(id.size()) + " bytes, expected at most " +
                   std::to_string(kMaxId));
  if (!std::regex_match(id, form))
    return invalid("id \"" + id + "\": expected a reversed domain, as in org.acme.my-nf4");
  return {};
}

Result<PluginSource> source_for(const std::string& kind, const std::string& language) {
  std::string kinds, languages;
  for (const PluginSource& source : plugin_templates().sources) {
    if (source.kind == kind && source.language == language) return source;
    if (source.language == "c++") kinds += (kinds.empty() ? "" : ", ") + std::string(source.kind);
    if (source.kind == kind)
      languages += (languages.empty() ? "" : ", ") + std::string(source.language);
  }
  if (languages.empty()) return invalid("kind \"" + kind + "\": expected one of " + kinds);
  return invalid("language \"" + language + "\": a template of kind " + kind + " is there in " +
                 languages);
}

/// The example under its new name. The class gets a suffix, so that no name can be a C++ keyword.
std::string source_text(const PluginSource& source, const std::string& name,
                        const std::string& id) {
  const std::string old_class = fs::path(source.file).stem();
  std::string old_name = old_class;
  std::replace(old_name.begin(), old_name.end(), '_', '-');
  std::string text(source.text);
  text = replaced(text, "\"org.driftstone.example." + old_name + "\"", "\"" + id + "\"");
  text = replaced(text, "\"" + old_name + "\"", "\"" + name + "\"");
  return replaced(text, old_class, with_underscores(name) + "_plugin");
}

Status write_file(const fs::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  return file ? Status() : io_error(path.string() + ": not written");
}

Status make_folder(const fs::path& folder) {
  std::error_code error;
  const fs::file_status there = fs::symlink_status(folder, error);
  if (fs::exists(there)) {
    if (!fs::is_directory(there)) return conflict(folder.string() + ": is there, and no folder");
    const bool empty = fs::is_empty(folder, error);
    if (error) return io_error(folder.string() + ": " + error.message());
    return empty ? Status() : conflict(folder.string() + ": is there, and not empty");
  }
  if (!fs::create_directory(folder, error))
    return io_error(folder.string() + ": " + (error ? error.message() : "not made"));
  return {};
}

std::string next_commands(const NewPlugin& wanted, const fs::path& folder) {
  const fs::path prefix = wanted.prefix.empty() ? own_sdk_prefix() : wanted.prefix;
  const std::string build = (folder / "build").string();
  const std::string file = quoted(build + "/" + wanted.name + ".so");
  std::string configure = "cmake -S " + quoted(folder.string()) + " -B " + quoted(build);
  if (!prefix.empty() && prefix != "/usr" && prefix != "/usr/local")
    configure += " -DCMAKE_PREFIX_PATH=" + quoted(prefix.string());
  return configure + "\ncmake --build " + quoted(build) + "\ndsctl plugin check " + file +
         "\ndsctl plugin load " + file + " --trust\n";
}

}  // namespace

fs::path own_sdk_prefix() {
  std::error_code error;
  const fs::path prefix = fs::read_symlink("/proc/self/exe", error).parent_path().parent_path();
  for (const char* lib : {"lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"}) {
    if (fs::exists(prefix / lib / "cmake/Driftstone/DriftstoneConfig.cmake", error)) return prefix;
  }
  return {};
}

Result<std::string> plugin_new(const NewPlugin& wanted) {
  DS_TRY(check_name(wanted.name));
  const std::string id = wanted.id.empty() ? "org.example." + wanted.name : wanted.id;
  DS_TRY(check_id(id));
  DS_ASSIGN(const PluginSource source, source_for(wanted.kind, wanted.language));
  const fs::path folder = (wanted.parent / wanted.name).lexically_normal();
  DS_TRY(make_folder(folder));
  const std::string file =
      with_underscores(wanted.name) + fs::path(source.file).extension().string();
  const auto filled = [&](std::string_view text) {
    std::string out(text);
    for (const auto& [mark, value] : std::initializer_list<std::pair<const char*, std::string>>{
             {"@NAME@", wanted.name}, {"@ID@", id}, {"@KIND@", wanted.kind}, {"@SOURCE@", file}})
      out = replaced(out, mark, value);
    return out;
  };
  DS_TRY(write_file(folder / file, source_text(source, wanted.name, id)));
  DS_TRY(write_file(folder / "CMakeLists.txt", filled(plugin_templates().cmake)));
  DS_TRY(write_file(folder / "README.md", filled(plugin_templates().readme)));
  return next_commands(wanted, folder);
}

}  // namespace ds::ctl
