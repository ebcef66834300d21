// SPDX-License-Identifier: Apache-2.0
// nlohmann-json throws on malformed text; this file is where that ends and Status begins.
#include "storage/json.h"

#include <cmath>
#include <exception>

namespace ds {
namespace {

/// Byte position of the bracket that exceeds `max_depth`, or npos. Runs before the parser so that
/// hostile nesting costs one linear scan and no memory. Brackets inside strings do not count.
size_t too_deep_at(std::string_view text, int max_depth) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > max_depth) return i;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return std::string_view::npos;
}

/// nlohmann's text without its "[json.exception...] " prefix.
std::string reason(const std::exception& error) {
  std::string_view text = error.what();
  if (const size_t end = text.find("] "); text.starts_with('[') && end != text.npos) {
    text.remove_prefix(end + 2);
  }
  return std::string(text);
}

Status wrong_type(std::string_view key, const Json& found, std::string_view wanted) {
  return invalid("\"" + std::string(key) + "\" is " + found.type_name() + ", expected " +
                 std::string(wanted));
}

Status missing(const Json& object, std::string_view key, std::string_view wanted) {
  if (!object.is_object()) {
    return invalid("looking for \"" + std::string(key) + "\" in " + object.type_name() +
                   ", expected an object");
  }
  return invalid("\"" + std::string(key) + "\" is missing, expected " + std::string(wanted));
}

Result<int64_t> as_int(const Json& value, std::string_view key) {
  if (value.is_number_unsigned()) {
    const auto n = value.get<uint64_t>();
    if (n > static_cast<uint64_t>(INT64_MAX)) {
      return invalid("\"" + std::string(key) + "\" is " + std::to_string(n) +
                     ", expected at most " + std::to_string(INT64_MAX));
    }
    return static_cast<int64_t>(n);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double d = value.get<double>();
    // Beyond 2^53 a double no longer says which integer was meant.
    if (d == std::floor(d) && std::abs(d) <= 9007199254740992.0) return static_cast<int64_t>(d);
    return invalid("\"" + std::string(key) + "\" is " + value.dump() + ", expected an integer");
  }
  return wrong_type(key, value, "an integer");
}

void append_number(const Json& value, std::string& out) {
  if (value.is_number_float()) {
    const double d = value.get<double>();
    // Integral doubles print as integers, because 1.0 and 1 are equal values.
    if (d == std::floor(d) && d >= -0x1p63 && d < 0x1p63) {
      out += std::to_string(static_cast<int64_t>(d));
      return;
    }
  }
  out += value.dump();
}

void append_canonical(const Json& value, std::string& out) {
  switch (value.type()) {
    case Json::value_t::object: {
      out += '{';
      bool first = true;
      for (const auto& [key, member] : value.get_ref<const Json::object_t&>()) {
        if (!first) out += ',';
        first = false;
        out += dump_json(Json(key));
        out += ':';
        append_canonical(member, out);
      }
      out += '}';
      return;
    }
    case Json::value_t::array: {
      out += '[';
      bool first = true;
      for (const Json& item : value.get_ref<const Json::array_t&>()) {
        if (!first) out += ',';
        first = false;
        append_canonical(item, out);
      }
      out += ']';
      return;
    }
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
    case Json::value_t::number_float:
      append_number(value, out);
      return;
    default:
      out += dump_json(value);
      return;
  }
}

}  // namespace

Result<Json> parse_json(std::string_view text, int max_depth) {
  if (const size_t at = too_deep_at(text, max_depth); at != std::string_view::npos) {
    return invalid("JSON at byte " + std::to_string(at) + ": nested deeper than " +
                   std::to_string(max_depth) + " levels");
  }
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const Json::parse_error& error) {
    return invalid("JSON at byte " + std::to_string(error.byte) + ": " + reason(error));
  } catch (const Json::out_of_range& error) {
    return invalid("JSON: " + reason(error) + ", expected a number that FP64 can hold");
  } catch (const std::exception& error) {  // no memory
    return invalid("JSON: " + reason(error));
  }
}

std::string dump_json(const Json& value, int indent) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

std::string canonical_json(const Json& value) {
  std::string out;
  append_canonical(value, out);
  return out;
}

const Json* find(const Json& object, std::string_view key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

Result<std::string> get_string(const Json& object, std::string_view key) {
  const Json* value = find(object, key);
  if (!value) return missing(object, key, "a string");
  if (!value->is_string()) return wrong_type(key, *value, "a string");
  return value->get_ref<const std::string&>();
}

Result<std::string> get_string(const Json& object, std::string_view key,
                               std::string_view fallback) {
  if (!find(object, key)) return std::string(fallback);
  return get_string(object, key);
}

Result<int64_t> get_int(const Json& object, std::string_view key) {
  const Json* value = find(object, key);
  if (!value) return missing(object, key, "an integer");
  return as_int(*value, key);
}

Result<int64_t> get_int(const Json& object, std::string_view key, int64_t fallback) {
  if (!find(object, key)) return fallback;
  return get_int(object, key);
}

Result<double> get_number(const Json& object, std::string_view key) {
  const Json* value = find(object, key);
  if (!value) return missing(object, key, "a number");
  if (!value->is_number()) return wrong_type(key, *value, "a number");
  return value->get<double>();
}

Result<double> get_number(const Json& object, std::string_view key, double fallback) {
  if (!find(object, key)) return fallback;
  return get_number(object, key);
}

Result<bool> get_bool(const Json& object, std::string_view key, bool fallback) {
  const Json* value = find(object, key);
  if (!value) return fallback;
  if (!value->is_boolean()) return wrong_type(key, *value, "true or false");
  return value->get<bool>();
}

}  // namespace ds
