// SPDX-License-Identifier: Apache-2.0
// A built-in module loaded from its file and one instance of its component, as a host makes it: its
// config is a map from key to value, what is not in it has the instance's own default.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "ds/plugin.hpp"
#include "kernels/pool.h"

namespace ds::test {

class ModuleFile {
 public:
  using Config = std::map<std::string, double>;

  explicit ModuleFile(const std::string& file, Config config = {}) : config_(std::move(config)) {
    host_.size = sizeof host_;
    host_.abi_minor = DS_ABI_MINOR;
    host_.config_number = [](const ds_config* c, const char* key, double* out) -> ds_code {
      const auto& config = *reinterpret_cast<const Config*>(c);
      const auto at = config.find(key);
      if (at == config.end()) return DS_E_CONFIG;
      *out = at->second;
      return DS_OK;
    };
    const std::string path = std::string(DS_MODULES_DIR) + "/" + file + ".so";
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // for the life of the program
    if (handle == nullptr) ADD_FAILURE() << dlerror();
    const auto entry = reinterpret_cast<ds_plugin_entry_fn>(dlsym(handle, DS_ENTRY_NAME));
    EXPECT_EQ(entry(&host_, &plugin, &st), DS_OK) << text();
    component = plugin->components[0];
    call.size = sizeof call;
    call.parallel = pool_.engine();
    create(config_);
  }
  ~ModuleFile() {
    if (instance != nullptr) component->ops->destroy(instance);
  }
  ModuleFile(const ModuleFile&) = delete;

  /// In place of the instance that was there.
  ds_code create(Config config) {
    if (instance != nullptr) component->ops->destroy(instance);
    instance = nullptr;
    config_ = std::move(config);
    return component->create(&host_, as_config(config_), {DS_DEV_CPU, 0}, &instance, &st);
  }
  ds_code reconfigure(Config config) {
    config_ = std::move(config);
    return component->ops->reconfigure(instance, as_config(config_), &st);
  }

  template <class Table>
  const Table& table() const {
    return *static_cast<const Table*>(component->table);
  }
  std::string text() const { return {st.text, st.len}; }
  std::string save() {
    std::string out;
    const ds_sink sink = sink_into(out);
    EXPECT_EQ(component->ops->save(instance, &sink, &st), DS_OK) << text();
    return out;
  }
  ds_code restore(std::string_view bytes) {
    ds_source source{};
    source.size = sizeof source;
    source.ctx = &bytes;
    source.read = [](void* ctx, void* to, std::uint64_t n, std::uint64_t* got) -> ds_code {
      auto& left = *static_cast<std::string_view*>(ctx);
      *got = left.copy(static_cast<char*>(to), std::min<std::uint64_t>(n, 1000));
      left.remove_prefix(*got);
      return DS_OK;
    };
    return component->ops->restore(instance, &source, sdk::str("1.0.0"), &st);
  }
  static ds_sink sink_into(std::string& out) {
    ds_sink sink{};
    sink.size = sizeof sink;
    sink.ctx = &out;
    sink.write = [](void* ctx, const void* bytes, std::uint64_t n) -> ds_code {
      static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
      return DS_OK;
    };
    return sink;
  }

  const ds_plugin* plugin = nullptr;
  const ds_component* component = nullptr;
  ds_instance* instance = nullptr;
  ds_call call{};
  ds_status st{};

 private:
  static const ds_config* as_config(const Config& config) {
    return reinterpret_cast<const ds_config*>(&config);
  }
  ds_host host_{};
  Config config_;
  Pool pool_{2};
};

}  // namespace ds::test
