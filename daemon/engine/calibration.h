// SPDX-License-Identifier: Apache-2.0
// What a quantizer is shown before it quantizes a base.
#pragma once

#include "engine/model.h"

namespace ds {

/// The text that a base is measured on while it draws it: sequences from one token each, taken from
/// the vocabulary at random, on at temperature 1. So no data is needed, and a base that has learned
/// is measured on what it has learned (LLM-QAT, Liu et al. 2023).
struct CalibrationText {
  int64_t sequences = 64, tokens = 128;  ///< tokens of each
  uint64_t seed = 20231124;
};

/// Shows `quantizer` the inputs of all weights of the layers while `base`, not quantized, draws
/// `text` by the components `with`. Fails as a plugin does.
Status calibrate(const Quantizer& quantizer, const BaseWeights& base, const Compute& compute,
                 const std::shared_ptr<const Components>& with, const CalibrationText& text = {});

}  // namespace ds
