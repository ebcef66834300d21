// SPDX-License-Identifier: Apache-2.0
// The life of an answer: prepare (maybe on a worker), submit, chunks, finishes, end.
#include "serve/answering.h"

#include <utility>

namespace ds {
namespace {

constexpr size_t kInlinePromptBytes = 16u << 10;  // tokenized within a millisecond or two

struct Answering : std::enable_shared_from_this<Answering> {
  Answering(Service& service, ResponderPtr responder, AnswerPlan plan)
      : service(service), responder(std::move(responder)), plan(std::move(plan)) {}

  std::optional<ApiError> prepare();  // worker or IO thread; the rest: IO thread
  void submit();
  void on_chunk(size_t index, const Chunk& chunk);
  void on_finish(size_t index, const Finish& finish);
  void fail(const ApiError& error);
  void complete();
  void send_chunk(Json choices);
  void cancel_all();

  Service& service;
  ResponderPtr responder;
  AnswerPlan plan;
  std::shared_ptr<const Weights> weights;  // what serves this answer, kept until its end
  std::vector<std::string> ids;
  std::vector<Json> choices;  // whole ones, when not streaming
  size_t unfinished = 0;
  int64_t prompt_count = 0, completion_count = 0, cached_count = 0;
  bool over = false;
};

std::optional<ApiError> Answering::prepare() {
  const std::string ref = plan.asks.front().generate.model;
  Result<std::shared_ptr<const Weights>> found =
      service.parts.versions.find(service.version_ref(ref));
  if (!found.ok()) return generation_error(service, found.status());
  weights = *found;
  plan.head.fingerprint = weights->fingerprint;
  if (plan.head.model.empty()) plan.head.model = "default";
  // The engine gets the version by its number: all choices and the fingerprint already promised in
  // a stream's first chunk are then of one version, whatever is published meanwhile.
  for (size_t i = 0; i < plan.asks.size(); ++i) {
    GenerateRequest& generate = plan.asks[i].generate;
    generate.id = i == 0 ? plan.head.id : plan.head.id + "-" + std::to_string(i);
    generate.model = weights->version;
    generate.sampling.seed += i;
    ids.push_back(generate.id);
  }
  return plan.prepare(plan.asks);
}

void Answering::submit() {
  const auto self = shared_from_this();
  unfinished = plan.asks.size();
  choices.resize(unfinished);
  for (size_t i = 0; i < plan.asks.size(); ++i) {
    Ask& ask = plan.asks[i];
    OnChunk chunk;
    if (plan.stream) chunk = [self, i](const Chunk& c) { self->on_chunk(i, c); };
    const Status submitted =
        submit_generation(service, std::move(ask.generate), std::move(ask.trace), std::move(chunk),
                          [self, i](const Finish& finish) { self->on_finish(i, finish); });
    if (!submitted.ok()) return fail(generation_error(service, submitted));
  }
  responder->on_close([self] {
    self->over = true;
    self->cancel_all();
  });
  if (!plan.stream) return;
  responder->begin_stream();
  plan.head.object = plan.shape.stream_object;
  for (size_t i = 0; plan.shape.first && i < choices.size(); ++i) {
    send_chunk(Json::array({plan.shape.first(i)}));
  }
}

void Answering::on_chunk(size_t index, const Chunk& chunk) {
  if (over || (chunk.text.empty() && chunk.tokens.empty())) return;
  send_chunk(Json::array({plan.shape.piece(index, chunk)}));
}

void Answering::on_finish(size_t index, const Finish& finish) {
  if (over) return;
  if (!finish.status.ok()) return fail(generation_error(service, finish.status));
  if (finish.finish_reason == "cancelled") {
    return fail({503, "the request was cancelled", "server_error", "", "cancelled"});
  }
  if (index % static_cast<size_t>(plan.answers_per_prompt) == 0) {
    prompt_count += finish.prompt_count;
    cached_count += finish.cached_count;
  }
  completion_count += finish.completion_count;
  if (plan.stream) {
    send_chunk(Json::array({plan.shape.last(index, finish)}));
  } else {
    choices[index] = plan.shape.whole(index, finish);
  }
  if (--unfinished == 0) complete();
}

void Answering::complete() {
  over = true;
  const Json usage = usage_json(prompt_count, completion_count, cached_count);
  if (!plan.stream) {
    Json body = answer(plan.head, std::move(choices));
    body["usage"] = usage;
    return responder->json(body);
  }
  if (plan.include_usage) {
    Json body = answer(plan.head, Json::array());
    body["usage"] = usage;
    responder->event(body);
  }
  responder->write("data: [DONE]\n\n");
  responder->end();
}

void Answering::send_chunk(Json chunk_choices) {
  responder->event(answer(plan.head, std::move(chunk_choices)));
}

void Answering::fail(const ApiError& error) {
  over = true;
  cancel_all();
  if (!responder->started()) return responder->error(error);
  responder->event(error_json(error));
  responder->end();
}

void Answering::cancel_all() {
  for (const std::string& id : ids) service.parts.engine.cancel(id);
}

}  // namespace

void answer_all(Service& service, const ResponderPtr& responder, AnswerPlan plan) {
  const std::string& model = plan.asks.front().generate.model;
  const bool now = plan.prompt_bytes <= kInlinePromptBytes &&
                   (model.empty() || service.version_ref(model) == "default");
  const auto answering = std::make_shared<Answering>(service, responder, std::move(plan));
  const auto go = [answering](const std::optional<ApiError>& refused) {
    if (refused) return answering->fail(*refused);
    if (answering->responder->open()) answering->submit();
  };
  if (now) return go(answering->prepare());
  // An old version may have to be read from disk, a long text takes long to tokenize.
  service.quick.post([answering, go, mailbox = service.mailbox] {
    mailbox->post([go, refused = answering->prepare()] { go(refused); });
  });
}

}  // namespace ds
