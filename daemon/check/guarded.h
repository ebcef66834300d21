// SPDX-License-Identifier: Apache-2.0
// Memory between two pages that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds::check {

class Guarded {
 public:
  /// `bytes` that end at the forbidden page if `at_end`, else 64-byte aligned with the rest of the
  /// page up to it filled with a pattern. `slack`: writable bytes behind the end instead,
  /// unwatched.
  Guarded(size_t bytes, bool at_end, size_t slack = 0);
  ~Guarded();
  Guarded(Guarded&& other) noexcept;
  Guarded(const Guarded&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }
  /// Whether the pattern around the bytes is untouched.
  bool intact() const;

 private:
  std::byte* map_ = nullptr;  ///< guard page, `inner_` bytes, guard page
  std::byte* data_ = nullptr;
  size_t bytes_ = 0, inner_ = 0, slack_ = 0;
};

}  // namespace ds::check
