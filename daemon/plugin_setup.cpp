// SPDX-License-Identifier: Apache-2.0
#include "plugin_setup.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "log.h"

namespace ds {
std::filesystem::path own_program() {
  std::error_code error;
  return std::filesystem::canonical("/proc/self/exe", error);
}

std::filesystem::path own_folder() { return own_program().parent_path(); }

namespace {

constexpr const char* kLearnerSettings[] = {"learn.learner", "learn.task_learner"};

/// The folder of the modules: beside the folder of this program.
std::string modules_folder() { return (own_folder().parent_path() / "modules").string(); }

/// Without the helper program beside this one all plugins run in the daemon.
IsolationOptions isolation(const Config& config, Metrics& metrics, EventBus& events) {
  IsolationOptions out;
  out.program = (own_folder() / "ds-plugin-helper").string();
  if (!posix_file_system().exists(out.program)) {
    log(LogLevel::kWarn, "plugin", out.program + ": is not there; tools run in the daemon");
    out.program.clear();
  }
  out.call_timeout_ns = config.integer("plugins.call_timeout") * 1'000'000;
  out.on_death = [&metrics, &events](std::string_view component, std::string_view why) {
    const std::string name(component);
    log(LogLevel::kError, "plugin", name + ": its helper process ended: " + std::string(why));
    metrics
        .counter("ds_plugin_helper_deaths_total", "helper processes that ended unasked",
                 {{"component", name}})
        .add(1);
    events.publish("plugin", {{"event", "died"}, {"component", name}, {"why", why}});
  };
  return out;
}

WeightFormat packed_format(const Config& config, bool on_gpu) {
  const std::string precision = config.text("serve.precision");
  if (precision == "fp32") return WeightFormat::kF32;
  if (precision == "tf32") return WeightFormat::kTF32;
  const bool half = precision == "fp16" || (precision == "default" && on_gpu);
  return half ? WeightFormat::kF16 : WeightFormat::kBF16;
}

/// What is not quantized is FP32 or BF16: plugins know no other factors.
WeightForm quantized_form(const Config& config, const ComponentsSlot& slot,
                          const Plugins::Serving& found) {
  auto quantizer = std::make_shared<const Quantizer>(found.instance, found.generation);
  const bool calibrated = quantizer->calibrates() && config.flag("model.calibrate");
  if (calibrated)
    log(LogLevel::kInfo, "plugin",
        std::string(quantizer->name()) +
            ": sees the inputs of the weights first; model.calibrate = false would be faster");
  const bool f32 = is_f32(packed_format(config, false));
  return {f32 ? WeightFormat::kF32 : WeightFormat::kBF16, std::move(quantizer),
          calibrated ? slot.current() : nullptr};
}

/// Whether a plugin that was there before is not: the daemon then starts without it.
bool left_out(const Plugins& plugins) { return !plugins.list()["refused"].empty(); }

/// What model.quant = `name` means.
Result<WeightForm> form_called(const std::string& name, Plugins& plugins, const Config& config,
                               const ComponentsSlot& slot, bool on_gpu) {
  const WeightForm as_in_file = packed_format(config, on_gpu);
  if (name == "file") return as_in_file;
  const auto serving = plugins.find(DS_KIND_QUANTIZER, name);
  if (!serving.ok() && left_out(plugins) && config.text("model.quant") == name) {
    log(LogLevel::kError, "plugin",
        serving.status().message() + "; weights as in the file instead");
    return as_in_file;
  }
  DS_ASSIGN(const Plugins::Serving found, serving);
  return quantized_form(config, slot, found);
}

/// Makes the serving version's weights anew in `form`, beside those in use, and swaps them in.
Status keep_in(const WeightForm& form, Bases& bases, Versions& versions) {
  const WeightForm before = bases.form();
  bases.set_form(form);
  const Status reloaded = versions.reload();
  if (!reloaded.ok()) bases.set_form(before);
  return reloaded;
}

/// Settings that name what a pass computes with; the built-in one serves without the named one.
struct Part {
  const char* setting;
  uint32_t kind;
  const char* built_in;
};
constexpr Part kParts[] = {{"serve.attention", DS_KIND_ATTENTION, "dense"},
                           {"serve.encoder", DS_KIND_ENCODER, "text"}};

/// One token through an encoder, on the model's own embedding: no self-test knows the model's
/// width.
Status try_out(const TextEncoder& encoder, const BaseWeights& base, const Compute& compute) {
  const Ops& ops = *compute.ops;
  std::vector<float> row(static_cast<size_t>(base.config().d_model));
  const int32_t id = 0;
  DS_ASSIGN(const auto ids, InBackend::make(ops, compute.context, &id, sizeof id));
  DS_ASSIGN(const auto out, OutOfBackend::make(ops, row.data(), row.size() * sizeof(float)));
  TextEncoding encoding;
  DS_TRY(encoding.forward(encoder, ops, compute.context, base, {ids.as<int32_t>(), 1},
                          out.as<float>()));
  out.fetch(compute.context);
  DS_TRY(finish(compute));
  if (std::ranges::all_of(row, [](float v) { return std::isfinite(v); })) return {};
  return {Code::kPlugin,
          "encoder " + std::string(encoder.name()) + ": NaN or infinity for token 0"};
}

/// The component of a kind that new sequences compute with.
std::string_view serving_name(uint32_t kind, const Components& now) {
  return kind == DS_KIND_ATTENTION ? now.attention->name() : now.encoder->name();
}

/// What new components have to work with.
struct WorksWith {
  bool on_gpu = false;
  const BaseWeights* base = nullptr;  ///< null: not known yet
  const Compute* compute = nullptr;   ///< null where base is
};

/// New sequences compute with `next`, if it works with that.
Status take(uint32_t kind, const Plugins::Serving& next, const WorksWith& with,
            ComponentsSlot& slot) {
  if (with.on_gpu && (next.instance->component().caps & DS_CAP_CUDA) == 0)
    return unsupported(std::string(kind_name(kind)) + " " + std::string(next.instance->name()) +
                       ": computes on the CPU alone, and the model is on a GPU; "
                       "dsd --device cpu serves it");
  if (kind == DS_KIND_ATTENTION) {
    auto attention = std::make_shared<const Attention>(next.instance, next.generation);
    slot.update([&](Components& c) { c.attention = std::move(attention); });
  } else {
    DS_ASSIGN(auto encoder, TextEncoder::make(next.instance, next.generation));
    if (with.base != nullptr) DS_TRY(try_out(*encoder, *with.base, *with.compute));
    slot.update([&](Components& c) { c.encoder = std::move(encoder); });
  }
  return {};
}

Status take(const Part& part, const std::string& name, const WorksWith& with, Plugins& plugins,
            ComponentsSlot& slot) {
  DS_ASSIGN(const Plugins::Serving found, plugins.find(part.kind, name));
  return take(part.kind, found, with, slot);
}

Status take_configured(const Config& config, Plugins& plugins, ComponentsSlot& slot,
                       const WorksWith& with) {
  for (const Part& part : kParts) {
    const Status taken = take(part, config.text(part.setting), with, plugins, slot);
    if (taken.ok()) continue;
    if (!left_out(plugins)) return taken.in(part.setting);
    log(LogLevel::kError, "plugin",
        taken.message() + "; " + part.setting + " is " + part.built_in + " instead");
    DS_TRY(take(part, part.built_in, with, plugins, slot).in(part.setting));
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Plugins>> open_plugins(const std::string& data, const Config& config,
                                              Metrics& metrics, EventBus& events,
                                              ComponentsSlot& slot, bool on_gpu) {
  PluginOptions options;
  options.modules = modules_folder();
  options.data = data;
  DS_ASSIGN(options.config, parse_json(config.text("plugins.config")));
  DS_ASSIGN(options.places, parse_json(config.text("plugins.isolation")));
  if (!options.places.is_object()) return invalid("plugins.isolation: expected an object of names");
  options.isolation = isolation(config, metrics, events);
  DS_ASSIGN(options.shadow, shadow_of(config.text("plugins.shadow")));
  report_plugin_crashes(Plugins::crash_report(data));
  PluginServices services;
  services.log = [](int32_t level, std::string_view component, std::string_view text) {
    const LogLevel ours = level >= DS_LOG_ERROR  ? LogLevel::kError
                          : level == DS_LOG_WARN ? LogLevel::kWarn
                          : level == DS_LOG_INFO ? LogLevel::kInfo
                                                 : LogLevel::kDebug;
    log(ours, "plugin", std::string(component) + ": " + std::string(text));
  };
  services.metric = [&metrics](std::string_view name, double value, bool is_counter) {
    const Labels labels = {{"name", std::string(name)}};
    if (is_counter)
      metrics.counter("ds_plugin_events_total", "counted by plugins", labels).add(value);
    else
      metrics.gauge("ds_plugin_value", "reported by plugins", labels).set(value);
  };
  DS_ASSIGN(auto plugins, Plugins::open(std::move(options), std::move(services),
                                        posix_file_system(), system_clock_seam()));
  const Json list = plugins->list();  // named: a temporary would be gone before the first turn
  for (const Json& refused : list["refused"])
    log(LogLevel::kWarn, "plugin", "not loaded: " + refused.value("reason", ""));
  DS_TRY(take_configured(config, *plugins, slot, {on_gpu, nullptr, nullptr}));
  for (const char* setting : kLearnerSettings) {
    const Status learns = plugins->find(DS_KIND_LEARNER, config.text(setting)).status();
    if (!learns.ok() && !left_out(*plugins)) return learns.in(setting);
    if (!learns.ok()) log(LogLevel::kError, "plugin", learns.message() + "; feedback waits");
  }
  return plugins;
}

Result<WeightForm> weight_form(Plugins& plugins, const Config& config, const ComponentsSlot& slot,
                               bool on_gpu) {
  return form_called(config.text("model.quant"), plugins, config, slot, on_gpu);
}

void follow_plugins(Plugins& plugins, Config& config, ComponentsSlot& slot, Bases& bases,
                    Versions& versions, EventBus& events, SharedCompute& loader) {
  const auto take_now = [&](uint32_t kind, const Plugins::Serving& next) {
    const std::lock_guard lock(loader.mutex);
    const Compute& compute = loader.now();
    const bool on_gpu = !compute.ops->host_memory;
    const auto weights = on_gpu ? versions.current() : on_host(versions.current());
    return take(kind, next, {on_gpu, weights->base.get(), &compute}, slot);
  };
  const bool gpu_there = !loader.now().ops->host_memory;
  config.before_change("model.quant", [&, gpu_there](const std::string& name) -> Status {
    DS_ASSIGN(const WeightForm form, form_called(name, plugins, config, slot, gpu_there));
    return keep_in(form, bases, versions);
  });
  for (const char* setting : kLearnerSettings) {
    config.before_change(setting, [&](const std::string& name) {
      return plugins.find(DS_KIND_LEARNER, name).status();
    });
  }
  for (const Part& part : kParts) {
    config.before_change(part.setting, [&, take_now](const std::string& name) -> Status {
      DS_ASSIGN(const Plugins::Serving found, plugins.find(part.kind, name));
      return take_now(part.kind, found);
    });
  }
  config.before_change("plugins.shadow", [&](const std::string& name) -> Status {
    DS_ASSIGN(const Shadow shadow, shadow_of(name));
    plugins.set_shadow(shadow);
    return {};
  });
  plugins.on_swap(
      [&, take_now](uint32_t kind, const std::string& name, const Plugins::Serving& next) {
        Status taken;
        for (const Part& part : kParts) {
          if (part.kind == kind && serving_name(kind, *slot.current()) == name)
            taken = take_now(kind, next);
        }
        if (kind == DS_KIND_QUANTIZER && config.text("model.quant") == name) {
          taken = keep_in(quantized_form(config, slot, next), bases, versions);
        }
        if (!taken.ok()) log(LogLevel::kError, "plugin", taken.message());
        events.publish("plugin", {{"event", "swapped"},
                                  {"kind", kind_name(kind)},
                                  {"name", name},
                                  {"generation", next.generation}});
      });
}

}  // namespace ds
