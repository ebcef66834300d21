// SPDX-License-Identifier: Apache-2.0
// Reading the other side of the plugin ABI: structs of any size, strings, status values.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>

#include "ds/plugin.h"
#include "ds/status.h"

namespace ds {

/// All of T: what the writer of `from` did not know is zero (rule R1).
template <class T>
T full_struct(const T* from) {
  T out{};
  if (from != nullptr) std::memcpy(&out, from, std::min<size_t>(from->size, sizeof out));
  out.size = sizeof out;
  return out;
}

inline std::string_view text_of(ds_str s) {
  return s.ptr != nullptr ? std::string_view(s.ptr, static_cast<size_t>(s.len))
                          : std::string_view();
}
inline ds_str abi_str(std::string_view s) { return {s.data(), s.size()}; }

constexpr std::string_view kKindNames[] = {"",        "encoder",    "attention", "quantizer",
                                           "learner", "curriculum", "retriever", "tool"};
/// "attention"; empty for a kind that this host does not know.
constexpr std::string_view kind_name(uint32_t kind) {
  return kind < std::size(kKindNames) ? kKindNames[kind] : std::string_view();
}
/// 0 = no such kind.
constexpr uint32_t kind_of_name(std::string_view name) {
  for (uint32_t kind = 1; kind < std::size(kKindNames); ++kind) {
    if (kKindNames[kind] == name) return kind;
  }
  return 0;
}

/// A call of the daemon's on `pool`; what else it says is the caller's.
inline ds_call host_call(const ds_parallel* pool) {
  ds_call call{};
  call.size = sizeof call;
  call.parallel = pool;
  return call;
}

/// Why a call failed, as ours: "window-global: q: 5 dimensions, expected 3".
inline Status plugin_status(std::string_view component, ds_code code, const ds_status& st) {
  if (code == DS_OK) return {};
  const std::string text(st.text, std::min<size_t>(st.len, sizeof st.text));
  const std::string message = std::string(component) + ": " +
                              (text.empty() ? "failed with code " + std::to_string(code) : text);
  switch (code) {
    case DS_E_ARG:
    case DS_E_SHAPE:
    case DS_E_DTYPE:
    case DS_E_CONFIG:
    case DS_E_DATA:
      return {Code::kInvalid, message};
    case DS_E_DEVICE:
    case DS_E_UNSUPPORTED:
    case DS_E_VERSION:
      return {Code::kUnsupported, message};
    case DS_E_NOMEM:
      return {Code::kUnavailable, message};
    case DS_E_BUSY:
      return {Code::kBusy, message};
    case DS_E_DEADLINE:
      return {Code::kDeadline, message};
    case DS_E_CANCELLED:
      return {Code::kCancelled, message};
    default:
      return {Code::kPlugin, message};
  }
}

}  // namespace ds
