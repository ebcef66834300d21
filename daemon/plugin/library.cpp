// SPDX-License-Identifier: Apache-2.0
#include "plugin/library.h"

#include <cstdlib>
#include <cstring>

#include "plugin/elf_file.h"
#include "plugin/load_entry.h"

namespace ds {

/// The functions behind ds_host; ctx is the library that calls.
struct HostTable {
  static PluginLibrary& caller(void* ctx) { return *static_cast<PluginLibrary*>(ctx); }

  static const void* get_interface(void*, ds_str) { return nullptr; }

  static int32_t log_enabled(void*, int32_t level) { return level >= DS_LOG_INFO ? 1 : 0; }

  static void log(void* ctx, int32_t level, ds_str component, ds_str text) {
    const PluginLibrary& library = caller(ctx);
    if (library.services_->log)
      library.services_->log(level, library.id_ + "/" + std::string(text_of(component)),
                             text_of(text));
  }

  static ds_code alloc(void* ctx, ds_device device, uint64_t bytes, uint64_t align, void** out) {
    if (out == nullptr) return DS_E_ARG;
    if (device.type != DS_DEV_CPU) return DS_E_DEVICE;
    const uint64_t unit = std::max<uint64_t>(align, sizeof(void*));
    if ((unit & (unit - 1)) != 0 || bytes > UINT64_MAX - unit) return DS_E_ARG;
    *out = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
    if (*out == nullptr && bytes != 0) return DS_E_NOMEM;
    caller(ctx).host_bytes_ += static_cast<int64_t>(bytes);
    return DS_OK;
  }

  static void dealloc(void* ctx, ds_device device, void* p, uint64_t bytes) {
    if (p == nullptr || device.type != DS_DEV_CPU) return;
    std::free(p);
    caller(ctx).host_bytes_ -= static_cast<int64_t>(bytes);
  }

  static void thread_enter(void* ctx, ds_str) { ++caller(ctx).threads_; }
  static void thread_leave(void* ctx) { --caller(ctx).threads_; }

  static void metric(void* ctx, ds_str name, double value, int32_t is_counter) {
    const PluginLibrary& library = caller(ctx);
    if (library.services_->metric) library.services_->metric(text_of(name), value, is_counter != 0);
  }

  static ds_host table(PluginLibrary* library) {
    ds_host h{};
    h.size = sizeof h;
    h.abi_minor = DS_ABI_MINOR;
    h.ctx = library;
    h.name = abi_str("driftstone");
    h.version = abi_str(DS_VERSION);
    h.get_interface = &get_interface;
    h.log_enabled = &log_enabled;
    h.log = &log;
    h.alloc = &alloc;
    h.dealloc = &dealloc;
    h.thread_enter = &thread_enter;
    h.thread_leave = &thread_leave;
    h.metric = &metric;
    h.config_int = &config_int;
    h.config_number = &config_number;
    h.config_text = &config_text;
    h.config_json = &config_json;
    return h;
  }
};

namespace {

constexpr uint64_t kComponentLimit = 64;

bool usable_name(std::string_view name) {
  return !name.empty() && name.size() <= 64 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
                  c == '.';
         });
}

/// What a kind's table must have, by the header's "opt." marks.
bool has_required(const ds_component& c) {
  switch (c.kind) {
    case DS_KIND_ENCODER: {
      const auto t = full_struct(static_cast<const ds_encoder*>(c.table));
      return t.plan != nullptr && t.encode != nullptr && t.modalities != 0;
    }
    case DS_KIND_ATTENTION: {
      const auto t = full_struct(static_cast<const ds_attention*>(c.table));
      return t.plan != nullptr && t.prefill != nullptr;
    }
    case DS_KIND_QUANTIZER: {
      const auto t = full_struct(static_cast<const ds_quantizer*>(c.table));
      return t.format != nullptr && t.quantize != nullptr && t.dequantize != nullptr;
    }
    case DS_KIND_LEARNER:
      return full_struct(static_cast<const ds_learner*>(c.table)).draws != nullptr;
    case DS_KIND_CURRICULUM:
      return full_struct(static_cast<const ds_curriculum*>(c.table)).pick != nullptr;
    case DS_KIND_RETRIEVER: {
      const auto t = full_struct(static_cast<const ds_retriever*>(c.table));
      return t.put != nullptr && t.erase != nullptr && t.commit != nullptr && t.search != nullptr &&
             t.fetch != nullptr;
    }
    case DS_KIND_TOOL: {
      const auto t = full_struct(static_cast<const ds_tool*>(c.table));
      return t.analyse != nullptr || t.invoke != nullptr;
    }
    default:
      return false;
  }
}

Status broken(const std::string& path, const std::string& what) {
  return Status(Code::kPlugin, path + ": " + what);
}

}  // namespace

Status PluginLibrary::add_component(const ds_component* given, uint32_t note_kinds) {
  if (given == nullptr) return broken(path_, "a component is NULL");
  const ds_component c = full_struct(given);
  const std::string name(text_of(c.name));
  if (!usable_name(name))
    return broken(path_, "component name \"" + name +
                             "\": expected 1 to 64 of a-z, 0-9, dot, dash, underscore");
  const std::string_view kind = kind_name(c.kind);
  if (kind.empty())
    return broken(path_, name + ": kind " + std::to_string(c.kind) + " is not known here");
  if ((note_kinds & (1u << c.kind)) == 0)
    return broken(path_, name + ": kind " + std::string(kind) + " is not in the file's note");
  if (component(c.kind, name) != nullptr)
    return broken(path_, std::string(kind) + " " + name + " is there twice");
  if (c.min_host_minor > DS_ABI_MINOR)
    return unsupported(path_ + ": " + name + " needs plugin ABI 1." +
                       std::to_string(c.min_host_minor) + ", this host has 1." +
                       std::to_string(DS_ABI_MINOR));
  if ((c.caps & DS_CAP_CPU) == 0)
    return unsupported(path_ + ": " + name + " does not run on a CPU");
  if (c.create == nullptr || c.ops == nullptr || full_struct(c.ops).destroy == nullptr)
    return broken(path_, name + ": create or destroy is missing");
  if (c.table == nullptr || !has_required(c))
    return broken(path_, name + ": a function that every " + std::string(kind) + " has is missing");
  DS_TRY(make_plugin_config(name, text_of(c.config_schema), Json::object()).status().in(path_));
  components_.push_back(c);
  return {};
}

Status PluginLibrary::read_descriptor(ds_plugin_entry_fn entry, std::string_view note_id,
                                      uint32_t note_kinds) {
  const ds_plugin* given = nullptr;
  ds_status st{};
  const ds_code code = entry(&host_, &given, &st);
  if (code != DS_OK) return plugin_status(path_, code, st);
  if (given == nullptr) return broken(path_, "the entry gave no descriptor");
  const ds_plugin plugin = full_struct(given);
  id_ = text_of(plugin.id);
  version_ = text_of(plugin.version);
  license_ = text_of(plugin.license);
  abi_minor_ = plugin.abi_minor;
  if (id_ != note_id)
    return broken(path_,
                  "id \"" + id_ + "\", the file's note says \"" + std::string(note_id) + "\"");
  if (version_.empty() || version_.size() > 64)
    return broken(path_, "version is empty or too long");
  if (plugin.component_count == 0 || plugin.component_count > kComponentLimit ||
      plugin.components == nullptr)
    return broken(path_, std::to_string(plugin.component_count) + " components, expected 1 to " +
                             std::to_string(kComponentLimit));
  for (uint32_t i = 0; i < plugin.component_count; ++i)
    DS_TRY(add_component(plugin.components[i], note_kinds));
  return {};
}

Result<std::shared_ptr<const PluginLibrary>> PluginLibrary::load(const FileContent& file,
                                                                 const PluginServices& services) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(file.bytes.data()),
                                         file.bytes.size());
  Result<PluginFile> judged = inspect_plugin(bytes);
  if (!judged.ok()) return judged.status().in(file.path);
  const std::string who = file.sha256 + " " + judged->id;
  const PluginRunning running(who.c_str());  // constructors of the file run, too
  int file_at = -1;
  const Result<ds_plugin_entry_fn> entry = load_entry(judged->id, bytes, &file_at);
  if (!entry.ok()) return entry.status().in(file.path);
  auto library = std::make_shared<PluginLibrary>();
  library->services_ = &services;
  library->file_ = file_at;
  library->path_ = file.path;
  library->sha256_ = file.sha256;
  library->host_ = HostTable::table(library.get());
  DS_TRY(library->read_descriptor(*entry, judged->id, judged->kinds));
  return std::shared_ptr<const PluginLibrary>(std::move(library));
}

const ds_component* PluginLibrary::component(uint32_t kind, std::string_view name) const {
  for (const ds_component& c : components_) {
    if (c.kind == kind && text_of(c.name) == name) return &c;
  }
  return nullptr;
}

Result<std::shared_ptr<PluginInstance>> PluginInstance::create(
    std::shared_ptr<const PluginLibrary> library, const ds_component& component, const Json& config,
    const IsolationOptions* isolation) {
  std::shared_ptr<PluginInstance> made(new PluginInstance(std::move(library), component));
  made->ops_ = full_struct(component.ops);
  DS_ASSIGN(made->config_,
            make_plugin_config(made->name(), text_of(component.config_schema), config));
  if (isolation != nullptr) {
    DS_TRY(made->create_isolated(*isolation));
    return made;
  }
  ds_status st{};
  const PluginRunning running(made->who());
  const ds_code code = component.create(made->library().host(), made->config_.get(),
                                        {DS_DEV_CPU, 0}, &made->handle_, &st);
  if (code != DS_OK) {
    made->handle_ = nullptr;
    return plugin_status(made->name(), code, st);
  }
  if (made->handle_ == nullptr)
    return Status(Code::kPlugin, std::string(made->name()) + ": create gave no instance");
  return made;
}

Status PluginInstance::create_isolated(const IsolationOptions& isolation) {
  const std::string_view cannot = IsolatedInstance::cannot(component_);
  if (!cannot.empty())
    return unsupported(std::string(name()) + ": cannot run isolated: " + std::string(cannot));
  HelperLaunch launch;
  launch.program = isolation.program;
  launch.file = library_->file();
  launch.kind = kind_name(component_.kind);
  launch.component = name();
  launch.path = library_->path();
  launch.sha256 = library_->sha256();
  launch.version = library_->version();
  launch.arena_bytes = isolation.arena_bytes;
  const auto log = [library = library_.get(), who = library_->id() + "/" + std::string(name())](
                       int32_t level, std::string_view text) {
    if (library->services().log) library->services().log(level, who, text);
  };
  DS_ASSIGN(auto made,
            IsolatedInstance::create(isolation, std::move(launch), component_, config_->text, log));
  component_ = IsolatedInstance::proxied(component_, isolated_table_);
  ops_ = *component_.ops;
  isolated_ = made.get();
  handle_ = reinterpret_cast<ds_instance*>(made.release());
  return {};
}

PluginInstance::~PluginInstance() {
  const PluginRunning running(who_.c_str());
  if (handle_ != nullptr) ops_.destroy(handle_);
}

std::string_view PluginInstance::name() const { return text_of(component_.name); }

PluginInstance::PluginInstance(std::shared_ptr<const PluginLibrary> library,
                               const ds_component& component)
    : library_(std::move(library)),
      component_(component),
      who_(library_->sha256() + " " + library_->id() + "/" + std::string(text_of(component.name))) {
}

Status PluginInstance::reconfigure(const Json& values) {
  const std::string_view schema = text_of(component_.config_schema);
  DS_ASSIGN(auto next, make_plugin_config(name(), schema, values));
  DS_ASSIGN(const std::string key, restart_key(schema, config_->values, next->values));
  if (!key.empty())
    return unsupported(std::string(name()) + ": " + key +
                       " cannot change while it runs; reload the plugin with it");
  if (ops_.reconfigure == nullptr) return unsupported(std::string(name()) + ": has no reconfigure");
  ds_status st{};
  const Call call = alone();
  const ds_code code = ops_.reconfigure(handle_, next.get(), &st);
  if (code != DS_OK) return plugin_status(name(), code, st);
  config_ = std::move(next);
  return {};
}

Result<std::string> PluginInstance::save() const {
  if (ops_.save == nullptr) return unsupported(std::string(name()) + ": keeps no state");
  constexpr size_t kStateLimit = size_t{1} << 30;
  std::string out;
  const auto write = [](void* ctx, const void* bytes, uint64_t n) -> ds_code {
    auto& to = *static_cast<std::string*>(ctx);
    if (n > kStateLimit - to.size()) return DS_E_NOMEM;
    to.append(static_cast<const char*>(bytes), static_cast<size_t>(n));
    return DS_OK;
  };
  const ds_sink sink{sizeof sink, 0, &out, write};
  ds_status st{};
  const Call call = alone();
  const ds_code code = ops_.save(handle_, &sink, &st);
  if (code != DS_OK) return plugin_status(name(), code, st);
  return out;
}

Status PluginInstance::restore(const std::string& state, std::string_view saved_by_version) {
  if (ops_.restore == nullptr) return unsupported(std::string(name()) + ": keeps no state");
  std::string_view rest(state);
  const auto read = [](void* ctx, void* bytes, uint64_t n, uint64_t* got) -> ds_code {
    auto& from = *static_cast<std::string_view*>(ctx);
    *got = std::min<uint64_t>(n, from.size());
    std::memcpy(bytes, from.data(), static_cast<size_t>(*got));
    from.remove_prefix(static_cast<size_t>(*got));
    return DS_OK;
  };
  const ds_source source{sizeof source, 0, &rest, read};
  ds_status st{};
  const Call call = alone();
  return plugin_status(name(), ops_.restore(handle_, &source, abi_str(saved_by_version), &st), st);
}

Status PluginInstance::health() const {
  if (ops_.health == nullptr) return {};
  const PluginRunning running(who_.c_str());
  ds_status st{};
  return plugin_status(name(), ops_.health(handle_, &st), st);
}

}  // namespace ds
