// SPDX-License-Identifier: Apache-2.0
// What the data socket does with a message: hello, feedback, infer, cancel, and the order of the
// answers.
#include <utility>

#include "serve/data_socket_state.h"

namespace ds {
namespace {

constexpr size_t kInlinePromptBytes = 16u << 10;  // longer ones are tokenized off the IO thread

}  // namespace

void DataSocket::State::on(const Address& from, Peer& peer, size_t, wire::Error& error) {
  service.parts.metrics
      .counter("ds_wire_errors_total", "Data socket messages refused, by code.",
               {{"code", error.code}})
      .add();
  fill(from, reserve(peer), wire::encode(error));
}

void DataSocket::State::on(const Address& from, Peer& peer, size_t, wire::Hello& hello) {
  peer.greeted = true;
  peer.client = hello.client;
  const ServerOptions& options = service.options;
  const Json reply = {{"op", "hello"},
                      {"store", service.parts.store.store_id()},
                      {"last_seq", service.parts.store.last_seq(hello.client, hello.epoch)},
                      {"version", service.parts.versions.current()->version},
                      {"limits",
                       {{"record_bytes", options.max_record_bytes},
                        {"header_bytes", options.max_wire_header_bytes},
                        {"attachment_bytes", options.max_attachment_bytes},
                        {"inflight_items", options.peer_inflight_items},
                        {"inflight_bytes", options.peer_inflight_bytes},
                        {"context", service.parts.engine.options().context}}}};
  fill(from, reserve(peer), reply);
}

void DataSocket::State::on(const Address& from, Peer& peer, size_t cost, wire::Feedback& feedback) {
  const uint64_t number = reserve(peer);
  const int64_t seq = feedback.submission.seq;
  if (service.draining) {
    return fill(from, number,
                wire::encode(wire::Error{"shutting_down", "the daemon is stopping", seq}));
  }
  if (!admit(peer, cost)) {
    wire::Error busy{"busy", "too much feedback of this peer is unanswered", seq};
    busy.retry_after_ms = 50;
    return fill(from, number, wire::encode(busy));
  }
  const Json* kind_field = find(feedback.submission.record, "kind");
  const std::string kind =
      kind_field && kind_field->is_string() ? kind_field->get<std::string>() : "";
  service.parts.store.submit(
      std::move(feedback.submission),
      [weak = weak_from_this(), mailbox = service.mailbox, &metrics = service.parts.metrics, from,
       number, seq, cost, kind](const Ack* ack, const Refusal* refusal) {
        const Json reply =
            ack ? wire::encode_ack(seq, *ack) : wire::encode(wire::refused(seq, *refusal));
        count_feedback(metrics, kind, ack, refusal);
        mailbox->post([weak, from, number, cost, reply] {
          const auto self = weak.lock();
          Peer* peer = self ? self->find_peer(from) : nullptr;
          if (!peer) return;
          self->release(*peer, cost);
          self->fill(from, number, reply);
        });
      });
}

void DataSocket::State::on(const Address& from, Peer& peer, size_t, wire::Cancel& cancel) {
  const uint64_t number = reserve(peer);
  const auto found = peer.requests.find(cancel.id);
  if (found == peer.requests.end()) {
    return fill(
        from, number,
        wire::encode(wire::Error{"not_found", "no live request has this id", 0, cancel.id}));
  }
  found->second.cancelled = true;
  service.parts.engine.cancel(found->second.engine_id);
  fill(from, number, {{"op", "cancelled"}, {"id", cancel.id}});
}

void DataSocket::State::on(const Address& from, Peer& peer, size_t cost, wire::Infer& infer) {
  wire::Error refusal{"", "", 0, infer.id};
  if (service.draining) {
    refusal.code = "shutting_down", refusal.message = "the daemon is stopping";
  } else if (peer.requests.contains(infer.id)) {
    refusal.code = "conflict", refusal.message = "a live request of this peer has the same id";
  } else if (!admit(peer, cost)) {
    refusal.code = "busy", refusal.message = "too many requests of this peer are unanswered";
    refusal.retry_after_ms = 50;
  }
  if (!refusal.code.empty()) return answer(from, wire::encode(refusal));
  const std::string engine_id = (infer.messages.empty() ? "cmpl-" : "chatcmpl-") + random_hex(12);
  peer.requests[infer.id].engine_id = engine_id;
  if (infer.task_model) return infer_task(from, cost, std::move(infer));
  infer_language(from, cost, std::move(infer), engine_id);
}

void DataSocket::State::infer_language(const Address& from, size_t cost, wire::Infer infer,
                                       const std::string& engine_id) {
  const auto shared = std::make_shared<wire::Infer>(std::move(infer));
  shared->generate.id = engine_id;
  const auto prepare = [this, shared]() -> Status {
    const std::string ref = service.version_ref(shared->generate.model);
    const auto weights = service.parts.versions.find(ref);
    if (!weights.ok()) return weights.status();
    shared->generate.model = ref;
    if (!shared->messages.empty()) {
      const auto error = set_chat_prompt(service, shared->messages, shared->generate);
      return error ? invalid(error->message) : Status();
    }
    shared->generate.prompt = {Segment{service.parts.tokenizer->encode(shared->prompt, true)}};
    shared->generate.stop_ids = {service.parts.tokenizer->eos()};
    return {};
  };
  const Peer* peer = find_peer(from);
  TraceSeed trace{
      shared->messages.empty() ? Json{{"prompt", shared->prompt}} : shared->raw_messages,
      peer->client};
  const auto go = [this, from, cost, shared, trace](const Status& prepared) {
    if (prepared.ok()) {
      return submit_language(from, cost, shared->id, std::move(shared->generate), trace,
                             shared->stream);
    }
    finish_request(from, shared->id, cost, wire::encode(wire::failed(shared->id, prepared)));
  };
  const std::string& model = shared->generate.model;
  if (cost <= kInlinePromptBytes && (model.empty() || service.version_ref(model) == "default")) {
    return go(prepare());
  }
  service.quick.post([self = shared_from_this(), mailbox = service.mailbox, prepare, go] {
    mailbox->post([self, go, prepared = prepare()] { go(prepared); });
  });
}

void DataSocket::State::submit_language(const Address& from, size_t cost, const std::string& id,
                                        GenerateRequest request, TraceSeed trace, bool stream) {
  Peer* peer = find_peer(from);
  if (!peer) return;
  if (peer->requests[id].cancelled) {
    return finish_request(
        from, id, cost, {{"op", "done"}, {"id", id}, {"finish_reason", "cancelled"}, {"text", ""}});
  }
  const std::string response_id = request.id;
  OnChunk chunk;
  if (stream) {
    chunk = [weak = weak_from_this(), from, id](const Chunk& part) {
      const auto self = weak.lock();
      if (!self || part.text.empty()) return;
      self->answer(from, {{"op", "token"}, {"id", id}, {"text", part.text}});
    };
  }
  const Status submitted = submit_generation(
      service, std::move(request), std::move(trace), std::move(chunk),
      [weak = weak_from_this(), from, cost, id, response_id](const Finish& finish) {
        const auto self = weak.lock();
        if (!self) return;
        if (!finish.status.ok()) {
          return self->finish_request(from, id, cost,
                                      wire::encode(wire::failed(id, finish.status)));
        }
        self->finish_request(from, id, cost,
                             {{"op", "done"},
                              {"id", id},
                              {"response_id", response_id},
                              {"finish_reason", finish.finish_reason},
                              {"text", finish.text},
                              {"usage",
                               {{"prompt_tokens", finish.prompt_count},
                                {"completion_tokens", finish.completion_count},
                                {"total_tokens", finish.prompt_count + finish.completion_count}}},
                              {"version", finish.version},
                              {"system_fingerprint", finish.fingerprint}});
      });
  if (!submitted.ok()) finish_request(from, id, cost, wire::encode(wire::failed(id, submitted)));
}

void DataSocket::State::infer_task(const Address& from, size_t cost, wire::Infer infer) {
  const std::string id = infer.id;
  if (!service.parts.task_models.infer) {
    return finish_request(
        from, id, cost,
        wire::encode(wire::failed(id, unsupported("this daemon has no task models"))));
  }
  service.parts.task_models.infer(
      infer.generate.model, std::move(infer.input),
      [weak = weak_from_this(), mailbox = service.mailbox, from, cost, id](Result<Json> result) {
        mailbox->post([weak, from, cost, id, result = std::move(result)] {
          const auto self = weak.lock();
          Peer* peer = self ? self->find_peer(from) : nullptr;
          if (!peer) return;
          if (!result.ok()) {
            return self->finish_request(from, id, cost,
                                        wire::encode(wire::failed(id, result.status())));
          }
          Json done = result.value();
          done["op"] = "done";
          done["id"] = id;
          done["finish_reason"] = peer->requests[id].cancelled ? "cancelled" : "stop";
          self->finish_request(from, id, cost, std::move(done));
        });
      });
}

void DataSocket::State::finish_request(const Address& to, const std::string& id, size_t cost,
                                       Json last) {
  Peer* peer = find_peer(to);
  if (!peer) return;
  peer->requests.erase(id);
  release(*peer, cost);
  answer(to, last);
}

bool DataSocket::State::admit(Peer& peer, size_t cost) {
  const bool full =
      peer.inflight_items >= service.options.peer_inflight_items ||
      (peer.inflight_items && peer.inflight_bytes + cost > service.options.peer_inflight_bytes);
  if (full) return false;
  ++peer.inflight_items;
  peer.inflight_bytes += cost;
  return true;
}

void DataSocket::State::release(Peer& peer, size_t cost) {
  --peer.inflight_items;
  peer.inflight_bytes -= cost;
}

// ---- answers in order ----

uint64_t DataSocket::State::reserve(Peer& peer) {
  peer.ordered.emplace_back();
  return peer.first_ordered + peer.ordered.size() - 1;
}

void DataSocket::State::fill(const Address& to, uint64_t number, const Json& answer) {
  Peer* peer = find_peer(to);
  if (!peer) return;
  peer->ordered[number - peer->first_ordered] = Outgoing{to.envelope, dump_json(answer)};
  while (!peer->ordered.empty() && peer->ordered.front()) {
    Outgoing next = std::move(*peer->ordered.front());
    peer->ordered.pop_front();
    ++peer->first_ordered;
    enqueue(to.routing_id, *peer, std::move(next));
    if (!(peer = find_peer(to))) return;  // dropped while sending
  }
}

void DataSocket::State::answer(const Address& to, const Json& json) {
  if (Peer* peer = find_peer(to)) enqueue(to.routing_id, *peer, {to.envelope, dump_json(json)});
}

}  // namespace ds
