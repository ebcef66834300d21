// SPDX-License-Identifier: Apache-2.0
#include "plugin/self_test.h"

#include <cmath>

#include "plugin/replayed_calls.h"

namespace ds {
namespace {

Status all_finite(const std::vector<float>& values, std::string_view what) {
  for (const float v : values) {
    if (!std::isfinite(v))
      return Status(Code::kPlugin, std::string(what) + ": NaN or infinity from a small input");
  }
  return {};
}

}  // namespace

Status self_test(const PluginInstance& instance) {
  DS_TRY(instance.health());
  for (const CallInput& input : small_calls(instance.component().kind)) {
    DS_ASSIGN(const CallOutput output, replay(instance, input, 0));
    DS_TRY(all_finite(output.values, instance.name()));
    DS_TRY(all_finite(output.weights, instance.name()));
  }
  return {};
}

}  // namespace ds
