// SPDX-License-Identifier: Apache-2.0
// Vectors over a model's trainable parameters as a learner plugin gets them: by handle, through
// operations of the host (ds_vectors), so that one learner works on low-rank factors, on all
// weights and on any device. Not thread-safe.
#pragma once

#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ds/plugin.h"
#include "ds/status.h"
#include "engine/parameters.h"

namespace ds {

class RoundVectors {
 public:
  /// `weights` and `gradient` (slot 0) have equal sizes, lie in the memory of the backend and
  /// outlive it. The weights as they are now become DS_VEC_PARENT.
  static Result<std::unique_ptr<RoundVectors>> over(const Compute& compute,
                                                    std::span<float> weights,
                                                    std::span<float> gradient);
  RoundVectors(const RoundVectors&) = delete;

  /// Slots 1 to 3 are zero again.
  void begin_step();
  /// The gradient that the passes have left in slot 0 becomes that of `slot`; slot 0 is zero.
  Status move_gradient_to(uint32_t slot);

  /// Vectors that the learner has named, to be kept with the version.
  using Named = std::map<std::string, std::vector<float>>;
  /// Before the learner's first call. Error: a length other than the weights'.
  Status restore(const Named& named);
  Result<Named> named() const;

  /// Valid as long as this object.
  const ds_vectors* table() const { return &table_; }

 private:
  RoundVectors(const Compute& compute, std::span<float> weights, std::span<float> gradient);
  Status add(int32_t handle);
  float* at(int32_t handle);
  ds_code have(std::initializer_list<int32_t> handles);

  static ds_code make(void* ctx, ds_str name, int32_t* handle);
  static ds_code copy(void* ctx, int32_t from, int32_t to);
  static ds_code scale(void* ctx, float a, int32_t x);
  static ds_code axpy(void* ctx, float a, int32_t x, int32_t y);
  static ds_code multiply(void* ctx, float a, int32_t x, int32_t z, int32_t y);
  static ds_code dot(void* ctx, int32_t x, int32_t y, double* out);

  Compute compute_;
  std::span<float> weights_, gradient_;
  std::map<int32_t, BackendVector> owned_;
  std::map<std::string, int32_t, std::less<>> names_;
  Buffer sum_;  ///< of dot, in the backend
  int32_t next_ = DS_VEC_PARENT + 1;
  ds_vectors table_{};
};

}  // namespace ds
