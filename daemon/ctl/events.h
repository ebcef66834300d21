// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "storage/json.h"

namespace ds::ctl {

/// "14:03:09  version   current=v2  parent=v1\n"; what an event has beyond number, time and topic.
std::string event_line(const Json& event, bool colour);

}  // namespace ds::ctl
