// SPDX-License-Identifier: Apache-2.0
// dsd: builds the parts, wires serve/ and learn/ together, waits for a signal, takes them down in
// order.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <new>
#include <thread>

#include "config.h"
#include "engine/bases.h"
#include "engine/delta_file.h"
#include "engine/engine.h"
#include "learn/learner.h"
#include "learn/task_models.h"
#include "log.h"
#include "machine.h"
#include "plugin_setup.h"
#include "restart.h"
#include "serve/server.h"
#include "storage/backup.h"
#include "storage/seams.h"

extern char** environ;

namespace ds {
namespace {

struct Arguments {
  std::string model, data, run, http, config, device = "auto";
  std::vector<std::string> set;
};

std::string environment_or(const char* name, const std::string& fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : fallback;
}

/// Places that are not given: the system's for root, else the user's (XDG base directories).
void fill_folders(Arguments& a) {
  const std::string home = environment_or("HOME", "/tmp");
  const bool root = geteuid() == 0;
  if (a.data.empty()) {
    a.data = root ? "/var/lib/driftstone"
                  : environment_or("XDG_DATA_HOME", home + "/.local/share") + "/driftstone";
  }
  if (a.run.empty()) a.run = environment_or("DS_RUN_DIR", "");
  if (a.run.empty()) {
    const std::string runtime = environment_or("XDG_RUNTIME_DIR", "");
    a.run = root               ? "/run/driftstone"
            : !runtime.empty() ? runtime + "/driftstone"
                               : "/tmp/driftstone-" + std::to_string(geteuid());
  }
  if (a.config.empty()) {
    const std::string file =
        root ? "/etc/driftstone/dsd.toml"
             : environment_or("XDG_CONFIG_HOME", home + "/.config") + "/driftstone/dsd.toml";
    if (std::filesystem::exists(file)) a.config = file;
  }
}

Status load_config(const Arguments& a, Config& config) {
  if (!a.config.empty()) DS_TRY(config.load_toml(a.config));
  DS_TRY(config.load_environment(environ));
  if (!a.http.empty()) DS_TRY(config.set("http.address", a.http, "flag"));
  for (const std::string& pair : a.set) {
    const size_t equal = pair.find('=');
    if (equal == std::string::npos) return invalid("--set " + pair + ": expected key=value");
    DS_TRY(config.set(pair.substr(0, equal), pair.substr(equal + 1), "flag"));
  }
  return {};
}

Status make_private(const std::string& path) {
  std::error_code error;
  const bool existed = std::filesystem::exists(path);
  std::filesystem::create_directories(path, error);
  if (error) return io_error(path + ": " + error.message());
  if (!existed) std::filesystem::permissions(path, std::filesystem::perms::owner_all, error);
  return error ? io_error(path + ": " + error.message()) : Status();
}

LogLevel log_level(const std::string& name) {
  return name == "debug"   ? LogLevel::kDebug
         : name == "warn"  ? LogLevel::kWarn
         : name == "error" ? LogLevel::kError
                           : LogLevel::kInfo;
}

int64_t parameter_count(const ModelFile& file) {
  int64_t total = 0;
  for (const auto& [name, tensor] : file.tensors()) total += elements_of(tensor.shape);
  return total;
}

std::string display_name(std::string name) {
  for (char& c : name)
    c = c == ' ' || c == '/' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

ModelInfo model_info(const ModelFile& file, const std::string& path) {
  return {display_name(file.name()),
          file.sha256(),
          file.config().architecture,
          parameter_count(file),
          0,
          std::filesystem::absolute(path).string()};
}

ReplayStore::Options store_options(const Arguments& a, const Config& config) {
  ReplayStore::Options o;
  o.directory = a.data + "/replay";
  o.fs = &posix_file_system();
  o.clock = &system_clock_seam();
  o.reservoir_slots = static_cast<uint64_t>(config.integer("store.reservoir_slots"));
  o.seed = static_cast<uint64_t>(config.integer("learn.seed"));
  o.max_record_bytes = static_cast<size_t>(config.integer("limits.max_record"));
  o.max_attachment_bytes = static_cast<size_t>(config.integer("limits.max_attachment"));
  o.trace_ttl_ms = config.integer("trace.ttl");
  o.trace_max_bytes = static_cast<uint64_t>(config.integer("trace.max"));
  return o;
}

EngineOptions engine_options(const Config& config, const ModelConfig& model, KvDtype kv_dtype) {
  EngineOptions o;
  o.context = std::min(config.integer("serve.context"), model.context);
  o.max_running = config.integer("serve.max_running");
  o.max_waiting = config.integer("serve.max_waiting");
  o.prefill_chunk = config.integer("serve.prefill_chunk");
  o.prefix_cache = config.flag("serve.prefix_cache");
  o.kv_dtype = kv_dtype;
  return o;
}

Status write_ready(const Arguments& a, const Endpoints& at, const std::string& version) {
  const Json ready = {{"pid", getpid()},     {"http", at.http},       {"data", at.data},
                      {"events", at.events}, {"control", at.control}, {"version", version}};
  log(LogLevel::kInfo, "main", "ready: " + version + ", http " + at.http);
  return write_file_atomically(posix_file_system(), a.run + "/ready.json", dump_json(ready) + "\n");
}

LearnControl control_of(Learner& learner) {
  return {[&] { return learner.status(); },
          [&](bool wait, JsonCallback done) { learner.step(wait, std::move(done)); },
          [&](bool paused) { return learner.set_paused(paused); },
          [&](const std::string& id, JsonCallback done) { learner.undo(id, std::move(done)); }};
}

TaskModelControl control_of(TaskModels& tasks) {
  return {[&](const std::string& name, const std::vector<int64_t>& sizes) {
            return tasks.create(name, sizes);
          },
          [&] { return tasks.list(); },
          [&](const std::string& name, std::vector<float> input, JsonCallback done) {
            done(tasks.infer(name, input));
          },
          [&](const std::string& name) { return tasks.versions(name); }};
}

/// {path, files, bytes} of a verified backup.
Json backup_summary(const std::string& path, const Json& manifest) {
  int64_t bytes = 0, files = 0;
  if (const Json* list = find(manifest, "files")) {
    for (const Json& file : *list) {
      bytes += get_int(file, "bytes", 0).ok() ? *get_int(file, "bytes", 0) : 0;
      ++files;
    }
  }
  return {{"path", path}, {"files", files}, {"bytes", bytes}};
}

Result<Json> make_backup(const ReplayStore& store, Versions& versions, TaskModels& tasks,
                         const std::string& data, const std::string& path) {
  // What the copy of the store names must be there until it is copied, too.
  const auto kept = std::make_pair(versions.keep_files(), tasks.keep_files());
  DS_TRY(create_backup(store, posix_file_system(), data, path));
  DS_ASSIGN(const Json manifest, verify_backup(posix_file_system(), path));
  return backup_summary(path, manifest);
}

void log_failure(const Status& status) {
  if (!status.ok()) log(LogLevel::kWarn, "main", status.message());
}

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

void log_signal(int signal) {
  log(LogLevel::kInfo, "main",
      std::string("stopping on ") + (signal == SIGTERM ? "SIGTERM" : "SIGINT"));
}

/// Whether one came within so long.
bool stop_signal_within_ms(int64_t ms) {
  const sigset_t set = stop_signals();
  const timespec wait{ms / 1000, ms % 1000 * 1'000'000};
  const int got = sigtimedwait(&set, nullptr, &wait);
  if (got > 0) log_signal(got);
  return got > 0;
}

/// While it lives a signal ends the process at once: nothing has been promised yet, and the store
/// bears worse.
class EndsBySignal {
 public:
  EndsBySignal() : thread_([this] { watch(); }) {}
  ~EndsBySignal() {
    over_ = true;
    thread_.join();
  }

 private:
  void watch() const {
    while (!over_) {
      if (!stop_signal_within_ms(100)) continue;
      stop_log();
      _exit(0);
    }
  }
  std::atomic<bool> over_{false};
  std::thread thread_;
};

/// How the daemon ends.
enum class End { kStop, kStartAnew };

/// Until a signal, or until a GPU that failed may be tried anew.
End wait_for_end(const Config& config, const DeviceState& device, bool started_without,
                 const Restarts& restarts) {
  // Without the GPU from the start: it would fail in the same way. One that served once is tried
  // again all the same, rarely: what took its memory may be gone.
  constexpr int64_t kSeldomMs = 600'000;
  const bool never = started_without && !restarts.any();
  if (started_without)
    log(LogLevel::kWarn, "device",
        never ? "the CPU serves until somebody starts dsd anew"
              : "the CPU serves; the GPU is tried again in 10 minutes");
  Clock& clock = system_clock_seam();
  while (!stop_signal_within_ms(100)) {
    const DeviceState::View now = device.view();
    if (never || now.phase != DeviceState::Phase::kOnHost) continue;
    const int64_t served_ms = (clock.monotonic_ns() - now.since_ns) / 1'000'000;
    if (served_ms < (started_without ? kSeldomMs : config.integer("device.restart_after")))
      continue;
    if (restarts.allowed(clock.unix_ms() / 1000, config.integer("device.restarts")))
      return End::kStartAnew;
  }
  return End::kStop;
}

/// A model file and what its text needs.
struct LoadedModel {
  std::unique_ptr<ModelFile> file;
  std::shared_ptr<const Tokenizer> tokenizer;
  ChatTemplate chat;
};

Result<LoadedModel> load_model(const std::string& path) {
  LoadedModel m;
  DS_ASSIGN(m.file, ModelFile::open(path));
  Result<std::shared_ptr<const Tokenizer>> tokenizer = Tokenizer::create(m.file->tokenizer());
  if (!tokenizer.ok()) return tokenizer.status().in(path);
  m.tokenizer = std::move(*tokenizer);
  Result<ChatTemplate> chat = ChatTemplate::create(m.file->tokenizer());
  if (!chat.ok()) return chat.status().in(path);
  m.chat = std::move(*chat);
  return m;
}

Result<std::shared_ptr<const Weights>> load_with(const Compute& compute, const VersionManifest& m,
                                                 Bases& bases, const VersionStore& files) {
  DS_ASSIGN(auto base, bases.find(m.base_sha256, compute));
  if (compute.ops->host_memory && base->host() != nullptr) base = base->host();
  return load_weights(m, files, std::move(base), compute);
}

/// Where the engine computes now. Bases that nobody decodes with make room where there is none.
Result<std::shared_ptr<const Weights>> load_version(SharedCompute& loader, const VersionManifest& m,
                                                    Bases& bases, const VersionStore& files) {
  const std::lock_guard lock(loader.mutex);
  const Compute& compute = loader.now();
  auto loaded = load_with(compute, m, bases, files);
  if (loaded.ok()) return loaded;
  if (&loader.now() != &compute) return load_with(loader.now(), m, bases, files);  // just lost
  const bool again = loaded.status().code() == Code::kResource && bases.drop_idle();
  return again ? load_with(compute, m, bases, files) : std::move(loaded);
}

Result<std::unique_ptr<Versions>> open_versions_there(Bases& bases, BaseStore& base_files,
                                                      VersionStore& files, ReplayStore& store,
                                                      const Config& config, Machine& machine) {
  {
    // Into memory by all threads, before anything asks for it with one. Calibrating takes a minute.
    const EndsBySignal interruptible;
    DS_TRY(bases.find(bases.file_sha256(), machine.engine_now()).status());
  }
  DS_TRY(files.clean());
  const LoadWeights load = [&](const VersionManifest& m) {
    return load_version(machine.loader, m, bases, files);
  };
  DS_ASSIGN(auto versions,
            Versions::open("default", bases.file_sha256(), store, files, system_clock_seam(), load,
                           config.integer("versions.keep")));
  DS_TRY(base_files.keep_only(versions->bases()));  // a crash may have left one without a version
  return versions;
}

/// On the CPU if the weights find no memory on the GPU, or it fails.
Result<std::unique_ptr<Versions>> open_versions(Bases& bases, BaseStore& base_files,
                                                VersionStore& files, ReplayStore& store,
                                                const Config& config, Machine& machine) {
  auto opened = open_versions_there(bases, base_files, files, store, config, machine);
  const Code code = opened.status().code();
  const bool for_the_gpu = code == Code::kResource || code == Code::kDeviceLost;
  if (!for_the_gpu || !machine.may_do_without || !machine.device->is_gpu()) return opened;
  machine.state.lose(opened.status().message());
  return open_versions_there(bases, base_files, files, store, config, machine);
}

/// Until a signal, or a reason to start anew.
Result<End> serve_and_learn(const Arguments& a, const Config& config, ServerParts parts,
                            Learner& learner, const Restarts& restarts) {
  const DeviceState& device = *parts.device;
  const bool started_without = device.lost();
  EventBus& events = parts.events;
  const Versions& versions = parts.versions;
  const uint64_t watch = events.subscribe([&](const Event& e) {
    if (e.topic == "store") learner.notify();
  });
  DS_ASSIGN(ServerOptions options, server_options(config, a.run));
  DS_ASSIGN(const auto server, Server::start(std::move(parts), std::move(options)));
  learner.start();
  DS_TRY(write_ready(a, server->endpoints(), versions.current()->version));
  const End end = wait_for_end(config, device, started_without, restarts);
  log_failure(posix_file_system().remove_all(a.run + "/ready.json"));
  events.unsubscribe(watch);
  server->stop(config.integer("drain.timeout"));
  return end;
}

/// What metrics tell of the device beside its loss.
void show_device(const Device& device, const Restarts& restarts, Pool& pool, Metrics& metrics) {
  metrics
      .gauge("ds_device_restarts", "New starts within an hour because the GPU failed, at the last")
      .set(static_cast<double>(restarts.within_hour(system_clock_seam().unix_ms() / 1000)));
  if (!device.is_gpu()) return;
  metrics.on_collect([&metrics, &pool] {
    metrics.gauge("ds_learn_gpu_share", "Part of the GPU's SMs that training may use")
        .set(share_of(pool.gpu_share().part(system_clock_seam().monotonic_ns())));
  });
}

Result<End> serve(const Arguments& a, Config& config, EventBus& events, ReplayStore& store,
                  const Restarts& restarts) {
  Clock& clock = system_clock_seam();
  Metrics metrics;
  Pool pool(static_cast<int>(config.integer("serve.threads")));
  DS_ASSIGN(const std::unique_ptr<Machine> machine,
            open_machine(a.device, restarts.any(), pool, events, metrics));
  const Device& device = *machine->device;
  ComponentsSlot& components = machine->components;
  show_device(device, restarts, pool, metrics);
  DS_ASSIGN(
      const std::unique_ptr<Plugins> plugins,
      open_plugins(a.data + "/plugins", config, metrics, events, components, device.is_gpu()));
  DS_ASSIGN(const LoadedModel model, load_model(a.model));
  VersionStore files(posix_file_system(), a.data);
  BaseStore base_files(posix_file_system(), a.data);
  DS_ASSIGN(const WeightForm form, weight_form(*plugins, config, components, device.is_gpu()));
  Bases bases(*model.file, base_files, form);
  DS_ASSIGN(const std::unique_ptr<Versions> versions,
            open_versions(bases, base_files, files, store, config, *machine));
  versions->on_change([&](const Json& event) { events.publish("version", event); });
  TaskModels tasks(store, files, config, *plugins, pool, cpu_ops(best_cpu_isa()), events, clock);
  DS_TRY(tasks.open());
  Engine engine(
      engine_options(config, model.file->config(), kv_dtype(*machine->engine.ops, form.format)),
      machine->engine, pool, *versions, model.tokenizer, metrics, clock);
  machine->tell_from_now_on(engine);
  Learner learner({*versions,
                   store,
                   files,
                   bases,
                   base_files,
                   config,
                   pool,
                   device.ops(),
                   machine->learner,
                   components,
                   *plugins,
                   metrics,
                   events,
                   clock,
                   model.tokenizer,
                   model.chat,
                   [&](bool at_once) { return tasks.train(at_once); },
                   {},
                   &machine->state});
  follow_plugins(*plugins, config, components, bases, *versions, events, machine->loader);
  const auto backup = [&](const std::string& path) {
    return make_backup(store, *versions, tasks, a.data, path);
  };
  ServerParts parts{engine,
                    *versions,
                    store,
                    files,
                    config,
                    metrics,
                    events,
                    clock,
                    model.tokenizer,
                    model.chat,
                    model_info(*model.file, a.model),
                    device.name(),
                    control_of(learner),
                    control_of(tasks),
                    std::filesystem::absolute(a.data).string(),
                    backup,
                    plugins.get(),
                    &machine->state};
  return serve_and_learn(a, config, std::move(parts), learner, restarts);
}

Result<End> run(Arguments a, const Restarts& restarts) {
  Config config;
  fill_folders(a);
  DS_TRY(load_config(a, config));
  if (a.model.empty()) return invalid("--model is missing: a GGUF file or a Hugging Face folder");
  DS_TRY(make_private(a.run));
  DS_TRY(make_private(a.data));
  EventBus events(system_clock_seam());
  start_log(log_level(config.text("log.level")), &events);
  struct StopLog {
    ~StopLog() { stop_log(); }
  } stop_log_at_end;
  DS_ASSIGN(const std::unique_ptr<ReplayStore> store, ReplayStore::open(store_options(a, config)));
  // Left by a crash, if there; the store is locked, so no other daemon's.
  DS_TRY(posix_file_system().remove_all(a.run + "/ready.json"));
  return serve(a, config, events, *store, restarts);
}

/// In the place of a process that has ended as it does on a signal, but for a GPU that is lost.
Status start_anew(Restarts restarts, const std::string& program, char** arguments) {
  if (stop_signal_within_ms(0)) return {};  // while it drained
  restarts.add(system_clock_seam().unix_ms() / 1000);
  return restarts.execute(program, arguments);
}

}  // namespace
}  // namespace ds

int main(int argc, char** argv) {
  ds::Arguments a;
  CLI::App app{"dsd: serves a language model and learns from feedback while it does"};
  app.add_option("--model", a.model, "GGUF file or Hugging Face folder");
  app.add_option("--data", a.data, "folder of the replay store and the versions");
  app.add_option("--run", a.run, "folder of the sockets and ready.json");
  app.add_option("--http", a.http, "address of the HTTP API, 127.0.0.1:0 for any free port");
  app.add_option("--config", a.config, "TOML file");
  app.add_option("--device", a.device, "auto (a GPU if there is one), cpu or cuda:N");
  app.add_option("--set", a.set, "a setting, key=value (repeatable)");
  bool list_settings = false;
  app.add_flag("--help-settings", list_settings, "print every setting as a Markdown table");
  app.set_version_flag("--version", DS_VERSION);
  CLI11_PARSE(app, argc, argv);
  if (list_settings) {
    std::fputs(ds::settings_markdown().c_str(), stdout);
    return 0;
  }
  // Before any thread starts: SIGTERM and SIGINT are taken by sigwait() alone.
  const sigset_t set = ds::stop_signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  // As it is called now: what lies there when it is needed is what would be started by hand.
  const std::string program = ds::own_program().string();
  const auto restarts = ds::Restarts::parse(ds::environment_or(ds::Restarts::kVariable, ""));
  // While it starts: sizes follow the model and the settings.
  const std::string too_little = a.model + ": not enough memory for this model with these settings";
  ds::Status status;
  try {
    const ds::Result<ds::End> end = ds::run(a, restarts);
    status = end.status();
    if (status.code() == ds::Code::kResource) status = status.in(too_little);
    if (end.ok() && *end == ds::End::kStartAnew) status = ds::start_anew(restarts, program, argv);
  } catch (const std::bad_alloc&) {
    status = ds::unavailable(too_little);
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "dsd: %s\n", status.message().c_str());
  return 1;
}
