// SPDX-License-Identifier: Apache-2.0
// A component whose code runs in a helper process. To the rest of the daemon it is an instance like
// any other: its functions send the call to the helper and wait for the reply.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "ds/plugin.h"
#include "ds/status.h"
#include "plugin/isolated_process.h"
#include "plugin/isolated_replies.h"
#include "plugin/restart_policy.h"
#include "storage/seams.h"

namespace ds {

struct IsolationOptions {
  std::string program;                         ///< ds-plugin-helper; empty = nothing isolated
  uint64_t arena_bytes = uint64_t{256} << 20;  ///< takes memory only where it is written
  int64_t call_timeout_ns = 30'000'000'000;    ///< of calls without a deadline
  int64_t grace_ns = 500'000'000;              ///< from the deadline until it is killed
  RestartLimits restart;                       ///< times by `now`
  std::function<int64_t()> now = [] { return system_clock_seam().monotonic_ns(); };
  /// "tool/cppcheck", "signal 11": on the thread whose call it was.
  std::function<void(std::string_view component, std::string_view why)> on_death;
};

/// A component's functions as the daemon calls them when it runs isolated.
struct IsolatedTable {
  ds_instance_ops ops{};
  ds_tool tool{};
  ds_retriever retriever{};
  ds_curriculum curriculum{};
  ds_quantizer quantizer{};
  ds_encoder encoder{};
};

class IsolatedInstance {
 public:
  /// Why a component cannot run isolated; empty if it can.
  static std::string_view cannot(const ds_component& component);
  /// Why no component of a kind can; empty if one may.
  static std::string_view kind_cannot(uint32_t kind);
  /// `component`, with its create and functions replaced by those in `table`, which outlives it.
  static ds_component proxied(const ds_component& component, IsolatedTable& table);

  /// Starts the helper and creates the instance in it. `launch.file` outlives it.
  static Result<std::unique_ptr<IsolatedInstance>> create(const IsolationOptions& options,
                                                          HelperLaunch launch,
                                                          const ds_component& component,
                                                          std::string config, HelperLog log);

  /// `call` null: without deadline.
  ds_code call(HelperOp op, const ds_call* call, const FlatWriter& arguments,
               const ReplyReader& read, ds_status* st);
  /// call(), of what the next helper has to be told again.
  ds_code change(HelperOp op, const FlatWriter& arguments, const ReplyReader& read, ds_status* st);
  ds_code health(ds_status* st);
  uint64_t room() const { return arena_room(options_.arena_bytes); }  ///< bytes of a reply
  ds_code reconfigure(std::string_view config, ds_status* st);
  ds_code restore(std::string state, std::string_view saved_by_version, ds_status* st);

  struct State {
    pid_t pid;  ///< -1: none runs
    uint64_t deaths;
    const char* breaker;
    bool open;
  };
  State state() const;

 private:
  struct Sent {
    std::string_view request;
    int64_t deadline_ns;
    const uint32_t* cancel;
  };
  IsolatedInstance(const IsolationOptions& options, HelperLaunch launch,
                   const ds_component& component, std::string config, HelperLog log);
  ds_code run(HelperOp op, const ds_call* call, std::string_view arguments, const ReplyReader& read,
              ds_status* st);
  ds_code ensure_running(ds_status* st);
  ds_code replay(ds_status* st);
  ds_code exchange(const Sent& sent, const ReplyReader& read, ds_status* st);
  ds_code died(HelperProcess::End end, const std::string& why, ds_status* st);
  void compact();

  const IsolationOptions options_;
  const HelperLaunch launch_;
  const bool stateful_, remembers_;
  const HelperLog log_;
  mutable std::mutex calls_;  ///< one at a time
  std::unique_ptr<HelperProcess> process_;
  // What the next helper gets: the last state that was saved, and the changes since. Saving after
  // each change would copy everything each time; only replaying would grow without end. So it is
  // saved when the changes since outweigh the state, where nothing waits for a commit.
  std::string config_, state_, state_version_;
  std::vector<std::pair<HelperOp, std::string>> changes_;
  size_t changes_bytes_ = 0;
  bool has_state_ = false;
  mutable std::mutex known_;  ///< the two below: read while a call runs
  RestartPolicy policy_;
  pid_t pid_ = -1;
  std::string last_death_;
};

/// The bytes of a request; `arguments` follow what all have.
std::string helper_request(HelperOp op, const ds_call* call, int64_t deadline_ns,
                           std::string_view arguments);

/// What the plugin file of `launch` says of itself (plugin/description.h), loaded in a helper
/// process that ends with this call; hostile bytes. `id` names it in on_death.
Result<std::string> describe_in_helper(const IsolationOptions& options, const HelperLaunch& launch,
                                       const std::string& id, const HelperLog& log);

}  // namespace ds
