// SPDX-License-Identifier: Apache-2.0
#include "engine/mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "storage/seams.h"

namespace ds {
namespace {

/// y [rows, n] = x [rows, k] W^T, W given row-major [n, k] (or [k, n] when transposed).
void multiply(const Compute& compute, int64_t rows, int64_t n, int64_t k, const float* x,
              const float* w, bool transposed, const float* bias, float* y) {
  Buffer packed(static_cast<size_t>(compute.ops->packed_bytes(WeightFormat::kF32, n, k)));
  compute.ops->pack(compute.context, WeightFormat::kF32, n, k, w, transposed, packed.data());
  LinearArgs args;
  args.rows = rows;
  args.x = x;
  args.x_stride = k;
  args.n_weights = 1;
  args.w[0] = {WeightFormat::kF32, n, k, packed.data()};
  args.bias[0] = bias;
  args.y[0] = y;
  args.y_stride[0] = n;
  compute.ops->linear(compute.context, args);
}

}  // namespace

Mlp::Mlp(std::vector<int64_t> sizes, uint64_t seed) : sizes_(std::move(sizes)) {
  DS_CHECK(sizes_.size() >= 2);
  int64_t total = 0;
  for (size_t i = 0; i + 1 < sizes_.size(); ++i) {
    const int64_t in = sizes_[i], out = sizes_[i + 1];
    layers_.push_back({in, out, total, total + in * out});
    total += in * out + out;
  }
  parameters_.resize(static_cast<size_t>(total));
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const double bound = 1.0 / std::sqrt(static_cast<double>(layer.in));
    Rng rng(seed, i);
    for (int64_t p = layer.weight; p < layer.bias + layer.out; ++p) {
      parameters_[static_cast<size_t>(p)] = static_cast<float>((2.0 * rng.uniform() - 1.0) * bound);
    }
  }
}

std::vector<std::vector<float>> Mlp::activations(const Compute& compute, int64_t rows,
                                                 const float* x) const {
  std::vector<std::vector<float>> out;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    std::vector<float> y(static_cast<size_t>(rows * layer.out));
    multiply(compute, rows, layer.out, layer.in, i == 0 ? x : out.back().data(),
             parameters_.data() + layer.weight, false, parameters_.data() + layer.bias, y.data());
    if (i + 1 < layers_.size()) compute.ops->relu(compute.context, rows * layer.out, y.data());
    out.push_back(std::move(y));
  }
  return out;
}

std::vector<float> Mlp::forward(const Compute& compute, int64_t rows, const float* x) const {
  return std::move(activations(compute, rows, x).back());
}

double Mlp::loss(const Compute& compute, int64_t rows, const float* x, const int32_t* labels,
                 std::span<const float> weight, std::span<float> logprob,
                 std::span<float> gradient) const {
  DS_CHECK(std::ssize(weight) == rows && std::ssize(logprob) == rows);
  std::vector<std::vector<float>> y = activations(compute, rows, x);
  CrossEntropyArgs args;
  args.rows = rows;
  args.vocab = args.stride = sizes_.back();
  args.logits = y.back().data();
  args.target = labels;
  args.weight = weight.data();
  args.logprob = logprob.data();
  args.gradient = !gradient.empty();
  compute.ops->cross_entropy(compute.context, args);
  double sum = 0;
  for (size_t r = 0; r < logprob.size(); ++r) sum -= static_cast<double>(weight[r]) * logprob[r];
  if (gradient.empty()) return sum;
  DS_CHECK(gradient.size() == parameters_.size());
  std::fill(gradient.begin(), gradient.end(), 0.0f);
  std::vector<float> dy = std::move(y.back());
  for (size_t i = layers_.size(); i-- > 0;) {
    const Layer& layer = layers_[i];
    const float* input = i == 0 ? x : y[i - 1].data();
    OuterArgs outer;
    outer.rows = rows;
    outer.n = outer.dy_stride = layer.out;
    outer.dy = dy.data();
    outer.k = outer.x_stride = layer.in;
    outer.x = input;
    outer.out = gradient.data() + layer.weight;
    compute.ops->outer_accumulate(compute.context, 1, &outer);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < layer.out; ++o)
        gradient[static_cast<size_t>(layer.bias + o)] += dy[static_cast<size_t>(r * layer.out + o)];
    }
    if (i == 0) break;
    std::vector<float> dx(static_cast<size_t>(rows * layer.in));
    multiply(compute, rows, layer.in, layer.out, dy.data(), parameters_.data() + layer.weight, true,
             nullptr, dx.data());
    compute.ops->relu_backward(compute.context, rows * layer.in, y[i - 1].data(), dx.data());
    dy = std::move(dx);
  }
  return sum;
}

std::vector<StoredTensor> Mlp::tensors() const {
  std::vector<StoredTensor> out;
  const auto bytes = [&](int64_t at, int64_t n) {
    return std::string(reinterpret_cast<const char*>(parameters_.data() + at),
                       static_cast<size_t>(n) * sizeof(float));
  };
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    const std::string name = "layers." + std::to_string(i) + ".";
    out.push_back({name + "weight", "F32", {l.out, l.in}, bytes(l.weight, l.in * l.out)});
    out.push_back({name + "bias", "F32", {l.out}, bytes(l.bias, l.out)});
  }
  return out;
}

Status Mlp::set_tensors(const std::vector<StoredTensor>& tensors) {
  const std::vector<StoredTensor> want = this->tensors();
  if (tensors.size() != want.size()) {
    return corrupt("task model: " + std::to_string(tensors.size()) + " tensors, expected " +
                   std::to_string(want.size()));
  }
  for (size_t i = 0; i < want.size(); ++i) {
    const auto t = std::find_if(tensors.begin(), tensors.end(),
                                [&](const StoredTensor& s) { return s.name == want[i].name; });
    if (t == tensors.end() || t->dtype != "F32" || t->data.size() != want[i].data.size()) {
      return corrupt("task model: tensor " + want[i].name + " is missing or has another size");
    }
    const Layer& l = layers_[i / 2];
    std::memcpy(parameters_.data() + (i % 2 == 0 ? l.weight : l.bias), t->data.data(),
                t->data.size());
  }
  return {};
}

}  // namespace ds
