// SPDX-License-Identifier: Apache-2.0
// dsctl: watches and steers dsd, as a client of its HTTP API on the control socket. CLI11 throws;
// that ends here.
#include <CLI/CLI.hpp>
#include <clocale>
#include <cstdio>
#include <exception>
#include <string_view>

#include "ctl/commands.h"
#include "ctl/interrupt.h"
#include "ctl/session.h"

namespace ds::ctl {
namespace {

/// Whether -o json was asked for, even when the rest of the line does not parse.
bool wants_json(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "-ojson" || word == "--output=json") return true;
    const bool option = word == "-o" || word == "--output";
    if (option && i + 1 < argc && std::string_view(argv[i + 1]) == "json") return true;
  }
  return false;
}

/// The deepest command that was named, for the hint.
std::string named_command(const CLI::App& app) {
  std::string name = "dsctl";
  const CLI::App* at = &app;
  while (!at->get_subcommands().empty()) {
    at = at->get_subcommands().front();
    name += " " + at->get_name();
  }
  return name;
}

/// CLI11 misses the subcommand before it looks at the word in its place; people want to hear of the
/// word.
std::string usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<std::string> words = app.remaining(true);
  const bool unnamed = dynamic_cast<const CLI::RequiredError*>(&error) &&
                       std::string_view(error.what()).find("subcommand") != std::string_view::npos;
  if (unnamed && !words.empty()) return words[0] + ": no such command";
  return unnamed ? named_command(app) + " what?" : error.what();
}

void declare_globals(CLI::App& app, GlobalOptions& options) {
  app.add_option("--run", options.run_dir,
                 "the daemon's run folder (default: DS_RUN_DIR, $XDG_RUNTIME_DIR/driftstone, "
                 "/tmp/driftstone-UID, /run/driftstone)")
      ->type_name("DIR");
  app.add_option("-o,--output", options.output,
                 "how to print: table or json (streams: a line each)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("FORM");
  app.add_flag("--yes", options.yes, "do not ask before destructive commands");
  app.add_option("--timeout", options.timeout_s,
                 "give up after this long (default: 10 s, long work: never)")
      ->check(CLI::PositiveNumber)
      ->type_name("SECONDS");
}

int run(int argc, char** argv) {
  CLI::App app("Watches and steers dsd, the daemon that learns from feedback.", "dsctl");
  GlobalOptions options;
  Command chosen;
  declare_globals(app, options);
  app.set_version_flag("--version", "dsctl " DS_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  app.footer(
      "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no such thing, 4 in the way\n"
      "(conflict or busy), 5 daemon unreachable, 6 not permitted, 7 timed out, 8 checked and\n"
      "not good, 130 interrupted.");
  declare_commands(app, chosen);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    if (wants_json(argc, argv)) options.output = "json";
    return Session(options).fail_as(kUsage, "usage", usage_error(app, error),
                                    named_command(app) + " --help");
  }
  Session session(options);
  return chosen(session);
}

}  // namespace
}  // namespace ds::ctl

int main(int argc, char** argv) {
  std::setlocale(LC_CTYPE, "");
  ds::ctl::catch_interrupts();
  try {
    return ds::ctl::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dsctl: %s\nhint: this is a bug, please report it\n", error.what());
    return ds::ctl::kFailed;
  }
}
