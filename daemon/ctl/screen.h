// SPDX-License-Identifier: Apache-2.0
// The whole terminal as one frame that is redrawn: alternate screen, hidden cursor, keys
// unbuffered.
#pragma once

#include <termios.h>

#include <string>

namespace ds::ctl {

class Screen {
 public:
  Screen();   ///< takes the terminal
  ~Screen();  ///< gives it back as it was
  Screen(const Screen&) = delete;

  int columns() const;
  int rows() const;
  /// Draws the frame from the top left; lines beyond the terminal are cut.
  void draw(const std::string& frame);
  /// Waits up to `ms`; true when the user asked to leave (q, Escape, Ctrl-C).
  bool leave_within(int ms);

 private:
  termios saved_ = {};
  bool keys_ = false;
};

/// Both stdin and stdout are terminals.
bool on_terminal();

}  // namespace ds::ctl
