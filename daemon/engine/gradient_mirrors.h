// SPDX-License-Identifier: Apache-2.0
// Gradients live with the masters, in the host's memory. A backend with memory of its own adds up
// those of one backward pass in mirrors, which are added to the host's at its end.
#pragma once

#include <span>
#include <unordered_map>
#include <vector>

#include "engine/model.h"

namespace ds {

class GradientMirrors {
 public:
  explicit GradientMirrors(const Compute& compute) : compute_(compute) {}

  /// Where the backend adds to `host`: there, or in its mirror, which is zero when it is first
  /// asked for in a pass. The same span gives the same place until add_back().
  float* of(std::span<float> host);
  /// Ends the pass.
  Status add_back();

 private:
  struct Mirror {
    Buffer there;
    std::span<float> host;
    bool used = false;
  };
  Compute compute_;
  std::unordered_map<const float*, Mirror> mirrors_;  ///< by the host's address
  std::vector<float> fetched_;
};

}  // namespace ds
