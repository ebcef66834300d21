// SPDX-License-Identifier: Apache-2.0
// A tool that nobody trusts. Its constructor writes the number of its process to a file of
// $TMPDIR; built with DS_UNTRUSTED_ENDS it then kills its process, with DS_UNTRUSTED_HANGS it never
// comes back. A finding's line is the number of the process that answers; "abort" ends it, "reach
// out" names the calls that could harm the daemon and were allowed.
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
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

std::string reach_out() {
  std::string out;
  const auto tried = [&](const char* name, bool allowed) {
    if (allowed) out += std::string(name) + " ";
  };
  const pid_t daemon = getppid();
  char from = 0, to = 0;
  const iovec here{&to, 1}, there{&from, 1};
  tried("kill", kill(daemon, 0) == 0);
  tried("kill-group", kill(-daemon, 0) == 0);
  tried("kill-all", kill(-1, 0) == 0);
  tried("tgkill", syscall(SYS_tgkill, daemon, daemon, 0) == 0);
  tried("ptrace", ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) == 0);
  tried("process_vm_readv", process_vm_readv(getpid(), &here, 1, &there, 1, 0) == 1);
  tried("socket", socket(AF_UNIX, SOCK_STREAM, 0) >= 0);
  tried("unshare", syscall(SYS_unshare, 0) == 0);
  tried("pidfd_send_signal",
        syscall(SYS_pidfd_send_signal, 0, 0, nullptr, 0) == 0 || errno != EPERM);
  if (kill(getpid(), 0) != 0) out += "not even itself ";
  if (std::system("true") != 0) out += "no program ";
  return out.empty() ? "nothing" : out;
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
    const std::string said = text == "reach out" ? reach_out() : word_;
    f.message = ds::sdk::str(said);
    f.confidence = 1;
    emit(f);
  }

 private:
  std::string word_;
};

}  // namespace

DS_PLUGIN("org.driftstone.untrusted", DS_UNTRUSTED_VERSION, "Apache-2.0", Untrusted)
