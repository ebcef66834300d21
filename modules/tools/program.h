// SPDX-License-Identifier: Apache-2.0
// Runs another program with bounds: on its time, its output and its memory. No shell is involved;
// the program gets nothing of ours but a folder of its own.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "ds/plugin.hpp"

namespace ds::modules {

inline std::string system_text(int number) { return std::strerror(number); }

inline std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * std::int64_t{1'000'000'000} + now.tv_nsec;
}

/// Where `name` is; empty = in none of the folders of PATH. Relative ones do not count: what they
/// are depends on the folder that the host happens to run in.
inline std::string program_in_path(const std::string& name) {
  const char* path = secure_getenv("PATH");
  std::string_view left = path != nullptr ? path : "";
  while (!left.empty()) {
    const std::string_view folder = left.substr(0, left.find(':'));
    left.remove_prefix(std::min(left.size(), folder.size() + 1));
    const std::string file = std::string(folder) + "/" + name;
    struct stat about {};
    if (folder.starts_with('/') && stat(file.c_str(), &about) == 0 && S_ISREG(about.st_mode) &&
        access(file.c_str(), X_OK) == 0)
      return file;
  }
  return {};
}

/// A new folder that nobody else can read; gone with the object.
class PrivateFolder {
 public:
  PrivateFolder() {
    std::error_code error;
    const auto base = std::filesystem::temp_directory_path(error);
    path_ = (error ? std::filesystem::path("/tmp") : base) / "driftstone-XXXXXX";
    if (mkdtemp(path_.data()) == nullptr)
      throw sdk::error(DS_E_INTERNAL, path_ + ": " + system_text(errno));
  }
  /// Whatever the memory: names are there already, and nothing is thrown.
  ~PrivateFolder() {
    for (const std::string& file : files_) unlink(file.c_str());
    if (rmdir(path_.c_str()) == 0) return;
    try {  // the program left something
      std::error_code ignored;
      std::filesystem::remove_all(path_, ignored);
    } catch (const std::bad_alloc&) {
    }
  }
  PrivateFolder(const PrivateFolder&) = delete;

  const std::string& path() const { return path_; }
  void write(const std::string& file, std::string_view content) {
    const std::string& name = files_.emplace_back(path_ + "/" + file);
    std::ofstream out(name, std::ios::binary);
    out.write(content.data(), static_cast<std::streamsize>(content.size()));
    if (!out.flush()) throw sdk::error(DS_E_INTERNAL, name + ": cannot be written");
  }

 private:
  std::string path_;
  std::vector<std::string> files_;
};

struct ProgramRun {
  std::string program;                             // absolute path
  std::vector<std::string> arguments;              // without its name
  std::string folder;                              // in which it runs
  std::uint64_t most_output = 0, most_memory = 0;  // bytes
  double most_seconds = 0;
};

/// The child and all that it starts (a process group); both ended with the object.
class Child {
 public:
  Child(const ProgramRun& run, int output) {
    std::vector<std::string> words = run.arguments;
    words.insert(words.begin(), run.program);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    std::string path = "PATH=/usr/local/bin:/usr/bin:/bin", locale = "LC_ALL=C.UTF-8";
    char* const environment[] = {path.data(), locale.data(), nullptr};
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    int failed = posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    const auto then = [&failed](int result) { failed = failed != 0 ? failed : result; };
    then(posix_spawn_file_actions_addopen(&files, 1, "/dev/null", O_WRONLY, 0));
    then(posix_spawn_file_actions_adddup2(&files, output, 2));
    then(posix_spawn_file_actions_addclosefrom_np(&files, 3));
    then(posix_spawn_file_actions_addchdir_np(&files, run.folder.c_str()));
    posix_spawnattr_t how;
    posix_spawnattr_init(&how);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setpgroup(&how, 0);
    posix_spawnattr_setsigmask(&how, &none);
    posix_spawnattr_setsigdefault(&how, &all);
    posix_spawnattr_setflags(
        &how, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    if (failed == 0)
      failed = posix_spawn(&id_, run.program.c_str(), &files, &how, argv.data(), environment);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&how);
    if (failed != 0) {
      id_ = 0;
      throw sdk::error(DS_E_INTERNAL, run.program + ": " + system_text(failed));
    }
    limit(run);
  }
  ~Child() { end(); }
  Child(const Child&) = delete;

  /// Whether it has ended by itself. Its number stays taken until end().
  bool has_ended() const {
    siginfo_t about{};
    const int failed = waitid(P_PID, static_cast<id_t>(id_), &about, WEXITED | WNOHANG | WNOWAIT);
    return failed != 0 || about.si_pid == id_;
  }
  /// Of waitpid.
  int end() {
    if (id_ == 0) return 0;
    kill(-id_, SIGKILL);
    int status = 0;
    while (waitpid(id_, &status, 0) < 0 && errno == EINTR) {
    }
    id_ = 0;
    return status;
  }

 private:
  /// Besides the memory: so that it ends when nobody watches it any more.
  void limit(const ProgramRun& run) const {
    const rlimit memory{run.most_memory, run.most_memory}, no_core{0, 0};
    const auto seconds = static_cast<rlim_t>(run.most_seconds) + 2;
    const rlimit cpu{seconds, seconds};
    prlimit(id_, RLIMIT_AS, &memory, nullptr);
    prlimit(id_, RLIMIT_CPU, &cpu, nullptr);
    prlimit(id_, RLIMIT_CORE, &no_core, nullptr);
  }
  pid_t id_ = 0;
};

struct Pipe {
  int end[2] = {-1, -1};  // to read, to write
  Pipe() {
    if (pipe2(end, O_CLOEXEC) != 0) throw sdk::error(DS_E_INTERNAL, "pipe: " + system_text(errno));
    fcntl(end[0], F_SETFL, O_NONBLOCK);
  }
  ~Pipe() {
    close(end[0]);
    close_writing();
  }
  Pipe(const Pipe&) = delete;
  void close_writing() {
    if (end[1] >= 0) close(end[1]);
    end[1] = -1;
  }
};

/// All that is there to read, to the end of `out`; whether more may come.
inline bool read_more(int from, const ProgramRun& run, std::string& out) {
  char piece[16384];
  for (;;) {
    const ssize_t n = read(from, piece, sizeof piece);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return true;
    if (n <= 0) return false;
    out.append(piece, static_cast<std::size_t>(n));
    if (out.size() > run.most_output)
      throw sdk::error(DS_E_DATA, run.program + ": wrote more than " +
                                      std::to_string(run.most_output) + " bytes");
  }
}

/// What the program wrote to its standard error.
inline std::string run_program(const ds_call& call, const ProgramRun& run) {
  const std::int64_t own = now_ns() + static_cast<std::int64_t>(run.most_seconds * 1e9);
  const std::int64_t until = call.deadline_ns != 0 ? std::min(call.deadline_ns, own) : own;
  Pipe pipe;
  Child child(run, pipe.end[1]);
  pipe.close_writing();
  std::string out;
  for (bool more = true, ended = false; !ended;) {
    sdk::check_cancelled(call);
    if (now_ns() >= until)
      throw sdk::error(DS_E_DEADLINE,
                       run.program + ": not done " +
                           (until == own ? "within " + std::to_string(run.most_seconds) + " s"
                                         : "by the call's deadline"));
    ended = child.has_ended();
    if (!ended) {
      pollfd ready{more ? pipe.end[0] : -1, POLLIN, 0};
      poll(&ready, 1, more ? 20 : 2);  // ms; the cancel flag has no descriptor to wait for
    }
    if (more) more = read_more(pipe.end[0], run, out);
  }
  const int status = child.end();
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return out;
  throw sdk::error(
      DS_E_INTERNAL,
      run.program + ": " +
          (WIFEXITED(status) ? "exit status " + std::to_string(WEXITSTATUS(status))
                             : std::string("ended by signal ") + strsignal(WTERMSIG(status))) +
          (out.empty() ? "" : ": " + out.substr(0, 120)));
}

}  // namespace ds::modules
