// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#include "ds/plugin.h"

namespace ds {

constexpr ds_dtype kAbiF32{DS_FLOAT, 32, 1}, kAbiBf16{DS_BFLOAT, 16, 1}, kAbiF16{DS_FLOAT, 16, 1},
    kAbiI32{DS_INT, 32, 1}, kAbiU8{DS_UINT, 8, 1};

/// A ds_tensor with its shape, at most four dimensions: contiguous, in memory that is not its own,
/// the host's unless set otherwise.
class TensorView {
 public:
  TensorView() = default;
  TensorView(const void* data, ds_dtype dtype, std::initializer_list<int64_t> shape) {
    set(data, dtype, shape);
  }
  TensorView(const TensorView&) = delete;

  void set(const void* data, ds_dtype dtype, std::initializer_list<int64_t> shape,
           ds_device device = {DS_DEV_CPU, 0}) {
    std::copy(shape.begin(), shape.end(), shape_.begin());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides_[i] = stride;
      stride *= shape_[i];
    }
    tensor_ = {};
    tensor_.data = const_cast<void*>(data);
    tensor_.device = device;
    tensor_.ndim = static_cast<int32_t>(shape.size());
    tensor_.dtype = dtype;
    tensor_.shape = shape_.data();
    tensor_.strides = strides_.data();
    tensor_.bytes = static_cast<uint64_t>(stride) * dtype.bits / 8;
  }
  /// A matrix in packed panels (DS_PACK_x): its buffer is not rows times columns.
  void set_packing(uint32_t packing, uint64_t bytes) {
    tensor_.packing = packing;
    tensor_.bytes = bytes;
  }
  /// Rows that lie `elements` apart in a buffer of `bytes`.
  void set_row_stride(int64_t elements, uint64_t bytes) {
    strides_[0] = elements;
    tensor_.bytes = bytes;
  }
  void move_to(const void* data) { tensor_.data = const_cast<void*>(data); }
  const ds_tensor* get() const { return &tensor_; }

 private:
  ds_tensor tensor_{};
  std::array<int64_t, 4> shape_{}, strides_{};
};

}  // namespace ds
