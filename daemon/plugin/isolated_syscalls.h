// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

namespace ds {

/// From now on no thread of this process, nor any program that it starts, may look into or steer
/// another process by ptrace and the like, open a socket, mount, load code into the kernel, touch
/// its keyrings, or send a signal to the process `daemon`: the call fails with EPERM. False: the
/// kernel has no filters. Needs PR_SET_NO_NEW_PRIVS.
bool forbid_syscalls(pid_t daemon);

}  // namespace ds
