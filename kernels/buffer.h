// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "ds/status.h"
#include "kernels/ops.h"

namespace ds {

/// Uninitialised bytes: of the host, aligned to 64, or of a backend.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    const size_t rounded = (std::max<size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlign, rounded)));
    DS_CHECK(data_ != nullptr);  // host out of memory: die, restart from the checkpoint
  }
  /// In the memory of `ops`, which calls enqueued there may go on using until finish().
  Buffer(const Ops& ops, size_t bytes) : bytes_(bytes) {
    data_ = std::unique_ptr<std::byte, Free>(
        static_cast<std::byte*>(ops.allocate(static_cast<int64_t>(bytes))), Free(ops.release));
    DS_CHECK(data_ != nullptr);
  }
  /// In the host's memory, quick to copy from and to the memory of `ops`.
  static Buffer pinned(const Ops& ops, size_t bytes) {
    Buffer out;
    out.data_ = std::unique_ptr<std::byte, Free>(
        static_cast<std::byte*>(ops.allocate_pinned(static_cast<int64_t>(bytes))),
        Free(ops.release_pinned));
    out.bytes_ = bytes;
    DS_CHECK(out.data_ != nullptr);
    return out;
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
  std::byte* at_least(const Ops& ops, size_t bytes) {
    if (bytes_ < bytes) *this = Buffer(ops, bytes);
    return data();
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    Free() : release(std::free) {}
    explicit Free(void (*with)(void*)) : release(with) {}
    void (*release)(void*);
    void operator()(std::byte* p) const { release(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t bytes_ = 0;
};

/// What lies at `data` of the host, where `ops` can use it: itself, or a copy.
class InBackend {
 public:
  InBackend(const Ops& ops, const OpContext& context, const void* data, size_t bytes)
      : data_(data) {
    if (ops.host_memory || data == nullptr) return;
    copy_ = Buffer(ops, bytes);
    ops.upload(context, copy_.data(), data, static_cast<int64_t>(bytes));
    data_ = copy_.data();
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }

 private:
  const void* data_;
  Buffer copy_;
};

/// Room at `data` of the host for what `ops` computes: that itself, or a place it is fetched from.
class OutOfBackend {
 public:
  OutOfBackend(const Ops& ops, void* data, size_t bytes) : ops_(ops), data_(data), bytes_(bytes) {
    if (!ops.host_memory && data != nullptr) there_ = Buffer(ops, bytes);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(there_.data() != nullptr ? static_cast<void*>(there_.data()) : data_);
  }
  /// It is at the host's place after finish().
  void fetch(const OpContext& context) const {
    if (there_.data() != nullptr)
      ops_.download(context, data_, there_.data(), static_cast<int64_t>(bytes_));
  }

 private:
  const Ops& ops_;
  void* data_;
  size_t bytes_;
  Buffer there_;
};

}  // namespace ds
