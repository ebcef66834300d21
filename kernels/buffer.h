// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "ds/status.h"

namespace ds {

/// 64-byte aligned bytes, uninitialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    const size_t rounded = (std::max<size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlign, rounded)));
    DS_CHECK(data_ != nullptr);  // host out of memory: die, restart from the checkpoint
  }
  static Buffer zeros(size_t bytes) {
    Buffer out(bytes);
    std::memset(out.data(), 0, bytes);
    return out;
  }
  std::byte* data() const { return data_.get(); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  size_t bytes() const { return bytes_; }
  /// At least `bytes`; what was in it is gone if it had to grow.
  std::byte* at_least(size_t bytes) {
    if (bytes_ < bytes) *this = Buffer(bytes);
    return data();
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace ds
