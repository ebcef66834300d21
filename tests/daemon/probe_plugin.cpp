// SPDX-License-Identifier: Apache-2.0
// A plugin for the tests of the host: it shows whether its code has run, has a setting of each
// sort, and keeps a state.
#include <cstdio>
#include <cstdlib>

#include "ds/plugin.hpp"

namespace {

__attribute__((constructor)) void leave_mark() {
  if (const char* path = std::getenv("DS_PROBE_MARK")) {
    if (std::FILE* file = std::fopen(path, "w")) std::fclose(file);
  }
}

struct Probe {
  static constexpr std::string_view name = "probe";
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,
    "properties":{"size":{"type":"integer","default":1},
                  "word":{"type":"string","default":"hello","x-ds-live":true}}})";

  explicit Probe(ds::sdk::context context) : word_(context.get("word", "")) {}
  void reconfigure(ds::sdk::context context) { word_ = context.get("word", ""); }
  std::string save() const { return state_; }
  void restore(std::string state, std::string_view) { state_ = std::move(state); }
  std::string invoke(const ds_call&, std::string_view) const {
    return "{\"word\":\"" + word_ + "\"}";
  }

 private:
  std::string word_, state_;
};

}  // namespace

DS_PLUGIN("org.driftstone.probe", "1.0.0", "Apache-2.0", Probe)
