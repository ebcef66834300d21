// SPDX-License-Identifier: Apache-2.0
// doctor: what is wrong, why it matters, how to mend it. Works from the outside in, so that it is
// of use without a daemon.
#include "ctl/doctor.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "config.h"
#include "ctl/commands.h"
#include "ctl/output.h"
#include "storage/model_file.h"
#include "storage/seams.h"

namespace ds::ctl {
namespace {

constexpr int kProbeTimeoutMs = 1000;
constexpr int64_t kClockToleranceMs = 5000;
constexpr double kLowSpaceShare = 0.05;
constexpr double kLowSpaceBytes = 1024.0 * 1024 * 1024;

using Findings = std::vector<Finding>;

std::string octal(mode_t mode) {
  char text[8];
  std::snprintf(text, sizeof text, "%04o", mode & 07777);
  return text;
}

/// Returns whether there is a folder to look into.
bool check_run_dir(const std::string& path, Findings& findings) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    findings.push_back(
        {"run_dir_missing", path + ": no run folder", "dsctl finds the daemon's sockets there",
         "start dsd with --run " + path + ", or name the folder it uses: dsctl --run DIR"});
    return false;
  }
  if (info.st_mode & S_IWOTH && !(info.st_mode & S_ISVTX)) {
    findings.push_back({"run_dir_open",
                        path + ": mode " + octal(info.st_mode) + ", anyone may write",
                        "another user could put a socket of their own in the daemon's place",
                        "chmod 0755 " + path});
  }
  if (access(path.c_str(), R_OK | X_OK) != 0) {
    findings.push_back({"run_dir_unreadable", path + ": not readable for this user",
                        "the sockets cannot be reached",
                        "run dsctl as root or as the daemon's user"});
    return false;
  }
  return true;
}

bool is_alive(int64_t pid) {
  return pid > 0 && (kill(static_cast<pid_t>(pid), 0) == 0 || errno == EPERM);
}

void check_ready_file(const std::string& run_dir, Findings& findings) {
  const std::string path = run_dir + "/ready.json";
  const auto text = posix_file_system().read(path);
  if (!text.ok()) return;  // no daemon is no fault of the file's: the socket check tells
  const auto ready = parse_json(*text);
  if (!ready.ok()) {
    findings.push_back({"ready_damaged", path + ": " + ready.status().message(),
                        "clients read the daemon's addresses there",
                        "restart dsd, it rewrites the file"});
    return;
  }
  const int64_t pid = integer_at(*ready, "pid");
  if (!is_alive(pid)) {
    findings.push_back({"ready_stale",
                        path + ": names process " + std::to_string(pid) + ", which is gone",
                        "the daemon ended without cleaning up, so it was killed or crashed",
                        "look at its log for the reason, then start dsd again"});
    return;
  }
  const std::string http = text_at(*ready, "http", "");
  if (http.empty()) return;
  if (const Status status = tcp_reachable(http, kProbeTimeoutMs); !status.ok()) {
    findings.push_back(
        {"http_unreachable", http + ": " + status.message(),
         "OpenAI clients and the metrics scraper connect there",
         "check http.address and whether a firewall or a network namespace is between"});
  }
}

/// Returns whether a daemon answers there.
bool check_socket(const std::string& path, Findings& findings) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0) {
    findings.push_back({"socket_missing", path + ": no control socket",
                        "no daemon runs with this folder", "start dsd with this folder as --run"});
    return false;
  }
  if (info.st_mode & (S_IWOTH | S_IROTH)) {
    findings.push_back(
        {"socket_open", path + ": mode " + octal(info.st_mode) + ", open to every user",
         "the control socket can roll back, undo and reconfigure", "chmod 0600 " + path});
  }
  if (const Status status = unix_reachable(path, kProbeTimeoutMs); !status.ok()) {
    if (status.code() == Code::kPermission) {
      findings.push_back({"socket_denied", path + ": " + status.message(),
                          "this user may not steer the daemon",
                          "run dsctl as root or as the daemon's user"});
    } else {
      findings.push_back({"socket_stale", path + ": nobody listens",
                          "a socket left by a daemon that is gone",
                          "start dsd again, it replaces the socket"});
    }
    return false;
  }
  return true;
}

void check_config_file(const std::string& path, Findings& findings) {
  Config config;
  const Status status = config.load_toml(path);
  if (status.ok()) return;
  findings.push_back({"config_invalid", status.message(), "dsd refuses to start with this file",
                      "mend that line; dsctl config doc lists the settings"});
}

std::string default_config_file() {
  const char* config = std::getenv("XDG_CONFIG_HOME");
  const char* home = std::getenv("HOME");
  const std::string folder =
      config && *config ? config : std::string(home ? home : "") + "/.config";
  for (const std::string& path :
       {folder + "/driftstone/dsd.toml", std::string("/etc/driftstone/dsd.toml")}) {
    if (access(path.c_str(), F_OK) == 0) return path;
  }
  return "";
}

void check_disk(const std::string& folder, Findings& findings) {
  struct statvfs info = {};
  if (statvfs(folder.c_str(), &info) != 0) {
    findings.push_back({"data_dir_missing", folder + ": no data folder that can be looked at",
                        "feedback and versions are kept there", "check dsd's --data"});
    return;
  }
  const double available = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
  const double total = static_cast<double>(info.f_blocks) * static_cast<double>(info.f_frsize);
  if (const auto finding = judge_disk(folder, available, total)) findings.push_back(*finding);
}

/// The file that the base was loaded from is still there and the same: a restart would serve it.
void check_model(const Json& status, Findings& findings) {
  const std::string path = text_at(status, "model.path", ""),
                    serving = text_at(status, "model.sha256", "");
  if (path.empty() || serving.empty()) return;
  const auto digest = ModelFile::digest(path);
  if (!digest.ok()) {
    findings.push_back({"model_missing", digest.status().message(),
                        "what serves is in memory; the next start would fail",
                        "put the file with SHA-256 " + serving + " back to " + path});
  } else if (*digest != serving) {
    findings.push_back({"model_changed", path + ": SHA-256 is " + *digest + ", served is " + serving,
                        "the next start would refuse this data folder, whose versions belong to the "
                        "served base",
                        "put the old file back, or start the new one with another --data"});
  }
}

/// Questions to a daemon that answers.
void check_daemon(Session& session, const DoctorOptions& options, Findings& findings) {
  if (const auto health = session.get("/health"); !health.ok()) {
    findings.push_back({"not_answering", "GET /health: " + health.status().message(),
                        "the daemon listens but does not answer",
                        "look at its log; restart it if it hangs"});
    return;
  }
  if (const auto ready = session.get("/ready"); !ready.ok()) {
    findings.push_back({"not_ready", "GET /ready: " + ready.status().message(),
                        "requests are refused until the model is loaded, or while it drains",
                        "wait a moment; dsctl logs tells what it is doing"});
  }
  const int64_t before_ms = wall_ms();
  const auto status = session.get("/ds/v1/status");
  const int64_t after_ms = wall_ms();
  const auto versions = session.get("/ds/v1/versions");
  const auto held = session.get("/ds/v1/feedback?state=held&limit=1000");
  const auto quarantined = session.get("/ds/v1/feedback?state=quarantined&limit=1000");
  const Json empty = Json::object();
  const Findings more =
      judge_daemon(status.ok() ? *status : empty, versions.ok() ? *versions : empty,
                   held.ok() ? *held : empty, quarantined.ok() ? *quarantined : empty);
  findings.insert(findings.end(), more.begin(), more.end());
  if (status.ok()) {
    if (dig(*status, "now_ms")) {
      const auto skew = judge_clock(integer_at(*status, "now_ms"), before_ms, after_ms);
      if (skew) findings.push_back(*skew);
    }
    check_model(*status, findings);
  }
  const std::string folder = status.ok() ? text_at(*status, "data_dir", "") : "";
  if (options.data_dir.empty() && !folder.empty()) check_disk(folder, findings);
  if (!options.deep) return;
  const auto verified = session.post("/ds/v1/replay/verify", Json::object(), Patience::kLong);
  if (verified.ok() && flag_at(*verified, "ok")) return;
  findings.push_back({"store_damaged",
                      verified.ok() ? "the replay store is damaged" : verified.status().message(),
                      "damaged records cannot be replayed, and undo cannot re-form their rounds",
                      "restore the last good copy: dsctl backup restore DIR --data DIR"});
}

void print_findings(Session& session, const Findings& findings) {
  if (session.json()) {
    Json items = Json::array();
    for (const Finding& f : findings) {
      items.push_back({{"code", f.code}, {"what", f.what}, {"why", f.why}, {"mend", f.mend}});
    }
    session.document("ds.Findings/1", items);
    return;
  }
  if (findings.empty()) return session.print("nothing wrong found\n");
  std::string text;
  for (const Finding& f : findings) {
    text += paint(f.code, Colour::kRed, session.colour()) + "  " + printable(f.what) + "\n" +
            "  why   " + f.why + "\n" + "  mend  " + printable(f.mend) + "\n";
  }
  session.print(text + std::to_string(findings.size()) + " found\n");
}

}  // namespace

std::optional<Finding> judge_disk(const std::string& folder, double available, double total) {
  const bool low_share = total > 0 && available / total < kLowSpaceShare;
  if (!low_share && available >= kLowSpaceBytes) return std::nullopt;
  return Finding{"disk_low", folder + ": " + size_text(available) + " free of " + size_text(total),
                 "when the disk is full, feedback is refused (storage_full) and nothing is learned",
                 "free space, or lower versions.keep and trace.max"};
}

std::optional<Finding> judge_clock(int64_t daemon_ms, int64_t before_ms, int64_t after_ms) {
  const bool ahead = daemon_ms > after_ms + kClockToleranceMs;
  if (!ahead && daemon_ms >= before_ms - kClockToleranceMs) return std::nullopt;
  const int64_t apart_ms = ahead ? daemon_ms - after_ms : before_ms - daemon_ms;
  return Finding{"clock_skew",
                 "the daemon's clock is " + duration_text(static_cast<double>(apart_ms) / 1000) +
                     (ahead ? " ahead" : " behind"),
                 "fates, trace.ttl and ttl_days go by the daemon's clock",
                 "let both machines keep time by NTP: timedatectl set-ntp true"};
}

std::vector<Finding> judge_daemon(const Json& status, const Json& versions, const Json& held,
                                  const Json& quarantined) {
  Findings findings;
  if (!flag_at(status, "learning.enabled", true)) {
    findings.push_back({"learning_disabled", "learn.enabled is false",
                        "feedback is stored but never learned",
                        "dsctl config set learn.enabled true"});
  } else if (text_at(status, "learning.state", "") == "paused") {
    findings.push_back(
        {"learning_paused",
         "learning is paused, " + text_at(status, "learning.queued", "0") + " items wait",
         "feedback is stored but not learned", "dsctl learn resume"});
  }
  if (const std::string pinned = text_at(versions, "pinned", ""); !pinned.empty()) {
    findings.push_back({"version_pinned", pinned + " is pinned",
                        "what is learned from now on does not serve",
                        "dsctl version unpin, or promote the version that should serve"});
  }
  const size_t kept_back = list_at(held, "items").size(),
               suspect = list_at(quarantined, "items").size();
  if (kept_back > 0) {
    findings.push_back({"items_held", std::to_string(kept_back) + " items are held",
                        "the gate refused the version that learned them",
                        "dsctl feedback ls --state held, then show one for the reason"});
  }
  if (suspect > 0) {
    findings.push_back({"items_quarantined", std::to_string(suspect) + " items are quarantined",
                        "admission found them suspect, they will not be learned",
                        "dsctl feedback ls --state quarantined, then show one for the reason"});
  }
  return findings;
}

int doctor(Session& session, const DoctorOptions& options) {
  Findings findings;
  const std::string config =
      options.config_file.empty() ? default_config_file() : options.config_file;
  if (!config.empty()) check_config_file(config, findings);
  if (!options.data_dir.empty()) check_disk(options.data_dir, findings);
  if (check_run_dir(session.run_dir(), findings)) {
    check_ready_file(session.run_dir(), findings);
    if (check_socket(session.socket_path(), findings)) {
      check_daemon(session, options, findings);
    }
  }
  print_findings(session, findings);
  return findings.empty() ? kDone : kNotGood;
}

}  // namespace ds::ctl
