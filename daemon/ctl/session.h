// SPDX-License-Identifier: Apache-2.0
// What every command needs: the global options, the daemon's door, one way to print a document and
// one way to fail. Commands return the process's exit code.
#pragma once

#include <string>
#include <string_view>

#include "ctl/http_client.h"
#include "ds/status.h"
#include "storage/json.h"

namespace ds::ctl {

enum Exit : int {
  kDone = 0,
  kFailed = 1,  ///< refused or failed
  kUsage = 2,
  kNoSuch = 3,
  kInTheWay = 4,     ///< conflict or busy
  kUnreachable = 5,  ///< no daemon, or one that is not serving
  kForbidden = 6,
  kTimedOut = 7,
  kNotGood = 8,  ///< checked, and not good
  kInterrupted = 130,
};

int exit_code(Code code);

struct GlobalOptions {
  std::string run_dir;  ///< "" = find it
  std::string output = "table";
  bool yes = false;
  double timeout_s = 0;  ///< 0 = 10 s for short calls, none for long work
};

/// Where the daemon's run folder is: --run, DS_RUN_DIR, the user's run folder
/// ($XDG_RUNTIME_DIR/driftstone or /tmp/driftstone-<uid>) if it is there, else /run/driftstone. A
/// folder that is named is never second-guessed.
std::string find_run_dir(const std::string& named);

enum class Patience { kShort, kLong };

class Session {
 public:
  explicit Session(const GlobalOptions& options);

  bool json() const { return options_.output != "table"; }
  bool colour() const { return colour_; }            ///< of stdout
  bool interactive() const { return interactive_; }  ///< stdin and stderr are terminals
  const GlobalOptions& options() const { return options_; }
  const std::string& run_dir() const { return run_dir_; }
  std::string socket_path() const { return run_dir_ + "/control.sock"; }
  int64_t timeout_ms(Patience patience) const;

  // The daemon's answer as JSON. A failure's code, and a hint where the daemon or the connection
  // suggests one, are remembered for fail(). Thread-safe but for that memory.
  Result<Json> get(const std::string& target);
  Result<Json> post(const std::string& target, const Json& body,
                    Patience patience = Patience::kShort);
  Result<Json> remove(const std::string& target, Patience patience = Patience::kLong);
  Result<Json> call(const HttpRequest& request, Patience patience);
  Result<std::string> get_text(const std::string& target);
  /// SSE: `on_event(name, data)` until it returns false or the daemon ends the stream.
  Status follow(const HttpRequest& request, int64_t idle_ms,
                const std::function<bool(std::string_view, const Json&)>& on_event);

  /// With -o json: one document on stdout, "schema" first. Arrays become {"schema","items"}.
  void document(std::string_view schema, const Json& body) const;
  /// One line of a stream: compact JSON.
  void json_line(const Json& body) const;
  void print(std::string_view text) const;  ///< to stdout

  /// Prints the error (stderr, or the JSON error on stdout) and gives the exit code.
  int fail(const Status& status, std::string_view hint = "");
  int fail_as(int exit, std::string_view code, const std::string& message, std::string_view hint);

  /// True after "y" on a terminal, or with --yes. Otherwise the refusal has been printed and `exit`
  /// set.
  bool confirmed(const std::string& question, int& exit);

 private:
  Status error_of(const HttpResponse& response);
  Status remember(const Status& status);
  GlobalOptions options_;
  std::string run_dir_;
  bool colour_ = false, interactive_ = false;
  std::string last_code_, last_hint_;
};

}  // namespace ds::ctl
