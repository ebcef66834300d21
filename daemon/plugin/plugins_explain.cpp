// SPDX-License-Identifier: Apache-2.0
// Why a file would be loaded or not, one step after the other; none of its code runs.
#include <span>

#include "plugin/elf_file.h"
#include "plugin/plugins.h"

namespace ds {
namespace {

std::string kinds_text(uint32_t mask) {
  std::string out;
  for (uint32_t kind = 1; kind < std::size(kKindNames); ++kind) {
    if ((mask >> kind & 1u) != 0) out += (out.empty() ? "" : ", ") + std::string(kind_name(kind));
  }
  return out;
}

/// Whether `load --isolated` would ask for no trust; what a component says of itself is not known.
Status isolable(uint32_t mask) {
  for (uint32_t kind = 1; kind < std::size(kKindNames); ++kind) {
    const std::string_view cannot = IsolatedInstance::kind_cannot(kind);
    if ((mask >> kind & 1u) != 0 && !cannot.empty())
      return unsupported("cannot run in helper processes only: " + std::string(cannot));
  }
  return {};
}

class Steps {
 public:
  /// Adds a step; false when it failed.
  bool add(const char* name, const Status& status, const std::string& good) {
    steps_.push_back(
        {{"step", name}, {"ok", status.ok()}, {"text", status.ok() ? good : status.message()}});
    all_ok_ = all_ok_ && status.ok();
    return status.ok();
  }
  /// The answer; `isolated` as for a load with --isolated, which needs no trust.
  Json result(const std::string& path, bool isolated) const {
    return {{"path", path}, {"loads", all_ok_}, {"loads_isolated", isolated}, {"steps", steps_}};
  }

 private:
  Json steps_ = Json::array();
  bool all_ok_ = true;
};

}  // namespace

Json Plugins::explain(const std::string& path) const {
  Steps steps;
  const Result<FileContent> file = read_plugin_file(path);
  if (!steps.add("file", file.status(),
                 file.ok() ? "regular file, owner and modes are fine, " +
                                 std::to_string(file->bytes.size()) + " bytes"
                           : ""))
    return steps.result(path, false);
  const Result<PluginFile> judged =
      inspect_plugin(std::as_bytes(std::span(file->bytes.data(), file->bytes.size())));
  if (!steps.add("note", judged.status(),
                 judged.ok() ? judged->id + ", ABI 1." + std::to_string(judged->abi_minor) + ", " +
                                   kinds_text(judged->kinds)
                             : ""))
    return steps.result(path, false);
  const Result<std::string> trusted = trust_.judge(*file);
  steps.add("trust", trusted.status(), trusted.ok() ? *trusted : "");
  const Status isolated = isolable(judged->kinds);
  if (!trusted.ok())
    steps.add("isolated", isolated, "needs no trust in helper processes: plugin load --isolated");
  std::lock_guard lock(mutex_);
  std::string loaded;
  for (const auto& [key, slot] : slots_) {
    const Generation& g = slot.generations[slot.serving];
    if (g.library->sha256() == file->sha256)
      loaded +=
          (loaded.empty() ? "" : ", ") + key.second + " generation " + std::to_string(g.number);
  }
  steps.add("loaded", {}, loaded.empty() ? "not loaded" : "as " + loaded);
  return steps.result(file->path, isolated.ok());
}

}  // namespace ds
