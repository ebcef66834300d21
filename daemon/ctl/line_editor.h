// SPDX-License-Identifier: Apache-2.0
// Lines from the user: libedit with history on a terminal, plain lines elsewhere.
#pragma once

#include <memory>
#include <optional>
#include <string>

namespace ds::ctl {

class LineEditor {
 public:
  /// Takes the terminal out of line mode until destroyed: keys typed between two reads are not echoed and
  /// belong to the next read.
  LineEditor();
  ~LineEditor();
  /// The next line without its newline. No value at the end of input. Ctrl-C clears the line: ""
  /// and interrupted() is set.
  std::optional<std::string> read(const std::string& prompt);

 private:
  struct Terminal;
  std::unique_ptr<Terminal> terminal_;  ///< null when stdin is no terminal
};

}  // namespace ds::ctl
