// SPDX-License-Identifier: Apache-2.0
// JSON where memory may be refused at any point. A value of nlohmann's allocates while it is
// destroyed, which then ends the process; its events do not, and neither do single strings and
// numbers. So objects are read by events into what is declared here, and written by hand.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <variant>

#include "ds/plugin.hpp"

namespace ds::modules {

/// A member of an object; of what is nested or null only the name of its type is kept.
struct JsonMember {
  struct Other {
    const char* type;
  };
  std::variant<Other, bool, std::int64_t, std::uint64_t, double, std::string> value;

  const char* type() const {
    if (const auto* other = std::get_if<Other>(&value)) return other->type;
    return std::holds_alternative<std::string>(value) ? "string"
           : std::holds_alternative<bool>(value)      ? "boolean"
                                                      : "number";
  }
  bool is_scalar() const { return !std::holds_alternative<Other>(value); }
  const std::string* text() const { return std::get_if<std::string>(&value); }
};

/// 1 equals 1.0. Nested values and null equal nothing.
inline bool operator==(const JsonMember& x, const JsonMember& y) {
  return std::visit(
      [](const auto& a, const auto& b) {
        using A = std::decay_t<decltype(a)>;
        using B = std::decay_t<decltype(b)>;
        constexpr bool numbers = std::is_arithmetic_v<A> && std::is_arithmetic_v<B> &&
                                 !std::is_same_v<A, bool> && !std::is_same_v<B, bool>;
        if constexpr (std::is_same_v<A, JsonMember::Other>) {
          return false;
        } else if constexpr (std::is_same_v<A, B>) {
          return a == b;
        } else if constexpr (numbers && std::is_integral_v<A> && std::is_integral_v<B>) {
          return std::cmp_equal(a, b);
        } else if constexpr (numbers) {
          return static_cast<double>(a) == static_cast<double>(b);
        } else {
          return false;
        }
      },
      x.value, y.value);
}

using JsonMembers = std::map<std::string, JsonMember, std::less<>>;

namespace detail {

/// Takes the parser's events. Of equal keys the last counts.
struct MemberReader {
  JsonMembers members;
  const char* root = nullptr;  // type of the whole
  std::string at;
  int depth = 0;

  bool take(JsonMember member) {
    if (depth == 0) root = member.type();
    if (depth == 1 && root == std::string_view("object"))
      members.insert_or_assign(at, std::move(member));
    return true;
  }
  bool open(const char* type) {
    take({JsonMember::Other{type}});
    ++depth;
    return true;
  }
  bool close() {
    --depth;
    return true;
  }

  // What nlohmann::json::sax_parse calls.
  bool null() { return take({JsonMember::Other{"null"}}); }
  bool boolean(bool value) { return take({value}); }
  bool number_integer(std::int64_t value) { return take({value}); }
  bool number_unsigned(std::uint64_t value) { return take({value}); }
  bool number_float(double value, const std::string&) { return take({value}); }
  bool string(std::string& value) { return take({std::move(value)}); }
  bool binary(nlohmann::json::binary_t&) { return false; }
  bool start_object(std::size_t) { return open("object"); }
  bool start_array(std::size_t) { return open("array"); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& name) {
    if (depth == 1) at = std::move(name);
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception&) {
    return false;
  }
};

}  // namespace detail

/// The members of the object `text`; `what` and `code` are for the error.
inline JsonMembers json_members(std::string_view text, std::string_view what, ds_code code) {
  detail::MemberReader reader;
  if (!nlohmann::json::sax_parse(text, &reader))
    throw sdk::error(code, std::string(what) + ": not JSON");
  if (reader.root != std::string_view("object"))
    throw sdk::error(code, std::string(what) + ": " + reader.root + ", expected an object");
  return std::move(reader.members);
}

/// A string in quotes. What is no UTF-8 is replaced.
inline std::string json_text(std::string_view text) {
  using Json = nlohmann::json;
  return Json(std::string(text)).dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace ds::modules
