// SPDX-License-Identifier: Apache-2.0
// Texts that ship with the learner: everyday prompts that anchor the base's manners, canaries, and
// the probe behind the domain `base`. Changing one changes every weight hash: see daemon/README.md.
#pragma once

#include <span>
#include <string_view>

namespace ds {

/// Ordinary questions; the base's own answers to them are what an update must not disturb.
std::span<const std::string_view> anchor_prompts();

/// A text and the token that must follow it. The base gives each key with a margin of at least 1
/// nat (SmolLM2; the gate skips a canary that the base at hand does not know).
struct Canary {
  std::string_view prompt, key;
};
std::span<const Canary> canaries();

/// Short plain texts: held-out loss of domain `base`, and KL(base || candidate).
std::span<const std::string_view> probe_texts();

}  // namespace ds
