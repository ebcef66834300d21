// SPDX-License-Identifier: Apache-2.0
#include "learn/round_vectors.h"

#include <algorithm>
#include <utility>

#include "plugin/abi.h"

namespace ds {
namespace {

constexpr size_t kChunk = 16384;
constexpr size_t kMostVectors = 64;  // that a learner may make

/// What a learner may write: its own, the gradients, the weights.
bool writable(int32_t handle) { return handle != DS_VEC_PARENT; }

}  // namespace

RoundVectors::RoundVectors(const ds_parallel* parallel, VectorPieces weights, VectorPieces gradient)
    : parallel_(parallel) {
  DS_CHECK(weights.size() == gradient.size());
  for (size_t piece = 0; piece < weights.size(); ++piece) {
    const size_t size = weights[piece].size();
    DS_CHECK(gradient[piece].size() == size);
    for (size_t begin = 0; begin < size; begin += kChunk)
      chunks_.push_back({piece, begin, std::min(kChunk, size - begin)});
    size_ += size;
  }
  vectors_[DS_VEC_GRADIENT0] = std::move(gradient);
  vectors_[DS_VEC_WEIGHTS] = std::move(weights);
  VectorPieces* parent = add(DS_VEC_PARENT);
  for (size_t i = 0; i < parent->size(); ++i)
    std::ranges::copy(vectors_[DS_VEC_WEIGHTS][i], (*parent)[i].begin());
  table_ = {sizeof table_, 0, this, make, copy, scale, axpy, multiply, dot};
}

/// Zero, with pieces like the weights'.
VectorPieces* RoundVectors::add(int32_t handle) {
  std::vector<float>& all = owned_[handle];
  all.assign(size_, 0.0f);
  VectorPieces& pieces = vectors_[handle];
  float* next = all.data();
  for (const std::span<float> piece : vectors_[DS_VEC_WEIGHTS]) {
    pieces.push_back({next, piece.size()});
    next += piece.size();
  }
  return &pieces;
}

void RoundVectors::begin_step() {
  for (int32_t slot = 1; slot < 4; ++slot) {
    const auto found = owned_.find(slot);
    if (found != owned_.end()) std::ranges::fill(found->second, 0.0f);
  }
}

void RoundVectors::move_gradient_to(uint32_t slot) {
  const auto handle = static_cast<int32_t>(slot);
  (void)copy(this, DS_VEC_GRADIENT0, handle);
  (void)scale(this, 0.0f, DS_VEC_GRADIENT0);
}

Status RoundVectors::restore(const Named& named) {
  for (const auto& [name, values] : named) {
    if (values.size() != size_) {
      return {Code::kCorrupt, "vector " + name + ": " + std::to_string(values.size()) +
                                  " numbers, the weights are " + std::to_string(size_)};
    }
    names_[name] = next_;
    add(next_);
    std::ranges::copy(values, owned_[next_++].begin());
  }
  return {};
}

RoundVectors::Named RoundVectors::named() const {
  Named out;
  for (const auto& [name, handle] : names_) out[name] = owned_.at(handle);
  return out;
}

float* RoundVectors::at(int32_t handle, const Chunk& chunk) {
  return vectors_.at(handle)[chunk.piece].data() + chunk.begin;
}

/// Whether all of them are vectors. A slot that nothing was drawn into is one, too: zero.
bool RoundVectors::have(std::initializer_list<int32_t> handles) {
  for (const int32_t h : handles) {
    if (vectors_.contains(h)) continue;
    if (h <= DS_VEC_GRADIENT0 || h > DS_VEC_GRADIENT0 + 3) return false;
    add(h);
  }
  return true;
}

template <class Function>
void RoundVectors::each_chunk(const Function& function) const {
  parallel_->run(
      parallel_->ctx, std::ssize(chunks_),
      [](void* user, int64_t index) {
        (*static_cast<const Function*>(user))(static_cast<size_t>(index));
      },
      const_cast<Function*>(&function));
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
  *handle = self.next_++;
  self.add(*handle);
  if (!text.empty()) self.names_.emplace(text, *handle);
  return DS_OK;
}

ds_code RoundVectors::copy(void* ctx, int32_t from, int32_t to) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!self.have({from, to}) || !writable(to)) return DS_E_ARG;
  self.each_chunk([&](size_t i) {
    const Chunk& c = self.chunks_[i];
    if (from != to) std::copy_n(self.at(from, c), c.size, self.at(to, c));
  });
  return DS_OK;
}

ds_code RoundVectors::scale(void* ctx, float a, int32_t x) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!self.have({x}) || !writable(x)) return DS_E_ARG;
  self.each_chunk([&](size_t i) {
    const Chunk& c = self.chunks_[i];
    float* to = self.at(x, c);
    // 0 clears, whatever was there.
    for (size_t k = 0; k < c.size; ++k) to[k] = a == 0.0f ? 0.0f : a * to[k];
  });
  return DS_OK;
}

ds_code RoundVectors::axpy(void* ctx, float a, int32_t x, int32_t y) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!self.have({x, y}) || !writable(y)) return DS_E_ARG;
  self.each_chunk([&](size_t i) {
    const Chunk& c = self.chunks_[i];
    const float* from = self.at(x, c);
    float* to = self.at(y, c);
    for (size_t k = 0; k < c.size; ++k) to[k] += a * from[k];
  });
  return DS_OK;
}

ds_code RoundVectors::multiply(void* ctx, float a, int32_t x, int32_t z, int32_t y) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (!self.have({x, z, y}) || !writable(y)) return DS_E_ARG;
  self.each_chunk([&](size_t i) {
    const Chunk& c = self.chunks_[i];
    const float *u = self.at(x, c), *v = self.at(z, c);
    float* to = self.at(y, c);
    for (size_t k = 0; k < c.size; ++k) to[k] += a * u[k] * v[k];
  });
  return DS_OK;
}

ds_code RoundVectors::dot(void* ctx, int32_t x, int32_t y, double* out) {
  auto& self = *static_cast<RoundVectors*>(ctx);
  if (out == nullptr || !self.have({x, y})) return DS_E_ARG;
  std::vector<double> sums(self.chunks_.size(), 0.0);
  self.each_chunk([&](size_t i) {
    const Chunk& c = self.chunks_[i];
    const float *u = self.at(x, c), *v = self.at(y, c);
    for (size_t k = 0; k < c.size; ++k) sums[i] += static_cast<double>(u[k]) * v[k];
  });
  *out = 0;
  for (const double sum : sums) *out += sum;
  return DS_OK;
}

}  // namespace ds
