// SPDX-License-Identifier: Apache-2.0
// What training changes, in the memory of the backend: one vector of numbers, so that clip,
// optimizer and learners work on all of it at once, whatever tensors it consists of.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/model.h"

namespace ds {

/// FP32 numbers in the memory of a backend, which may be another than the host's.
class BackendVector {
 public:
  BackendVector() = default;
  static Result<BackendVector> make(const Compute& compute, size_t size);  ///< zeros

  size_t size() const { return size_; }
  float* data() const { return storage_.as<float>(); }
  std::span<float> all() const { return {data(), size_}; }
  void zero();
  void set(std::span<const float> from);  ///< from the host; as many as size()
  /// To the host. Waits for what is enqueued; fails as the backend does.
  Result<std::vector<float>> read() const;
  Result<BackendVector> copy() const;

 private:
  Compute compute_;
  Buffer storage_;
  size_t size_ = 0;
};

/// Where each tensor of a model begins in one vector of all of them, by HF name.
class ParameterTable {
 public:
  explicit ParameterTable(const ModelConfig& config);
  size_t size() const { return size_; }         ///< parameters
  size_t begin(const std::string& name) const;  ///< of a tensor that the model has
  NamedTensors split(std::span<const float> all) const;
  /// Error: a tensor is missing or has another size.
  Result<std::vector<float>> join(const NamedTensors& tensors) const;

 private:
  struct Place {
    size_t begin, size;
  };
  std::map<std::string, Place> places_;
  size_t size_ = 0;
};

/// Gradients of every parameter; TrainGraph::backward() adds to them. Row-major [out, in].
class FullGradients {
 public:
  static Result<FullGradients> make(const Compute& compute, const ModelConfig& config);  ///< zeros
  float* of(const std::string& name) { return values_.data() + table_.begin(name); }
  std::span<float> all() const { return values_.all(); }
  void zero() { values_.zero(); }
  Result<NamedTensors> read() const;

 private:
  FullGradients(ParameterTable table, BackendVector values)
      : table_(std::move(table)), values_(std::move(values)) {}

  ParameterTable table_;
  BackendVector values_;
};

}  // namespace ds
