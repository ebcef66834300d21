// SPDX-License-Identifier: Apache-2.0
#include "plugin/plugin_config.h"

#include <cmath>
#include <valijson/adapters/nlohmann_json_adapter.hpp>
#include <valijson/schema.hpp>
#include <valijson/schema_parser.hpp>
#include <valijson/validation_results.hpp>
#include <valijson/validator.hpp>

namespace ds {
namespace {

using valijson::adapters::NlohmannJsonAdapter;

Result<Json> parse_schema(std::string_view component, std::string_view text) {
  if (text.empty()) return Json{{"type", "object"}, {"additionalProperties", false}};
  Result<Json> schema = parse_json(text);
  if (!schema.ok()) return schema.status().in(std::string(component) + ": schema");
  if (!schema->is_object())
    return invalid(std::string(component) + ": schema: " + schema->type_name() +
                   ", expected an object");
  return schema;
}

void fill_defaults(const Json& schema, Json& values) {
  const Json* properties = find(schema, "properties");
  if (properties == nullptr || !properties->is_object() || !values.is_object()) return;
  for (const auto& [key, property] : properties->items()) {
    if (!property.is_object()) continue;
    const Json* fallback = find(property, "default");
    if (fallback != nullptr && !values.contains(key)) values[key] = *fallback;
    if (values.contains(key)) fill_defaults(property, values[key]);
  }
}

/// The library throws on a schema that it cannot read and names no place then.
Status check_values(std::string_view component, const Json& schema_json, const Json& values) {
  const std::string where(component);
  valijson::Schema schema;
  try {
    valijson::SchemaParser().populateSchema(NlohmannJsonAdapter(schema_json), schema);
  } catch (const std::exception& e) {
    return Status(Code::kPlugin, where + ": schema: " + e.what());
  }
  valijson::ValidationResults results;
  if (valijson::Validator().validate(schema, NlohmannJsonAdapter(values), &results)) return {};
  valijson::ValidationResults::Error error;
  std::string message, place;
  while (results.popError(error)) {
    if (!message.empty() && error.context.size() < 2) continue;  // the first names the place best
    place.clear();
    for (size_t i = 1; i < error.context.size(); ++i) place += error.context[i];
    message = error.description;
  }
  return invalid(where + ": config" + (place.empty() ? "" : " " + place) + ": " + message +
                 ", got " + dump_json(values));
}

const Json* at_path(const ds_config* config, const char* path) {
  if (config == nullptr || path == nullptr) return nullptr;
  const Json* at = &config->values;
  std::string_view rest(path);
  while (!rest.empty()) {
    const size_t dot = rest.find('.');
    if (!at->is_object()) return nullptr;
    at = find(*at, rest.substr(0, dot));
    if (at == nullptr) return nullptr;
    rest = dot == std::string_view::npos ? std::string_view() : rest.substr(dot + 1);
  }
  return at;
}

std::unique_ptr<ds_config> filled(const Json& schema, Json values) {
  if (values.is_null()) values = Json::object();
  fill_defaults(schema, values);
  auto config = std::make_unique<ds_config>();
  config->values = std::move(values);
  config->text = dump_json(config->values);
  return config;
}

}  // namespace

Result<std::unique_ptr<ds_config>> make_plugin_config(std::string_view component,
                                                      std::string_view schema_text, Json values) {
  DS_ASSIGN(const Json schema, parse_schema(component, schema_text));
  auto config = filled(schema, std::move(values));
  DS_TRY(check_values(component, schema, config->values));
  return config;
}

Result<std::unique_ptr<ds_config>> unjudged_plugin_config(std::string_view component,
                                                          std::string_view schema, Json values) {
  DS_ASSIGN(const Json parsed, parse_schema(component, schema));
  return filled(parsed, std::move(values));
}

Result<std::string> restart_key(std::string_view schema_text, const Json& before,
                                const Json& next) {
  DS_ASSIGN(const Json schema, parse_schema("component", schema_text));
  const Json* properties = find(schema, "properties");
  const auto live = [&](const std::string& key) {
    const Json* property = properties != nullptr ? find(*properties, key) : nullptr;
    const Result<bool> marked =
        property != nullptr ? get_bool(*property, "x-ds-live", false) : Result<bool>(false);
    return marked.ok() && *marked;
  };
  for (const auto& [key, value] : next.items()) {
    if ((!before.contains(key) || before[key] != value) && !live(key)) return key;
  }
  for (const auto& [key, value] : before.items()) {
    if (!next.contains(key) && !live(key)) return key;
  }
  return std::string();
}

ds_code config_int(const ds_config* config, const char* path, int64_t* out) {
  const Json* at = at_path(config, path);
  if (at == nullptr || !at->is_number() || out == nullptr) return DS_E_CONFIG;
  if (at->is_number_float()) {
    const auto value = at->get<double>();
    if (std::trunc(value) != value || std::fabs(value) > 9e15) return DS_E_CONFIG;
    *out = static_cast<int64_t>(value);
    return DS_OK;
  }
  *out = at->get<int64_t>();
  return DS_OK;
}

ds_code config_number(const ds_config* config, const char* path, double* out) {
  const Json* at = at_path(config, path);
  if (at == nullptr || !at->is_number() || out == nullptr) return DS_E_CONFIG;
  *out = at->get<double>();
  return DS_OK;
}

ds_code config_text(const ds_config* config, const char* path, ds_str* out) {
  const Json* at = at_path(config, path);
  if (at == nullptr || !at->is_string() || out == nullptr) return DS_E_CONFIG;
  const auto& text = at->get_ref<const std::string&>();
  *out = {text.data(), text.size()};
  return DS_OK;
}

ds_str config_json(const ds_config* config) {
  if (config == nullptr) return {"{}", 2};
  return {config->text.data(), config->text.size()};
}

}  // namespace ds
