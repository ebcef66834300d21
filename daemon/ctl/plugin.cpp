// SPDX-License-Identifier: Apache-2.0
// plugin: what is loaded, why a file is not, load and swap, sign, check.
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "ctl/commands.h"
#include "ctl/output.h"
#include "ctl/plugin_new.h"
#include "storage/seams.h"
#include "storage/signature.h"

extern char** environ;

namespace ds::ctl {
namespace {

std::string absolute(const std::string& path) {
  std::error_code error;
  const auto full = std::filesystem::absolute(path, error);
  return error ? path : full.lexically_normal().string();
}

/// KEY=VALUE pairs as an object; a value that is JSON is taken as such, else as text.
Result<Json> config_of(const std::vector<std::string>& pairs) {
  Json out = Json::object();
  for (const std::string& pair : pairs) {
    const size_t equal = pair.find('=');
    if (equal == 0 || equal == std::string::npos)
      return invalid("\"" + pair + "\": expected KEY=VALUE");
    const std::string text = pair.substr(equal + 1);
    const Result<Json> value = parse_json(text);
    out[pair.substr(0, equal)] = value.ok() ? *value : Json(text);
  }
  return out;
}

/// "installed, isolated": none of its code runs in the daemon.
std::string with_isolated(const Json& item, const char* key) {
  return text_at(item, key) + (flag_at(item, "isolated") ? ", isolated" : "");
}

std::vector<std::string> cells_of(const Json& item) {
  return {text_at(item, "name"),         text_at(item, "kind"),
          text_at(item, "state"),        std::to_string(integer_at(item, "generation")),
          text_at(item, "version"),      text_at(item, "id"),
          with_isolated(item, "origin"), text_at(item, "sha256").substr(0, 12)};
}

/// Of the recorded calls that were run before it served, if any were.
std::string shadow_text(const Json& item) {
  const std::string text = text_at(item, "shadow.text", "");
  return text.empty() ? "" : "\n  " + text;
}

int show_component(Session& session, const Json& reply, const char* verb,
                   bool with_shadow = false) {
  if (session.json()) {
    session.document("ds.Plugin/1", reply);
    return kDone;
  }
  session.print(text_at(reply, "kind") + " " + text_at(reply, "name") + " " + verb +
                ", generation " + std::to_string(integer_at(reply, "generation")) + " of " +
                text_at(reply, "id") + " " + text_at(reply, "version") +
                (with_shadow ? shadow_text(reply) : "") + "\n");
  return kDone;
}

int change(Session& session, const char* path, const Json& body, const char* verb,
           bool with_shadow = false) {
  const auto reply = session.post(path, body, Patience::kLong);
  if (!reply.ok()) return session.fail(reply.status(), kPluginListHint);
  return show_component(session, *reply, verb, with_shadow);
}

/// A program beside this one, with its output where ours goes.
int run_beside(Session& session, const std::string& program, std::vector<std::string> arguments) {
  std::error_code error;
  const auto self = std::filesystem::canonical("/proc/self/exe", error);
  const std::string path = (self.parent_path() / program).string();
  if (error || !std::filesystem::exists(path))
    return session.fail_as(kNoSuch, "not_found", path + ": no such program",
                           "it comes with the plugin SDK");
  arguments.insert(arguments.begin(), path);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  const int failed = posix_spawn(&child, path.c_str(), nullptr, nullptr, argv.data(), environ);
  if (failed != 0) return session.fail(io_error(path + ": " + std::strerror(failed)));
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status)) return kFailed;
  return WEXITSTATUS(status) == 1 ? kNotGood : WEXITSTATUS(status);
}

}  // namespace

int plugin_create(Session& session, const NewPlugin& wanted) {
  NewPlugin here = wanted;
  if (here.prefix.empty()) here.prefix = own_sdk_prefix();
  const auto next = plugin_new(here);
  if (!next.ok()) return session.fail(next.status());
  if (session.json())
    session.document("ds.PluginCreated/1", {{"name", wanted.name}, {"next", *next}});
  else
    session.print(*next + (next->ends_with('\n') ? "" : "\n"));
  return kDone;
}

int plugin_list(Session& session) {
  const auto reply = session.get("/ds/v1/plugins");
  if (!reply.ok()) return session.fail(reply.status());
  if (session.json()) {
    session.document("ds.PluginList/1", *reply);
    return kDone;
  }
  Table table({"NAME", "KIND", "STATE", ">GENERATION", "VERSION", "ID", "ORIGIN", "SHA256"});
  for (const Json& item : list_at(*reply, "plugins"))
    table.row(cells_of(item), state_colour(text_at(item, "state")), 2);
  session.print(table.text(session.colour()));
  for (const Json& item : list_at(*reply, "refused"))
    session.print("not loaded: " + text_at(item, "reason") + "\n");
  return kDone;
}

int plugin_show(Session& session, const std::string& name) {
  const auto reply = session.get("/ds/v1/plugins/" + url_encode(name));
  if (!reply.ok()) return session.fail(reply.status(), kPluginListHint);
  if (session.json()) {
    session.document("ds.Plugin/1", *reply);
    return kDone;
  }
  std::vector<std::pair<std::string, std::string>> lines;
  for (const char* key :
       {"name", "kind", "summary", "id", "version", "license", "abi", "state", "generation",
        "users", "threads", "origin", "trusted_by", "path", "sha256", "config", "config_schema"})
    lines.emplace_back(key, key == std::string_view("trusted_by") ? with_isolated(*reply, key)
                                                                  : text_at(*reply, key));
  for (const char* key : {"runs_in", "pid", "deaths", "breaker"}) {
    if (reply->contains(key)) lines.emplace_back(key, text_at(*reply, key));
  }
  if (reply->contains("shadow")) lines.emplace_back("shadow", text_at(*reply, "shadow.text"));
  session.print(key_values(lines));
  Table table({"NAME", "KIND", "STATE", ">GENERATION", "VERSION", "ID", "ORIGIN", "SHA256"});
  for (const Json& item : list_at(*reply, "generations"))
    table.row(cells_of(item), state_colour(text_at(item, "state")), 2);
  session.print("\n" + table.text(session.colour()));
  return kDone;
}

int plugin_explain(Session& session, const std::string& file) {
  const auto reply = session.post("/ds/v1/plugins/explain", {{"path", absolute(file)}});
  if (!reply.ok()) return session.fail(reply.status());
  const bool loads = flag_at(*reply, "loads");
  if (session.json()) {
    session.document("ds.PluginExplanation/1", *reply);
    return loads ? kDone : kNotGood;
  }
  for (const Json& step : list_at(*reply, "steps")) {
    const bool ok = flag_at(step, "ok");
    session.print(
        paint(ok ? "ok  " : "NO  ", ok ? Colour::kGreen : Colour::kRed, session.colour()) +
        text_at(step, "step") + ": " + text_at(step, "text") + "\n");
  }
  return loads ? kDone : kNotGood;
}

int plugin_load(Session& session, const PluginRequest& o) {
  const auto config = config_of(o.config);
  if (!config.ok())
    return session.fail_as(kUsage, "usage", config.status().message(), "e.g. window=64");
  Json body = {{"path", absolute(o.file)}, {"trust", o.trust}};
  if (o.isolated) body["isolated"] = true;
  if (!o.config.empty()) body["config"] = *config;
  if (!o.shadow.empty()) body["shadow"] = o.shadow;
  const auto reply = session.post("/ds/v1/plugins/load", body, Patience::kLong);
  if (!reply.ok()) return session.fail(reply.status(), "dsctl plugin explain FILE says more");
  if (session.json()) {
    session.document("ds.PluginLoaded/1", *reply);
    return kDone;
  }
  for (const Json& item : list_at(*reply, "components"))
    session.print(text_at(item, "kind") + " " + text_at(item, "name") + " loaded, generation " +
                  std::to_string(integer_at(item, "generation")) + ", trusted by " +
                  with_isolated(item, "trusted_by") + shadow_text(item) + "\n");
  return kDone;
}

int plugin_reload(Session& session, const PluginRequest& o) {
  const auto config = config_of(o.config);
  if (!config.ok())
    return session.fail_as(kUsage, "usage", config.status().message(), "e.g. window=64");
  Json body = {{"name", o.name}};
  if (!o.file.empty()) body["path"] = absolute(o.file);
  if (!o.config.empty()) body["config"] = *config;
  if (!o.shadow.empty()) body["shadow"] = o.shadow;
  return change(session, "/ds/v1/plugins/reload", body, "reloaded", true);
}

int plugin_configure(Session& session, const PluginRequest& o) {
  const auto config = config_of(o.config);
  if (!config.ok())
    return session.fail_as(kUsage, "usage", config.status().message(), "e.g. window=64");
  return change(session, "/ds/v1/plugins/configure", {{"name", o.name}, {"config", *config}},
                "configured");
}

int plugin_rollback(Session& session, const std::string& name) {
  return change(session, "/ds/v1/plugins/rollback", {{"name", name}}, "rolled back");
}

int plugin_retire(Session& session, const std::string& name) {
  return change(session, "/ds/v1/plugins/retire", {{"name", name}}, "tidied");
}

int plugin_check(Session& session, const CheckRequest& request) {
  std::vector<std::string> arguments = {"--level", std::to_string(request.level)};
  if (!request.report.empty()) arguments.insert(arguments.end(), {"--json", request.report});
  arguments.push_back(request.file);
  return run_beside(session, "ds-plugin-check", std::move(arguments));
}

int plugin_sign(Session& session, const std::string& key, const std::string& file) {
  FileSystem& fs = posix_file_system();
  const auto pem = fs.read(key);
  if (!pem.ok()) return session.fail(pem.status(), "dsctl plugin keygen NAME makes one");
  const auto bytes = fs.read(file);
  if (!bytes.ok()) return session.fail(bytes.status());
  const auto signature = sign_ed25519(*pem, *bytes);
  if (!signature.ok()) return session.fail(signature.status().in(key));
  const Status written = write_file_atomically(fs, file + ".sig", *signature);
  if (!written.ok()) return session.fail(written);
  if (session.json())
    session.document("ds.PluginSignature/1", {{"signature", file + ".sig"}});
  else
    session.print(file + ".sig written\n");
  return kDone;
}

int plugin_keygen(Session& session, const std::string& name) {
  FileSystem& fs = posix_file_system();
  const std::string secret = name + ".key.pem", open = name + ".pem";
  for (const std::string& path : {secret, open}) {
    if (fs.exists(path)) return session.fail(conflict(path + ": is there already"));
  }
  const auto pair = make_ed25519();
  if (!pair.ok()) return session.fail(pair.status());
  umask(077);
  Status written = write_file_atomically(fs, secret, pair->private_pem);
  if (written.ok()) written = write_file_atomically(fs, open, pair->public_pem);
  if (!written.ok()) return session.fail(written);
  if (session.json())
    session.document("ds.PluginKey/1", {{"private", secret}, {"public", open}});
  else
    session.print(secret + " signs, keep it; " + open +
                  " goes into <data>/plugins/keys/ of the daemons that trust it\n");
  return kDone;
}

}  // namespace ds::ctl
