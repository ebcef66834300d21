// SPDX-License-Identifier: Apache-2.0
// Findings in C and C++ by the program cppcheck, run on the text alone in a folder of its own.
#include <pugixml.hpp>

#include "modules/json_members.h"
#include "modules/tools/program.h"

namespace ds::modules {
namespace {

constexpr std::uint64_t kLargestText = 16 << 20, kLargestOutput = 16 << 20,
                        kLargestMemory = std::uint64_t{2} << 30;

struct Finding {
  std::uint32_t severity = 0, line = 0, column = 0;
  std::string rule, message;
  float confidence = 1;

  ds_finding view() const {
    ds_finding out{};
    out.severity = severity;
    out.line = line;
    out.column = column;
    out.rule = sdk::str(rule);
    out.message = sdk::str(message);
    out.confidence = confidence;
    return out;
  }
};

/// 0: not about the code.
std::uint32_t severity_of(std::string_view name) {
  if (name == "error") return DS_SEVERITY_ERROR;
  if (name == "warning" || name == "portability" || name == "performance")
    return DS_SEVERITY_WARNING;
  if (name == "style") return DS_SEVERITY_NOTE;
  return 0;
}
std::string_view severity_name(std::uint32_t severity) {
  return severity == DS_SEVERITY_ERROR     ? "error"
         : severity == DS_SEVERITY_WARNING ? "warning"
                                           : "note";
}

/// The report of --xml-version=2. A place beyond the text's lines, or in another file (#line), is
/// unknown to whoever has only the text: line 0.
std::vector<Finding> findings_in(const std::string& xml, std::string_view file,
                                 std::uint32_t lines) {
  pugi::xml_document document;
  const pugi::xml_parse_result parsed = document.load_buffer(xml.data(), xml.size());
  const pugi::xml_node errors = document.child("results").child("errors");
  if (!parsed || !errors)
    throw sdk::error(DS_E_DATA, std::string("cppcheck: its report is no XML of version 2: ") +
                                    (parsed ? "no results" : parsed.description()) + ": \"" +
                                    xml.substr(0, 80) + "\"");
  std::vector<Finding> out;
  for (const pugi::xml_node& error : errors.children("error")) {
    Finding f;
    f.severity = severity_of(error.attribute("severity").value());
    if (f.severity == 0) continue;
    f.rule = error.attribute("id").value();
    f.message = error.attribute("msg").value();
    f.confidence = error.attribute("inconclusive").as_bool() ? 0.5f : 1.0f;
    const pugi::xml_node place = error.child("location");
    const std::uint32_t line = place.attribute("line").as_uint();
    if (file == place.attribute("file").value() && line <= lines) {
      f.line = line;
      f.column = line > 0 ? place.attribute("column").as_uint() : 0;
    }
    out.push_back(std::move(f));
  }
  std::stable_sort(out.begin(), out.end(), [](const Finding& x, const Finding& y) {
    return std::pair(x.line, x.column) < std::pair(y.line, y.column);
  });
  return out;
}

/// Bytes of a line continuation at `at`, or 0.
std::size_t splice(std::string_view text, std::size_t at) {
  const std::string_view left = text.substr(at);
  std::size_t n = left.starts_with("\\") ? 1 : left.starts_with("\?\?/") ? 3 : 0;
  if (n == 0) return 0;
  while (n < left.size() && (left[n] == ' ' || left[n] == '\t' || left[n] == '\r')) ++n;
  return n < left.size() && left[n] == '\n' ? n + 1 : 0;
}

/// The text with each "include" as "Include", also where a line continuation runs through it, and
/// without the byte-order mark that would make it UTF-16. cppcheck would open the files that the
/// text names, whatever they are on this machine; it has no option not to. Places stay the same.
std::string without_includes(std::string_view text) {
  constexpr std::string_view kWord = "include";
  std::string out(text);
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::size_t at = i, matched = 0;
    while (matched < kWord.size() && at < text.size()) {
      if (const std::size_t skipped = matched > 0 ? splice(text, at) : 0; skipped > 0) {
        at += skipped;
      } else if (text[at] == kWord[matched]) {
        ++at, ++matched;
      } else {
        break;
      }
    }
    if (matched == kWord.size()) out[i] = 'I';
  }
  if (text.starts_with("\xff\xfe") || text.starts_with("\xfe\xff")) out.replace(0, 2, "  ");
  return out;
}

double seconds_of(const sdk::context& c) {
  const double seconds = c.get("timeout_s", 30.0);
  if (!(seconds > 0 && seconds <= 3600))
    throw sdk::error(DS_E_CONFIG,
                     "timeout_s: " + std::to_string(seconds) + ", expected 0.001 to 3600");
  return seconds;
}

std::string text_at(const JsonMembers& arguments, const char* key, const char* otherwise) {
  const auto at = arguments.find(key);
  if (at == arguments.end()) {
    if (otherwise != nullptr) return otherwise;
    throw sdk::error(DS_E_ARG, std::string(key) + ": missing, expected a string");
  }
  if (at->second.text() == nullptr)
    throw sdk::error(DS_E_ARG, std::string(key) + ": " + at->second.type() + ", expected a string");
  return *at->second.text();
}

std::string json_of(const Finding& f, std::string_view path) {
  return "{\"column\":" + std::to_string(f.column) +
         ",\"confidence\":" + (f.confidence < 1 ? "0.5" : "1.0") +
         ",\"line\":" + std::to_string(f.line) + ",\"message\":" + json_text(f.message) +
         ",\"path\":" + json_text(path) + ",\"rule\":" + json_text(f.rule) +
         ",\"severity\":" + json_text(severity_name(f.severity)) + "}";
}

}  // namespace

class Cppcheck {
 public:
  static constexpr std::string_view name = "cppcheck";
  static constexpr std::string_view summary = "findings in C and C++ by the program cppcheck";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_OUT_OF_PROCESS;
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,"properties":{)"
      R"("timeout_s":{"type":"number","minimum":0.001,"maximum":3600,"default":30,"x-ds-live":true,)"
      R"("description":"seconds after which the program is ended"}}})";
  static constexpr std::string_view input_schema =
      R"({"type":"object","required":["language","text"],"properties":{)"
      R"("language":{"enum":["c","c++"]},"path":{"type":"string"},"text":{"type":"string"}}})";

  explicit Cppcheck(sdk::context c)
      : program_(program_in_path("cppcheck")), timeout_s_(seconds_of(c)) {}
  void reconfigure(sdk::context c) { timeout_s_ = seconds_of(c); }

  template <class Emit>
  void analyse(const ds_call& call, std::string_view language, std::string_view /*path*/,
               std::string_view text, Emit&& emit) const {
    for (const Finding& finding : findings(call, language, text)) emit(finding.view());
  }

  std::string invoke(const ds_call& call, std::string_view arguments_json) const {
    const JsonMembers arguments = json_members(arguments_json, "arguments", DS_E_ARG);
    const std::string path = text_at(arguments, "path", ""),
                      language = text_at(arguments, "language", nullptr),
                      text = text_at(arguments, "text", nullptr);
    std::string out = "{\"findings\":[";
    for (const Finding& f : findings(call, language, text))
      out += (out.back() == '[' ? "" : ",") + json_of(f, path);
    return out + "]}";
  }

 private:
  std::vector<Finding> findings(const ds_call& call, std::string_view language,
                                std::string_view text) const {
    if (language != "c" && language != "c++")
      throw sdk::error(DS_E_UNSUPPORTED,
                       "language \"" + std::string(language) + "\", expected \"c\" or \"c++\"");
    if (program_.empty())
      throw sdk::error(DS_E_UNSUPPORTED,
                       "the program cppcheck is not installed, or not in PATH: "
                       "apt-get install cppcheck, then dsctl plugin reload cppcheck");
    if (text.size() > kLargestText)
      throw sdk::error(DS_E_ARG, "text: " + std::to_string(text.size()) +
                                     " bytes, expected at most " + std::to_string(kLargestText));
    const std::string file = language == "c" ? "text.c" : "text.cpp";
    PrivateFolder folder;
    folder.write(file, without_includes(text));
    ProgramRun run;
    run.program = program_;
    run.arguments = {"-q",
                     "--xml",
                     "--xml-version=2",
                     "--enable=warning,style,performance,portability",
                     "--inconclusive",
                     "--language=" + std::string(language),
                     file};
    run.folder = folder.path();
    run.most_output = kLargestOutput;
    run.most_memory = kLargestMemory;
    run.most_seconds = timeout_s_;
    const auto lines = static_cast<std::uint32_t>(std::count(text.begin(), text.end(), '\n') + 1);
    return findings_in(run_program(call, run), file, lines);
  }

  const std::string program_;  // empty: not there
  std::atomic<double> timeout_s_;
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.tool-cppcheck", "1.0.0", "Apache-2.0", ds::modules::Cppcheck)
