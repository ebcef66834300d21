// SPDX-License-Identifier: Apache-2.0
// plugin: what one answers: run a tool, compare two on the same calls, time one.
#include <cmath>
#include <filesystem>
#include <map>

#include "ctl/commands.h"
#include "ctl/output.h"
#include "storage/seams.h"

namespace ds::ctl {
namespace {

/// Empty: no idea.
std::string language_of(const std::string& file) {
  static const std::map<std::string, std::string> by_ending = {
      {".c", "c"},           {".cc", "c++"},  {".cpp", "c++"},   {".cxx", "c++"},
      {".h", "c++"},         {".hh", "c++"},  {".hpp", "c++"},   {".py", "python"},
      {".rs", "rust"},       {".go", "go"},   {".java", "java"}, {".js", "javascript"},
      {".ts", "typescript"}, {".sh", "shell"}};
  const auto at = by_ending.find(std::filesystem::path(file).extension().string());
  return at != by_ending.end() ? at->second : "";
}

/// "a.cpp:3:11: error: Null pointer dereference [nullPointer]"
std::string finding_line(const std::string& file, const Json& finding) {
  std::string place = file;
  if (const int64_t line = integer_at(finding, "line"); line > 0) {
    place += ":" + std::to_string(line);
    if (const int64_t column = integer_at(finding, "column"); column > 0)
      place += ":" + std::to_string(column);
  }
  return place + ": " + text_at(finding, "severity") + ": " + text_at(finding, "message") + " [" +
         text_at(finding, "rule") + "]\n";
}

/// Numbers of a reply; null there means that it is not finite.
std::string relative_at(const Json& item, const char* key) {
  const auto value = number_at(item, key);
  return value ? number_text(*value) : "not finite";
}

/// In microseconds; from 100 on whole ones.
std::string time_at(const Json& item, const char* key) {
  const double us = number_at(item, key).value_or(0);
  return us < 100 ? number_text(us) : std::to_string(std::llround(us));
}

std::string generation_text(const Json& item) {
  return text_at(item, "name") + " generation " + std::to_string(integer_at(item, "generation"));
}

}  // namespace

int plugin_run(Session& session, const std::string& name, const std::string& file,
               const std::string& language) {
  Json body = {{"path", file}, {"language", language.empty() ? language_of(file) : language}};
  if (body["language"] == "")
    return session.fail_as(kUsage, "usage", file + ": its name does not tell the language",
                           "--language c++, for example");
  const auto text = posix_file_system().read(file);
  if (!text.ok()) return session.fail(text.status());
  body["text"] = *text;
  const auto reply = session.post("/ds/v1/tools/" + url_encode(name), body, Patience::kLong);
  if (!reply.ok()) return session.fail(reply.status(), kPluginListHint);
  const auto& findings = list_at(*reply, "findings");
  if (session.json()) {
    session.document("ds.ToolFindings/1", *reply);
  } else {
    for (const Json& finding : findings) session.print(finding_line(file, finding));
    if (flag_at(*reply, "truncated")) session.print(file + ": there is more\n");
  }
  return findings.empty() ? kDone : kNotGood;
}

int plugin_diff(Session& session, const CompareOptions& o) {
  const auto reply = session.post("/ds/v1/plugins/diff", {{"a", o.a}, {"b", o.b}}, Patience::kLong);
  if (!reply.ok()) return session.fail(reply.status(), kPluginListHint);
  const int result = integer_at(*reply, "differing") == 0 ? kDone : kNotGood;
  if (session.json()) {
    session.document("ds.PluginDiff/1", *reply);
    return result;
  }
  session.print(text_at(*reply, "kind") + " " + generation_text((*reply)["a"]) + " and " +
                generation_text((*reply)["b"]) + ": " + text_at(*reply, "text") + "\n");
  Table table({"CALL", "SIZE", ">LARGEST", ">MEAN", "SAME"});
  for (const Json& call : list_at(*reply, "calls")) {
    const bool failed = call.contains("failed");
    table.row({text_at(call, "call"), text_at(call, "size"),
               failed ? "-" : relative_at(call, "largest"),
               failed ? "-" : relative_at(call, "mean"),
               failed                    ? text_at(call, "failed")
               : flag_at(call, "within") ? "yes"
                                         : "no"});
  }
  session.print(table.text(session.colour()));
  for (const auto& [key, side] : {std::pair{"only_a", "a"}, {"only_b", "b"}}) {
    for (const Json& finding : list_at(*reply, key))
      session.print("only " + generation_text((*reply)[side]) + ": " +
                    finding_line(text_at(finding, "path"), finding));
  }
  return result;
}

int plugin_bench(Session& session, const BenchOptions& o) {
  const auto reply = session.post("/ds/v1/plugins/bench",
                                  {{"name", o.name}, {"seconds", o.seconds}}, Patience::kLong);
  if (!reply.ok()) return session.fail(reply.status(), kPluginListHint);
  if (session.json()) {
    session.document("ds.PluginBench/1", *reply);
    return kDone;
  }
  session.print(text_at(*reply, "kind") + " " + generation_text(*reply) + ", " +
                text_at(*reply, "source") + " calls, one core\n");
  Table table({"CALL", "SIZE", ">RUNS", ">MEDIAN us", ">P99 us", ">CALLS/s"});
  for (const Json& call : list_at(*reply, "calls"))
    table.row({text_at(call, "call"), text_at(call, "size"),
               std::to_string(integer_at(call, "runs")), time_at(call, "median_us"),
               time_at(call, "p99_us"), std::to_string(integer_at(call, "per_s"))});
  session.print(table.text(session.colour()));
  return kDone;
}

}  // namespace ds::ctl
