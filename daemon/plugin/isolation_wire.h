// SPDX-License-Identifier: Apache-2.0
// What the daemon and a helper process share: an arena of memory that neither can resize, and a
// socket on which a byte wakes the other side. There is no lock in the arena. A request and its
// reply are flat values (plugin/flat.h); the daemon takes every byte of a reply as hostile.
// A socket, not an eventfd: whether an eventfd blocks is a flag that both sides share, so a helper
// could make the daemon wait for ever; MSG_DONTWAIT holds for the call that says it.
//
// Request: op, deadline, seed, step, request id, generation, workspace bytes, then the arguments.
// Reply: code, native, flags, text; log lines (count; level, component, text); and, if the code is
// DS_OK, the results.
#pragma once

#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace ds {

enum class HelperOp : uint32_t {
  kCreate = 1,
  kHealth,
  kReconfigure,
  kSave,
  kRestore,
  kStats,
  kAnalyse,
  kInvoke,
  kPut,
  kErase,
  kCommit,
  kSearch,
  kFetch,
  kPick,
  kScore,
  kOutcome,
  kFormat,
  kObserve,
  kQuantize,
  kDequantize,
  kPlan,
  kEncode,
  kDescribe,  ///< loads the file and says what is in it, without an instance
};

/// At the arena's start.
struct ArenaHead {
  std::atomic<uint64_t> sequence;        ///< of the request, by the daemon
  std::atomic<uint64_t> request_bytes;   ///< by the daemon
  std::atomic<uint64_t> reply_sequence;  ///< by the helper, that of the request
  std::atomic<uint64_t> reply_bytes;     ///< by the helper
  std::atomic<uint32_t> stop;            ///< by the daemon: ds_call.cancel of the helper's call
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(ArenaHead) <= 4096);

/// Half of what follows the head is the request's, half the reply's.
constexpr uint64_t kArenaHeadBytes = 4096;
constexpr uint64_t arena_room(uint64_t arena_bytes) { return (arena_bytes - kArenaHeadBytes) / 2; }

/// File descriptors of a helper; it has no others but the standard ones.
constexpr int kHelperFile = 3, kHelperArena = 4, kHelperSocket = 5;
/// Its arguments: kind, component (both empty: only to describe the file), path and SHA-256 of the
/// file, pid of the daemon.
constexpr int kHelperArguments = 6;

constexpr uint64_t kMostHelperLogs = 64;

/// glibc 2.36 declares pidfd_open without C linkage.
inline int pidfd_of(pid_t pid) { return static_cast<int>(syscall(SYS_pidfd_open, pid, 0)); }

}  // namespace ds
