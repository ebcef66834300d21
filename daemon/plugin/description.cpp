// SPDX-License-Identifier: Apache-2.0
#include "plugin/description.h"

#include <algorithm>
#include <span>
#include <type_traits>

#include "plugin/abi.h"
#include "plugin/plugin_config.h"
#include "plugin/utf8.h"

namespace ds {
namespace {

constexpr uint64_t kMostComponents = 64, kMostTensorNames = 4096;
constexpr size_t kMostShortText = 64, kMostLineText = 4096, kMostSchemaText = size_t{1} << 18;

// --- What is checked ---

bool usable_name(std::string_view name) {
  return !name.empty() && name.size() <= kMostShortText &&
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

Status broken(const std::string& what) { return {Code::kPlugin, what}; }

/// For an error: what is no plain letter could make a log say something else.
std::string printable(std::string_view text) {
  std::string out(text.substr(0, sizeof ds_note::id));
  std::ranges::replace_if(
      out, [](char c) { return c < ' ' || c > '~'; }, '?');
  return out;
}

Status check_text(const std::string& what, ds_str text, size_t most) {
  if (text.len > most)
    return broken(what + " has " + std::to_string(text.len) + " bytes, at most " +
                  std::to_string(most));
  return valid_utf8(text_of(text)) ? Status() : broken(what + " is not UTF-8");
}

/// The strings of a component's table.
Status check_table_texts(const std::string& name, const ds_component& c) {
  if (c.kind == DS_KIND_TOOL)
    return check_text(name + ": input schema",
                      full_struct(static_cast<const ds_tool*>(c.table)).input_schema,
                      kMostSchemaText);
  if (c.kind != DS_KIND_ENCODER) return {};
  const auto t = full_struct(static_cast<const ds_encoder*>(c.table));
  if (t.tensor_count > kMostTensorNames || (t.tensor_count != 0 && t.tensor_names == nullptr))
    return broken(name + ": " + std::to_string(t.tensor_count) + " tensor names, expected 0 to " +
                  std::to_string(kMostTensorNames));
  for (const ds_str tensor : std::span(t.tensor_names, t.tensor_count))
    DS_TRY(check_text(name + ": a tensor's name", tensor, kMostLineText));
  return {};
}

Status check_component(const ds_component& c, uint32_t note_kinds, Schemas schemas) {
  const std::string name(text_of(c.name));
  if (!usable_name(name))
    return broken("component name \"" + printable(name) +
                  "\": expected 1 to 64 of a-z, 0-9, dot, dash, underscore");
  const std::string_view kind = kind_name(c.kind);
  if (kind.empty()) return broken(name + ": kind " + std::to_string(c.kind) + " is not known here");
  if ((note_kinds & (1u << c.kind)) == 0)
    return broken(name + ": kind " + std::string(kind) + " is not in the file's note");
  if (c.min_host_minor > DS_ABI_MINOR)
    return unsupported(name + " needs plugin ABI 1." + std::to_string(c.min_host_minor) +
                       ", this host has 1." + std::to_string(DS_ABI_MINOR));
  if ((c.caps & DS_CAP_CPU) == 0) return unsupported(name + " does not run on a CPU");
  if (c.create == nullptr || c.ops == nullptr || full_struct(c.ops).destroy == nullptr)
    return broken(name + ": create or destroy is missing");
  if (c.table == nullptr || !has_required(c))
    return broken(name + ": a function that every " + std::string(kind) + " has is missing");
  DS_TRY(check_text(name + ": summary", c.summary, kMostLineText));
  DS_TRY(check_text(name + ": config schema", c.config_schema, kMostSchemaText));
  DS_TRY(check_table_texts(name, c));
  const std::string_view schema = text_of(c.config_schema);
  return schemas == Schemas::kRun ? make_plugin_config(name, schema, Json::object()).status()
                                  : unjudged_plugin_config(name, schema, Json::object()).status();
}

Status check_all(const ds_plugin& given, const PluginFile& note, Schemas schemas,
                 Description& out) {
  const ds_plugin plugin = full_struct(&given);
  DS_TRY(check_text("id", plugin.id, sizeof ds_note::id));
  DS_TRY(check_text("version", plugin.version, kMostShortText));
  DS_TRY(check_text("license", plugin.license, kMostLineText));
  out.id = text_of(plugin.id);
  out.version = text_of(plugin.version);
  out.license = text_of(plugin.license);
  out.abi_minor = plugin.abi_minor;
  if (out.id != note.id)
    return broken("id \"" + printable(out.id) + "\", the file's note says \"" + note.id + "\"");
  if (out.version.empty()) return broken("version is empty");
  if (plugin.component_count == 0 || plugin.component_count > kMostComponents ||
      plugin.components == nullptr)
    return broken(std::to_string(plugin.component_count) + " components, expected 1 to " +
                  std::to_string(kMostComponents));
  for (const ds_component* at : std::span(plugin.components, plugin.component_count)) {
    if (at == nullptr) return broken("a component is NULL");
    const ds_component c = full_struct(at);
    DS_TRY(check_component(c, note.kinds, schemas));
    for (const ds_component& other : out.components) {
      if (other.kind == c.kind && text_of(other.name) == text_of(c.name))
        return broken(std::string(kind_name(c.kind)) + " " + std::string(text_of(c.name)) +
                      " is there twice");
    }
    out.components.push_back(c);
  }
  return {};
}

// --- The flat form: of each function only whether it is there ---

template <class F>
void each_function(F f, auto&... functions) {
  (f(functions), ...);
}
template <class F>
void functions_of(ds_instance_ops& t, F f) {
  each_function(f, t.destroy, t.health, t.reconfigure, t.save, t.restore, t.stats, t.parameters,
                t.parameters_changed);
}
template <class F>
void functions_of(ds_encoder& t, F f) {
  each_function(f, t.plan, t.encode, t.backward);
}
template <class F>
void functions_of(ds_attention& t, F f) {
  each_function(f, t.plan, t.prefill, t.decode, t.backward, t.explain);
}
template <class F>
void functions_of(ds_quantizer& t, F f) {
  each_function(f, t.format, t.observe, t.quantize, t.dequantize, t.plan, t.prepare, t.linear,
                t.fake_quant, t.fake_quant_backward);
}
template <class F>
void functions_of(ds_learner& t, F f) {
  each_function(f, t.round_begin, t.draws, t.coefficients, t.combine, t.stepped, t.round_end,
                t.forget);
}
template <class F>
void functions_of(ds_curriculum& t, F f) {
  each_function(f, t.pick, t.score, t.outcome);
}
template <class F>
void functions_of(ds_retriever& t, F f) {
  each_function(f, t.put, t.erase, t.commit, t.search, t.fetch);
}
template <class F>
void functions_of(ds_tool& t, F f) {
  each_function(f, t.analyse, t.invoke);
}

template <class Table>
void put_functions(FlatWriter& to, Table table) {
  functions_of(table, [&](auto* function) { to.put<uint8_t>(function != nullptr); });
}

template <class... A>
ds_code not_here(A...) {
  return DS_E_UNSUPPORTED;
}
void destroy_nothing(ds_instance*) {}

struct SetFunction {
  FlatReader& from;
  bool there() const {
    const auto flag = from.get<uint8_t>();
    if (flag > 1) from.fail("a function is neither there nor missing");
    return flag == 1;
  }
  template <class... A>
  void operator()(ds_code (*&function)(A...)) const {
    function = there() ? &not_here<A...> : nullptr;
  }
  void operator()(void (*&function)(ds_instance*)) const {
    function = there() ? &destroy_nothing : nullptr;
  }
};

/// Calls f with a table of the kind, empty; false: no such kind.
template <class F>
bool with_table(uint32_t kind, F f) {
  switch (kind) {
    case DS_KIND_ENCODER:
      return f(ds_encoder{}), true;
    case DS_KIND_ATTENTION:
      return f(ds_attention{}), true;
    case DS_KIND_QUANTIZER:
      return f(ds_quantizer{}), true;
    case DS_KIND_LEARNER:
      return f(ds_learner{}), true;
    case DS_KIND_CURRICULUM:
      return f(ds_curriculum{}), true;
    case DS_KIND_RETRIEVER:
      return f(ds_retriever{}), true;
    case DS_KIND_TOOL:
      return f(ds_tool{}), true;
    default:
      return false;
  }
}

void put_table(FlatWriter& to, const ds_component& c) {
  with_table(c.kind, [&](auto kind) {
    const auto table = full_struct(static_cast<const decltype(kind)*>(c.table));
    put_functions(to, table);
    if constexpr (std::is_same_v<decltype(kind), ds_tool>) to.put_text(text_of(table.input_schema));
    if constexpr (std::is_same_v<decltype(kind), ds_encoder>) {
      to.put(table.modalities);
      to.put<uint64_t>(table.tensor_count);
      for (const ds_str name : std::span(table.tensor_names, table.tensor_count))
        to.put_text(text_of(name));
    }
  });
}

}  // namespace

Result<Description> check_description(const ds_plugin& given, const PluginFile& note,
                                      const std::string& path, Schemas schemas) {
  Description out;
  DS_TRY(check_all(given, note, schemas, out).in(path));
  return out;
}

void put_description(FlatWriter& to, const Description& from) {
  for (const std::string_view text : {from.id, from.version, from.license}) to.put_text(text);
  to.put(from.abi_minor);
  to.put<uint64_t>(from.components.size());
  for (const ds_component& c : from.components) {
    to.put(c.kind);
    for (const ds_str text : {c.name, c.summary, c.config_schema}) to.put_text(text_of(text));
    to.put(c.caps);
    to.put(c.min_sm);
    to.put(c.min_host_minor);
    put_functions(to, full_struct(c.ops));
    put_table(to, c);
  }
}

void DescribedPlugin::read_table(FlatReader& from, Part& part) {
  const bool known = with_table(part.component.kind, [&](auto empty) {
    auto& table = part.table.emplace<decltype(empty)>(empty);
    table.size = sizeof table;
    functions_of(table, SetFunction{from});
    if constexpr (std::is_same_v<decltype(empty), ds_tool>)
      table.input_schema = abi_str(from.get_text());
    if constexpr (std::is_same_v<decltype(empty), ds_encoder>) {
      table.modalities = from.get<uint32_t>();
      const uint64_t n = from.get_count(sizeof(uint64_t));
      if (n > kMostTensorNames) from.fail("an encoder has too many tensors");
      for (uint64_t i = 0; i < n && from.ok(); ++i)
        part.tensor_names.push_back(abi_str(from.get_text()));
      table.tensor_names = part.tensor_names.data();
      table.tensor_count = static_cast<uint32_t>(part.tensor_names.size());
    }
    part.component.table = &table;
  });
  if (!known) from.fail("a component's kind is not known here");
}

void DescribedPlugin::read_part(FlatReader& from, Part& part) {
  ds_component& c = part.component;
  c.size = sizeof c;
  c.kind = from.get<uint32_t>();
  for (ds_str* text : {&c.name, &c.summary, &c.config_schema}) *text = abi_str(from.get_text());
  c.caps = from.get<uint64_t>();
  c.min_sm = from.get<uint32_t>();
  c.min_host_minor = from.get<uint32_t>();
  c.create = &not_here<const ds_host*, const ds_config*, ds_device, ds_instance**, ds_status*>;
  part.ops.size = sizeof part.ops;
  functions_of(part.ops, SetFunction{from});
  c.ops = &part.ops;
  read_table(from, part);
}

Result<const ds_plugin*> DescribedPlugin::read() {
  if (bytes_.size() > kMostDescriptionBytes)
    return broken("its description has " + std::to_string(bytes_.size()) + " bytes, at most " +
                  std::to_string(kMostDescriptionBytes));
  FlatReader from(bytes_);
  plugin_.size = sizeof plugin_;
  for (ds_str* text : {&plugin_.id, &plugin_.version, &plugin_.license})
    *text = abi_str(from.get_text());
  plugin_.abi_minor = from.get<uint32_t>();
  const uint64_t n = from.get_count(sizeof(uint32_t));
  if (n > kMostComponents) from.fail("it has too many components");
  for (uint64_t i = 0; i < n && from.ok(); ++i) {
    read_part(from, parts_.emplace_back());
    list_.push_back(&parts_.back().component);
  }
  if (from.ok() && !from.at_end()) from.fail("something follows it");
  if (!from.ok()) return broken(std::string("its description: ") + from.why());
  plugin_.components = list_.data();
  plugin_.component_count = static_cast<uint32_t>(list_.size());
  return &plugin_;
}

}  // namespace ds
