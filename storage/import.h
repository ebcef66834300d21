// SPDX-License-Identifier: Apache-2.0
// Feedback in the formats people already have, as native records.
#pragma once

#include <vector>

#include "ds/status.h"
#include "storage/json.h"

namespace ds {

/// One line of an import file, told by its keys: a native record, OpenAI chat or preference
/// fine-tuning JSONL, TRL language modelling / prompt-completion / preference (explicit or implicit
/// prompt) / unpaired preference, or an Open WebUI feedback export (which may give several records:
/// the rating and a pair per sibling answer). The records are not yet checked: check_record() is,
/// on submission.
Result<std::vector<Json>> import_line(const Json& line);

}  // namespace ds
