// SPDX-License-Identifier: Apache-2.0
#include "ctl/line_editor.h"

#include <fcntl.h>
#include <histedit.h>
#include <langinfo.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <clocale>
#include <cstdlib>
#include <cwchar>
#include <iostream>

#include "ctl/interrupt.h"

namespace ds::ctl {
namespace {

constexpr int kHistoryLines = 1000;

/// $XDG_STATE_HOME/driftstone/history, readable by its owner only; "" when there is no home.
std::string history_path() {
  const char* state = std::getenv("XDG_STATE_HOME");
  const char* home = std::getenv("HOME");
  std::string folder;
  if (state && *state) {
    folder = state;
  } else if (home && *home) {
    folder = std::string(home) + "/.local/state";
  } else {
    return "";
  }
  for (size_t at = 1; at <= folder.size(); ++at) {
    if (at == folder.size() || folder[at] == '/') mkdir(folder.substr(0, at).c_str(), 0700);
  }
  folder += "/driftstone";
  mkdir(folder.c_str(), 0700);
  const std::string path = folder + "/history";
  const int fd = open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  if (fd < 0) return "";
  close(fd);
  return path;
}

/// One character for libedit. Unlike its own reader this one sees Ctrl-C through the interrupt
/// pipe.
int read_character(EditLine* editor, wchar_t* character) {
  FILE* input = nullptr;
  el_get(editor, EL_GETFP, 0, &input);
  mbstate_t state = {};
  for (;;) {
    pollfd watched[2] = {{fileno(input), POLLIN, 0}, {interrupt_fd(), POLLIN, 0}};
    if (poll(watched, interrupt_fd() >= 0 ? 2 : 1, -1) < 0 && !interrupted()) continue;
    if (interrupted()) return -1;
    char byte = 0;
    if (::read(fileno(input), &byte, 1) != 1) return 0;
    const size_t used = std::mbrtowc(character, &byte, 1, &state);
    if (used == static_cast<size_t>(-1)) state = {};  // not UTF-8: skipped
    // NUL is no key here: libedit would quote the next one, and a Ctrl-D from before the editor took the
    // terminal arrives as NUL.
    if (used == 1) return 1;
  }
}

}  // namespace

struct LineEditor::Terminal {
  EditLine* editor = nullptr;
  History* history = nullptr;
  HistEvent event = {};
  std::string prompt, path;

  static char* show_prompt(EditLine* editor) {
    void* self = nullptr;
    el_get(editor, EL_CLIENTDATA, &self);
    return static_cast<Terminal*>(self)->prompt.data();
  }
};

LineEditor::LineEditor() {
  if (!isatty(STDIN_FILENO)) return;
  if (std::string_view(nl_langinfo(CODESET)) != "UTF-8") std::setlocale(LC_CTYPE, "C.UTF-8");
  terminal_ = std::make_unique<Terminal>();
  Terminal& t = *terminal_;
  t.history = history_init();
  history(t.history, &t.event, H_SETSIZE, kHistoryLines);
  history(t.history, &t.event, H_SETUNIQUE, 1);
  t.path = history_path();
  if (!t.path.empty()) history(t.history, &t.event, H_LOAD, t.path.c_str());
  t.editor = el_init("dsctl", stdin, stdout, stderr);
  el_set(t.editor, EL_CLIENTDATA, &t);
  el_set(t.editor, EL_PROMPT, &Terminal::show_prompt);
  el_set(t.editor, EL_EDITOR, "emacs");
  el_set(t.editor, EL_HIST, history, t.history);
  el_set(t.editor, EL_GETCFN, read_character);
  // Between two reads libedit gives the terminal back to line mode, where a Ctrl-D becomes an end-of-file
  // mark that the next read sees as NUL. Without line mode, what is typed during an answer stays as it was
  // typed, and its echo does not mix with the answer. el_end() restores the mode from before.
  el_set(t.editor, EL_SETTY, "-x", "-icanon", "-echo", nullptr);
}

LineEditor::~LineEditor() {
  if (!terminal_) return;
  Terminal& t = *terminal_;
  if (!t.path.empty()) history(t.history, &t.event, H_SAVE, t.path.c_str());
  el_end(t.editor);
  history_end(t.history);
}

std::optional<std::string> LineEditor::read(const std::string& prompt) {
  std::string line;
  if (!terminal_) {
    if (!std::getline(std::cin, line)) return std::nullopt;
    return line;
  }
  Terminal& t = *terminal_;
  t.prompt = prompt;
  int length = 0;
  const char* text = el_gets(t.editor, &length);
  if (interrupted()) {
    std::fputs("\n", stdout);
    el_reset(t.editor);
    return "";
  }
  if (!text || length <= 0) return std::nullopt;
  line.assign(text, static_cast<size_t>(length));
  while (line.ends_with('\n') || line.ends_with('\r')) line.pop_back();
  if (!line.empty()) history(t.history, &t.event, H_ENTER, line.c_str());
  return line;
}

}  // namespace ds::ctl
