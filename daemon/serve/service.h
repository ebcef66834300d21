// SPDX-License-Identifier: Apache-2.0
// What routes and the data socket share: the daemon's parts, the ways between threads, and small
// identities. Lives from Server::start to the end of Server::stop.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>

#include "serve/handoff.h"
#include "serve/http.h"
#include "serve/server.h"
#include "serve/tokens.h"

namespace ds {

/// `bytes` random bytes from the kernel as lower-case hex.
std::string random_hex(size_t bytes);

/// A client that follows the events.
struct Follower {
  ResponderPtr responder;
  uint64_t subscription = 0;
  uint64_t last_sent = 0;  ///< event number
};

struct Service {
  ServerParts parts;
  ServerOptions options;
  std::shared_ptr<Mailbox> mailbox;
  std::string process_id;  ///< random; names the client of anonymous HTTP feedback
  int64_t started_ms = 0;
  int64_t started_ns = 0;
  Tokens tokens;
  std::atomic<bool> draining{false};
  uint32_t end_tools = 0;                         ///< by __atomic functions; 1 = calls of tools end
  int64_t anonymous_epoch = 0;                    ///< IO thread
  std::set<std::shared_ptr<Follower>> followers;  ///< live event streams; IO thread
  std::atomic<int64_t> serving_since_ms{0};       ///< last change of the serving version
  Worker quick;                                   ///< point reads and traces: milliseconds
  Worker slow;  ///< rollback, backup, verification: as long as they take

  Service(ServerParts parts, ServerOptions options, std::shared_ptr<Mailbox> mailbox);

  /// A model reference as Versions knows it: this model's own name is "default".
  std::string version_ref(const std::string& model) const;
  void end_followers();  ///< IO thread

  /// Runs `work` on `worker` and answers with its result on the IO thread.
  void answer_from(Worker& worker, const ResponderPtr& responder,
                   std::function<Result<Json>()> work);
  /// A callback for long work elsewhere: answers on the IO thread, from whatever thread it is
  /// called.
  JsonCallback answer_later(const ResponderPtr& responder);
};

/// Counts one feedback submission: received by kind, duplicate, or refused by reason.
void count_feedback(Metrics& metrics, const std::string& kind, const Ack* ack,
                    const Refusal* refusal);

}  // namespace ds
