// SPDX-License-Identifier: Apache-2.0
#include "engine/parameters.h"

#include "storage/llama_tensors.h"

namespace ds {

Result<BackendVector> BackendVector::make(const Compute& compute, size_t size) {
  BackendVector out;
  DS_ASSIGN(out.storage_, Buffer::make(*compute.ops, size * sizeof(float)));
  out.compute_ = compute;
  out.size_ = size;
  out.zero();
  return out;
}

void BackendVector::zero() {
  if (size_ == 0) return;
  compute_.ops->zero(compute_.context, storage_.data(),
                     static_cast<int64_t>(size_ * sizeof(float)));
}

void BackendVector::set(std::span<const float> from) {
  DS_CHECK(from.size() == size_);
  if (size_ == 0) return;
  compute_.ops->upload(compute_.context, storage_.data(), from.data(),
                       static_cast<int64_t>(from.size_bytes()));
}

Result<std::vector<float>> BackendVector::read() const {
  std::vector<float> out(size_);
  if (size_ == 0) return out;
  compute_.ops->download(compute_.context, out.data(), storage_.data(),
                         static_cast<int64_t>(size_ * sizeof(float)));
  DS_TRY(finish(compute_));
  return out;
}

Result<BackendVector> BackendVector::copy() const {
  DS_ASSIGN(BackendVector out, make(compute_, size_));
  if (size_ > 0)
    compute_.ops->copy(compute_.context, out.data(), data(),
                       static_cast<int64_t>(size_ * sizeof(float)));
  return out;
}

ParameterTable::ParameterTable(const ModelConfig& config) {
  for (const ExpectedTensor& tensor : llama_tensors(config)) {
    places_[tensor.hf_name].size = static_cast<size_t>(elements_of(tensor.shape));
  }
  for (auto& [name, place] : places_) {
    place.begin = size_;
    size_ += place.size;
  }
}

size_t ParameterTable::begin(const std::string& name) const {
  const auto at = places_.find(name);
  DS_CHECK(at != places_.end());
  return at->second.begin;
}

NamedTensors ParameterTable::split(std::span<const float> all) const {
  DS_CHECK(all.size() == size_);
  NamedTensors out;
  for (const auto& [name, place] : places_) {
    const auto part = all.subspan(place.begin, place.size);
    out[name].assign(part.begin(), part.end());
  }
  return out;
}

Result<std::vector<float>> ParameterTable::join(const NamedTensors& tensors) const {
  std::vector<float> out;
  out.reserve(size_);
  for (const auto& [name, place] : places_) {
    const auto at = tensors.find(name);
    if (at == tensors.end()) return not_found(name + ": tensor missing");
    if (at->second.size() != place.size) {
      return invalid(name + ": " + std::to_string(at->second.size()) +
                     " elements, the model wants " + std::to_string(place.size));
    }
    out.insert(out.end(), at->second.begin(), at->second.end());
  }
  return out;
}

Result<FullGradients> FullGradients::make(const Compute& compute, const ModelConfig& config) {
  ParameterTable table(config);
  DS_ASSIGN(BackendVector values, BackendVector::make(compute, table.size()));
  return FullGradients(std::move(table), std::move(values));
}

Result<NamedTensors> FullGradients::read() const {
  DS_ASSIGN(const std::vector<float> all, values_.read());
  return table_.split(all);
}

}  // namespace ds
