// SPDX-License-Identifier: Apache-2.0
// A learner among the built-in modules, for a round.
#pragma once

#include "learn/learner_plugin.h"
#include "reference_model.h"

namespace ds::test {

inline LearnerPlugin learner_module(const std::string& name, const LearnerMemory& memory = {}) {
  Result<Plugins::Serving> found = modules().find(DS_KIND_LEARNER, name);
  if (!found.ok()) std::fprintf(stderr, "%s\n", found.status().message().c_str());
  DS_CHECK(found.ok());
  Result<LearnerPlugin> made = LearnerPlugin::create(*found, memory);
  DS_CHECK(made.ok());
  return std::move(made).value();
}

}  // namespace ds::test
