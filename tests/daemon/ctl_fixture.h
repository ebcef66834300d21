// SPDX-License-Identifier: Apache-2.0
// What the dsctl tests stand on: a scripted control server on a UNIX socket, and the real dsctl
// program run with pipes or on a pseudo-terminal.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/storage/scratch_folder.h"

namespace ds::test {

struct Canned {
  int status = 200;
  std::string body;
  std::string type = "application/json";
  bool chunked = false;  ///< in pieces of 7 bytes
  bool hang = false;     ///< never answers
  std::string raw = {};  ///< instead of everything above: these bytes
};

/// Answers "METHOD /path?query" (or, failing that, "METHOD /path") with canned bytes. Several
/// answers for one request are given in turn, the last one for ever. Everything else is 404.
class FakeControl {
 public:
  explicit FakeControl(const std::string& run_dir);
  ~FakeControl();
  void on(const std::string& request, Canned answer);
  void on(const std::string& request, const std::string& json) { on(request, Canned{200, json}); }
  /// "POST /ds/v1/x {body}" in order of arrival.
  std::vector<std::string> requests() const;

 private:
  void serve();
  void handle(int fd);
  Canned answer_for(const std::string& request);
  std::string path_;
  int listener_ = -1, stop_pipe_[2] = {-1, -1};
  mutable std::mutex mutex_;
  std::map<std::string, std::vector<Canned>> answers_;
  std::map<std::string, size_t> turns_;
  std::vector<std::string> requests_;
  std::vector<std::thread> handlers_;
  std::thread thread_;
};

struct Ran {
  int exit = -1;
  std::string out, err;
};

/// Runs dsctl with pipes. `environment` entries ("NAME=value") come on top of a minimal one
/// (TZ=UTC).
Ran run_dsctl(const std::vector<std::string>& arguments, const std::string& input = "",
              const std::vector<std::string>& environment = {});

/// dsctl on a pseudo-terminal of 100 x 30.
class Terminal {
 public:
  explicit Terminal(const std::vector<std::string>& arguments,
                    const std::vector<std::string>& environment = {});
  ~Terminal();
  /// Reads until `text` has appeared since the last call; false after 10 s or at the end.
  bool wait_for(const std::string& text);
  void type(const std::string& keys);
  int finish();  ///< reads to the end; the exit code, 128 + signal if killed
  const std::string& output() const { return output_; }

 private:
  bool read_some(int patience_ms);
  bool wait_for(const std::string& text, int patience_ms);
  int master_ = -1, pid_ = -1;
  size_t searched_ = 0;
  std::string output_;
};

}  // namespace ds::test
