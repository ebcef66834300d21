// SPDX-License-Identifier: Apache-2.0
// A component's settings: a JSON object that its JSON Schema (draft 7) allows, with the schema's
// defaults filled in. This is what the C type ds_config points to.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "ds/plugin.h"
#include "ds/status.h"
#include "storage/json.h"

struct ds_config {
  ds::Json values;
  std::string text;  ///< of the same
};

namespace ds {

/// `schema` empty: no keys. Errors name the component, the key and what the schema wants.
Result<std::unique_ptr<ds_config>> make_plugin_config(std::string_view component,
                                                      std::string_view schema, Json values);
/// The same without holding the values to the schema, which is only parsed: for a schema that
/// nobody trusts, where a helper process does the rest.
Result<std::unique_ptr<ds_config>> unjudged_plugin_config(std::string_view component,
                                                          std::string_view schema, Json values);

/// Keys of `next` that differ from `before` but are not marked "x-ds-live" in the schema; empty =
/// the change can be made while the instance runs.
Result<std::string> restart_key(std::string_view schema, const Json& before, const Json& next);

/// ds_host.config_*: dotted path; DS_E_CONFIG leaves *out alone.
ds_code config_int(const ds_config* config, const char* path, int64_t* out);
ds_code config_number(const ds_config* config, const char* path, double* out);
ds_code config_text(const ds_config* config, const char* path, ds_str* out);
ds_str config_json(const ds_config* config);

}  // namespace ds
