// SPDX-License-Identifier: Apache-2.0
#include "engine/calibration.h"

#include "engine/batch_decoder.h"

namespace ds {

Status calibrate(const Quantizer& quantizer, const BaseWeights& base, const Compute& compute,
                 const std::shared_ptr<const Components>& with, const CalibrationText& text) {
  DS_CHECK(text.sequences > 0 && text.tokens > 0);
  Rng rng(text.seed);
  std::vector<std::vector<TokenId>> begun(static_cast<size_t>(text.sequences));
  for (auto& ids : begun)
    ids = {static_cast<TokenId>(rng.below(static_cast<uint64_t>(base.config().vocab)))};
  const LinearWatch watch = [&](int64_t layer, Target target, int64_t rows, int64_t k,
                                const float* x) {
    return quantizer.observe(compute.context, weight_name(layer, target), rows, k, x);
  };
  const ComponentsSlot slot(*with);
  BatchDecoder decoder(base.config(), {compute.ops, compute.context, &slot}, KvDtype::kBF16);
  constexpr TokenId kNoStop = -1;
  return decoder.generate(base, nullptr, begun, text.tokens, kNoStop, {.seed = text.seed}, &watch)
      .status();
}

}  // namespace ds
