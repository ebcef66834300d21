// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
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
  /// In the memory of `ops`, which calls enqueued there may go on using until finish(). kResource
  /// when there is not enough, or the backend has failed (then finish() says so).
  static Result<Buffer> make(const Ops& ops, size_t bytes) {
    return taken(ops, ops.allocate(static_cast<int64_t>(bytes)), ops.release, bytes);
  }
  /// In the host's memory, quick to copy from and to the memory of `ops`.
  static Result<Buffer> pinned(const Ops& ops, size_t bytes) {
    return taken(ops, ops.allocate_pinned(static_cast<int64_t>(bytes)), ops.release_pinned, bytes);
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
  /// The same in the memory of `ops`. What was there is given back first; after a failure nothing
  /// is there.
  Status grow(const Ops& ops, size_t bytes) {
    if (bytes_ >= bytes) return {};
    *this = Buffer();
    DS_ASSIGN(*this, make(ops, bytes));
    return {};
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    Free() : release(std::free) {}
    explicit Free(void (*with)(void*)) : release(with) {}
    void (*release)(void*);
    void operator()(std::byte* p) const { release(p); }
  };
  static Result<Buffer> taken(const Ops& ops, void* memory, void (*release)(void*), size_t bytes) {
    if (memory == nullptr)
      return no_memory(std::string(ops.name) + ": no memory for " + std::to_string(bytes) +
                       " bytes more");
    Buffer out;
    out.data_ = std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(memory), Free(release));
    out.bytes_ = bytes;
    return out;
  }
  std::unique_ptr<std::byte, Free> data_;
  size_t bytes_ = 0;
};

/// What lies at `data` of the host, where `ops` can use it: itself, or a copy.
class InBackend {
 public:
  static Result<InBackend> make(const Ops& ops, const OpContext& context, const void* data,
                                size_t bytes) {
    InBackend out(data);
    if (ops.host_memory || data == nullptr) return out;
    DS_ASSIGN(out.copy_, Buffer::make(ops, bytes));
    ops.upload(context, out.copy_.data(), data, static_cast<int64_t>(bytes));
    out.data_ = out.copy_.data();
    return out;
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }

 private:
  explicit InBackend(const void* data) : data_(data) {}
  const void* data_;
  Buffer copy_;
};

/// Room at `data` of the host for what `ops` computes: that itself, or a place it is fetched from.
class OutOfBackend {
 public:
  static Result<OutOfBackend> make(const Ops& ops, void* data, size_t bytes) {
    OutOfBackend out(ops, data, bytes);
    if (ops.host_memory || data == nullptr) return out;
    DS_ASSIGN(out.there_, Buffer::make(ops, bytes));
    return out;
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
  OutOfBackend(const Ops& ops, void* data, size_t bytes) : ops_(ops), data_(data), bytes_(bytes) {}
  const Ops& ops_;
  void* data_;
  size_t bytes_;
  Buffer there_;
};

}  // namespace ds
