// SPDX-License-Identifier: Apache-2.0
// Low-rank factors as tensors of a version: PEFT names in HF layout. BF16 is what serves and is
// hashed, FP32 are the masters that training goes on from.
#pragma once

#include <string>
#include <vector>

#include "engine/model.h"
#include "storage/version_store.h"

namespace ds {

/// "base_model.model.model.layers.N.<path>.lora_A.weight" [rank, k] and "...lora_B.weight" [n,
/// rank].
std::vector<StoredTensor> factors_to_tensors(const ModelConfig& config, int64_t rank,
                                             const std::vector<LoraDelta::LayerFactors>& factors,
                                             const std::string& dtype);

/// The reverse. Refuses unknown names, wrong shapes and a factor without its partner.
Result<std::vector<LoraDelta::LayerFactors>> tensors_to_factors(
    const ModelConfig& config, int64_t rank, const std::vector<StoredTensor>& tensors);

/// Weights of a stored version over `base`, which is the manifest's; v1 and what full fine-tuning
/// has made have no delta.
Result<std::shared_ptr<const Weights>> load_weights(const VersionManifest& manifest,
                                                    const VersionStore& files,
                                                    std::shared_ptr<const BaseWeights> base,
                                                    const Compute& compute);

}  // namespace ds
