// SPDX-License-Identifier: Apache-2.0
// The one door to nlohmann-json: parsing with limits and typed access that returns a Status instead
// of throwing. Everything else in the tree uses these functions on `ds::Json`.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "ds/status.h"

namespace ds {

using Json = nlohmann::json;

/// Parses one JSON document. Refuses invalid UTF-8, trailing bytes and nesting deeper than
/// `max_depth` with the byte position in the message.
Result<Json> parse_json(std::string_view text, int max_depth = 64);

/// Serialises without throwing; bytes that are not UTF-8 become U+FFFD.
std::string dump_json(const Json& value, int indent = -1);

/// RFC 8785-like canonical text: keys sorted, no spaces, shortest round-trip numbers. Two equal
/// values give equal bytes, which is what hashes of records are taken over.
std::string canonical_json(const Json& value);

// Typed members of an object. The message names the key, the type found and the type wanted.
// `get_*` with a default returns it when the key is absent or null; without one, absence fails.
Result<std::string> get_string(const Json& object, std::string_view key);
Result<std::string> get_string(const Json& object, std::string_view key, std::string_view fallback);
Result<int64_t> get_int(const Json& object, std::string_view key);
Result<int64_t> get_int(const Json& object, std::string_view key, int64_t fallback);
Result<double> get_number(const Json& object, std::string_view key);
Result<double> get_number(const Json& object, std::string_view key, double fallback);
Result<bool> get_bool(const Json& object, std::string_view key, bool fallback);
/// The member, or nullptr when absent or null.
const Json* find(const Json& object, std::string_view key);

}  // namespace ds
