// SPDX-License-Identifier: Apache-2.0
#include "ctl_fixture.h"

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ds::test {
namespace {

constexpr int kPatienceMs = 10'000;

const char* dsctl_path() { return DS_BIN_DIR "/dsctl"; }

/// What a fresh fork becomes. Made before it: threads of this program may have held the allocator's
/// lock when it forked, and under ASan nobody lets go of it in the child.
class Command {
 public:
  Command(const std::vector<std::string>& arguments, const std::vector<std::string>& environment) {
    words_.insert(words_.end(), arguments.begin(), arguments.end());
    variables_.insert(variables_.end(), environment.begin(), environment.end());
    for (std::string& word : words_) argv_.push_back(word.data());
    for (std::string& variable : variables_) envp_.push_back(variable.data());
    argv_.push_back(nullptr);
    envp_.push_back(nullptr);
  }
  Command(const Command&) = delete;
  [[noreturn]] void run() const {
    execve(dsctl_path(), argv_.data(), envp_.data());
    _exit(127);
  }

 private:
  std::vector<std::string> words_ = {"dsctl"};
  std::vector<std::string> variables_ = {"TZ=UTC", "TERM=xterm", "LC_ALL=C.UTF-8",
                                         "PATH=/usr/bin:/bin", "HOME=/nonexistent"};
  std::vector<char*> argv_, envp_;
};

int exit_of(int pid) {
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void send_all(int fd, const std::string& bytes) {
  for (size_t sent = 0; sent < bytes.size();) {
    const ssize_t n = send(fd, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return;
    sent += static_cast<size_t>(n);
  }
}

std::string in_chunks(const std::string& body) {
  std::string out;
  for (size_t at = 0; at < body.size(); at += 7) {
    const std::string piece = body.substr(at, 7);
    char size[16];
    std::snprintf(size, sizeof size, "%zx\r\n", piece.size());
    out += size + piece + "\r\n";
  }
  return out + "0\r\n\r\n";
}

}  // namespace

FakeControl::FakeControl(const std::string& run_dir) : path_(run_dir + "/control.sock") {
  listener_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof address.sun_path, "%s", path_.c_str());
  unlink(path_.c_str());
  const mode_t before = umask(0177);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) std::abort();
  umask(before);
  if (listen(listener_, 64) != 0 || pipe2(stop_pipe_, O_CLOEXEC) != 0) std::abort();
  thread_ = std::thread([this] { serve(); });
}

FakeControl::~FakeControl() {
  close(stop_pipe_[1]);
  thread_.join();
  for (std::thread& handler : handlers_) handler.join();
  close(listener_);
  close(stop_pipe_[0]);
}

void FakeControl::on(const std::string& request, Canned answer) {
  const std::lock_guard lock(mutex_);
  answers_[request].push_back(std::move(answer));
}

std::vector<std::string> FakeControl::requests() const {
  const std::lock_guard lock(mutex_);
  return requests_;
}

void FakeControl::serve() {
  for (;;) {
    pollfd watched[2] = {{listener_, POLLIN, 0}, {stop_pipe_[0], POLLIN, 0}};
    poll(watched, 2, -1);
    if (watched[1].revents) return;
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) handlers_.emplace_back([this, fd] { handle(fd); });
  }
}

Canned FakeControl::answer_for(const std::string& request) {
  const std::lock_guard lock(mutex_);
  auto it = answers_.find(request);
  if (it == answers_.end()) it = answers_.find(request.substr(0, request.find('?')));
  if (it == answers_.end()) {
    return {404, R"({"error":{"message":"no such thing: )" + request + R"(","code":"not_found"}})"};
  }
  const size_t turn = turns_[it->first]++;
  return it->second[std::min(turn, it->second.size() - 1)];
}

void FakeControl::handle(int fd) {
  std::string text;
  size_t head = std::string::npos, length = 0;
  char bytes[4096];
  while (head == std::string::npos || text.size() < head + 4 + length) {
    const ssize_t n = recv(fd, bytes, sizeof bytes, 0);
    if (n <= 0) break;
    text.append(bytes, static_cast<size_t>(n));
    head = text.find("\r\n\r\n");
    const size_t field = text.find("Content-Length: ");
    if (field < head) length = std::strtoul(text.c_str() + field + 16, nullptr, 10);
  }
  const std::string request = text.substr(0, text.find(" HTTP/"));
  {
    const std::lock_guard lock(mutex_);
    const std::string body = head == std::string::npos ? "" : text.substr(head + 4);
    requests_.push_back(request + (body.empty() ? "" : " " + body));
  }
  const Canned answer = answer_for(request);
  if (!answer.raw.empty()) {
    send_all(fd, answer.raw);
  } else if (!answer.hang) {
    const std::string framing =
        answer.chunked ? "Transfer-Encoding: chunked\r\n"
                       : "Content-Length: " + std::to_string(answer.body.size()) + "\r\n";
    send_all(fd, "HTTP/1.1 " + std::to_string(answer.status) +
                     " X\r\nContent-Type: " + answer.type + "\r\n" + framing + "\r\n" +
                     (answer.chunked ? in_chunks(answer.body) : answer.body));
  }
  if (answer.hang) {  // until the client gives up or the test ends
    pollfd watched[2] = {{fd, POLLIN | POLLHUP, 0}, {stop_pipe_[0], POLLIN, 0}};
    poll(watched, 2, -1);
  }
  close(fd);
}

Ran run_dsctl(const std::vector<std::string>& arguments, const std::string& input,
              const std::vector<std::string>& environment) {
  int in[2], out[2], err[2];
  if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) std::abort();
  const Command command(arguments, environment);
  const int pid = fork();
  if (pid == 0) {
    dup2(in[0], 0);
    dup2(out[1], 1);
    dup2(err[1], 2);
    command.run();
  }
  close(in[0]);
  close(out[1]);
  close(err[1]);
  std::thread writer([&] {  // large inputs must not block against unread output
    signal(SIGPIPE, SIG_IGN);
    for (size_t at = 0; at < input.size();) {
      const ssize_t n = write(in[1], input.data() + at, input.size() - at);
      if (n <= 0) break;
      at += static_cast<size_t>(n);
    }
    close(in[1]);
  });
  Ran ran;
  pollfd watched[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
  while (watched[0].fd >= 0 || watched[1].fd >= 0) {
    if (poll(watched, 2, kPatienceMs) <= 0) {
      kill(pid, SIGKILL);
      break;
    }
    for (int i = 0; i < 2; ++i) {
      if (!watched[i].revents) continue;
      char bytes[4096];
      const ssize_t n = read(watched[i].fd, bytes, sizeof bytes);
      if (n <= 0) {
        watched[i].fd = -1;
      } else {
        (i == 0 ? ran.out : ran.err).append(bytes, static_cast<size_t>(n));
      }
    }
  }
  writer.join();
  close(out[0]);
  close(err[0]);
  ran.exit = exit_of(pid);
  return ran;
}

Terminal::Terminal(const std::vector<std::string>& arguments,
                   const std::vector<std::string>& environment) {
  winsize size = {};
  size.ws_row = 30;
  size.ws_col = 100;
  const Command command(arguments, environment);
  pid_ = forkpty(&master_, nullptr, nullptr, &size);
  if (pid_ == 0) command.run();
  fcntl(master_, F_SETFD, FD_CLOEXEC);
}

Terminal::~Terminal() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    exit_of(pid_);
  }
  close(master_);
}

bool Terminal::read_some(int patience_ms) {
  pollfd watched = {master_, POLLIN, 0};
  if (poll(&watched, 1, patience_ms) <= 0) return false;
  char bytes[4096];
  const ssize_t n = read(master_, bytes, sizeof bytes);
  if (n <= 0) return false;
  output_.append(bytes, static_cast<size_t>(n));
  return true;
}

bool Terminal::wait_for(const std::string& text) { return wait_for(text, kPatienceMs); }

bool Terminal::wait_for(const std::string& text, int patience_ms) {
  for (;;) {
    const size_t at = output_.find(text, searched_);
    if (at != std::string::npos) {
      searched_ = at + text.size();
      return true;
    }
    if (!read_some(patience_ms)) return false;
  }
}

void Terminal::type(const std::string& keys) {
  if (write(master_, keys.data(), keys.size()) < 0) std::perror("write to the terminal");
}

int Terminal::finish() {
  while (read_some(kPatienceMs)) {
  }
  pollfd closed = {master_, POLLIN, 0};
  if (poll(&closed, 1, 0) == 0)
    kill(pid_, SIGKILL);  // it still waits for something: not a hang of ours
  const int exit = exit_of(pid_);
  pid_ = -1;
  return exit;
}

}  // namespace ds::test
