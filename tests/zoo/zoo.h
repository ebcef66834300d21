// SPDX-License-Identifier: Apache-2.0
// What the zoo's files share. A file holds a sound component of a kind, named "sound", and copies
// of it that each break one rule; zoo_test.cpp says which check has to catch which.
#pragma once

#include <ctime>

#include "ds/plugin.hpp"

namespace zoo {

inline std::int64_t now_ns(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

inline void check_deadline(const ds_call& call) {
  if (call.deadline_ns != 0 && now_ns(CLOCK_MONOTONIC) > call.deadline_ns)
    throw ds::sdk::error(DS_E_DEADLINE, "too late");
}

inline constexpr float kOneBitMore = 1.000001f;

/// A component of the C++ layer as data that can be spoilt.
template <class T, class Table>
struct raw_component {
  ds_component component = ds::sdk::component<T>;
  Table table = *static_cast<const Table*>(ds::sdk::component<T>.table);
  raw_component() { component.table = &table; }
  raw_component(const raw_component&) = delete;
};

}  // namespace zoo

/// The note and the entry for components named one by one: ZOO(id, kind bits, &component...).
#define ZOO(ID, KINDS, ...)                                                                   \
  __attribute__((section(".note.driftstone"), used,                                           \
                 aligned(4))) static constexpr ds_note ds_note_ = ::ds::sdk::note(ID, KINDS); \
  extern "C" DS_EXPORT ds_code ds_plugin_entry_v1(const ds_host* host, const ds_plugin** out, \
                                                  ds_status* st) {                            \
    static const ds_component* const list[] = {__VA_ARGS__};                                  \
    static const ds_plugin self = [] {                                                        \
      ds_plugin p{};                                                                          \
      p.size = sizeof p;                                                                      \
      p.abi_minor = DS_ABI_MINOR;                                                             \
      p.id = ::ds::sdk::str(ID);                                                              \
      p.version = ::ds::sdk::str("1.0.0");                                                    \
      p.license = ::ds::sdk::str("Apache-2.0");                                               \
      p.component_count = static_cast<std::uint32_t>(std::size(list));                        \
      p.components = list;                                                                    \
      return p;                                                                               \
    }();                                                                                      \
    if (host == nullptr || out == nullptr)                                                    \
      return ::ds::sdk::fail(st, DS_E_ARG, "no host or no output");                           \
    *out = &self;                                                                             \
    return DS_OK;                                                                             \
  }
