// SPDX-License-Identifier: Apache-2.0
// What a plugin file says of itself: read from the plugin's own memory where it is loaded, from
// the flat value of a helper process where it is not. Either is checked in the same way.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "ds/plugin.h"
#include "ds/status.h"
#include "plugin/elf_file.h"
#include "plugin/flat.h"

namespace ds {

struct Description {
  std::string id, version, license;
  uint32_t abi_minor = 0;
  std::vector<ds_component> components;  ///< in full; they point into what was described
};

/// Whether the config schemas are run on an empty config. A schema that nobody trusts is not: what
/// it makes the validator do would happen in this process.
enum class Schemas { kRun, kParse };

/// Holds `given` against the file's note and against what this host can use. Errors begin with
/// `path`.
Result<Description> check_description(const ds_plugin& given, const PluginFile& note,
                                      const std::string& path, Schemas schemas);

constexpr size_t kMostDescriptionBytes = size_t{1} << 20;

/// For DescribedPlugin, which another process reads.
void put_description(FlatWriter& to, const Description& from);

/// A descriptor made from such bytes, which are hostile. Its functions say which ones there are and
/// do nothing but fail: they are for IsolatedInstance::proxied().
class DescribedPlugin {
 public:
  explicit DescribedPlugin(std::string bytes) : bytes_(std::move(bytes)) {}
  DescribedPlugin(const DescribedPlugin&) = delete;

  /// Lives in this object.
  Result<const ds_plugin*> read();

 private:
  struct Part {
    ds_component component{};
    ds_instance_ops ops{};
    std::variant<std::monostate, ds_encoder, ds_attention, ds_quantizer, ds_learner, ds_curriculum,
                 ds_retriever, ds_tool>
        table;
    std::vector<ds_str> tensor_names;  ///< of an encoder
  };
  void read_part(FlatReader& from, Part& part);
  void read_table(FlatReader& from, Part& part);

  const std::string bytes_;  ///< the strings are views of it
  std::deque<Part> parts_;
  std::vector<const ds_component*> list_;
  ds_plugin plugin_{};
};

}  // namespace ds
