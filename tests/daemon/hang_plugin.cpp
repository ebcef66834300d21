// SPDX-License-Identifier: Apache-2.0
// A tool that does what its text says: "hang" never comes back and heeds nothing, "stop" waits
// until it is told to stop, "abort" ends the process, "log" logs a line; anything else is one
// finding with that text.
#include <cstdlib>

#include "ds/plugin.hpp"

namespace {

struct Hang {
  static constexpr std::string_view name = "hang";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_OUT_OF_PROCESS;

  explicit Hang(ds::sdk::context) {}

  template <class Emit>
  void analyse(const ds_call& call, std::string_view, std::string_view, std::string_view text,
               Emit emit) const {
    for (volatile bool always = true; text == "hang" && always;) {
    }
    while (text == "stop" && __atomic_load_n(call.cancel, __ATOMIC_RELAXED) == 0) {
    }
    if (text == "stop") throw ds::sdk::error(DS_E_CANCELLED, "stopped as told");
    if (text == "abort") std::abort();
    ds_finding f{};
    f.severity = DS_SEVERITY_NOTE;
    f.line = 7;
    f.message = ds::sdk::str(text);
    f.confidence = 0.5f;
    emit(f);
  }
};

}  // namespace

DS_PLUGIN("org.driftstone.hang", "1.0.0", "Apache-2.0", Hang)
