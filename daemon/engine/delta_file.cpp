// SPDX-License-Identifier: Apache-2.0
#include "engine/delta_file.h"

#include <cstring>
#include <map>

#include "engine/bf16.h"
#include "engine/versions.h"

namespace ds {
namespace {

std::string to_bytes(const std::vector<float>& values, const std::string& dtype) {
  std::string out;
  if (dtype == "F32") {
    out.assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    return out;
  }
  DS_CHECK(dtype == "BF16");
  out.resize(values.size() * 2);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = to_bf16(values[i]);
    std::memcpy(out.data() + 2 * i, &half, 2);
  }
  return out;
}

Result<std::vector<float>> from_bytes(const StoredTensor& tensor, int64_t elements) {
  const size_t width = tensor.dtype == "F32" ? 4 : tensor.dtype == "BF16" ? 2 : 0;
  if (width == 0)
    return unsupported(tensor.name + ": dtype " + tensor.dtype + ", expected F32 or BF16");
  if (tensor.data.size() != static_cast<size_t>(elements) * width) {
    return corrupt(tensor.name + ": " + std::to_string(tensor.data.size()) + " bytes, expected " +
                   std::to_string(static_cast<size_t>(elements) * width));
  }
  std::vector<float> out(static_cast<size_t>(elements));
  for (size_t i = 0; i < out.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + (4 - width), tensor.data.data() + i * width,
                width);
    std::memcpy(&out[i], &bits, 4);
  }
  return out;
}

std::string factor_name(int64_t layer, Target target, char factor) {
  return "base_model.model.model.layers." + std::to_string(layer) + "." +
         std::string(target_path(target)) + ".lora_" + factor + ".weight";
}

}  // namespace

std::vector<StoredTensor> factors_to_tensors(const ModelConfig& config, int64_t rank,
                                             const std::vector<LoraDelta::LayerFactors>& factors,
                                             const std::string& dtype) {
  std::vector<StoredTensor> out;
  for (size_t layer = 0; layer < factors.size(); ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const LoraDelta::Factors& f = factors[layer][t];
      if (f.a.empty()) continue;
      const auto target = static_cast<Target>(t);
      const auto [n, k] = target_shape(config, target);
      const auto at = static_cast<int64_t>(layer);
      out.push_back({factor_name(at, target, 'A'), dtype, {rank, k}, to_bytes(f.a, dtype)});
      out.push_back({factor_name(at, target, 'B'), dtype, {n, rank}, to_bytes(f.b, dtype)});
    }
  }
  return out;
}

Result<std::vector<LoraDelta::LayerFactors>> tensors_to_factors(
    const ModelConfig& config, int64_t rank, const std::vector<StoredTensor>& tensors) {
  std::map<std::string, const StoredTensor*> by_name;
  for (const StoredTensor& t : tensors) by_name[t.name] = &t;
  std::vector<LoraDelta::LayerFactors> out(static_cast<size_t>(config.n_layers));
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const auto target = static_cast<Target>(t);
      const auto [n, k] = target_shape(config, target);
      const auto a = by_name.find(factor_name(layer, target, 'A'));
      const auto b = by_name.find(factor_name(layer, target, 'B'));
      if (a == by_name.end() && b == by_name.end()) continue;
      if (a == by_name.end() || b == by_name.end()) {
        return corrupt(factor_name(layer, target, a == by_name.end() ? 'A' : 'B') +
                       ": missing beside its partner");
      }
      if (a->second->shape != std::vector<int64_t>{rank, k} ||
          b->second->shape != std::vector<int64_t>{n, rank}) {
        return corrupt(a->first + ": shape does not fit rank " + std::to_string(rank) +
                       " and a weight of " + std::to_string(n) + " x " + std::to_string(k));
      }
      LoraDelta::Factors& f = out[static_cast<size_t>(layer)][t];
      DS_ASSIGN(f.a, from_bytes(*a->second, rank * k));
      DS_ASSIGN(f.b, from_bytes(*b->second, n * rank));
      by_name.erase(a);
      by_name.erase(b);
    }
  }
  if (!by_name.empty()) return corrupt(by_name.begin()->first + ": unknown tensor in a delta");
  return out;
}

Result<std::shared_ptr<const Weights>> load_weights(const VersionManifest& manifest,
                                                    const VersionStore& files,
                                                    std::shared_ptr<const BaseWeights> base,
                                                    const Compute& compute) {
  std::shared_ptr<const LoraDelta> delta;
  if (manifest.method == "lora") {
    DS_ASSIGN(const int64_t rank, get_int(manifest.details, "rank"));
    DS_ASSIGN(const double scale, get_number(manifest.details, "scale"));
    if (rank < 1 || rank > kLoraRank)
      return corrupt("manifest: rank " + std::to_string(rank) + ", expected 1 to 16");
    DS_ASSIGN(const std::vector<StoredTensor> tensors,
              files.read_delta(manifest.model, manifest.number));
    DS_ASSIGN(const auto factors, tensors_to_factors(base->config(), rank, tensors));
    DS_ASSIGN(delta, LoraDelta::pack(*base, compute, rank, static_cast<float>(scale), factors));
  } else if (manifest.method != "base" && manifest.method != "full") {
    return unsupported("version v" + std::to_string(manifest.number) + ": method " +
                       manifest.method);
  }
  return make_weights(manifest, std::move(base), std::move(delta));
}

}  // namespace ds
