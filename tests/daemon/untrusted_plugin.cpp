// SPDX-License-Identifier: Apache-2.0
// A tool that nobody trusts. Its constructor writes the number of its process to a file of
// $TMPDIR; built with DS_UNTRUSTED_ENDS it then kills its process, with DS_UNTRUSTED_HANGS it never
// comes back. A finding's line is the number of the process that answers; "abort" ends it.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "ds/plugin.hpp"

#ifndef DS_UNTRUSTED_VERSION
#define DS_UNTRUSTED_VERSION "1.0.0"
#endif

namespace {

__attribute__((constructor)) void leave_mark() {
  const char* folder = std::getenv("TMPDIR");
  if (folder == nullptr) return;
  if (std::FILE* file = std::fopen((std::string(folder) + "/constructed").c_str(), "a")) {
    std::fprintf(file, "%d\n", getpid());
    std::fclose(file);
  }
#ifdef DS_UNTRUSTED_ENDS
  kill(getpid(), SIGKILL);
#endif
#ifdef DS_UNTRUSTED_HANGS
  for (volatile bool always = true; always;) {
  }
#endif
}

struct Untrusted {
  static constexpr std::string_view name = "untrusted";
  static constexpr std::string_view summary = "says which process it is";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_OUT_OF_PROCESS;
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,"properties":{
    "word":{"type":"string","pattern":"^[a-z]+$","default":"hello","x-ds-live":true}}})";
  static constexpr std::string_view input_schema = R"({"type":"object"})";

  explicit Untrusted(ds::sdk::context context) : word_(context.get("word", "")) {}
  void reconfigure(ds::sdk::context context) { word_ = context.get("word", ""); }

  template <class Emit>
  void analyse(const ds_call&, std::string_view, std::string_view, std::string_view text,
               Emit emit) const {
    if (text == "abort") std::abort();
    ds_finding f{};
    f.severity = DS_SEVERITY_NOTE;
    f.line = static_cast<std::uint32_t>(getpid());
    f.message = ds::sdk::str(word_);
    f.confidence = 1;
    emit(f);
  }

 private:
  std::string word_;
};

}  // namespace

DS_PLUGIN("org.driftstone.untrusted", DS_UNTRUSTED_VERSION, "Apache-2.0", Untrusted)
