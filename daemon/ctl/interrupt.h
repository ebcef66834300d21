// SPDX-License-Identifier: Apache-2.0
// Ctrl-C as something that waits can see: the handler makes a pipe readable, every poll() of dsctl
// watches that pipe. So an interrupt between a check and the wait after it is never lost.
#pragma once

namespace ds::ctl {

/// Installs the handlers of SIGINT and SIGTERM; SIGPIPE is ignored. Once, before threads start.
void catch_interrupts();
bool interrupted();
void clear_interrupt();  ///< the REPL goes on after a cancelled answer
int interrupt_fd();      ///< readable from the signal until clear_interrupt(); -1 before
                         ///< catch_interrupts()

/// Waits for an interrupt for at most `ms`. True if one came (or is already there).
bool wait_or_interrupt(int ms);

}  // namespace ds::ctl
