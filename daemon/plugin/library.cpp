// SPDX-License-Identifier: Apache-2.0
#include "plugin/library.h"

#include <cstdlib>
#include <cstring>
#include <span>

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
      library.services_->log(level, library.id() + "/" + std::string(text_of(component)),
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

std::span<const std::byte> bytes_of(const FileContent& file) {
  return std::as_bytes(std::span(file.bytes.data(), file.bytes.size()));
}

}  // namespace

std::shared_ptr<PluginLibrary> PluginLibrary::of(const FileContent& file,
                                                 const PluginServices& services) {
  auto library = std::make_shared<PluginLibrary>();
  library->services_ = &services;
  library->path_ = file.path;
  library->sha256_ = file.sha256;
  library->host_ = HostTable::table(library.get());
  return library;
}

HelperLaunch PluginLibrary::launch(const IsolationOptions& isolation) const {
  HelperLaunch out;
  out.program = isolation.program;
  out.file = file_;
  out.path = path_;
  out.sha256 = sha256_;
  out.version = version();
  out.arena_bytes = isolation.arena_bytes;
  return out;
}

Result<std::shared_ptr<const PluginLibrary>> PluginLibrary::load(const FileContent& file,
                                                                 const PluginServices& services) {
  Result<PluginFile> judged = inspect_plugin(bytes_of(file));
  if (!judged.ok()) return judged.status().in(file.path);
  const std::string who = file.sha256 + " " + judged->id;
  const PluginRunning running(who.c_str());  // constructors of the file run, too
  const auto library = of(file, services);
  const Result<ds_plugin_entry_fn> entry = load_entry(judged->id, bytes_of(file), &library->file_);
  if (!entry.ok()) return entry.status().in(file.path);
  const ds_plugin* given = nullptr;
  ds_status st{};
  const ds_code code = (*entry)(&library->host_, &given, &st);
  if (code != DS_OK) return plugin_status(file.path, code, st);
  if (given == nullptr) return Status(Code::kPlugin, file.path + ": the entry gave no descriptor");
  DS_ASSIGN(library->said_, check_description(*given, *judged, file.path, Schemas::kRun));
  return std::shared_ptr<const PluginLibrary>(library);
}

Result<std::shared_ptr<const PluginLibrary>> PluginLibrary::describe(
    const FileContent& file, const PluginServices& services, const IsolationOptions& isolation) {
  Result<PluginFile> judged = inspect_plugin(bytes_of(file));
  if (!judged.ok()) return judged.status().in(file.path);
  const std::string who = file.sha256 + " " + judged->id;
  const PluginRunning running(who.c_str());  // hostile bytes are read
  if (isolation.program.empty())
    return unavailable(file.path + ": no ds-plugin-helper is there to run it in");
  const auto library = of(file, services);
  DS_ASSIGN(library->own_file_, sealed_file(judged->id, bytes_of(file)));
  library->file_ = library->own_file_.get();
  const HelperLaunch launch = library->launch(isolation);
  const auto log = [&](int32_t level, std::string_view text) {
    if (services.log) services.log(level, judged->id, text);
  };
  Result<std::string> said = describe_in_helper(isolation, launch, judged->id, log);
  if (!said.ok()) return said.status().in(file.path);
  library->described_ = std::make_unique<DescribedPlugin>(std::move(*said));
  const Result<const ds_plugin*> given = library->described_->read();
  if (!given.ok()) return given.status().in(file.path);
  DS_ASSIGN(library->said_, check_description(**given, *judged, file.path, Schemas::kParse));
  return std::shared_ptr<const PluginLibrary>(library);
}

const ds_component* PluginLibrary::component(uint32_t kind, std::string_view name) const {
  for (const ds_component& c : said_.components) {
    if (c.kind == kind && text_of(c.name) == name) return &c;
  }
  return nullptr;
}

Result<std::shared_ptr<PluginInstance>> PluginInstance::create(
    std::shared_ptr<const PluginLibrary> library, const ds_component& component, const Json& config,
    const IsolationOptions* isolation) {
  std::shared_ptr<PluginInstance> made(new PluginInstance(std::move(library), component));
  made->ops_ = full_struct(component.ops);
  if (isolation == nullptr && !made->library().runs_here())
    return Status(Code::kPermission,
                  std::string(made->name()) + ": nobody trusts its file, it runs in a helper only");
  DS_ASSIGN(made->config_, made->config_from(config));
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

/// A schema that nobody trusts is held against the config in the helper.
Result<std::unique_ptr<ds_config>> PluginInstance::config_from(const Json& values) const {
  const std::string_view schema = text_of(component_.config_schema);
  return library_->runs_here() ? make_plugin_config(name(), schema, values)
                               : unjudged_plugin_config(name(), schema, values);
}

Status PluginInstance::create_isolated(const IsolationOptions& isolation) {
  const std::string_view cannot = IsolatedInstance::cannot(component_);
  if (!cannot.empty())
    return unsupported(std::string(name()) + ": cannot run isolated: " + std::string(cannot));
  HelperLaunch launch = library_->launch(isolation);
  launch.kind = kind_name(component_.kind);
  launch.component = name();
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
  DS_ASSIGN(auto next, config_from(values));
  DS_ASSIGN(const std::string key,
            restart_key(text_of(component_.config_schema), config_->values, next->values));
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
