// SPDX-License-Identifier: Apache-2.0
// Chat completions, completions and models: from parsed requests to plans, and how choices look.
#include "serve/openai.h"

#include <utility>

#include "serve/answering.h"

namespace ds {
namespace {

constexpr int64_t kMsPerSecond = 1000;

AnswerPlan plan_for(const Service& service, const CompletionCommon& common, const char* id_prefix,
                    const char* object) {
  AnswerPlan plan;
  plan.head.id = id_prefix + random_hex(12);
  plan.head.object = object;
  plan.head.model = common.generate.model;
  plan.head.created_s = service.parts.clock.unix_ms() / kMsPerSecond;
  plan.answers_per_prompt = common.n;
  plan.stream = common.stream;
  plan.include_usage = common.include_usage;
  return plan;
}

void list_ignored(const ResponderPtr& responder, const std::string& ignored) {
  if (!ignored.empty()) responder->add_header("x-ds-ignored", ignored);
}

Json chat_choice(size_t index, const char* key, Json message, Json logprobs, Json reason) {
  return {{"index", index},
          {key, std::move(message)},
          {"logprobs", std::move(logprobs)},
          {"finish_reason", std::move(reason)}};
}

AnswerShape chat_shape(std::shared_ptr<const Tokenizer> tokenizer, bool logprobs) {
  AnswerShape shape;
  shape.stream_object = "chat.completion.chunk";
  shape.first = [](size_t i) {
    return chat_choice(i, "delta", {{"role", "assistant"}, {"content", ""}}, nullptr, nullptr);
  };
  shape.piece = [=](size_t i, const Chunk& chunk) {
    return chat_choice(i, "delta", {{"content", chunk.text}},
                       logprobs ? chat_logprobs(*tokenizer, chunk.tokens) : Json(), nullptr);
  };
  shape.last = [](size_t i, const Finish& finish) {
    return chat_choice(i, "delta", Json::object(), nullptr, finish_reason(finish));
  };
  shape.whole = [=](size_t i, const Finish& finish) {
    return chat_choice(
        i, "message", {{"role", "assistant"}, {"content", finish.text}, {"refusal", nullptr}},
        logprobs ? chat_logprobs(*tokenizer, finish.tokens) : Json(), finish_reason(finish));
  };
  return shape;
}

void chat(Service& service, RouteCall& call, const ResponderPtr& responder) {
  ChatRequest request;
  if (const auto error = parse_chat(call.body, service.parts.tokenizer->vocab_size(), request)) {
    return responder->error(*error);
  }
  list_ignored(responder, request.ignored);
  const GenerateRequest generate = request.generate;
  const std::string source = request.user.empty() ? "http" : request.user;
  AnswerPlan plan = plan_for(service, request, "chatcmpl-", "chat.completion");
  plan.shape = chat_shape(service.parts.tokenizer, generate.logprobs >= 0);
  for (int i = 0; i < plan.answers_per_prompt; ++i) {
    plan.asks.push_back({generate, {request.raw_messages, source}});
  }
  for (const ChatMessage& message : request.messages) plan.prompt_bytes += message.content.size();
  plan.prepare = [&service, messages = std::move(request.messages)](
                     std::vector<Ask>& asks) -> std::optional<ApiError> {
    if (auto error = set_chat_prompt(service, messages, asks.front().generate)) return error;
    for (Ask& ask : asks) {
      ask.generate.prompt = asks.front().generate.prompt;
      ask.generate.stop_ids = asks.front().generate.stop_ids;
    }
    return std::nullopt;
  };
  answer_all(service, responder, std::move(plan));
}

// What an echoing answer starts with; filled by prepare(), read by the shape.
struct Echo {
  std::vector<std::string> prompts;  // text by choice; empty without echo
};

Json text_choice(size_t index, std::string text, Json logprobs, Json reason) {
  return {{"index", index},
          {"text", std::move(text)},
          {"logprobs", std::move(logprobs)},
          {"finish_reason", std::move(reason)}};
}

AnswerShape text_shape(std::shared_ptr<const Tokenizer> tokenizer, bool logprobs,
                       std::shared_ptr<Echo> echo) {
  // Characters of the answer so far, by choice: text_offset of a streamed piece.
  const auto offsets = std::make_shared<std::vector<int64_t>>(echo->prompts.size(), 0);
  AnswerShape shape;
  shape.stream_object = "text_completion";
  shape.first = [echo](size_t i) { return text_choice(i, echo->prompts[i], nullptr, nullptr); };
  shape.piece = [=](size_t i, const Chunk& chunk) {
    Json entries;
    if (logprobs) entries = completion_logprobs(*tokenizer, chunk.tokens, (*offsets)[i]);
    (*offsets)[i] += count_characters(chunk.tokens);
    return text_choice(i, chunk.text, std::move(entries), nullptr);
  };
  shape.last = [](size_t i, const Finish& finish) {
    return text_choice(i, "", nullptr, finish_reason(finish));
  };
  shape.whole = [=](size_t i, const Finish& finish) {
    Json entries;
    if (logprobs) {
      std::vector<TokenInfo> tokens = finish.prompt_tokens;  // empty unless echoed
      tokens.insert(tokens.end(), finish.tokens.begin(), finish.tokens.end());
      entries = completion_logprobs(*tokenizer, tokens, 0);
    }
    return text_choice(i, echo->prompts[i] + finish.text, std::move(entries),
                       finish_reason(finish));
  };
  return shape;
}

void completion(Service& service, RouteCall& call, const ResponderPtr& responder) {
  CompletionRequest request;
  if (const auto error =
          parse_completion(call.body, service.parts.tokenizer->vocab_size(), request)) {
    return responder->error(*error);
  }
  if (request.stream && request.generate.prompt_logprobs) {
    return responder->error({400, "stream: not supported yet together with echo and logprobs",
                             "invalid_request_error", "stream", "unsupported"});
  }
  list_ignored(responder, request.ignored);
  const GenerateRequest generate = request.generate;
  const std::string source = request.user.empty() ? "http" : request.user;
  AnswerPlan plan = plan_for(service, request, "cmpl-", "text_completion");
  for (size_t i = 0; i < request.prompts.size() * static_cast<size_t>(request.n); ++i) {
    plan.asks.push_back({generate, {Json::object(), source}});
  }
  for (const auto& prompt : request.prompts) {
    if (const auto* text = std::get_if<std::string>(&prompt)) plan.prompt_bytes += text->size();
  }
  const auto echo = std::make_shared<Echo>();
  echo->prompts.resize(plan.asks.size());
  plan.shape = text_shape(service.parts.tokenizer, generate.logprobs >= 0, echo);
  if (!request.echo) plan.shape.first = nullptr;
  plan.prepare =
      [&service, echo, wants_echo = request.echo, n = static_cast<size_t>(request.n),
       prompts = std::move(request.prompts)](std::vector<Ask>& asks) -> std::optional<ApiError> {
    const Tokenizer& tokenizer = *service.parts.tokenizer;
    for (size_t i = 0; i < asks.size(); ++i) {
      const auto* text = std::get_if<std::string>(&prompts[i / n]);
      std::vector<TokenId> ids =
          text ? tokenizer.encode(*text, true) : std::get<std::vector<TokenId>>(prompts[i / n]);
      if (ids.empty()) {
        return ApiError{400, "prompt: has no tokens", "invalid_request_error", "prompt",
                        "empty_prompt"};
      }
      std::string shown = text ? *text : tokenizer.decode(ids);
      if (wants_echo) echo->prompts[i] = shown;
      asks[i].trace.messages = {{"prompt", std::move(shown)}};
      asks[i].generate.prompt = {Segment{std::move(ids)}};
      asks[i].generate.stop_ids = {tokenizer.eos()};
    }
    return std::nullopt;
  };
  answer_all(service, responder, std::move(plan));
}

Json model_object(const Service& service, const std::string& id, const Json& version) {
  const ModelInfo& model = service.parts.model;
  int64_t created_ms = model.created_ms ? model.created_ms : service.started_ms;
  if (const Json* made = find(version, "created_ms"); made && made->is_number_integer()) {
    created_ms = made->get<int64_t>();
  }
  const Json* parent = find(version, "parent");
  const Json* name = find(version, "version");
  return {{"id", id},
          {"object", "model"},
          {"created", created_ms / kMsPerSecond},
          {"owned_by", "driftstone"},
          {"root", model.name},
          {"parent", parent && parent->is_string() ? *parent : Json()},
          {"ds",
           {{"version", name ? *name : Json()},
            {"modalities", {"text"}},
            {"sha256", model.sha256},
            {"parameters", model.parameters}}}};
}

// `default` first, then the versions.
Json model_list(const Service& service) {
  Json models = Json::array();
  const std::string current = service.parts.versions.current()->version;
  const Json versions = service.parts.versions.list();
  for (const Json& version : versions) {
    const Json* name = find(version, "version");
    if (name && *name == current) models.push_back(model_object(service, "default", version));
  }
  if (models.empty()) models.push_back(model_object(service, "default", {{"version", current}}));
  for (const Json& version : versions) {
    const Result<std::string> name = get_string(version, "version");
    if (name.ok()) models.push_back(model_object(service, *name, version));
  }
  return models;
}

void get_model(Service& service, RouteCall& call, const ResponderPtr& responder) {
  const std::string& id = call.params.front();
  const Json models = model_list(service);
  if (id == service.parts.model.name) {
    Json model = models.front();
    model["id"] = id;
    return responder->json(model);
  }
  for (const Json& model : models) {
    if (model["id"] == id) return responder->json(model);
  }
  responder->error(generation_error(service, not_found("model '" + id + "' does not exist")));
}

}  // namespace

void add_openai_routes(Router& router, Service& service) {
  for (const std::string prefix : {"/v1", ""}) {
    router.add("POST", prefix + "/chat/completions", kInfer, BodyKind::kJson,
               [&service](RouteCall& call, const ResponderPtr& to) { chat(service, call, to); });
    router.add(
        "POST", prefix + "/completions", kInfer, BodyKind::kJson,
        [&service](RouteCall& call, const ResponderPtr& to) { completion(service, call, to); });
    router.add(
        "POST", prefix + "/embeddings", kInfer, BodyKind::kJson,
        [&service](RouteCall& call, const ResponderPtr& to) { embeddings(service, call, to); });
    router.add("GET", prefix + "/models", kRead, BodyKind::kNone,
               [&service](RouteCall&, const ResponderPtr& to) {
                 to->json({{"object", "list"}, {"data", model_list(service)}});
               });
    router.add(
        "GET", prefix + "/models/{}", kRead, BodyKind::kNone,
        [&service](RouteCall& call, const ResponderPtr& to) { get_model(service, call, to); });
    router.add_planned(prefix + "/files/*",
                       "uploads for fine-tuning; send examples to /ds/v1/feedback");
    router.add_planned(prefix + "/fine_tuning/*",
                       "fine-tuning jobs; send examples to /ds/v1/feedback");
    router.add("POST", prefix + "/responses", kInfer, BodyKind::kRaw,
               [](RouteCall&, const ResponderPtr& to) {
                 to->error({404, "there is no /v1/responses: use /v1/chat/completions",
                            "invalid_request_error", "", "unknown_url"});
               });
  }
}

}  // namespace ds
