// SPDX-License-Identifier: Apache-2.0
#include "check/guarded.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "ds/status.h"

namespace ds::check {
namespace {

constexpr size_t kPage = 4096;
constexpr std::byte kPattern{0x5a};

size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

Guarded::Guarded(size_t bytes, bool at_end, size_t slack) : bytes_(bytes), slack_(slack) {
  const size_t used = at_end ? bytes : rounded(bytes, 64);
  inner_ = rounded(used + slack + 64, kPage);
  void* map = mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  DS_CHECK(map != MAP_FAILED);
  map_ = static_cast<std::byte*>(map);
  DS_CHECK(mprotect(map_ + kPage, inner_, PROT_READ | PROT_WRITE) == 0);
  std::memset(map_ + kPage, static_cast<int>(kPattern), inner_);
  data_ = map_ + kPage + inner_ - rounded(slack, 64) - used;
}

Guarded::~Guarded() {
  if (map_ != nullptr) munmap(map_, inner_ + 2 * kPage);
}

Guarded::Guarded(Guarded&& other) noexcept
    : map_(std::exchange(other.map_, nullptr)),
      data_(other.data_),
      bytes_(other.bytes_),
      inner_(other.inner_),
      slack_(other.slack_) {}

bool Guarded::intact() const {
  if (slack_ != 0) return true;
  const std::byte* const begin = map_ + kPage;
  for (const std::byte* p = begin; p < begin + inner_; ++p) {
    if (p == data_) p += bytes_;
    if (p < begin + inner_ && *p != kPattern) return false;
  }
  return true;
}

}  // namespace ds::check
