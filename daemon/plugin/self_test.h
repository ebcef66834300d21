// SPDX-License-Identifier: Apache-2.0
// A quick look at a fresh instance before it may serve: does it answer a small call, with finite
// numbers? ds-plugin-check is the thorough one.
#pragma once

#include "plugin/library.h"

namespace ds {

Status self_test(const PluginInstance& instance);

}  // namespace ds
