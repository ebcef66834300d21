// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "engine/train_graph.h"
#include "storage/seams.h"

namespace ds {

template <class Visit>
void Adapters::each_adapted(const Visit& visit) const {
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      if (adapts(static_cast<Target>(t))) visit(layer, static_cast<Target>(t));
    }
  }
}

Adapters::Adapters(const Compute& compute, const ModelConfig& config, int64_t rank, float scale,
                   uint32_t targets)
    : compute_(compute), config_(config), rank_(rank), scale_(scale), targets_(targets) {
  DS_CHECK(rank >= 1 && rank <= kLoraRank);
}

Result<std::unique_ptr<Adapters>> Adapters::make(const Compute& compute, const ModelConfig& config,
                                                 int64_t rank, float scale, uint32_t targets) {
  std::unique_ptr<Adapters> out(new Adapters(compute, config, rank, scale, targets));
  int64_t total = 0;
  out->offsets_.resize(static_cast<size_t>(config.n_layers * kTargets));
  out->each_adapted([&](int64_t layer, Target t) {
    out->offsets_[static_cast<size_t>(layer * kTargets + t)] = total;
    const auto [n, k] = target_shape(config, t);
    total += rank * (n + k);
  });
  DS_ASSIGN(out->parameters_, BackendVector::make(compute, static_cast<size_t>(total)));
  return out;
}

Result<std::unique_ptr<Adapters>> Adapters::copy() const {
  std::unique_ptr<Adapters> out(new Adapters(compute_, config_, rank_, scale_, targets_));
  out->offsets_ = offsets_;
  DS_ASSIGN(out->parameters_, parameters_.copy());
  return out;
}

Status Adapters::zero_gradient() {
  if (gradient_.size() > 0) {
    gradient_.zero();
  } else {
    DS_ASSIGN(gradient_, BackendVector::make(compute_, parameters_.size()));
  }
  return {};
}

void Adapters::initialise(uint64_t seed) {
  std::vector<float> start(parameters_.size(), 0.0f);
  each_adapted([&](int64_t layer, Target t) {
    const int64_t k = target_shape(config_, t).second;
    const double bound = 1.0 / std::sqrt(static_cast<double>(k));
    Rng rng(seed, static_cast<uint64_t>(layer * kTargets + t));
    float* p = start.data() + offset(layer, t);
    for (int64_t i = 0; i < rank_ * k; ++i)
      p[i] = static_cast<float>((2.0 * rng.uniform() - 1.0) * bound);
  });
  parameters_.set(start);
}

Result<std::vector<LoraDelta::LayerFactors>> Adapters::factors() const {
  DS_ASSIGN(const std::vector<float> all, parameters_.read());
  std::vector<LoraDelta::LayerFactors> out(static_cast<size_t>(config_.n_layers));
  each_adapted([&](int64_t layer, Target t) {
    const auto [n, k] = target_shape(config_, t);
    LoraDelta::Factors& f = out[static_cast<size_t>(layer)][t];
    const float* a = all.data() + offset(layer, t);
    const float* bt = a + rank_ * k;
    f.a.assign(a, bt);
    f.b.resize(static_cast<size_t>(n * rank_));
    for (int64_t r = 0; r < rank_; ++r) {
      for (int64_t i = 0; i < n; ++i) f.b[static_cast<size_t>(i * rank_ + r)] = bt[r * n + i];
    }
  });
  return out;
}

Status Adapters::set_factors(const std::vector<LoraDelta::LayerFactors>& factors) {
  if (static_cast<int64_t>(factors.size()) != config_.n_layers) {
    return invalid("adapters: " + std::to_string(factors.size()) + " layers, the model has " +
                   std::to_string(config_.n_layers));
  }
  std::vector<float> all(parameters_.size());
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
      float* a = all.data() + offset(layer, target);
      float* bt = std::copy(f.a.begin(), f.a.end(), a);
      for (int64_t r = 0; r < rank_; ++r) {
        for (int64_t i = 0; i < n; ++i) bt[r * n + i] = f.b[static_cast<size_t>(i * rank_ + r)];
      }
    }
  }
  parameters_.set(all);
  return {};
}

/// Places of all packs in one piece of memory, and the list of them for pack_factors().
Status Adapters::lay_out_packs(const OperandFormats& formats) {
  const Ops& ops = *compute_.ops;
  constexpr int64_t kAlign = 256;
  int64_t bytes = 0;
  std::vector<FactorPack> list;
  std::vector<int64_t> begins;
  const auto place = [&](WeightFormat format, int64_t n, int64_t k) {
    begins.push_back(bytes);
    bytes += (ops.packed_bytes(format, n, k) + kAlign - 1) / kAlign * kAlign;
  };
  each_adapted([&](int64_t layer, Target t) {
    const auto [n, k] = target_shape(config_, t);
    const WeightFormat forward = formats.forward(layer, t), backward = backward_format(forward);
    place(forward, kLoraRank, k);
    place(forward, n, kLoraRank);
    place(backward, kLoraRank, n);
    place(backward, k, kLoraRank);
  });
  packed_.clear();  // until all of it is there
  DS_TRY(packs_.grow(ops, static_cast<size_t>(bytes)));
  std::vector<Packed> packed(offsets_.size());
  size_t next = 0;
  each_adapted([&](int64_t layer, Target t) {
    const auto [n, k] = target_shape(config_, t);
    const auto at = [&] { return static_cast<void*>(packs_.data() + begins[next++]); };
    FactorPack f;
    f.format = formats.forward(layer, t);
    f.n = n;
    f.k = k;
    f.a = parameters_.data() + offset(layer, t);
    f.bt = f.a + rank_ * k;
    f.a_packed = at();
    f.b_packed = at();
    f.bt_packed = at();
    f.at_packed = at();
    list.push_back(f);
    const WeightFormat backward = backward_format(f.format);
    packed[static_cast<size_t>(layer * kTargets + t)] = {{f.format, kLoraRank, k, f.a_packed},
                                                         {f.format, n, kLoraRank, f.b_packed},
                                                         {backward, k, kLoraRank, f.at_packed},
                                                         {backward, kLoraRank, n, f.bt_packed}};
  });
  const auto list_bytes = list.size() * sizeof(FactorPack);
  DS_TRY(pack_list_.grow(ops, list_bytes));
  ops.upload(compute_.context, pack_list_.data(), list.data(), static_cast<int64_t>(list_bytes));
  packed_ = std::move(packed);
  formats_ = formats;
  return {};
}

Status Adapters::pack(const OperandFormats& formats) {
  if (packed_.empty() || !(formats_ == formats)) DS_TRY(lay_out_packs(formats));
  const auto count = static_cast<int64_t>(pack_list_.bytes() / sizeof(FactorPack));
  compute_.ops->pack_factors(compute_.context, rank_, count, pack_list_.as<FactorPack>());
  return {};
}

LoraPair Adapters::forward_pair(int64_t layer, Target t) const {
  const Packed& p = packed_[static_cast<size_t>(layer * kTargets + t)];
  return {p.a, p.b, scale_};
}

LoraPair Adapters::backward_pair(int64_t layer, Target t) const {
  const Packed& p = packed_[static_cast<size_t>(layer * kTargets + t)];
  return {p.bt, p.at, scale_};
}

}  // namespace ds
