// SPDX-License-Identifier: Apache-2.0
// Level 1: save, restore, reconfigure, health and stats.
#include <algorithm>
#include <random>

#include "check/check.h"

namespace ds::check {
namespace {

struct Reader {
  std::string_view bytes;
  uint64_t piece;  // at most so many at a time: short reads are allowed
};
ds_code read_some(void* ctx, void* to, uint64_t n, uint64_t* got) {
  auto* reader = static_cast<Reader*>(ctx);
  *got = std::min({n, reader->piece, static_cast<uint64_t>(reader->bytes.size())});
  std::memcpy(to, reader->bytes.data(), *got);
  reader->bytes.remove_prefix(*got);
  return DS_OK;
}

ds_code save(Bench& bench, ds_instance* instance, std::string& out) {
  ds_sink sink{sizeof sink, 0, &out, collect};
  ds_status st{};
  return ops_of(bench.component).save(instance, &sink, &st);
}
ds_code restore(Bench& bench, ds_instance* instance, std::string_view bytes,
                uint64_t piece = 1000) {
  Reader reader{bytes, piece};
  ds_source source{sizeof source, 0, &reader, read_some};
  ds_status st{};
  return ops_of(bench.component).restore(instance, &source, bench.subject.plugin->version, &st);
}

bool stateful(const Bench& bench) { return (bench.component.caps & DS_CAP_STATEFUL) != 0; }

std::string all_traces(Bench& bench, ds_instance* instance, uint64_t content) {
  std::string out;
  TrialOptions options;
  options.content = content;
  for (const Operation& operation : operations_of(bench.component)) {
    const Trace trace = trace_on(bench, instance, operation, options);
    out += std::to_string(trace.code);
    out.append(reinterpret_cast<const char*>(trace.output.data()), trace.output.size());
  }
  return out;
}

/// A worked-in instance, saved; what it and the restored one do next is the same.
Verdict save_restore(Bench& bench) {
  if (!stateful(bench)) return skipped("it has no state");
  const Instance original(bench), copy(bench);
  if (!original || !copy) return failed(original.text());
  (void)all_traces(bench, original.get(), 3);
  std::string state;
  if (save(bench, original.get(), state) != DS_OK) return failed("save failed");
  if (restore(bench, copy.get(), state) != DS_OK) return failed("restore refused what save wrote");
  std::string again;
  if (save(bench, copy.get(), again) != DS_OK || again != state)
    return failed("saved, restored and saved again: " + std::to_string(again.size()) +
                  " other bytes than the first " + std::to_string(state.size()));
  if (all_traces(bench, copy.get(), 5) != all_traces(bench, original.get(), 5))
    return failed("the restored instance answers otherwise than the saved one");
  return pass(std::to_string(state.size()) + " bytes");
}

Verdict restore_garbage(Bench& bench) {
  if (!stateful(bench)) return skipped("it has no state");
  std::mt19937_64 rng(bench.settings.seed);
  for (int i = 0; i < 64; ++i) {
    const Instance instance(bench);
    if (!instance) return failed(instance.text());
    std::string noise(1 + rng() % 4096, '\0');
    for (char& c : noise) c = static_cast<char>(rng());
    const ds_code code = restore(bench, instance.get(), noise, 1 + rng() % 4096);
    if (code == DS_OK)
      return failed("restore took " + std::to_string(noise.size()) + " random bytes (seed " +
                    std::to_string(bench.settings.seed) + ")");
    (void)all_traces(bench, instance.get(), 3);  // and it still stands
  }
  return pass();
}

Verdict reconfigures(Bench& bench) {
  const ds_instance_ops ops = ops_of(bench.component);
  const Instance instance(bench);
  if (!instance) return failed(instance.text());
  ds_status st{};
  if (ops.health != nullptr && ops.health(instance.get(), &st) != DS_OK)
    return failed("health: " + std::string(st.text, std::min<size_t>(st.len, sizeof st.text)));
  if (ops.stats != nullptr) {
    std::string text;
    ds_sink sink{sizeof sink, 0, &text, collect};
    if (ops.stats(instance.get(), &sink, &st) != DS_OK) return failed("stats failed");
    const auto json = parse_json(text);
    if (!json.ok() || !json->is_object()) return failed("stats gave no JSON object");
  }
  if (ops.reconfigure == nullptr) return pass("no reconfigure");
  const auto same = make_config(bench.settings.config);
  if (ops.reconfigure(instance.get(), same.get(), &st) != DS_OK)
    return failed("reconfigure refused the settings that it was created with");
  (void)all_traces(bench, instance.get(), 3);
  return pass();
}

}  // namespace

std::vector<Check> state_checks() {
  return {{"contract.save-restore", 1, 0, {}, save_restore},
          {"contract.restore-garbage", 1, 0, {}, restore_garbage},
          {"contract.reconfigure", 1, 0, {}, reconfigures}};
}

}  // namespace ds::check
