// SPDX-License-Identifier: Apache-2.0
// A ds_tensor as flat values: its description, then its bytes if the other side reads them.
#pragma once

#include <cstdlib>
#include <memory>
#include <string_view>

#include "ds/plugin.h"
#include "plugin/flat.h"

namespace ds {

constexpr int32_t kMostDims = 8;

/// With `data` the buffer's bytes travel; without, only how many there are.
inline void put_tensor(FlatWriter& to, const ds_tensor* t, bool data) {
  to.put<uint8_t>(t != nullptr);
  if (t == nullptr) return;
  to.put(t->dtype.code);
  to.put(t->dtype.bits);
  to.put(t->dtype.lanes);
  to.put(t->ndim);
  for (int32_t i = 0; i < t->ndim; ++i) to.put(t->shape[i]);
  for (int32_t i = 0; i < t->ndim; ++i) to.put(t->strides[i]);
  to.put(t->byte_offset);
  to.put(t->flags);
  to.put(t->packing);
  to.put(t->bytes);
  to.put<uint8_t>(data);
  if (data) to.put_text({static_cast<const char*>(t->data), static_cast<size_t>(t->bytes)});
}

/// A tensor with its own memory, 64-byte aligned.
class HeldTensor {
 public:
  explicit HeldTensor(FlatReader& from) {
    if (from.get<uint8_t>() == 0) return;
    there_ = true;
    tensor_.device = {DS_DEV_CPU, 0};
    tensor_.dtype.code = from.get<uint8_t>();
    tensor_.dtype.bits = from.get<uint8_t>();
    tensor_.dtype.lanes = from.get<uint16_t>();
    tensor_.ndim = from.get<int32_t>();
    if (tensor_.ndim < 0 || tensor_.ndim > kMostDims) {
      from.fail("a tensor has too many dimensions");
      tensor_.ndim = 0;
    }
    for (int32_t i = 0; i < tensor_.ndim; ++i) shape_[i] = from.get<int64_t>();
    for (int32_t i = 0; i < tensor_.ndim; ++i) strides_[i] = from.get<int64_t>();
    tensor_.shape = shape_;
    tensor_.strides = strides_;
    tensor_.byte_offset = from.get<uint64_t>();
    tensor_.flags = from.get<uint32_t>();
    tensor_.packing = from.get<uint32_t>();
    tensor_.bytes = from.get<uint64_t>();
    const bool data = from.get<uint8_t>() != 0;
    const std::string_view bytes = data ? from.get_text() : std::string_view();
    if (!from.ok()) return;
    memory_.reset(std::aligned_alloc(64, (tensor_.bytes / 64 + 1) * 64));
    if (memory_ == nullptr || (data && bytes.size() != tensor_.bytes)) {
      from.fail("a tensor's bytes are not all there");
      return;
    }
    if (data) std::memcpy(memory_.get(), bytes.data(), bytes.size());
    tensor_.data = memory_.get();
  }
  HeldTensor(const HeldTensor&) = delete;
  const ds_tensor* get() const { return there_ ? &tensor_ : nullptr; }
  std::string_view bytes() const {
    return {static_cast<const char*>(tensor_.data), static_cast<size_t>(tensor_.bytes)};
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  ds_tensor tensor_{};
  int64_t shape_[kMostDims]{}, strides_[kMostDims]{};
  std::unique_ptr<void, Free> memory_;
  bool there_ = false;
};

}  // namespace ds
