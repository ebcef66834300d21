// SPDX-License-Identifier: Apache-2.0
// The one table of settings and its rendering. A new setting is one line here.
#include <algorithm>
#include <numeric>
#include <vector>

#include "config.h"

namespace ds {
namespace {

constexpr double kMs = 1, kSecond = 1000, kMinute = 60 * kSecond, kDay = 1440 * kMinute;
constexpr double kKiB = 1024, kMiB = 1024 * kKiB, kGiB = 1024 * kMiB;
constexpr bool kLive = true, kRestart = false;
constexpr auto kB = SettingType::kBool;
constexpr auto kI = SettingType::kInt;
constexpr auto kN = SettingType::kNumber;
constexpr auto kT = SettingType::kText;
constexpr auto kD = SettingType::kDurationMs;
constexpr auto kS = SettingType::kBytes;

constexpr Setting kSettings[] = {
    {"learn.enabled", kB, "true", 0, 0, "", kLive, "train on feedback"},
    {"learn.method", kT, "lora", 0, 0, "lora|full", kRestart,
     "what a round trains: low-rank factors or every weight"},
    {"learn.min_items", kI, "1", 1, 1e6, "", kLive, "items that open a round"},
    {"learn.settle", kD, "2s", 0, kDay, "", kLive,
     "a round waits for this long without a new item"},
    {"learn.max_wait", kD, "30s", 0, 7 * kDay, "", kLive,
     "a round opens after this long whatever else arrives"},
    {"learn.max_lag", kD, "15s", 100 * kMs, 7 * kDay, "", kLive,
     "age of the oldest waiting item from which learning gets min_share"},
    {"learn.min_share", kN, "0.5", 0, 0.95, "", kLive,
     "share of compute that learning gets once it lags"},
    {"learn.learner", kT, "kl-to-base", 0, 0, "", kLive,
     "learner component of a plugin: what a round's steps train on"},
    {"learn.task_learner", kT, "er", 0, 0, "", kLive, "the same for task models"},
    {"learn.replay_ratio", kN, "0.5", 0, 0.95, "", kLive,
     "share of replayed examples in a step that the learner is asked for"},
    {"learn.deterministic", kB, "false", 0, 0, "", kRestart,
     "rounds are a function of the log alone: exactly min_items items, in offset order"},
    {"learn.seed", kI, "0", 0, 9007199254740991.0, "", kRestart, "seed of every draw"},
    {"learn.rank", kI, "8", 1, 16, "", kRestart, "rank of the low-rank factors"},
    {"learn.lr", kN, "0.002", 1e-7, 1, "", kLive,
     "learning rate of low-rank factors; every weight gets a fortieth of it"},
    {"learn.max_steps", kI, "60", 1, 100000, "", kLive,
     "optimizer steps of a round at most, or 10 for each of its items if that is more"},

    {"gate.max_drop", kN, "0.01", 0, 10, "", kLive,
     "allowed relative rise of an old domain's held-out loss"},
    {"gate.max_kl", kN, "0.10", 0, 100, "", kLive,
     "allowed mean KL divergence of candidate from base on the probe, nats per token"},

    {"serve.precision", kT, "default", 0, 0, "default|fp32|tf32|bf16|fp16", kRestart,
     "format of products, serving and training; default: fp16 on a GPU, whose backward pass is in "
     "BF16, else bf16"},
    {"serve.attention", kT, "dense", 0, 0, "", kLive, "attention component of a plugin"},
    {"serve.encoder", kT, "text", 0, 0, "", kLive, "encoder component for text"},
    {"serve.context", kI, "2048", 32, 1 << 20, "", kRestart, "longest sequence in tokens"},
    {"serve.max_running", kI, "16", 1, 1024, "", kRestart, "sequences decoded together"},
    {"serve.max_waiting", kI, "256", 0, 1 << 20, "", kRestart,
     "requests that may wait; more are refused with 429"},
    {"serve.prefill_chunk", kI, "128", 1, 1 << 16, "", kRestart,
     "prompt tokens per engine step at most"},
    {"serve.threads", kI, "0", 0, 1024, "", kRestart, "compute threads; 0 = physical cores"},
    {"serve.prefix_cache", kB, "true", 0, 0, "", kRestart, "keep KV pages of common prefixes"},

    {"model.quant", kT, "file", 0, 0, "", kLive,
     "what weights are kept in: file = the tensors as stored, else a quantizer component"},
    {"model.calibrate", kB, "true", 0, 0, "", kLive,
     "show a quantizer that asks for it the inputs of the weights, from the next time they are "
     "made"},
    {"plugins.config", kT, "{}", 0, 0, "", kRestart,
     "settings of plugins as JSON, by component: {\"window-global\": {\"window\": 64}}"},
    {"plugins.isolation", kT, "{}", 0, 0, "", kRestart,
     "where components run as JSON, by name: \"process\" or \"daemon\"; tools: process, others: "
     "daemon"},
    {"plugins.call_timeout", kD, "30s", kSecond, kDay, "", kRestart,
     "longest call into a helper process that has no deadline of its own"},
    {"plugins.shadow", kT, "report", 0, 0, "off|report|refuse", kLive,
     "recorded calls on a reloaded plugin before it serves; refuse = keep the old one if it "
     "differs"},
    {"versions.keep", kI, "50", 2, 1e6, "", kRestart,
     "newest versions that stay, besides v1, the serving one, its parent and the pinned one"},

    {"trace.ttl", kD, "7d", kMinute, 3650 * kDay, "", kRestart,
     "how long a response can be cited by feedback"},
    {"trace.max", kS, "256MiB", kMiB, 1024 * kGiB, "", kRestart, "disk space of response traces"},

    {"http.address", kT, "127.0.0.1:8471", 0, 0, "", kRestart,
     "HTTP over TCP, on this machine only; empty = off, port 0 = any"},
    {"data.endpoint", kT, "", 0, 0, "", kRestart,
     "one more ZeroMQ endpoint for feedback, e.g. tcp://127.0.0.1:5571"},
    {"auth.origins", kT, "", 0, 0, "", kRestart,
     "further host names accepted in Host and Origin, separated by commas"},

    {"limits.max_body", kS, "32MiB", kKiB, kGiB, "", kRestart, "HTTP request body"},
    {"limits.max_record", kS, "1MiB", kKiB, 64 * kMiB, "", kRestart,
     "JSON of a feedback record, as the store writes it"},
    {"limits.max_attachment", kS, "16MiB", kKiB, kGiB, "", kRestart,
     "binary attachments of a record, together"},
    {"limits.connections", kI, "256", 1, 65536, "", kRestart, "HTTP connections per listener"},

    {"device.restart_after", kD, "3s", 0, kDay, "", kLive,
     "how long the CPU serves in place of a GPU that failed before dsd drains and starts anew with "
     "the GPU"},
    {"device.restarts", kI, "30", 0, 1e6, "", kLive,
     "new starts within an hour because of that; beyond, the CPU serves on"},

    {"log.level", kT, "info", 0, 0, "debug|info|warn|error", kRestart,
     "least level that is written"},
    {"store.reservoir_slots", kI, "2048", 1, 1e7, "", kRestart,
     "examples kept for replay, per domain"},
    {"drain.timeout", kD, "10s", 0, 10 * kMinute, "", kRestart,
     "how long a stopping daemon finishes what runs"},
};

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row.back();
}

std::string shown(double value, SettingType type) {
  if (type == SettingType::kDurationMs) {
    if (value == 0) return "0";
    if (value >= kDay) return dump_json(Json(int64_t(value / kDay))) + "d";
    if (value >= kSecond) return dump_json(Json(int64_t(value / kSecond))) + "s";
    return dump_json(Json(int64_t(value))) + "ms";
  }
  if (type == SettingType::kBytes) {
    if (value >= kGiB) return dump_json(Json(int64_t(value / kGiB))) + "GiB";
    if (value >= kMiB) return dump_json(Json(int64_t(value / kMiB))) + "MiB";
    return dump_json(Json(int64_t(value / kKiB))) + "KiB";
  }
  if (type == SettingType::kInt) return dump_json(Json(int64_t(value)));
  return dump_json(Json(value == int64_t(value) ? Json(int64_t(value)) : Json(value)));
}

}  // namespace

std::span<const Setting> settings() { return kSettings; }

std::string nearest_setting(std::string_view name) {
  return std::min_element(std::begin(kSettings), std::end(kSettings),
                          [&](const Setting& a, const Setting& b) {
                            return edit_distance(name, a.name) < edit_distance(name, b.name);
                          })
      ->name;
}

std::string allowed_values(const Setting& setting) {
  if (*setting.choices) {
    std::string text = setting.choices;
    for (size_t at = 0; (at = text.find('|', at)) != text.npos; at += 2) text.replace(at, 1, ", ");
    return text;
  }
  if (setting.type == SettingType::kBool) return "true, false";
  if (setting.min == setting.max) return "text";
  return shown(setting.min, setting.type) + " to " + shown(setting.max, setting.type);
}

std::string settings_markdown() {
  std::string out =
      "| Setting | Default | Allowed | Takes effect | Meaning |\n|---|---|---|---|---|\n";
  for (const Setting& s : kSettings) {
    const std::string fallback = *s.fallback ? "`" + std::string(s.fallback) + "`" : "(empty)";
    out += "| `" + std::string(s.name) + "` | " + fallback + " | " + allowed_values(s) + " | " +
           (s.live ? "at once" : "restart") + " | " + s.help + " |\n";
  }
  return out;
}

}  // namespace ds
