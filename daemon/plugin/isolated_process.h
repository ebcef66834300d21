// SPDX-License-Identifier: Apache-2.0
// One helper process and its arena, as the daemon sees them.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <string_view>

#include "ds/status.h"
#include "plugin/isolation_wire.h"
#include "storage/descriptor.h"

namespace ds {

struct HelperLaunch {
  std::string program;  ///< ds-plugin-helper
  int file = -1;        ///< the plugin's sealed bytes, borrowed
  std::string kind, component, path, sha256, version;
  uint64_t arena_bytes = 0;
};

class HelperProcess {
 public:
  static Result<std::unique_ptr<HelperProcess>> start(const HelperLaunch& launch);
  ~HelperProcess();  ///< kills it
  HelperProcess(const HelperProcess&) = delete;

  pid_t pid() const { return pid_; }
  uint64_t room() const { return arena_room(arena_bytes_); }

  enum class End { kReply, kDied, kLate, kCancelled, kGarbage };
  struct Answer {
    End end;
    std::string bytes;  ///< a copy of the reply: it cannot change any more
    std::string why;    ///< of any other end
  };
  /// After any end but kReply the helper is dead. `cancel` as ds_call's, or null; once it is not 0
  /// the helper has `grace_ns` to answer.
  Answer exchange(std::string_view request, int64_t kill_at_ns, const uint32_t* cancel,
                  int64_t grace_ns);
  /// Kills it, if it lives, and says how it ended: "signal 9".
  std::string finish();

 private:
  HelperProcess() = default;
  ArenaHead& head() const { return *reinterpret_cast<ArenaHead*>(arena_); }
  Answer take_reply();

  pid_t pid_ = -1;
  Descriptor pidfd_, socket_;
  std::byte* arena_ = nullptr;
  uint64_t arena_bytes_ = 0, sequence_ = 0;
};

}  // namespace ds
