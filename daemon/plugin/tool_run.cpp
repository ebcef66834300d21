// SPDX-License-Identifier: Apache-2.0
#include "plugin/tool_run.h"

#include "kernels/pool.h"

namespace ds {
namespace {

constexpr size_t kMostFindings = 10'000;

const char* severity_name(uint32_t severity) {
  return severity == DS_SEVERITY_ERROR  ? "error"
         : severity == DS_SEVERITY_NOTE ? "note"
                                        : "warning";
}

struct Findings {
  const std::string& path;
  Json list = Json::array();
  bool truncated = false;
};

/// Called by the plugin: nothing may be thrown through it.
ds_code keep(void* ctx, const ds_finding* from) {
  auto& all = *static_cast<Findings*>(ctx);
  if (from == nullptr) return DS_E_ARG;
  if (all.list.size() == kMostFindings) {
    all.truncated = true;
    return DS_OK;
  }
  const ds_finding f = full_struct(from);
  Json finding = {{"path", all.path},          {"line", f.line},
                  {"column", f.column},        {"severity", severity_name(f.severity)},
                  {"rule", text_of(f.rule)},   {"message", text_of(f.message)},
                  {"confidence", f.confidence}};
  if (f.end_line != 0) {
    finding["end_line"] = f.end_line;
    finding["end_column"] = f.end_column;
  }
  if (f.fix.len != 0) finding["fix"] = text_of(f.fix);
  all.list.push_back(std::move(finding));
  return DS_OK;
}

}  // namespace

Result<Json> run_tool(const PluginInstance& tool, const ToolRequest& request) {
  const auto table = tool.table<ds_tool>();
  if (table.analyse == nullptr)
    return Status(Code::kUnsupported, std::string(tool.name()) + ": has no findings in a text");
  ds_call call = host_call(serial_parallel());
  call.cancel = request.stop;
  call.deadline_ns = request.deadline_ns;
  Findings found{request.path};
  ds_status st{};
  const auto lock = tool.one_call();
  const ds_code code =
      table.analyse(tool.handle(), &call, abi_str(request.language), abi_str(request.path),
                    abi_str(request.text), &found, &keep, &st);
  DS_TRY(plugin_status(tool.name(), code, st));
  return Json{
      {"tool", tool.name()}, {"findings", std::move(found.list)}, {"truncated", found.truncated}};
}

void record_tool(const PluginInstance& tool, const ToolRequest& request, const Json& answer) {
  constexpr size_t kMostBytes = size_t{64} << 10, kMostRecorded = 200;
  const Json& findings = answer["findings"];
  if (request.text.size() > kMostBytes || findings.size() > kMostRecorded) return;
  CallOutput output;
  output.findings = findings;
  tool.recorded().keep({ToolCall{request.language, request.path, request.text}}, std::move(output));
}

}  // namespace ds
