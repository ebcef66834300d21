// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "storage/json.h"

namespace ds::ctl {

/// One line per state that the item went through: time, state, version, step, lag, reason.
std::string fate_text(const Json& item);

}  // namespace ds::ctl
