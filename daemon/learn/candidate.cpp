// SPDX-License-Identifier: Apache-2.0
#include "learn/candidate.h"

#include <algorithm>
#include <iterator>

#include "engine/delta_file.h"
#include "engine/versions.h"
#include "storage/hash.h"

namespace ds {
namespace {

Result<std::unique_ptr<Adapters>> stored_factors(const VersionManifest& version,
                                                 const std::vector<StoredTensor>& tensors,
                                                 const ModelConfig& config,
                                                 const Compute& compute) {
  DS_ASSIGN(const int64_t rank, get_int(version.details, "rank"));
  DS_ASSIGN(const double scale, get_number(version.details, "scale"));
  DS_ASSIGN(const auto factors, tensors_to_factors(config, rank, tensors));
  DS_ASSIGN(auto adapters, Adapters::make(compute, config, rank, static_cast<float>(scale),
                                          group_recipe().targets));
  DS_TRY(adapters->set_factors(factors));
  return adapters;
}

/// W += scale * B A, for each target that has factors.
Status merge(const Adapters& adapters, const ModelConfig& config, NamedTensors& masters) {
  DS_ASSIGN(const std::vector<LoraDelta::LayerFactors> factors, adapters.factors());
  const int64_t rank = adapters.rank();
  for (size_t layer = 0; layer < factors.size(); ++layer) {
    for (int t = 0; t < kTargets; ++t) {
      const LoraDelta::Factors& f = factors[layer][t];
      if (f.a.empty()) continue;
      const auto target = static_cast<Target>(t);
      const auto [n, k] = target_shape(config, target);
      float* w = masters.at(weight_name(static_cast<int64_t>(layer), target)).data();
      for (int64_t row = 0; row < n; ++row, w += k) {
        for (int64_t r = 0; r < rank; ++r) {
          const float b = adapters.scale() * f.b[static_cast<size_t>(row * rank + r)];
          const float* a = f.a.data() + r * k;
          for (int64_t i = 0; i < k; ++i) w[i] += b * a[i];
        }
      }
    }
  }
  return {};
}

Result<Candidate> low_rank_candidate(const Trained& trained, VersionManifest manifest,
                                     const Compute& compute) {
  const Adapters& adapters = *trained.adapters;
  const ModelConfig& config = trained.base->config();
  DS_ASSIGN(const auto factors, adapters.factors());
  Candidate out;
  out.delta = factors_to_tensors(config, adapters.rank(), factors, "BF16");
  out.checkpoint = factors_to_tensors(config, adapters.rank(), factors, "F32");
  std::ranges::move(memory_tensors(trained.memory), std::back_inserter(out.checkpoint));
  manifest.method = "lora";
  manifest.base_sha256 = trained.base->sha256();
  manifest.details = {
      {"rank", adapters.rank()}, {"scale", adapters.scale()}, {"targets", adapters.targets()}};
  manifest.weight_hash = weight_hash(manifest.base_sha256, out.delta);
  DS_ASSIGN(auto delta,
            LoraDelta::pack(*trained.base, compute, adapters.rank(), adapters.scale(), factors));
  out.weights = make_weights(manifest, trained.base, std::move(delta));
  out.manifest = std::move(manifest);
  return out;
}

}  // namespace

Result<Trained> trained_from(const VersionManifest& version, const Weights& serving,
                             const Method& method, const VersionStore& files, const Bases& bases,
                             const Compute& compute) {
  const ModelConfig& config = bases.config();
  Trained out;
  out.base = serving.base;
  std::vector<StoredTensor> checkpoint;
  if (version.method != "base") {
    DS_ASSIGN(checkpoint, files.read_checkpoint(version.model, version.number));
    DS_ASSIGN(out.memory, take_memory(version, checkpoint));
  }
  if (version.method == "lora") {
    DS_ASSIGN(out.adapters, stored_factors(version, checkpoint, config, compute));
  } else if (!method.full) {
    const Recipe recipe = group_recipe();
    DS_ASSIGN(out.adapters,
              Adapters::make(compute, config, method.rank, recipe.scale, recipe.targets));
    out.adapters->initialise(method.seed);
  }
  if (!method.full) return out;
  DS_ASSIGN(NamedTensors masters, bases.masters(version.base_sha256));
  if (out.adapters) DS_TRY(merge(*out.adapters, config, masters));
  DS_ASSIGN(out.full, FullWeights::make(compute, config, masters));
  if (out.adapters) {  // the round starts from no base that serves
    DS_TRY(out.full->pack(bases.format()));
    out.base = out.full->packed();
    out.adapters.reset();
  }
  return out;
}

Result<Trained> copy_of(const Trained& trained) {
  Trained out;
  out.memory = trained.memory;
  if (trained.full) {  // its base is packed anew from the masters
    DS_ASSIGN(out.full, trained.full->copy());
    return out;
  }
  out.base = trained.base;
  DS_ASSIGN(out.adapters, trained.adapters->copy());
  return out;
}

Result<Candidate> make_candidate(const Trained& trained, VersionManifest manifest,
                                 const Compute& compute, const WeightForm& form) {
  if (!trained.full) return low_rank_candidate(trained, std::move(manifest), compute);
  const ModelConfig& config = trained.full->config();
  DS_ASSIGN(const NamedTensors masters, trained.full->read_masters());
  Candidate out;
  DS_ASSIGN(out.base_file, BaseStore::encode(config, masters));
  manifest.method = "full";
  manifest.base_sha256 = to_hex(sha256(out.base_file));
  manifest.details = {{"parameters", trained.full->size()}};
  out.checkpoint = memory_tensors(trained.memory);
  manifest.weight_hash = weight_hash(manifest.base_sha256, {});
  DS_ASSIGN(auto base,
            BaseWeights::from_tensors(config, masters, manifest.base_sha256, compute, form));
  out.weights = make_weights(manifest, std::move(base), nullptr);
  out.manifest = std::move(manifest);
  return out;
}

}  // namespace ds
