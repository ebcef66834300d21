// SPDX-License-Identifier: Apache-2.0
// All plugins of the daemon: which files are loaded and why they may be, and for each component its
// generations, one of which serves. A generation is one load of a file with one config; a newer one
// is made beside the serving one, tested, given its state, and swapped in by one pointer. What runs
// on the older one ends there. Code is never unmapped; a retired generation has no instance left.
//
// Thread-safe. Loading runs code of the plugin on the caller's thread.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ds/status.h"
#include "plugin/library.h"
#include "plugin/trust.h"
#include "storage/json.h"
#include "storage/seams.h"

namespace ds {

/// What a reload does with the recorded calls of the generation that serves: nothing; runs them on
/// the new one and says what differs; or also keeps the old one when something does.
enum class Shadow { kOff, kReport, kRefuse };
/// "off", "report", "refuse".
Result<Shadow> shadow_of(std::string_view name);

struct PluginOptions {
  std::string modules;  ///< folder of the built-in ones, trusted as the daemon's own file is
  std::string data;     ///< <data>/plugins: installed files, hashes and keys that are trusted
  Json config = Json::object();  ///< by component name
  IsolationOptions isolation{};  ///< without a program all run in the daemon
  Json places = Json::object();  ///< "process" or "daemon", by component name
  Shadow shadow = Shadow::kReport;
};

class Plugins {
 public:
  /// The serving generation of a component.
  struct Serving {
    std::shared_ptr<const PluginInstance> instance;
    uint64_t generation = 0;
  };
  /// A swap: called after it, on the thread that made it, with no lock held.
  using OnSwap = std::function<void(uint32_t kind, const std::string& name, const Serving& next)>;

  /// Loads the built-in modules and what was installed before, except a file in which the daemon
  /// crashed last time (report_plugin_crashes() with crash_report()). A file that is refused is
  /// logged and stays in refused(); the others load.
  static std::string crash_report(const std::string& data) { return data + "/crashed"; }
  static Result<std::unique_ptr<Plugins>> open(PluginOptions options, PluginServices services,
                                               FileSystem& fs, Clock& clock);

  /// Creates the instance at the first call. While the serving one's helper process has died too
  /// often, the built-in generation, if there is one. An unknown name's error lists the known ones.
  Result<Serving> find(uint32_t kind, std::string_view name);
  /// Names of the components of a kind, sorted.
  std::vector<std::string> names(uint32_t kind) const;
  void on_swap(OnSwap listener);

  /// Installs and loads a file. `trust`: its hash is trusted from now on; else the file needs a
  /// trusted signature or hash. A component that is there already gets a new generation.
  Result<Json> load(const std::string& path, bool trust, const Json& config,
                    std::optional<Shadow> shadow = {});
  /// The same for a file that nobody has to trust: none of its code ever runs in the daemon, its
  /// components run in helper processes. One that cannot is refused.
  Result<Json> load_isolated(const std::string& path, const Json& config,
                             std::optional<Shadow> shadow = {});
  /// A new generation of each component of the plugin or component `name`, from the file as it is
  /// now at `path`, or where it came from when empty; `config` null = unchanged.
  Result<Json> reload(const std::string& name, const std::string& path, const Json& config,
                      std::optional<Shadow> shadow = {});
  /// Back to the generation that served before.
  Result<Json> rollback(const std::string& name);
  /// Lets go of the generations that do not serve.
  Result<Json> retire(const std::string& name);
  /// Changes live keys of a serving instance.
  Result<Json> configure(const std::string& name, const Json& changes);

  /// Of reloads that do not say; kOff also ends the recording of calls.
  void set_shadow(Shadow shadow);
  /// What two components of a kind answer to the same calls: those recorded, else the self-test's.
  /// A name may end in "@GENERATION"; `b` empty: the generation before the serving one.
  Result<Json> diff(const std::string& a, const std::string& b);
  /// Times the same calls for about `seconds` in all, one after the other, with no pool.
  Result<Json> bench(const std::string& name, double seconds);

  Json list() const;                                 ///< {"plugins":[...], "refused":[...]}
  Result<Json> show(const std::string& name) const;  ///< one component, all generations
  /// What would happen to a file and why, step by step, without running any of it.
  Json explain(const std::string& path) const;
  Trust& trust() { return trust_; }

 private:
  /// Where a file comes from and why it may run.
  struct Standing {
    std::string origin;      ///< "built-in", "installed"
    std::string trusted_by;  ///< "nobody": then isolated
    bool isolated = false;   ///< in helper processes only
  };
  struct Generation {
    uint64_t number = 0;
    std::shared_ptr<const PluginLibrary> library;
    std::shared_ptr<PluginInstance> instance;     ///< null: not created yet, or retired
    std::weak_ptr<const PluginInstance> running;  ///< the same; lives while somebody computes
    Standing standing;
    Json config;
    int64_t loaded_ms = 0;
    Json shadow;  ///< what the recorded calls gave before it served; null: none ran
    bool retired = false;
  };
  using Key = std::pair<uint32_t, std::string>;  // kind, component
  struct Slot {
    std::vector<Generation> generations;
    size_t serving = 0, before = 0;  ///< indices; before == serving: none
    uint64_t next = 1;
  };
  struct Swap {
    Key key;
    Serving next;
  };

  Plugins(PluginOptions options, PluginServices services, FileSystem& fs, Clock& clock);
  Status take_crash_report();
  void scan_modules();
  Status scan_installed();
  /// Adds the file's components, each as the serving one of a new slot or as a new generation.
  Result<std::vector<Swap>> add(const FileContent& file, const Standing& standing,
                                const Json& config, Shadow shadow);
  Result<std::shared_ptr<const PluginLibrary>> library_of(const FileContent& file,
                                                          bool isolated) const;
  Result<Json> keep(std::unique_lock<std::mutex> change, const FileContent& file,
                    const Standing& standing, const Json& config, const std::vector<Swap>& swaps);
  Status replay_calls(const Slot& slot, Generation& next, Shadow shadow) const;
  Result<Serving> instance_at(const std::string& name);
  Result<Serving> before(const std::string& name);
  Status make_instance(Slot& slot, Generation& generation, const ds_component& component) const;
  Status hand_over(const Slot& slot, Generation& next) const;
  Result<Slot*> slot_of(const std::string& name, Key* key = nullptr);
  Result<Json> installed() const;  ///< entries of installed.json
  Status remember(const FileContent& file, const Standing& standing, const Json& config);
  Json describe(const Key& key, const Slot& slot, const Generation& generation) const;
  Json config_of(std::string_view component) const;
  Result<bool> runs_isolated(const PluginLibrary& library, const ds_component& component) const;
  static Generation& answering(Slot& slot);
  void announce(const std::vector<Swap>& swaps);

  const PluginOptions options_;
  const PluginServices services_;
  FileSystem& fs_;
  Clock& clock_;
  Trust trust_;
  std::mutex change_mutex_;   ///< one change at a time
  mutable std::mutex mutex_;  ///< the maps; never held while a plugin runs
  std::map<Key, Slot> slots_;
  std::vector<std::pair<std::string, std::string>> refused_;  ///< path, why
  std::vector<OnSwap> listeners_;
  std::atomic<Shadow> shadow_;
};

}  // namespace ds
