// SPDX-License-Identifier: Apache-2.0
// dsctl plugin new: a folder with a plugin that builds, passes its checks and can be loaded.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "ds/status.h"

namespace ds::ctl {

struct PluginSource {
  std::string_view kind, language;  ///< "c" or "c++"
  std::string_view file;            ///< "row_int8.cpp": its stem is the name inside
  std::string_view text;
};
struct PluginTemplates {
  std::string_view cmake, readme;  ///< with @NAME@, @ID@, @KIND@, @SOURCE@
  std::vector<PluginSource> sources;
};
/// What the build has embedded.
const PluginTemplates& plugin_templates();

struct NewPlugin {
  std::string name;  ///< lower-case words and digits with hyphens: "my-nf4"
  std::string kind;
  std::string language = "c++";
  std::string id;                      ///< reverse domain; "" = org.example.<name>
  std::filesystem::path parent = ".";  ///< the folder <parent>/<name> is made
  std::filesystem::path prefix;        ///< where the SDK is installed; empty = found by itself
};

/// Writes the folder and returns the commands to run next, one a line. An existing folder must be
/// empty; on failure nothing of what was there is changed.
Result<std::string> plugin_new(const NewPlugin& wanted);

/// The prefix of this program if the SDK is installed (or built) beside it, else empty.
std::filesystem::path own_sdk_prefix();

}  // namespace ds::ctl
