// SPDX-License-Identifier: Apache-2.0
// The whole command tree in one place: names, options, help. Options live as long as the command
// that captured them.
#include <CLI/CLI.hpp>
#include <memory>

#include "ctl/commands.h"
#include "ctl/plugin_new.h"

namespace ds::ctl {
namespace {

/// A subcommand whose options are an O, run by `run(session, options)`.
template <typename O>
struct Declared {
  CLI::App* app;
  std::shared_ptr<O> options;
};

struct None {};

template <typename O, typename Run>
Declared<O> declare(CLI::App& parent, const std::string& name, const std::string& help,
                    Command& chosen, Run run) {
  CLI::App* app = parent.add_subcommand(name, help);
  app->fallthrough();
  const auto options = std::make_shared<O>();
  app->callback([options, run, &chosen] {
    chosen = [options, run](Session& session) { return run(session, *options); };
  });
  return {app, options};
}

CLI::App& noun(CLI::App& app, const std::string& name, const std::string& help) {
  CLI::App* group = app.add_subcommand(name, help);
  group->require_subcommand(1);
  group->fallthrough();
  return *group;
}

struct Text {
  std::string text, second;
  bool flag = false;
};

struct ToolOptions {
  std::string name, file, language;
};

struct Texts {
  std::vector<std::string> texts;
};

void add_sampling(const Declared<AskOptions>& command) {
  auto& [app, o] = command;
  app->add_option("-m,--model", o->model, "model or version, e.g. v3 (default: what serves)");
  app->add_option("--system", o->system, "system turn before the conversation");
  app->add_option("--max-tokens", o->max_tokens, "tokens of the answer at most");
  app->add_option("--temperature", o->temperature, "0 = always the likeliest token (default: 0)");
  app->add_option("--seed", o->seed, "seed of the sampling");
}

void declare_talk(CLI::App& app, Command& chosen) {
  const auto one = declare<AskOptions>(app, "ask", "one answer, streamed", chosen, ask);
  one.app->add_option("PROMPT", one.options->prompt, "the question, - for stdin")->required();
  one.app->add_flag("--stats", one.options->stats, "tokens per second and response id, to stderr");
  add_sampling(one);
  add_sampling(
      declare<AskOptions>(app, "run", "talk: /good /bad /fix TEXT /undo /why", chosen, chat));

  const auto split =
      declare<Text>(app, "tokenize", "text as token ids", chosen,
                    [](Session& s, const Text& o) { return tokenize(s, o.text, o.flag); });
  split.app->add_option("TEXT", split.options->text, "the text, - for stdin")->required();
  split.app->add_flag("--count", split.options->flag, "only how many");
}

struct TopOptions {
  bool once = false;
  double interval_s = 1;
};

void declare_watching(CLI::App& app, Command& chosen) {
  const auto state = declare<Text>(app, "status", "the daemon at a glance", chosen,
                                   [](Session& s, const Text& o) { return status(s, o.flag); });
  state.app->add_flag("--exit-code", state.options->flag, "exit 8 when degraded");
  const auto screen = declare<TopOptions>(
      app, "top", "status, requests and events, redrawn (q leaves)", chosen,
      [](Session& s, const TopOptions& o) { return top(s, o.once, o.interval_s); });
  screen.app->add_flag("--once", screen.options->once, "one frame");
  screen.app->add_option("--interval", screen.options->interval_s, "seconds between frames")
      ->check(CLI::Range(0.1, 3600.0));
  declare<None>(app, "ps", "requests under way", chosen,
                [](Session& s, const None&) { return requests(s); });
  const auto stop = declare<Texts>(app, "cancel", "end requests", chosen,
                                   [](Session& s, const Texts& o) { return cancel(s, o.texts); });
  stop.app->add_option("REQUEST", stop.options->texts, "ids as ps shows them")->required();

  const auto happened = declare<EventOptions>(app, "events", "what happened", chosen, events);
  happened.app->add_flag("-f,--follow", happened.options->follow, "and what happens");
  happened.app->add_option(
      "--since", happened.options->since,
      "after this event number (default: all that are kept, with -f: only new ones)");
  happened.app->add_option("--topic", happened.options->topics,
                           "version,gate,step,drift,plugin,store,log");
  const auto lines = declare<LogOptions>(app, "logs", "the daemon's log", chosen, logs);
  lines.app->add_flag("-f,--follow", lines.options->follow, "and new lines as they come");
  lines.app->add_option("-n", lines.options->lines, "how many of the last lines")
      ->check(CLI::NonNegativeNumber);
  lines.app->add_option("--level", lines.options->level, "least level")
      ->check(CLI::IsMember({"debug", "info", "warn", "error"}));
  const auto numbers = declare<Text>(app, "metrics", "Prometheus metrics", chosen,
                                     [](Session& s, const Text& o) { return metrics(s, o.text); });
  numbers.app->add_option("--grep", numbers.options->text, "lines that match this expression");
  const auto check = declare<DoctorOptions>(app, "doctor", "look for faults, and how to mend them",
                                            chosen, doctor);
  check.app->add_option("--config", check.options->config_file, "settings file to check");
  check.app->add_option("--data", check.options->data_dir, "data folder to check");
  check.app->add_flag("--deep", check.options->deep,
                      "check every stored record too (takes a while)");
}

struct NewModel {
  std::string name;
  std::vector<int64_t> sizes;
};

void declare_model(CLI::App& app, Command& chosen) {
  CLI::App& model = noun(app, "model", "the language model and task models");
  declare<None>(model, "ls", "all models", chosen,
                [](Session& s, const None&) { return model_list(s); });
  const auto show = declare<Text>(model, "show", "one model", chosen,
                                  [](Session& s, const Text& o) { return model_show(s, o.text); });
  show.app->add_option("NAME", show.options->text)->required();
  const auto create = declare<NewModel>(
      model, "new", "create a task model", chosen,
      [](Session& s, const NewModel& o) { return model_new(s, o.name, o.sizes); });
  create.app->add_option("NAME", create.options->name)->required();
  create.app->add_option("--mlp", create.options->sizes, "layer sizes: inputs,hidden...,classes")
      ->delimiter(',')
      ->required()
      ->check(CLI::PositiveNumber);
}

void declare_plugin_files(CLI::App& plugin, Command& chosen) {
  const auto made = declare<NewPlugin>(
      plugin, "new", "a folder with a plugin that builds and passes its checks", chosen,
      [](Session& s, const NewPlugin& o) { return plugin_create(s, o); });
  made.app->add_option("NAME", made.options->name, "lower-case words with hyphens: my-nf4")
      ->required();
  made.app
      ->add_option("--kind", made.options->kind,
                   "encoder, attention, quantizer, learner, curriculum, retriever or tool")
      ->required();
  made.app->add_option("--lang", made.options->language, "c++ or c");
  made.app->add_option("--id", made.options->id, "reverse domain (default: org.example.NAME)");
  made.app->add_option("--in", made.options->parent, "where the folder is made");
  const auto check = declare<CheckRequest>(
      plugin, "check", "run the conformance kit on a file, without a daemon (exit 8: fails)",
      chosen, [](Session& s, const CheckRequest& o) { return plugin_check(s, o); });
  check.app->add_option("FILE", check.options->file)->required();
  check.app
      ->add_option("--level", check.options->level, "0 load, 1 contract, 2 numerics, 3 hostile")
      ->check(CLI::Range(0, 3));
  check.app->add_option("--report", check.options->report, "write the results as JSON");
  const auto sign =
      declare<Text>(plugin, "sign", "write FILE.sig, without a daemon", chosen,
                    [](Session& s, const Text& o) { return plugin_sign(s, o.second, o.text); });
  sign.app->add_option("FILE", sign.options->text)->required();
  sign.app->add_option("--key", sign.options->second, "private Ed25519 key, PEM")->required();
  const auto keys =
      declare<Text>(plugin, "keygen", "make a key pair to sign with", chosen,
                    [](Session& s, const Text& o) { return plugin_keygen(s, o.text); });
  keys.app->add_option("NAME", keys.options->text, "NAME.key.pem and NAME.pem are written")
      ->required();
}

void declare_plugin_calls(CLI::App& plugin, Command& chosen) {
  const auto diff = declare<CompareOptions>(
      plugin, "diff", "what two answer to the same recorded calls (exit 8: not the same)", chosen,
      [](Session& s, const CompareOptions& o) { return plugin_diff(s, o); });
  diff.app->add_option("A", diff.options->a, "NAME, or NAME@GENERATION")->required();
  diff.app->add_option("B", diff.options->b, "the same; without it: A's generation before");
  const auto bench = declare<BenchOptions>(
      plugin, "bench", "time of the recorded calls, one at a time on one core", chosen,
      [](Session& s, const BenchOptions& o) { return plugin_bench(s, o); });
  bench.app->add_option("NAME", bench.options->name, "NAME, or NAME@GENERATION")->required();
  bench.app->add_option("--seconds", bench.options->seconds, "in all")
      ->check(CLI::Range(0.01, 60.0));
}

void declare_plugin(CLI::App& app, Command& chosen) {
  CLI::App& plugin = noun(app, "plugin", "plugins: which there are, which serve");
  declare<None>(plugin, "ls", "all components", chosen,
                [](Session& s, const None&) { return plugin_list(s); });
  const auto with_name = [&](const char* name, const char* argument, const char* help,
                             int (*run)(Session&, const std::string&)) {
    const auto one = declare<Text>(plugin, name, help, chosen,
                                   [run](Session& s, const Text& o) { return run(s, o.text); });
    one.app->add_option(argument, one.options->text)->required();
  };
  with_name("show", "NAME", "one component and its generations", plugin_show);
  with_name("explain", "FILE", "whether a file would load, and why not (exit 8: no)",
            plugin_explain);
  with_name("rollback", "NAME", "back to the generation before", plugin_rollback);
  with_name("retire", "NAME", "let go of generations that do not serve", plugin_retire);
  const auto request = [&](const char* name, const char* help,
                           int (*run)(Session&, const PluginRequest&)) {
    return declare<PluginRequest>(plugin, name, help, chosen, run);
  };
  const auto load = request("load", "load a file, and again at every start", plugin_load);
  load.app->add_option("FILE", load.options->file)->required();
  load.app->add_option("KEY=VALUE", load.options->config, "its settings");
  load.app->add_flag("--trust", load.options->trust, "allow this very file, by its SHA-256");
  load.app
      ->add_flag("--isolated", load.options->isolated,
                 "no trust needed: its code runs in helper processes only")
      ->excludes("--trust");
  const auto again =
      request("reload", "swap in the file as it is now, while it serves", plugin_reload);
  again.app->add_option("NAME", again.options->name)->required();
  again.app->add_option("KEY=VALUE", again.options->config, "other settings");
  again.app->add_option("--file", again.options->file, "another file of the same plugin");
  for (CLI::App* swaps : {load.app, again.app}) {
    PluginRequest& options = swaps == load.app ? *load.options : *again.options;
    swaps
        ->add_option("--shadow", options.shadow,
                     "recorded calls on the new generation: off, report, or refuse if it differs")
        ->check(CLI::IsMember({"off", "report", "refuse"}));
  }
  const auto live = request("configure", "change live settings", plugin_configure);
  live.app->add_option("NAME", live.options->name)->required();
  live.app->add_option("KEY=VALUE", live.options->config)->required();
  const auto tool = declare<ToolOptions>(
      plugin, "run", "what a tool finds in a source file (exit 8: something)", chosen,
      [](Session& s, const ToolOptions& o) { return plugin_run(s, o.name, o.file, o.language); });
  tool.app->add_option("NAME", tool.options->name, "a component of kind tool: cppcheck")
      ->required();
  tool.app->add_option("FILE", tool.options->file)->required();
  tool.app->add_option("--language", tool.options->language, "c, c++, python ...");
  declare_plugin_calls(plugin, chosen);
  declare_plugin_files(plugin, chosen);
}

void declare_version(CLI::App& app, Command& chosen) {
  CLI::App& version = noun(app, "version", "weights: which there are, which serve");
  declare<None>(version, "ls", "all versions", chosen,
                [](Session& s, const None&) { return version_list(s); });
  const auto with_version = [&](const char* name, const char* help,
                                int (*run)(Session&, const std::string&)) {
    const auto one = declare<Text>(version, name, help, chosen,
                                   [run](Session& s, const Text& o) { return run(s, o.text); });
    one.app->add_option("VERSION", one.options->text, "e.g. v3")->required();
  };
  with_version("show", "one version: parent, items, gate", version_show);
  with_version("promote", "let a version serve, whatever the gate said", version_promote);
  with_version("pin", "keep a version serving", version_pin);
  declare<None>(version, "unpin", "let learned versions serve again", chosen,
                [](Session& s, const None&) { return version_unpin(s); });
  const auto back = declare<Text>(
      version, "rollback", "serve an earlier version again, and pin it", chosen,
      [](Session& s, const Text& o) { return version_rollback(s, o.text, o.second); });
  back.app->add_option("VERSION,--to", back.options->text, "default: the parent of what serves");
  back.app->add_option("--reason", back.options->second, "kept with the event");
  const auto compare =
      declare<Text>(version, "diff", "what lies between two versions", chosen,
                    [](Session& s, const Text& o) { return version_diff(s, o.text, o.second); });
  compare.app->add_option("A", compare.options->text)->required();
  compare.app->add_option("B", compare.options->second)->required();
}

struct PushOptions {
  std::string file;
  std::vector<std::string> correct;
};

int push(Session& session, const PushOptions& options) {
  if (options.correct.size() == 2) {
    return feedback_correct(session, options.correct[0], options.correct[1]);
  }
  return feedback_push(session, options.file);
}

void declare_feedback(CLI::App& app, Command& chosen) {
  CLI::App& feedback = noun(app, "feedback", "what the model is told, and what became of it");
  const auto add = declare<PushOptions>(
      feedback, "push", "send records: native, OpenAI, TRL or Open WebUI JSONL, told apart by line",
      chosen, push);
  CLI::Option* file = add.app->add_option("FILE", add.options->file, "JSONL file, - for stdin");
  CLI::Option* correct =
      add.app->add_option("--correct", add.options->correct, "what an answer should have been")
          ->type_name("RESPONSE_ID TEXT")
          ->expected(2);
  file->excludes(correct);
  add.app->require_option(1);
  add.app->callback([options = add.options, &chosen] {
    chosen = [options](Session& session) { return push(session, *options); };
  });

  const auto list =
      declare<FeedbackQuery>(feedback, "ls", "items, newest first", chosen, feedback_list);
  list.app->add_option("--state", list.options->state,
                       "stored, queued, trained, served, held, ...");
  list.app->add_option("--source", list.options->source, "from this source only");
  list.app->add_option("--kind", list.options->kind, "demonstration, correction, preference, ...");
  list.app->add_option("--limit", list.options->limit, "items at most")->check(CLI::Range(1, 1000));
  list.app->add_option("--after", list.options->after, "after this offset");
  list.app->add_flag("--oldest", list.options->oldest, "oldest first");
  const auto show =
      declare<Text>(feedback, "show", "one item and its fate", chosen,
                    [](Session& s, const Text& o) { return feedback_show(s, o.text); });
  show.app->add_option("ID", show.options->text)->required();
  const auto remove =
      declare<Texts>(feedback, "rm", "undo items: the weights forget them too", chosen,
                     [](Session& s, const Texts& o) { return feedback_remove(s, o.texts); });
  remove.app->add_option("ID", remove.options->texts)->required();
  declare<None>(feedback, "stats", "counts by state, kind, source and domain", chosen,
                [](Session& s, const None&) { return feedback_stats(s); });
}

void declare_learn(CLI::App& app, Command& chosen) {
  CLI::App& learn = noun(app, "learn", "rounds of training");
  declare<None>(learn, "status", "the learner and its last rounds", chosen,
                [](Session& s, const None&) { return learn_status(s); });
  const auto step =
      declare<Text>(learn, "step", "train a round now (exit 8: the gate held it)", chosen,
                    [](Session& s, const Text& o) { return learn_step(s, !o.flag); });
  step.app->add_flag("--no-wait", step.options->flag, "only start it");
  declare<None>(learn, "pause", "stop training; feedback is still stored", chosen,
                [](Session& s, const None&) { return learn_pause(s, true); });
  declare<None>(learn, "resume", "train again", chosen,
                [](Session& s, const None&) { return learn_pause(s, false); });
  const auto watch =
      declare<Text>(learn, "watch", "the loss curve; elsewhere than on a terminal, JSON lines",
                    chosen, [](Session& s, const Text& o) { return learn_watch(s, o.flag); });
  watch.app->add_flag("--once", watch.options->flag, "one frame, or the events so far");
}

struct Setting {
  std::vector<std::string> words;
};

/// NAME=VALUE or NAME VALUE.
int set_setting(Session& session, const Setting& options) {
  const std::string& first = options.words[0];
  const size_t equals = first.find('=');
  if (options.words.size() == 2) return config_set(session, first, options.words[1]);
  if (equals != std::string::npos) {
    return config_set(session, first.substr(0, equals), first.substr(equals + 1));
  }
  return session.fail_as(kUsage, "usage", first + ": no value", "dsctl config set NAME=VALUE");
}

void declare_upkeep(CLI::App& app, Command& chosen) {
  CLI::App& replay = noun(app, "replay", "the store that rehearsal draws from");
  declare<None>(replay, "stats", "examples by domain", chosen,
                [](Session& s, const None&) { return replay_stats(s); });
  declare<None>(replay, "verify", "check every record (exit 8: damaged)", chosen,
                [](Session& s, const None&) { return replay_verify(s); });

  CLI::App& config = noun(app, "config", "settings");
  const auto show = declare<Text>(config, "show", "the daemon's settings", chosen,
                                  [](Session& s, const Text& o) { return config_show(s, o.flag); });
  show.app->add_flag("--origin", show.options->flag,
                     "with defaults and where each value came from");
  const auto set = declare<Setting>(
      config, "set", "change a live setting until the daemon restarts", chosen, set_setting);
  set.app->add_option("NAME=VALUE", set.options->words)->required()->expected(1, 2);
  declare<None>(config, "doc", "all settings as Markdown, without a daemon", chosen,
                [](Session& s, const None&) { return config_doc(s); });

  CLI::App& backup = noun(app, "backup", "copies of store and versions");
  const auto with_path = [&](const char* name, const char* help,
                             int (*run)(Session&, const std::string&)) {
    const auto one = declare<Text>(backup, name, help, chosen,
                                   [run](Session& s, const Text& o) { return run(s, o.text); });
    one.app->add_option("DIR", one.options->text)->required();
  };
  with_path("create", "a consistent copy, while the daemon runs", backup_create);
  with_path("verify", "check a copy's hashes, without a daemon (exit 8: damaged)", backup_verify);
  const auto restore =
      declare<Text>(backup, "restore", "a copy into an empty data folder, without a daemon", chosen,
                    [](Session& s, const Text& o) { return backup_restore(s, o.text, o.second); });
  restore.app->add_option("DIR", restore.options->text)->required();
  restore.app->add_option("--data", restore.options->second, "the data folder to fill")->required();
}

}  // namespace

void declare_commands(CLI::App& app, Command& chosen) {
  declare_talk(app, chosen);
  declare_watching(app, chosen);
  declare_model(app, chosen);
  declare_plugin(app, chosen);
  declare_version(app, chosen);
  declare_feedback(app, chosen);
  declare_learn(app, chosen);
  declare_upkeep(app, chosen);
}

}  // namespace ds::ctl
