// SPDX-License-Identifier: Apache-2.0
#include "learn/round_vectors.h"

#include <utility>

#include "plugin/abi.h"

namespace ds {
namespace {

constexpr size_t kMostVectors = 64;  // that a learner may make

/// What a learner may write: its own, the gradients, the weights.
bool writable(int32_t handle) { return handle != DS_VEC_PARENT; }

}  // namespace

RoundVectors::RoundVectors(const Compute& compute, std::span<float> weights,
                           std::span<float> gradient)
    : compute_(compute), weights_(weights), gradient_(gradient) {
  DS_CHECK(weights.size() == gradient.size());
  table_ = {sizeof table_, 0, this, make, copy, scale, axpy, multiply, dot};
}

Result<std::unique_ptr<RoundVectors>> RoundVectors::over(const Compute& compute,
                                                         std::span<float> weights,
                                                         std::span<float> gradient) {
  std::unique_ptr<RoundVectors> out(new RoundVectors(compute, weights, gradient));
  DS_ASSIGN(out->sum_, Buffer::make(*compute.ops, sizeof(double)));
  DS_TRY(out->add(DS_VEC_PARENT));
  compute.ops->copy(compute.context, out->at(DS_VEC_PARENT), weights.data(),
                    static_cast<int64_t>(weights.size_bytes()));
  return out;
}

Status RoundVectors::add(int32_t handle) {
  DS_ASSIGN(owned_[handle], BackendVector::make(compute_, weights_.size()));
  return {};
}

void RoundVectors::begin_step() {
  for (int32_t slot = 1; slot < 4; ++slot) {
    const auto found = owned_.find(slot);
    if (found != owned_.end()) found->second.zero();
  }
}

Status RoundVectors::move_gradient_to(uint32_t slot) {
  const auto handle = static_cast<int32_t>(slot);
  if (!owned_.contains(handle)) DS_TRY(add(handle));
  (void)copy(this, DS_VEC_GRADIENT0, handle);
  (void)scale(this, 0.0f, DS_VEC_GRADIENT0);
  return {};
}

Status RoundVectors::restore(const Named& named) {
  for (const auto& [name, values] : named) {
    if (values.size() != weights_.size()) {
      return {Code::kCorrupt, "vector " + name + ": " + std::to_string(values.size()) +
                                  " numbers, the weights are " + std::to_string(weights_.size())};
    }
    DS_TRY(add(next_));
    owned_.at(next_).set(values);
    names_[name] = next_++;
  }
  return {};
}

Result<RoundVectors::Named> RoundVectors::named() const {
  Named out;
  for (const auto& [name, handle] : names_) {
    DS_ASSIGN(out[name], owned_.at(handle).read());
  }
  return out;
}

float* RoundVectors::at(int32_t handle) {
  if (handle == DS_VEC_GRADIENT0) return gradient_.data();
  if (handle == DS_VEC_WEIGHTS) return weights_.data();
  return owned_.at(handle).data();
}

/// DS_OK if all of them are vectors. A slot that nothing was drawn into is one, too: zero.
ds_code RoundVectors::have(std::initializer_list<int32_t> handles) {
  for (const int32_t h : handles) {
    if (h == DS_VEC_GRADIENT0 || h == DS_VEC_WEIGHTS || owned_.contains(h)) continue;
    if (h <= DS_VEC_GRADIENT0 || h > DS_VEC_GRADIENT0 + 3) return DS_E_ARG;
    if (!add(h).ok()) return DS_E_NOMEM;
  }
  return DS_OK;
}

ds_code RoundVectors::make(void* ctx, ds_str name, int32_t* handle) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  const std::string_view text = text_of(name);
  if (handle == nullptr || text.size() > 64) return DS_E_ARG;
  if (const auto found = self.names_.find(text); found != self.names_.end()) {
    *handle = found->second;
    return DS_OK;
  }
  if (self.owned_.size() > kMostVectors) return DS_E_NOMEM;
  if (!self.add(self.next_).ok()) return DS_E_NOMEM;
  *handle = self.next_++;
  if (!text.empty()) self.names_.emplace(text, *handle);
  return DS_OK;
}

ds_code RoundVectors::copy(void* ctx, int32_t from, int32_t to) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!writable(to)) return DS_E_ARG;
  if (const ds_code there = self.have({from, to}); there != DS_OK) return there;
  if (from == to) return DS_OK;
  self.compute_.ops->copy(self.compute_.context, self.at(to), self.at(from),
                          static_cast<int64_t>(self.weights_.size_bytes()));
  return DS_OK;
}

ds_code RoundVectors::scale(void* ctx, float a, int32_t x) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!writable(x)) return DS_E_ARG;
  if (const ds_code there = self.have({x}); there != DS_OK) return there;
  self.compute_.ops->axpby(self.compute_.context, std::ssize(self.weights_), 0.0f, self.at(x), a,
                           self.at(x));
  return DS_OK;
}

ds_code RoundVectors::axpy(void* ctx, float a, int32_t x, int32_t y) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!writable(y)) return DS_E_ARG;
  if (const ds_code there = self.have({x, y}); there != DS_OK) return there;
  self.compute_.ops->axpby(self.compute_.context, std::ssize(self.weights_), a, self.at(x), 1.0f,
                           self.at(y));
  return DS_OK;
}

ds_code RoundVectors::multiply(void* ctx, float a, int32_t x, int32_t z, int32_t y) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!writable(y)) return DS_E_ARG;
  if (const ds_code there = self.have({x, z, y}); there != DS_OK) return there;
  self.compute_.ops->multiply_add(self.compute_.context, std::ssize(self.weights_), a, self.at(x),
                                  self.at(z), self.at(y));
  return DS_OK;
}

ds_code RoundVectors::dot(void* ctx, int32_t x, int32_t y, double* out) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (out == nullptr) return DS_E_ARG;
  if (const ds_code there = self.have({x, y}); there != DS_OK) return there;
  const Ops& ops = *self.compute_.ops;
  ops.dot(self.compute_.context, std::ssize(self.weights_), self.at(x), self.at(y),
          self.sum_.as<double>());
  ops.download(self.compute_.context, out, self.sum_.data(), sizeof *out);
  return finish(self.compute_).ok() ? DS_OK : DS_E_DEVICE;
}

}  // namespace ds
