// SPDX-License-Identifier: Apache-2.0
#include "plugin/plugins.h"

#include <algorithm>

#include "plugin/self_test.h"

namespace ds {
namespace {

constexpr const char *kBuiltIn = "built-in", *kInstalled = "installed", *kNobody = "nobody";

std::string installed_list(const PluginOptions& options) {
  return options.data + "/installed.json";
}

}  // namespace

Plugins::Plugins(PluginOptions options, PluginServices services, FileSystem& fs, Clock& clock)
    : options_(std::move(options)),
      services_(std::move(services)),
      fs_(fs),
      clock_(clock),
      trust_(fs, options_.data),
      shadow_(options_.shadow) {}

Result<std::unique_ptr<Plugins>> Plugins::open(PluginOptions options, PluginServices services,
                                               FileSystem& fs, Clock& clock) {
  std::unique_ptr<Plugins> out(new Plugins(std::move(options), std::move(services), fs, clock));
  DS_TRY(out->trust_.read());
  DS_TRY(out->take_crash_report());
  out->scan_modules();
  DS_TRY(out->scan_installed());
  return out;
}

void Plugins::scan_modules() {
  const Result<std::vector<std::string>> names = fs_.list(options_.modules);
  if (!names.ok()) {
    refused_.emplace_back(options_.modules, names.status().message());
    return;
  }
  for (const std::string& name : *names) {
    if (!name.ends_with(".so")) continue;
    const std::string path = options_.modules + "/" + name;
    const auto added = [&]() -> Status {
      DS_ASSIGN(const FileContent file, read_plugin_file(path));
      return add(file, {kBuiltIn, "its place beside the daemon"}, Json(), Shadow::kOff).status();
    }();
    if (!added.ok()) refused_.emplace_back(path, added.message());
  }
}

Result<Json> Plugins::installed() const {
  const std::string list = installed_list(options_);
  if (!fs_.exists(list)) return Json::array();
  DS_ASSIGN(const std::string text, fs_.read(list));
  Result<Json> entries = parse_json(text);
  if (!entries.ok()) return entries.status().in(list);
  if (!entries->is_array()) return corrupt(list + ": expected an array");
  return entries;
}

/// Marks the installed file that the last process crashed in. A built-in module stays: without it
/// there may be nothing to serve with.
Status Plugins::take_crash_report() {
  const std::string report = crash_report(options_.data);
  if (!fs_.exists(report)) return {};
  DS_ASSIGN(const std::string text, fs_.read(report));
  const std::string sha256 = text.substr(0, text.find(' '));
  const std::string signal = text.substr(std::min(text.rfind(' ') + 1, text.size()));
  DS_ASSIGN(Json entries, installed());
  for (Json& entry : entries) {
    if (entry.value("sha256", "") == sha256)
      entry["crashed"] = signal.substr(0, signal.find_first_of("\n"));
  }
  DS_TRY(write_file_atomically(fs_, installed_list(options_), dump_json(entries, 2) + "\n"));
  return fs_.remove_all(report);
}

Status Plugins::scan_installed() {
  DS_ASSIGN(const Json entries, installed());
  for (const Json& entry : entries) {
    const auto added = [&]() -> Status {
      DS_ASSIGN(const std::string sha256, get_string(entry, "sha256"));
      DS_ASSIGN(const std::string crashed, get_string(entry, "crashed", ""));
      if (!crashed.empty())
        return unavailable("the daemon crashed in it (" + crashed +
                           "); `plugin load FILE --trust` lets it in again");
      DS_ASSIGN(const bool isolated, get_bool(entry, "isolated", false));
      DS_ASSIGN(FileContent file, read_plugin_file(options_.data + "/" + sha256 + ".so"));
      if (file.sha256 != sha256)
        return corrupt(file.path + ": SHA-256 is " + file.sha256 + ", expected " + sha256);
      DS_ASSIGN(const std::string by, get_string(entry, "trusted_by", "allow-list"));
      if (by == "allow-list" && !isolated) DS_TRY(trust_.judge(file).status());
      DS_ASSIGN(file.path, get_string(entry, "path", file.path));
      const Json* config = ds::find(entry, "config");
      return add(file, {kInstalled, by, isolated}, config != nullptr ? *config : Json(),
                 Shadow::kOff)
          .status();
    }();
    if (!added.ok()) {
      const std::string path = entry.value("path", "?");
      refused_.emplace_back(path, path + ": " + added.message());
    }
  }
  return {};
}

Json Plugins::config_of(std::string_view component) const {
  const Json* own = ds::find(options_.config, component);
  return own != nullptr ? *own : Json::object();
}

/// Tools run programs and read what users send: they are kept out of the daemon unless told
/// otherwise. What nobody trusts is kept out of it whatever is told.
Result<bool> Plugins::runs_isolated(const PluginLibrary& library,
                                    const ds_component& component) const {
  const bool here = library.runs_here();
  if (here && options_.isolation.program.empty()) return false;
  const std::string name(text_of(component.name));
  const std::string_view cannot = IsolatedInstance::cannot(component);
  if (!here && !cannot.empty())
    return unsupported(std::string(kind_name(component.kind)) + " " + name +
                       " cannot run isolated: " + std::string(cannot) +
                       "; a file with it has to be trusted");
  const Json* place = ds::find(options_.places, name);
  if (place == nullptr) return !here || (component.kind == DS_KIND_TOOL && cannot.empty());
  if (*place != "process" && *place != "daemon")
    return invalid("plugins.isolation: " + name + ": " + dump_json(*place) +
                   ", expected \"process\" or \"daemon\"");
  if (!here && *place == "daemon")
    return conflict("plugins.isolation says \"daemon\" for " + name +
                    ", but its file was loaded with --isolated; for the daemon it has to be " +
                    "trusted and loaded without");
  return *place == "process";
}

Status Plugins::make_instance(Slot& slot, Generation& generation,
                              const ds_component& component) const {
  DS_ASSIGN(const bool isolated, runs_isolated(*generation.library, component));
  DS_ASSIGN(generation.instance,
            PluginInstance::create(generation.library, component, generation.config,
                                   isolated ? &options_.isolation : nullptr));
  generation.running = generation.instance;
  generation.instance->recorded().turn(shadow_ != Shadow::kOff);
  DS_TRY(self_test(*generation.instance).in("self-test"));
  return slot.generations.empty() ? Status() : hand_over(slot, generation);
}

/// The state of the serving generation, if it has one, goes to the next.
Status Plugins::hand_over(const Slot& slot, Generation& next) const {
  const Generation& now = slot.generations[slot.serving];
  if (now.instance == nullptr) return {};
  const bool keeps = (now.instance->component().caps & DS_CAP_STATEFUL) != 0;
  const bool takes = (next.instance->component().caps & DS_CAP_STATEFUL) != 0;
  if (!keeps || !takes) return {};
  DS_ASSIGN(const std::string state, now.instance->save());
  return next.instance->restore(state, now.library->version());
}

Result<std::shared_ptr<const PluginLibrary>> Plugins::library_of(const FileContent& file,
                                                                 bool isolated) const {
  if (!isolated) return PluginLibrary::load(file, services_);
  DS_ASSIGN(const auto library, PluginLibrary::describe(file, services_, options_.isolation));
  for (const ds_component& component : library->components())
    DS_TRY(runs_isolated(*library, component).status().in(file.path));
  return library;
}

Result<std::vector<Plugins::Swap>> Plugins::add(const FileContent& file, const Standing& standing,
                                                const Json& config, Shadow shadow) {
  DS_ASSIGN(const auto library, library_of(file, standing.isolated));
  std::map<Key, Slot> next;  // all components or none
  std::vector<Swap> swaps;
  for (const ds_component& component : library->components()) {
    const Key key(component.kind, text_of(component.name));
    Slot slot;
    {
      std::lock_guard lock(mutex_);
      const auto known = slots_.find(key);
      if (known != slots_.end()) slot = known->second;
    }
    const Generation* now = slot.generations.empty() ? nullptr : &slot.generations[slot.serving];
    if (now != nullptr && now->library->id() != library->id())
      return conflict(std::string(kind_name(key.first)) + " " + key.second + " of " + file.path +
                      " (" + library->id() + ") is there already, from " + now->library->id());
    Generation made;
    made.number = slot.next++;
    made.library = library;
    made.standing = standing;
    made.loaded_ms = clock_.unix_ms();
    made.config = !config.is_null() ? config : now != nullptr ? now->config : config_of(key.second);
    const bool in_use = now != nullptr && now->instance != nullptr;
    // The first of a component is created when somebody asks for it; what takes another's place has
    // to work before.
    if (now != nullptr) {
      DS_TRY(make_instance(slot, made, component));
      DS_TRY(replay_calls(slot, made, shadow));
    }
    slot.before = slot.serving;
    slot.generations.push_back(std::move(made));
    slot.serving = slot.generations.size() - 1;
    const Generation& last = slot.generations.back();
    if (in_use) swaps.push_back({key, {last.instance, last.number}});
    next[key] = std::move(slot);
  }
  std::lock_guard lock(mutex_);
  for (auto& [key, slot] : next) slots_[key] = std::move(slot);
  return swaps;
}

void Plugins::announce(const std::vector<Swap>& swaps) {
  std::vector<OnSwap> listeners;
  {
    std::lock_guard lock(mutex_);
    listeners = listeners_;
  }
  for (const Swap& swap : swaps) {
    for (const OnSwap& listener : listeners) listener(swap.key.first, swap.key.second, swap.next);
  }
}

void Plugins::on_swap(OnSwap listener) {
  std::lock_guard lock(mutex_);
  listeners_.push_back(std::move(listener));
}

Result<Plugins::Serving> Plugins::find(uint32_t kind, std::string_view name) {
  std::lock_guard change(change_mutex_);
  const Key key(kind, name);
  Slot slot;
  {
    std::lock_guard lock(mutex_);
    const auto known = slots_.find(key);
    if (known != slots_.end()) slot = known->second;
  }
  if (slot.generations.empty()) {
    std::string there;
    for (const std::string& n : names(kind)) there += (there.empty() ? "" : ", ") + n;
    return not_found(std::string(kind_name(kind)) + " \"" + std::string(name) +
                     "\": no such plugin, there are: " + (there.empty() ? "none" : there));
  }
  Generation& answers = answering(slot);
  if (answers.instance == nullptr) {
    const ds_component* component = answers.library->component(kind, name);
    Slot alone;  // a first instance takes no state over
    DS_TRY(make_instance(alone, answers, *component).in(key.second));
    std::lock_guard lock(mutex_);
    slots_[key] = slot;
  }
  return Serving{answers.instance, answers.number};
}

/// The serving generation, or a built-in one while the serving one's helper process is out of
/// order.
Plugins::Generation& Plugins::answering(Slot& slot) {
  Generation& serving = slot.generations[slot.serving];
  const IsolatedInstance* isolated =
      serving.instance != nullptr ? serving.instance->isolated() : nullptr;
  if (isolated == nullptr || !isolated->state().open) return serving;
  const auto own = std::ranges::find_if(slot.generations, [&](const Generation& g) {
    return g.standing.origin == kBuiltIn && &g != &serving;
  });
  return own == slot.generations.end() ? serving : *own;
}

std::vector<std::string> Plugins::names(uint32_t kind) const {
  std::lock_guard lock(mutex_);
  std::vector<std::string> out;
  for (const auto& [key, slot] : slots_) {
    if (key.first == kind) out.push_back(key.second);
  }
  return out;
}

Status Plugins::remember(const FileContent& file, const Standing& standing, const Json& config) {
  DS_TRY(fs_.make_directories(options_.data));
  DS_TRY(write_file_atomically(fs_, options_.data + "/" + file.sha256 + ".so", file.bytes));
  DS_ASSIGN(const Json entries, installed());
  Json kept = Json::array();
  for (const Json& entry : entries) {  // a newer build of the same file takes its place
    if (entry.value("path", "") != file.path) kept.push_back(entry);
  }
  kept.push_back({{"path", file.path},
                  {"sha256", file.sha256},
                  {"trusted_by", standing.trusted_by},
                  {"isolated", standing.isolated},
                  {"config", config},
                  {"installed_ms", clock_.unix_ms()}});
  return write_file_atomically(fs_, installed_list(options_), dump_json(kept, 2) + "\n");
}

Result<Json> Plugins::load(const std::string& path, bool trust, const Json& config,
                           std::optional<Shadow> shadow) {
  std::unique_lock change(change_mutex_);
  DS_ASSIGN(const FileContent file, read_plugin_file(path));
  Result<std::string> trusted = trust_.judge(file);
  if (!trusted.ok() && !trust)
    return Status(trusted.status().code(), trusted.status().message() +
                                               "; --trust allows this very file, --isolated runs " +
                                               "it in helper processes only");
  const Standing standing{kInstalled, trusted.ok() ? *trusted : "allow-list"};
  DS_ASSIGN(const std::vector<Swap> swaps, add(file, standing, config, shadow.value_or(shadow_)));
  if (!trusted.ok()) DS_TRY(trust_.allow(file, "load --trust"));
  return keep(std::move(change), file, standing, config, swaps);
}

Result<Json> Plugins::load_isolated(const std::string& path, const Json& config,
                                    std::optional<Shadow> shadow) {
  std::unique_lock change(change_mutex_);
  DS_ASSIGN(const FileContent file, read_plugin_file(path));
  const Result<std::string> trusted = trust_.judge(file);
  const Standing standing{kInstalled, trusted.ok() ? *trusted : kNobody, true};
  DS_ASSIGN(const std::vector<Swap> swaps, add(file, standing, config, shadow.value_or(shadow_)));
  return keep(std::move(change), file, standing, config, swaps);
}

/// What was added is there after a restart, too, and is told.
Result<Json> Plugins::keep(std::unique_lock<std::mutex> change, const FileContent& file,
                           const Standing& standing, const Json& config,
                           const std::vector<Swap>& swaps) {
  DS_TRY(remember(file, standing, config));
  change.unlock();
  announce(swaps);
  Json out = {{"path", file.path},
              {"sha256", file.sha256},
              {"trusted_by", standing.trusted_by},
              {"isolated", standing.isolated},
              {"components", Json::array()}};
  std::lock_guard lock(mutex_);
  for (const auto& [key, slot] : slots_) {
    const Generation& g = slot.generations[slot.serving];
    if (g.library->sha256() == file.sha256) out["components"].push_back(describe(key, slot, g));
  }
  return out;
}

Result<Plugins::Slot*> Plugins::slot_of(const std::string& name, Key* key) {
  Slot* found = nullptr;
  for (auto& [k, slot] : slots_) {
    const Generation& serving = slot.generations[slot.serving];
    if (k.second != name && serving.library->id() != name &&
        std::string(kind_name(k.first)) + "/" + k.second != name)
      continue;
    if (found != nullptr)
      return conflict("plugin \"" + name + "\" names more than one component, say KIND/NAME");
    found = &slot;
    if (key != nullptr) *key = k;
  }
  if (found != nullptr) return found;
  std::string there;
  for (const auto& [k, slot] : slots_) there += (there.empty() ? "" : ", ") + k.second;
  return not_found("plugin \"" + name + "\": there are: " + (there.empty() ? "none" : there));
}

Result<Json> Plugins::reload(const std::string& name, const std::string& path, const Json& config,
                             std::optional<Shadow> shadow) {
  std::string from = path;
  Generation now;
  Key key;
  {
    std::lock_guard lock(mutex_);
    DS_ASSIGN(const Slot* slot, slot_of(name, &key));
    now = slot->generations[slot->serving];
    if (from.empty()) from = now.library->path();
  }
  std::unique_lock change(change_mutex_);
  DS_ASSIGN(const FileContent file, read_plugin_file(from));
  if (now.standing.origin != kBuiltIn || !path.empty()) {
    const Result<std::string> trusted = trust_.judge(file);
    if (!trusted.ok() && !now.standing.isolated)
      return Status(trusted.status().code(),
                    trusted.status().message() + "; `load --trust` allows this very file");
    now.standing.trusted_by = trusted.ok() ? *trusted : kNobody;
  }
  DS_ASSIGN(const std::vector<Swap> swaps,
            add(file, now.standing, config, shadow.value_or(shadow_)));
  if (now.standing.origin == kInstalled) DS_TRY(remember(file, now.standing, config));
  change.unlock();
  announce(swaps);
  return show(std::string(kind_name(key.first)) + "/" + key.second);
}

Result<Json> Plugins::rollback(const std::string& name) {
  std::unique_lock change(change_mutex_);
  Swap swap;
  {
    std::lock_guard lock(mutex_);
    DS_ASSIGN(Slot * slot, slot_of(name, &swap.key));
    Generation& before = slot->generations[slot->before];
    if (slot->before == slot->serving || before.retired)
      return conflict("plugin " + swap.key.second + ": no generation before " +
                      std::to_string(slot->generations[slot->serving].number) +
                      " is left to go back to");
    std::swap(slot->before, slot->serving);
    const Generation& now = slot->generations[slot->serving];
    swap.next = {now.instance, now.number};
  }
  change.unlock();
  if (swap.next.instance != nullptr) announce({swap});
  return show(std::string(kind_name(swap.key.first)) + "/" + swap.key.second);
}

Result<Json> Plugins::retire(const std::string& name) {
  std::lock_guard change(change_mutex_);
  Key key;
  std::vector<std::shared_ptr<PluginInstance>> gone;  // destroyed without the lock
  {
    std::lock_guard lock(mutex_);
    DS_ASSIGN(Slot * slot, slot_of(name, &key));
    for (size_t i = 0; i < slot->generations.size(); ++i) {
      Generation& g = slot->generations[i];
      if (i == slot->serving || g.retired) continue;
      gone.push_back(std::move(g.instance));
      g.instance.reset();
      g.retired = true;
    }
    slot->before = slot->serving;
  }
  gone.clear();
  return show(std::string(kind_name(key.first)) + "/" + key.second);
}

Result<Json> Plugins::configure(const std::string& name, const Json& changes) {
  std::lock_guard change(change_mutex_);
  Key key;
  std::shared_ptr<PluginInstance> instance;
  {
    std::lock_guard lock(mutex_);
    DS_ASSIGN(const Slot* slot, slot_of(name, &key));
    instance = slot->generations[slot->serving].instance;
  }
  if (instance == nullptr) return unavailable("plugin " + key.second + ": nothing uses it yet");
  if (!changes.is_object()) return invalid("config: expected an object of keys");
  Json next = instance->config();
  for (const auto& [k, value] : changes.items()) next[k] = value;
  DS_TRY(instance->reconfigure(next));
  {
    std::lock_guard lock(mutex_);
    Slot& slot = slots_[key];
    slot.generations[slot.serving].config = instance->config();
  }
  return show(std::string(kind_name(key.first)) + "/" + key.second);
}

Json Plugins::describe(const Key& key, const Slot& slot, const Generation& g) const {
  const bool serving = &g == &slot.generations[slot.serving];
  const bool before = slot.before != slot.serving && &g == &slot.generations[slot.before];
  const long users = g.running.use_count() - (g.instance != nullptr ? 1 : 0);
  const char* state = serving     ? (g.instance != nullptr ? "serving" : "ready")
                      : users > 0 ? "draining"
                      : before    ? "kept"
                      : g.retired ? "retired"
                                  : "idle";
  Json out = {{"name", key.second},
              {"kind", kind_name(key.first)},
              {"id", g.library->id()},
              {"version", g.library->version()},
              {"generation", g.number},
              {"state", state},
              {"users", users},
              {"threads", g.library->threads()},
              {"host_bytes", g.library->host_bytes()},
              {"origin", g.standing.origin},
              {"trusted_by", g.standing.trusted_by},
              {"isolated", g.standing.isolated},
              {"path", g.library->path()},
              {"sha256", g.library->sha256()},
              {"abi", "1." + std::to_string(g.library->abi_minor())},
              {"config", g.instance != nullptr ? g.instance->config() : g.config},
              {"recorded_calls", g.instance != nullptr ? g.instance->recorded().calls().size() : 0},
              {"loaded_ms", g.loaded_ms}};
  if (!g.shadow.is_null()) out["shadow"] = g.shadow;
  if (g.instance == nullptr) return out;
  const IsolatedInstance* isolated = g.instance->isolated();
  out["runs_in"] = isolated != nullptr ? "process" : "daemon";
  if (isolated == nullptr) return out;
  const IsolatedInstance::State helper = isolated->state();
  out["pid"] = helper.pid > 0 ? Json(helper.pid) : Json();
  out["deaths"] = helper.deaths;
  out["breaker"] = helper.breaker;
  return out;
}

Json Plugins::list() const {
  std::lock_guard lock(mutex_);
  Json out = {{"plugins", Json::array()}, {"refused", Json::array()}};
  for (const auto& [key, slot] : slots_)
    out["plugins"].push_back(describe(key, slot, slot.generations[slot.serving]));
  for (const auto& [path, why] : refused_)
    out["refused"].push_back({{"path", path}, {"reason", why}});
  return out;
}

Result<Json> Plugins::show(const std::string& name) const {
  std::lock_guard lock(mutex_);
  Key key;
  DS_ASSIGN(const Slot* slot, const_cast<Plugins*>(this)->slot_of(name, &key));
  const Generation& serving = slot->generations[slot->serving];
  Json out = describe(key, *slot, serving);
  const ds_component* component = serving.library->component(key.first, key.second);
  out["summary"] = text_of(component->summary);
  out["license"] = serving.library->license();
  const Result<Json> schema = parse_json(text_of(component->config_schema));
  out["config_schema"] = schema.ok() ? *schema : Json::object();
  out["generations"] = Json::array();
  for (const Generation& g : slot->generations)
    out["generations"].push_back(describe(key, *slot, g));
  return out;
}

}  // namespace ds
