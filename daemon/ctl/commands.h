// SPDX-License-Identifier: Apache-2.0
// The commands, one function each, by noun; arguments.cpp gives them their options. Each returns
// the exit code and has printed whatever there is to say.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ctl/session.h"

namespace CLI {
class App;
}

namespace ds::ctl {

using Command = std::function<int(Session&)>;

/// Declares every command below `app`; parsing stores the chosen one in `chosen`.
void declare_commands(CLI::App& app, Command& chosen);

struct AskOptions {
  std::string prompt;  ///< "-" reads stdin
  std::string model, system;
  std::optional<int64_t> max_tokens, seed;
  std::optional<double> temperature;
  bool stats = false;
};
int ask(Session& session, const AskOptions& options);
int chat(Session& session, const AskOptions& options);  ///< dsctl run
int tokenize(Session& session, const std::string& text, bool count);

int status(Session& session, bool with_exit_code);
int top(Session& session, bool once, double interval_s);
int requests(Session& session);  ///< dsctl ps
int cancel(Session& session, const std::vector<std::string>& ids);
int metrics(Session& session, const std::string& pattern);

struct EventOptions {
  bool follow = false;
  std::optional<int64_t> since;  ///< absent: all that are kept, when following only new ones
  std::string topics;            ///< "a,b"; "" = all
};
int events(Session& session, const EventOptions& options);
struct LogOptions {
  bool follow = false;
  int64_t lines = 100;
  std::string level = "info";
};
int logs(Session& session, const LogOptions& options);

int model_list(Session& session);
int model_show(Session& session, const std::string& name);
int model_new(Session& session, const std::string& name, const std::vector<int64_t>& sizes);

constexpr const char* kPluginListHint = "dsctl plugin ls lists the plugins";
struct NewPlugin;  // ctl/plugin_new.h
int plugin_create(Session& session, const NewPlugin& wanted);
int plugin_list(Session& session);
int plugin_show(Session& session, const std::string& name);
int plugin_explain(Session& session, const std::string& file);
struct PluginRequest {
  std::string name, file;
  std::vector<std::string> config;  ///< KEY=VALUE
  std::string shadow;               ///< off, report, refuse; "" = as the daemon is set
  bool trust = false;
  bool isolated = false;
};
int plugin_load(Session& session, const PluginRequest& request);
int plugin_reload(Session& session, const PluginRequest& request);
struct CompareOptions {
  std::string a, b;  ///< NAME or NAME@GENERATION; b empty: the generation before
};
int plugin_diff(Session& session, const CompareOptions& options);
struct BenchOptions {
  std::string name;
  double seconds = 2;
};
int plugin_bench(Session& session, const BenchOptions& options);
int plugin_configure(Session& session, const PluginRequest& request);
int plugin_rollback(Session& session, const std::string& name);
int plugin_retire(Session& session, const std::string& name);
struct CheckRequest {
  std::string file, report;  ///< report: "" = none
  int level = 2;
};
int plugin_check(Session& session, const CheckRequest& request);
int plugin_sign(Session& session, const std::string& key, const std::string& file);
/// `language` empty: by the file's name.
int plugin_run(Session& session, const std::string& name, const std::string& file,
               const std::string& language);
int plugin_keygen(Session& session, const std::string& name);

int version_list(Session& session);
int version_show(Session& session, const std::string& version);
int version_diff(Session& session, const std::string& a, const std::string& b);
int version_promote(Session& session, const std::string& version);
int version_rollback(Session& session, const std::string& to, const std::string& reason);
int version_pin(Session& session, const std::string& version);
int version_unpin(Session& session);

int feedback_push(Session& session, const std::string& file);
int feedback_correct(Session& session, const std::string& response_id, const std::string& text);
struct FeedbackQuery {
  std::string state, source, kind;
  int64_t limit = 20, after = 0;
  bool oldest = false;
};
int feedback_list(Session& session, const FeedbackQuery& query);
int feedback_show(Session& session, const std::string& id);
int feedback_remove(Session& session, const std::vector<std::string>& ids);
int feedback_stats(Session& session);

int learn_status(Session& session);
int learn_step(Session& session, bool wait);
int learn_pause(Session& session, bool paused);
int learn_watch(Session& session, bool once);

int replay_stats(Session& session);
int replay_verify(Session& session);

int config_show(Session& session, bool origin);
int config_set(Session& session, const std::string& name, const std::string& value);
int config_doc(Session& session);

int backup_create(Session& session, const std::string& path);
int backup_verify(Session& session, const std::string& path);
int backup_restore(Session& session, const std::string& path, const std::string& data_dir);

struct DoctorOptions {
  std::string config_file;  ///< "" = the user's, else the system's, if there is one
  std::string data_dir;     ///< "" = as the daemon says
  bool deep = false;        ///< also verify the store
};
int doctor(Session& session, const DoctorOptions& options);

}  // namespace ds::ctl
