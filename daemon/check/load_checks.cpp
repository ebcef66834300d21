// SPDX-License-Identifier: Apache-2.0
// Level 0: the file and its descriptor, before any instance.
#include <time.h>

#include <algorithm>

#include "check/check.h"

namespace ds::check {
namespace {

constexpr int64_t kMaxEntryNs = 5'000'000;

int64_t cpu_ns() {  // of this process: other load on the machine does not count
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

std::string in_quotes(std::string_view s) { return "\"" + std::string(s.substr(0, 80)) + "\""; }

/// Calls the entry once.
const ds_plugin* enter(ds_plugin_entry_fn entry, const ds_host* host, std::string& error) {
  const ds_plugin* out = nullptr;
  ds_status st{};
  const ds_code code = entry(host, &out, &st);
  if (code != DS_OK)
    error = "the entry gave " + std::to_string(code) + ": " +
            std::string(st.text, std::min<size_t>(st.len, sizeof st.text));
  else if (out == nullptr)
    error = "the entry gave no descriptor";
  return out;
}

/// A copy of all that a descriptor says, to see whether a second call changes it.
std::string contents(const ds_plugin& p) {
  std::string out(reinterpret_cast<const char*>(&p), std::min<size_t>(p.size, sizeof p));
  for (uint32_t i = 0; i < p.component_count; ++i) {
    const ds_component& c = *p.components[i];
    out.append(reinterpret_cast<const char*>(&c), std::min<size_t>(c.size, sizeof c));
  }
  return out;
}

Verdict entry_is_repeatable(const JudgedFile& file) {
  const auto entry = load_entry(file.note.id, file.bytes);
  if (!entry.ok()) return failed(entry.status().message());
  HostTable host;
  std::string error;
  int64_t longest = 0;
  const ds_plugin* first = nullptr;
  std::string before;
  for (int i = 0; i < 4; ++i) {
    const int64_t began = cpu_ns();
    const ds_plugin* now = enter(*entry, host.table(), error);
    longest = std::max(longest, cpu_ns() - began);
    if (!error.empty()) return failed(error);
    if (i == 0) {
      first = now;
      if (now->size < DS_SIZE_TO(ds_plugin, components))
        return failed("the descriptor's size is " + std::to_string(now->size));
      before = contents(*now);
    } else if (now != first) {
      return failed("call " + std::to_string(i + 1) + " gave another descriptor than the first");
    } else if (contents(*now) != before) {
      return failed("call " + std::to_string(i + 1) + " changed the descriptor");
    }
  }
  if (longest > kMaxEntryNs)
    return failed("a call took " + std::to_string(longest / 1000) + " us of CPU, at most 5000");
  if (host.allocated() != 0 || host.threads_entered() != 0)
    return failed("the entry took memory or began a thread: it has to be free of side effects");
  ds_status st{};
  if ((*entry)(host.table(), nullptr, &st) == DS_OK) return failed("no output, yet it gave 0");
  return pass();
}

/// For the checks behind entry_is_repeatable, which has seen the call succeed.
Result<const ds_plugin*> descriptor(const JudgedFile& file, HostTable& host) {
  DS_ASSIGN(const auto entry, load_entry(file.note.id, file.bytes));
  std::string error;
  const ds_plugin* p = enter(entry, host.table(), error);
  if (!error.empty()) return invalid(error);
  return p;
}

Verdict id_agrees(const JudgedFile& file) {
  HostTable host;
  const auto p = descriptor(file, host);
  if (!p.ok()) return failed(p.status().message());
  const std::string_view id = text_of((*p)->id);
  if (id != file.note.id)
    return failed("the note says " + in_quotes(file.note.id) + ", the descriptor " + in_quotes(id));
  if ((*p)->abi_minor != file.note.abi_minor)
    return failed("the note says ABI minor " + std::to_string(file.note.abi_minor) +
                  ", the descriptor " + std::to_string((*p)->abi_minor));
  const std::string_view version = text_of((*p)->version);
  const bool numeric = !version.empty() && std::count(version.begin(), version.end(), '.') == 2 &&
                       version.front() >= '0' && version.front() <= '9';
  if (!numeric) return failed("version " + in_quotes(version) + ", expected such as 1.2.0");
  if (text_of((*p)->license).empty()) return failed("no license is named");
  return pass();
}

Verdict kinds_agree(const JudgedFile& file) {
  HostTable host;
  const auto p = descriptor(file, host);
  if (!p.ok()) return failed(p.status().message());
  if ((*p)->component_count == 0 || (*p)->component_count > 64)
    return failed(std::to_string((*p)->component_count) + " components, expected 1 to 64");
  uint32_t kinds = 0;
  for (uint32_t i = 0; i < (*p)->component_count; ++i) {
    const ds_component* c = (*p)->components[i];
    if (c == nullptr || c->kind < DS_KIND_ENCODER || c->kind > DS_KIND_TOOL)
      return failed("component " + std::to_string(i) + " has no kind that is known");
    kinds |= 1u << c->kind;
  }
  if (kinds != file.note.kinds)
    return failed("the note says kinds " + std::to_string(file.note.kinds) +
                  ", the components are " + std::to_string(kinds));
  return pass();
}

Verdict names_are_fine(Bench& bench) {
  const std::string_view name = text_of(bench.component.name);
  const bool fine =
      !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_';
      });
  if (!fine)
    return failed("name " + in_quotes(name) + ": expected 1 to 64 of a-z, 0-9, -, . and _");
  for (uint32_t i = 0; i < bench.subject.plugin->component_count; ++i) {
    const ds_component* other = bench.subject.plugin->components[i];
    if (other != bench.subject.component && other->kind == bench.component.kind &&
        text_of(other->name) == name)
      return failed("two components of one kind are called " + in_quotes(name));
  }
  if (text_of(bench.component.summary).find('\n') != std::string_view::npos)
    return failed("the summary has more than one line");
  return pass();
}

Verdict schema_is_json(Bench& bench) {
  const std::string_view text = text_of(bench.component.config_schema);
  if (text.empty()) return pass("no settings");
  const auto schema = parse_json(text);
  if (!schema.ok()) return failed("config_schema: " + schema.status().message());
  if (!schema->is_object()) return failed("config_schema: not a JSON object");
  const Json* type = find(*schema, "type");
  if (type != nullptr && *type != "object") return failed("config_schema: type is not \"object\"");
  const Json* properties = find(*schema, "properties");
  if (properties != nullptr && !properties->is_object())
    return failed("config_schema: properties is not an object");
  return pass();
}

template <class T>
bool has(const T& table, std::initializer_list<const void*> required) {
  return table.size >= sizeof(uint32_t) &&
         std::none_of(required.begin(), required.end(), [](const void* f) { return !f; });
}
template <class F>
const void* erased(F* f) {
  return reinterpret_cast<const void*>(f);
}

bool kind_is_complete(const ds_component& c) {
  switch (c.kind) {
    case DS_KIND_ENCODER: {
      const auto t = table_of<ds_encoder>(c);
      return has(t, {erased(t.plan), erased(t.encode)}) && t.modalities != 0;
    }
    case DS_KIND_ATTENTION: {
      const auto t = table_of<ds_attention>(c);
      return has(t, {erased(t.plan), erased(t.prefill)});
    }
    case DS_KIND_QUANTIZER: {
      const auto t = table_of<ds_quantizer>(c);
      return has(t, {erased(t.format), erased(t.quantize), erased(t.dequantize)}) &&
             (t.prepare == nullptr || t.plan != nullptr);
    }
    case DS_KIND_LEARNER:
      return has(table_of<ds_learner>(c), {erased(table_of<ds_learner>(c).draws)});
    case DS_KIND_CURRICULUM:
      return has(table_of<ds_curriculum>(c), {erased(table_of<ds_curriculum>(c).pick)});
    case DS_KIND_RETRIEVER: {
      const auto t = table_of<ds_retriever>(c);
      return has(
          t, {erased(t.put), erased(t.erase), erased(t.commit), erased(t.search), erased(t.fetch)});
    }
    case DS_KIND_TOOL: {
      const auto t = table_of<ds_tool>(c);
      return t.analyse != nullptr || t.invoke != nullptr;
    }
    default:
      return false;
  }
}

Verdict functions_are_there(Bench& bench) {
  const ds_component& c = bench.component;
  if (c.size < DS_SIZE_TO(ds_component, table) || c.create == nullptr || c.ops == nullptr ||
      c.table == nullptr)
    return failed("create, ops or table is missing");
  const ds_instance_ops ops = ops_of(c);
  if (ops.destroy == nullptr) return failed("ops.destroy is missing");
  if (!kind_is_complete(c))
    return failed("a function that every " + std::string(kind_name(c.kind)) + " has is missing");
  const auto claims = [&](uint64_t cap) { return (c.caps & cap) != 0; };
  if (claims(DS_CAP_STATEFUL) != (ops.save != nullptr && ops.restore != nullptr))
    return failed("DS_CAP_STATEFUL and save/restore do not agree");
  if (claims(DS_CAP_TRAINABLE) != (ops.parameters != nullptr))
    return failed("DS_CAP_TRAINABLE and parameters do not agree");
  if (!claims(DS_CAP_CPU) && !claims(DS_CAP_CUDA)) return failed("it runs on no device");
  return pass();
}

}  // namespace

std::vector<FileCheck> file_checks() {
  return {{"load.entry", entry_is_repeatable}, {"load.id", id_agrees}, {"load.kinds", kinds_agree}};
}

std::vector<Check> load_checks() {
  return {{"load.functions", 0, 0, {}, functions_are_there},
          {"load.names", 0, 0, {}, names_are_fine},
          {"load.schema", 0, 0, {}, schema_is_json}};
}

}  // namespace ds::check
