// SPDX-License-Identifier: Apache-2.0
// The daemon's status as text: shared by `status` and `top`. Pure functions of the JSON.
#pragma once

#include <string>
#include <vector>

#include "storage/json.h"

namespace ds::ctl {

/// Why the daemon is not as it should be; empty = healthy.
std::vector<std::string> degraded_reasons(const Json& status);
/// "training  lora  round 12  step 204  loss 1.83   17 queued   lag p50 38s last 40s"
std::string learning_line(const Json& learning);
/// The six lines of `dsctl status`.
std::string status_text(const Json& status, bool colour);
/// The table of `dsctl ps`.
std::string requests_text(const Json& document, bool colour);

}  // namespace ds::ctl
