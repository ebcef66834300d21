// SPDX-License-Identifier: Apache-2.0
#include "check/allocations.h"

#include <dlfcn.h>
#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DS_CHECK_OWN_MALLOC 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define DS_CHECK_OWN_MALLOC 0
#endif
#endif
#ifndef DS_CHECK_OWN_MALLOC
#define DS_CHECK_OWN_MALLOC 1
#endif

namespace ds::check {
namespace {

std::atomic<int64_t> live{0};
thread_local bool watching = false;
thread_local uint64_t count = 0, refuse_at = 0;

}  // namespace

bool allocations_are_ours() { return DS_CHECK_OWN_MALLOC != 0; }
int64_t live_bytes() { return live.load(); }

AllocationWatch::AllocationWatch(uint64_t fail_at) {
  watching = true;
  count = 0;
  refuse_at = fail_at;
}
AllocationWatch::~AllocationWatch() { watching = false; }
uint64_t AllocationWatch::counted() { return count; }
bool AllocationWatch::refused() { return refuse_at != 0 && count >= refuse_at; }

AllocationPause::AllocationPause() : was_(watching) { watching = false; }
AllocationPause::~AllocationPause() { watching = was_; }

}  // namespace ds::check

#if DS_CHECK_OWN_MALLOC
namespace {

/// The C library's own needs are not the plugin's: without memory for a thread's TLS it aborts.
bool from_c_library(void* caller) {
  Dl_info info{};
  if (dladdr(caller, &info) == 0 || info.dli_fname == nullptr) return false;
  const char* slash = std::strrchr(info.dli_fname, '/');
  const char* file = slash != nullptr ? slash + 1 : info.dli_fname;
  return std::strncmp(file, "libc.so", 7) == 0 || std::strncmp(file, "ld-linux", 8) == 0;
}

bool refuse(void* caller) {
  using namespace ds::check;
  if (!watching || refuse_at == 0) return false;
  return !from_c_library(caller) && ++count == refuse_at;
}
void* counted(void* p) {
  if (p != nullptr)
    ds::check::live.fetch_add(static_cast<int64_t>(malloc_usable_size(p)),
                              std::memory_order_relaxed);
  return p;
}
void uncounted(void* p) {
  if (p != nullptr)
    ds::check::live.fetch_sub(static_cast<int64_t>(malloc_usable_size(p)),
                              std::memory_order_relaxed);
}

}  // namespace

// glibc's own names for the functions that these replace.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

#define DS_REPLACES __attribute__((visibility("default")))
DS_REPLACES void* malloc(size_t n) {
  return refuse(__builtin_return_address(0)) ? nullptr : counted(__libc_malloc(n));
}
DS_REPLACES void* calloc(size_t n, size_t each) {
  return refuse(__builtin_return_address(0)) ? nullptr : counted(__libc_calloc(n, each));
}
DS_REPLACES void* realloc(void* p, size_t n) {
  if (refuse(__builtin_return_address(0))) return nullptr;
  uncounted(p);
  void* out = __libc_realloc(p, n);
  return counted(out == nullptr && n != 0 ? p : out) == out ? out : nullptr;
}
DS_REPLACES void* memalign(size_t align, size_t n) {
  return refuse(__builtin_return_address(0)) ? nullptr : counted(__libc_memalign(align, n));
}
DS_REPLACES void* aligned_alloc(size_t align, size_t n) {
  return refuse(__builtin_return_address(0)) ? nullptr : counted(__libc_memalign(align, n));
}
DS_REPLACES int posix_memalign(void** out, size_t align, size_t n) {
  if (refuse(__builtin_return_address(0))) return ENOMEM;
  void* p = counted(__libc_memalign(align, n));
  if (p == nullptr) return ENOMEM;
  *out = p;
  return 0;
}
DS_REPLACES void free(void* p) {
  uncounted(p);
  __libc_free(p);
}
}
#endif
