// SPDX-License-Identifier: Apache-2.0
// One plugin file and the instances made from it. Either it is loaded here, from the bytes that
// were checked, by way of a sealed memory file that stays open: glibc would hand out the old
// library for a path or descriptor number that it has seen; it is never unmapped. Or it was only
// described by a helper process: then none of its code ever runs here, and its instances live in
// helpers.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "ds/plugin.h"
#include "ds/status.h"
#include "plugin/abi.h"
#include "plugin/crash_report.h"
#include "plugin/description.h"
#include "plugin/isolated.h"
#include "plugin/plugin_config.h"
#include "plugin/plugin_file.h"
#include "plugin/recorded_calls.h"
#include "storage/descriptor.h"

namespace ds {

/// What plugins may use of the daemon, apart from memory. Called from any thread.
struct PluginServices {
  std::function<void(int32_t level, std::string_view component, std::string_view text)> log;
  std::function<void(std::string_view name, double value, bool is_counter)> metric;
};

class PluginLibrary {
 public:
  /// Judges the bytes (plugin/elf_file.h), loads them, asks for the descriptor and checks it
  /// against the note. `services` outlives the process's plugins.
  static Result<std::shared_ptr<const PluginLibrary>> load(const FileContent& file,
                                                           const PluginServices& services);
  /// The same, but a helper process loads the bytes and says what the descriptor is.
  static Result<std::shared_ptr<const PluginLibrary>> describe(const FileContent& file,
                                                               const PluginServices& services,
                                                               const IsolationOptions& isolation);

  const std::string& path() const { return path_; }
  const std::string& sha256() const { return sha256_; }
  const Description& said() const { return said_; }
  const std::string& id() const { return said_.id; }
  const std::string& version() const { return said_.version; }
  const std::string& license() const { return said_.license; }
  uint32_t abi_minor() const { return said_.abi_minor; }
  /// Whether its code may run in this process.
  bool runs_here() const { return described_ == nullptr; }
  const PluginServices& services() const { return *services_; }
  /// A helper process for its bytes, of no component yet.
  HelperLaunch launch(const IsolationOptions& isolation) const;
  const std::vector<ds_component>& components() const { return said_.components; }
  const ds_component* component(uint32_t kind, std::string_view name) const;
  const ds_host* host() const { return &host_; }
  /// Threads that the plugin has said it runs; memory that it holds of the host.
  int64_t threads() const { return threads_; }
  int64_t host_bytes() const { return host_bytes_; }

 private:
  friend struct HostTable;
  static std::shared_ptr<PluginLibrary> of(const FileContent& file, const PluginServices& services);

  const PluginServices* services_ = nullptr;
  std::string path_, sha256_;
  int file_ = -1;
  Descriptor own_file_;                         ///< closes file_ where nothing was loaded from it
  std::unique_ptr<DescribedPlugin> described_;  ///< null: loaded here
  Description said_;
  ds_host host_{};
  std::atomic<int64_t> threads_{0}, host_bytes_{0};
};

/// One component, created with one config. Destroyed with the last reference.
class PluginInstance {
 public:
  /// `isolation` given: in a helper process of its own. A library that does not run here needs it.
  static Result<std::shared_ptr<PluginInstance>> create(
      std::shared_ptr<const PluginLibrary> library, const ds_component& component,
      const Json& config, const IsolationOptions* isolation = nullptr);
  /// A fresh instance with the same config, in the daemon.
  Result<std::shared_ptr<PluginInstance>> another() const {
    return create(library_, *library_->component(component_.kind, name()), config_->values);
  }
  ~PluginInstance();
  PluginInstance(const PluginInstance&) = delete;

  const PluginLibrary& library() const { return *library_; }
  const ds_component& component() const { return component_; }
  std::string_view name() const;
  ds_instance* handle() const { return handle_; }
  /// What its helper process does; null if it has none.
  const IsolatedInstance* isolated() const { return isolated_; }
  const Json& config() const { return config_->values; }
  /// The kind's table in full: ds_attention, ds_quantizer ...
  template <class Table>
  Table table() const {
    return full_struct(static_cast<const Table*>(component_.table));
  }
  /// Held around each call: a crash in it has a name, and [serial] and [hot] ones do not overlap
  /// unless the component is reentrant.
  struct Call {
    PluginRunning running;
    std::unique_lock<std::mutex> lock;
  };
  Call one_call() const { return {PluginRunning(who_.c_str()), lock_unless(DS_CAP_REENTRANT)}; }
  /// "<sha256> org.acme.nf4/my-nf4"
  const char* who() const { return who_.c_str(); }

  /// Of what it was asked; off until somebody turns it on.
  CallRecorder& recorded() const { return recorded_; }

  Status reconfigure(const Json& config);
  Result<std::string> save() const;
  Status restore(const std::string& state, std::string_view saved_by_version);
  Status health() const;

 private:
  PluginInstance(std::shared_ptr<const PluginLibrary> library, const ds_component& component);
  std::unique_lock<std::mutex> lock_unless(uint64_t caps) const {
    return (component_.caps & caps) != 0 ? std::unique_lock<std::mutex>()
                                         : std::unique_lock(calls_);
  }
  Call alone() const { return {PluginRunning(who_.c_str()), lock_unless(0)}; }
  const std::shared_ptr<const PluginLibrary> library_;
  Result<std::unique_ptr<ds_config>> config_from(const Json& values) const;
  Status create_isolated(const IsolationOptions& isolation);
  ds_component component_;
  IsolatedTable isolated_table_;
  const IsolatedInstance* isolated_ = nullptr;
  const std::string who_;
  ds_instance_ops ops_{};
  std::unique_ptr<ds_config> config_;
  ds_instance* handle_ = nullptr;
  mutable std::mutex calls_;
  mutable CallRecorder recorded_;
};

}  // namespace ds
