// SPDX-License-Identifier: Apache-2.0
// A working plugin that says whenever the loader runs a piece of it, before anybody has asked: an
// IFUNC resolver (while symbols are bound), DT_INIT, a constructor, the entry. It writes one letter
// each to a file descriptor that the test has opened, by bare system calls: a resolver may call
// nothing.
#include <sys/syscall.h>

#include "ds/plugin.hpp"
#include "tests/daemon/hostile_marks.h"

namespace {

__attribute__((always_inline)) inline void mark(char letter) {
  const char* at = &letter;
#if defined(__x86_64__)
  long result = SYS_write;
  asm volatile("syscall"
               : "+a"(result)
               : "D"(static_cast<long>(ds::kMarkDescriptor)), "S"(at), "d"(1l)
               : "rcx", "r11", "memory");
#else
  register long x0 asm("x0") = ds::kMarkDescriptor;
  register long x1 asm("x1") = reinterpret_cast<long>(at);
  register long x2 asm("x2") = 1;
  register long x8 asm("x8") = SYS_write;
  asm volatile("svc 0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x8) : "memory");
#endif
}

__attribute__((constructor)) void constructor() { mark(ds::kMarkConstructor); }

int answer() { return 1; }

struct Hostile {
  static constexpr std::string_view name = "hostile";
  explicit Hostile(ds::sdk::context) {}
  std::string invoke(const ds_call&, std::string_view) const;
};

}  // namespace

extern "C" {
void hostile_init() { mark(ds::kMarkInit); }  // DT_INIT, by a linker option

__attribute__((no_sanitize("address", "undefined", "thread"))) int (*hostile_resolver())() {
  mark(ds::kMarkResolver);
  return &answer;
}
int hostile_answer() __attribute__((ifunc("hostile_resolver")));
}

std::string Hostile::invoke(const ds_call&, std::string_view) const {
  return std::to_string(hostile_answer());
}

DS_PLUGIN("org.driftstone.hostile", "1.0.0", "Apache-2.0", Hostile)

#ifdef DS_SECOND_EXPORT
extern "C" DS_EXPORT int hostile_second() { return hostile_answer(); }
#endif
