// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "engine/train_graph.h"
#include "storage/seams.h"

namespace ds {

Adapters::Adapters(const ModelConfig& config, int64_t rank, float scale, uint32_t targets)
    : config_(config), rank_(rank), scale_(scale), targets_(targets) {
  DS_CHECK(rank >= 1 && rank <= kLoraRank);
  int64_t total = 0;
  offsets_.resize(static_cast<size_t>(config.n_layers * kTargets));
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      offsets_[static_cast<size_t>(layer * kTargets + t)] = total;
      const auto [n, k] = target_shape(config, static_cast<Target>(t));
      if (adapts(static_cast<Target>(t))) total += rank * (n + k);
    }
  }
  parameters_.assign(static_cast<size_t>(total), 0.0f);
  gradient_.assign(static_cast<size_t>(total), 0.0f);
  packed_.resize(offsets_.size());
}

std::unique_ptr<Adapters> Adapters::copy() const {
  auto out = std::make_unique<Adapters>(config_, rank_, scale_, targets_);
  out->parameters_ = parameters_;
  return out;
}

void Adapters::initialise(uint64_t seed) {
  std::fill(parameters_.begin(), parameters_.end(), 0.0f);
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      if (!adapts(target)) continue;
      const int64_t k = target_shape(config_, target).second;
      const double bound = 1.0 / std::sqrt(static_cast<double>(k));
      Rng rng(seed, static_cast<uint64_t>(layer * kTargets + t));
      float* p = a(layer, target);
      for (int64_t i = 0; i < rank_ * k; ++i)
        p[i] = static_cast<float>((2.0 * rng.uniform() - 1.0) * bound);
    }
  }
}

void Adapters::zero_gradient() { std::fill(gradient_.begin(), gradient_.end(), 0.0f); }

std::vector<LoraDelta::LayerFactors> Adapters::factors() const {
  auto& self = const_cast<Adapters&>(*this);  // the accessors below only read
  std::vector<LoraDelta::LayerFactors> out(static_cast<size_t>(config_.n_layers));
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      if (!adapts(target)) continue;
      const auto [n, k] = target_shape(config_, target);
      LoraDelta::Factors& f = out[static_cast<size_t>(layer)][t];
      const float* a_data = self.a(layer, target);
      const float* bt_data = self.bt(layer, target);
      f.a.assign(a_data, a_data + rank_ * k);
      f.b.resize(static_cast<size_t>(n * rank_));
      for (int64_t r = 0; r < rank_; ++r) {
        for (int64_t i = 0; i < n; ++i)
          f.b[static_cast<size_t>(i * rank_ + r)] = bt_data[r * n + i];
      }
    }
  }
  return out;
}

Status Adapters::set_factors(const std::vector<LoraDelta::LayerFactors>& factors) {
  if (static_cast<int64_t>(factors.size()) != config_.n_layers) {
    return invalid("adapters: " + std::to_string(factors.size()) + " layers, the model has " +
                   std::to_string(config_.n_layers));
  }
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      const LoraDelta::Factors& f = factors[static_cast<size_t>(layer)][t];
      const auto [n, k] = target_shape(config_, target);
      const auto a_size = static_cast<size_t>(adapts(target) ? rank_ * k : 0);
      const auto b_size = static_cast<size_t>(adapts(target) ? rank_ * n : 0);
      if (f.a.size() != a_size || f.b.size() != b_size) {
        return invalid("adapters: layer " + std::to_string(layer) + " " +
                       std::string(target_path(target)) + ": A has " + std::to_string(f.a.size()) +
                       " elements, expected " + std::to_string(a_size));
      }
      if (a_size == 0) continue;
      std::copy(f.a.begin(), f.a.end(), a(layer, target));
      float* bt_data = bt(layer, target);
      for (int64_t r = 0; r < rank_; ++r) {
        for (int64_t i = 0; i < n; ++i)
          bt_data[r * n + i] = f.b[static_cast<size_t>(i * rank_ + r)];
      }
    }
  }
  return {};
}

void Adapters::pack(const Compute& compute, WeightFormat format) {
  const Ops& ops = *compute.ops;
  std::vector<float> padded;
  const auto pack_one = [&](Linear& out, int64_t n, int64_t k, const float* source,
                            bool transposed) {
    if (out.storage.bytes() == 0) {
      out.storage = Buffer(ops, static_cast<size_t>(ops.packed_bytes(format, n, k)));
    }
    const InBackend from(ops, compute.context, source, static_cast<size_t>(n * k) * sizeof(float));
    ops.pack(compute.context, format, n, k, from.as<float>(), transposed, out.storage.data());
    out.view = {format, n, k, out.storage.data()};
  };
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      if (!adapts(target)) continue;
      const auto [n, k] = target_shape(config_, target);
      Packed& p = packed_[static_cast<size_t>(layer * kTargets + t)];
      // Masters hold `rank` rows; the packed forms have kLoraRank, the rest zero.
      padded.assign(static_cast<size_t>(kLoraRank * k), 0.0f);
      std::copy_n(a(layer, target), rank_ * k, padded.begin());
      pack_one(p.a, kLoraRank, k, padded.data(), false);
      pack_one(p.at, k, kLoraRank, padded.data(), true);
      padded.assign(static_cast<size_t>(kLoraRank * n), 0.0f);
      std::copy_n(bt(layer, target), rank_ * n, padded.begin());
      pack_one(p.bt, kLoraRank, n, padded.data(), false);
      pack_one(p.b, n, kLoraRank, padded.data(), true);
    }
  }
}

LoraPair Adapters::forward_pair(int64_t layer, Target t) const {
  const Packed& p = packed_[static_cast<size_t>(layer * kTargets + t)];
  return {p.a.view, p.b.view, scale_};
}

LoraPair Adapters::backward_pair(int64_t layer, Target t) const {
  const Packed& p = packed_[static_cast<size_t>(layer * kTargets + t)];
  return {p.bt.view, p.at.view, scale_};
}

}  // namespace ds
