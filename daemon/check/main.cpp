// SPDX-License-Identifier: Apache-2.0
// ds-plugin-check: judges a plugin file. Exit status: 0 passed, 1 a check failed, 2 misuse.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "check/runner.h"

namespace {

void print(const ds::check::Line& line) {
  using ds::check::Outcome;
  const char* word = line.verdict.result == Outcome::kPass   ? "pass"
                     : line.verdict.result == Outcome::kFail ? "FAIL"
                                                             : "skip";
  std::printf("%s  %-24s %s%s%s\n", word, line.check.c_str(), line.component.c_str(),
              line.verdict.text.empty() ? "" : "  ", line.verdict.text.c_str());
  std::fflush(stdout);
}

bool write_json(const std::string& path, const ds::Json& report) {
  std::FILE* out = std::fopen(path.c_str(), "w");
  if (out == nullptr) return false;
  const std::string text = ds::dump_json(report, 2) + "\n";
  const bool whole = std::fwrite(text.data(), 1, text.size(), out) == text.size();
  return std::fclose(out) == 0 && whole;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Judges a Driftstone plugin: 0 loads, 1 keeps the contract, 2 computes what it "
      "promises, 3 survives hostile input.");
  std::string file, json, component, config = "{}";
  int level = 2;
  ds::check::Settings settings;
  double timeout_s = 60;
  app.add_option("--level", level, "0 to 3; each includes those below")->check(CLI::Range(0, 3));
  app.add_option("--json", json, "write the report to this file");
  app.add_option("--seed", settings.seed, "of random inputs");
  app.add_option("--iterations", settings.iterations, "of the hostile checks");
  app.add_option("--component", component, "only the one of this name");
  app.add_option("--config", config, "settings to create it with, a JSON object");
  app.add_option("--timeout", timeout_s, "seconds for one check")->check(CLI::Range(0.1, 3600.0));
  app.add_option("file", file, "the plugin, a .so file")->required();
  CLI11_PARSE(app, argc, argv);
  const auto values = ds::parse_json(config);
  if (!values.ok() || !values->is_object()) {
    std::fprintf(stderr, "ds-plugin-check: --config: expected a JSON object\n");
    return 2;
  }
  settings.config = *values;
  settings.timeout_ms = static_cast<int>(timeout_s * 1000);
  const auto report = ds::check::run_checks(file, level, component, settings, print);
  std::printf("%s: %s, sha256 %s, level %d, seed %llu\n", file.c_str(),
              report.passed() ? "passed" : "FAILED", report.sha256.c_str(), level,
              static_cast<unsigned long long>(settings.seed));
  if (!json.empty() && !write_json(json, report.to_json())) {
    std::fprintf(stderr, "ds-plugin-check: %s: could not be written\n", json.c_str());
    return 2;
  }
  return report.passed() ? 0 : 1;
}
