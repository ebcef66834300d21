// SPDX-License-Identifier: Apache-2.0
// Texts for benches of accuracy, and how likely a model finds them.
#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "tests/daemon/reference_model.h"

namespace ds {

using Texts = std::vector<std::vector<TokenId>>;

/// Those of SmolLM2's reference.
inline Texts reference_texts() {
  Texts out;
  const Json reference = test::read_json(test::data_path("smollm2/reference.json"));
  for (const Json& text : reference["teacher_forced"])
    out.push_back(text["ids"].get<std::vector<TokenId>>());
  return out;
}

inline constexpr const char* kLicences = "/usr/share/common-licenses";  // of Debian's base-files

inline std::vector<TokenId> licence(const Tokenizer& tokenizer, const std::string& name) {
  const auto text = posix_file_system().read(std::string(kLicences) + "/" + name);
  DS_CHECK(text.ok());
  return tokenizer.encode(*text, false);
}

/// All but `without`, in the order of their names; links are skipped.
inline std::vector<TokenId> licences(const Tokenizer& tokenizer, const std::string& without = {}) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(kLicences)) {
    if (entry.is_regular_file() && !entry.is_symlink()) names.insert(entry.path().filename());
  }
  names.erase(without);
  std::vector<TokenId> out;
  for (const std::string& name : names) {
    const auto ids = licence(tokenizer, name);
    out.insert(out.end(), ids.begin(), ids.end());
  }
  return out;
}

/// log p(ids[i + 1] | ids[..i]) out of logits [ids, vocab].
inline std::vector<double> next_logprobs(const float* logits, std::span<const TokenId> ids,
                                         int64_t vocab) {
  std::vector<double> out;
  for (size_t row = 0; row + 1 < ids.size(); ++row) {
    const float* x = logits + static_cast<int64_t>(row) * vocab;
    const double top = *std::max_element(x, x + vocab);
    double total = 0;
    for (int64_t i = 0; i < vocab; ++i) total += std::exp(x[i] - top);
    out.push_back(x[ids[row + 1]] - top - std::log(total));
  }
  return out;
}

}  // namespace ds
