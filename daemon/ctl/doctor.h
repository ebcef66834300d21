// SPDX-License-Identifier: Apache-2.0
// The judgements of `dsctl doctor` that are pure functions.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "storage/json.h"

namespace ds::ctl {

struct Finding {
  std::string code;  ///< stable, for programs: "socket_stale"
  std::string what, why, mend;
};

/// Less than 5 % or less than 1 GiB free.
std::optional<Finding> judge_disk(const std::string& folder, double available, double total);

/// The daemon's wall clock, read between `before_ms` and `after_ms` of this one, is more than 5 s away.
std::optional<Finding> judge_clock(int64_t daemon_ms, int64_t before_ms, int64_t after_ms);

/// From /ds/v1/status, /ds/v1/versions and the held and quarantined items; absent parts are
/// skipped.
std::vector<Finding> judge_daemon(const Json& status, const Json& versions, const Json& held,
                                  const Json& quarantined);

}  // namespace ds::ctl
