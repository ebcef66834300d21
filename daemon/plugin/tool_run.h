// SPDX-License-Identifier: Apache-2.0
// Runs a tool of a plugin on a text.
#pragma once

#include <string>

#include "plugin/library.h"

namespace ds {

struct ToolRequest {
  std::string language, path, text;
  int64_t deadline_ns = 0;         ///< CLOCK_MONOTONIC
  const uint32_t* stop = nullptr;  ///< read atomically; not 0 = end soon
};

/// {"tool", "findings": [{path, line, column, end_line, end_column, severity, rule, message, fix,
/// confidence}], "truncated"}: at most 10,000 findings, truncated when there were more. Lines and
/// columns from 1, 0 = unknown; end and fix only where the tool says them.
Result<Json> run_tool(const PluginInstance& tool, const ToolRequest& request);

/// Keeps the call with what it gave; neither a long text nor very many findings.
void record_tool(const PluginInstance& tool, const ToolRequest& request, const Json& answer);

}  // namespace ds
