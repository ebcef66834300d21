// SPDX-License-Identifier: Apache-2.0
// Shared ground of the routes.
#include "serve/service.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <utility>

#include "storage/hash.h"

namespace ds {

std::string random_hex(size_t bytes) {
  std::array<uint8_t, 32> raw{};
  DS_CHECK(bytes <= raw.size());
  // Up to 256 bytes come whole or not at all; failing means a kernel without getrandom.
  DS_CHECK(getrandom(raw.data(), bytes, 0) == static_cast<ssize_t>(bytes));
  return to_hex({raw.data(), bytes});
}

Service::Service(ServerParts parts_in, ServerOptions options_in,
                 std::shared_ptr<Mailbox> mailbox_in)
    : parts(std::move(parts_in)),
      options(std::move(options_in)),
      mailbox(std::move(mailbox_in)),
      process_id(random_hex(6)),
      started_ms(parts.clock.unix_ms()),
      started_ns(parts.clock.monotonic_ns()),
      tokens(parts.clock),
      serving_since_ms(started_ms) {}

std::string Service::version_ref(const std::string& model) const {
  const std::string& name = parts.model.name;
  if (model == name) return "default";
  if (model.starts_with(name + "@")) return model.substr(name.size() + 1);
  return model;
}

void Service::end_followers() {
  for (const auto& follower : std::exchange(followers, {})) {
    parts.events.unsubscribe(follower->subscription);
    follower->responder->end();
  }
}

void Service::answer_from(Worker& worker, const ResponderPtr& responder,
                          std::function<Result<Json>()> work) {
  worker.post([callback = answer_later(responder), work = std::move(work)] { callback(work()); });
}

JsonCallback Service::answer_later(const ResponderPtr& responder) {
  return [mailbox = mailbox, responder](Result<Json> result) {
    mailbox->post([responder, result = std::move(result)] { responder->result(result); });
  };
}

void count_feedback(Metrics& metrics, const std::string& kind, const Ack* ack,
                    const Refusal* refusal) {
  if (refusal) {
    metrics
        .counter("ds_feedback_rejected_total", "Feedback refused at the door, by reason.",
                 {{"reason", refusal->code}})
        .add();
    return;
  }
  if (ack->duplicate) {
    metrics.counter("ds_feedback_duplicates_total", "Feedback sent again and already stored.")
        .add();
    return;
  }
  // The store accepted it, so the kind is one of its few.
  metrics.counter("ds_feedback_received_total", "Feedback stored, by kind.", {{"kind", kind}})
      .add();
}

}  // namespace ds
