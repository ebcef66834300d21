// SPDX-License-Identifier: Apache-2.0
// POST /v1/embeddings: mean of the final hidden states, scaled to unit length as OpenAI's are.
#include <cmath>
#include <utility>

#include "serve/openai.h"
#include "serve/openai_types.h"

namespace ds {
namespace {

constexpr size_t kMaxInputs = 256;

struct EmbeddingCall {
  ResponderPtr responder;
  std::string model, fingerprint;
  std::shared_ptr<const Weights> weights;
  std::vector<std::string> texts;
  bool base64 = false;
  std::vector<Json> data;
  size_t unfinished = 0;
  int64_t tokens = 0;
  bool over = false;
  std::vector<std::string> ids;  // of the engine's requests
};

std::optional<ApiError> parse(const Json& body, int64_t width, EmbeddingCall& call,
                              std::string& ignored) {
  Fields fields(body);
  call.model = fields.text("model", "");
  const std::string format = fields.text("encoding_format", "float");
  call.base64 = format == "base64";
  if (!call.base64 && format != "float") {
    fields.fail("encoding_format", "'" + format + "', expected float or base64");
  }
  const int64_t dimensions = fields.integer("dimensions", width, 1, 1 << 20);
  if (dimensions != width) {
    fields.fail("dimensions",
                std::to_string(dimensions) + ", this model gives " + std::to_string(width));
  }
  fields.get("user");
  const Json* input = fields.get("input");
  const char* expected = "expected a non-empty string or a list of them";
  if (!input) {
    fields.fail("input", expected);
  } else {
    const Json list = input->is_array() ? *input : Json::array({*input});
    if (list.empty() || list.size() > kMaxInputs) fields.fail("input", "expected 1 to 256 texts");
    for (const Json& item : list) {
      if (item.is_number() || item.is_array()) {
        fields.fail("input",
                    "token ids of another tokenizer cannot be embedded: send text "
                    "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
                    "token_ids");
        break;
      }
      if (!item.is_string() || item.get_ref<const std::string&>().empty()) {
        fields.fail("input", expected);
        break;
      }
      call.texts.push_back(item.get<std::string>());
    }
  }
  ignored = fields.ignored();
  return fields.error();
}

Json encode(std::vector<float> values, bool base64) {
  double sum = 0;
  for (const float v : values) sum += static_cast<double>(v) * v;
  const double scale = sum > 0 ? 1 / std::sqrt(sum) : 0;
  for (float& v : values) v = static_cast<float>(v * scale);
  if (base64) return base64_floats(values);
  Json list = Json::array();
  for (const float v : values) list.push_back(shortest(v));
  return list;
}

void cancel_all(Service& service, EmbeddingCall& call) {
  call.over = true;
  for (const std::string& id : call.ids) service.parts.engine.cancel(id);
}

void one_done(Service& service, const std::shared_ptr<EmbeddingCall>& call, size_t index,
              const Status& status, std::vector<float> values) {
  if (call->over) return;
  if (!status.ok()) {
    cancel_all(service, *call);
    return call->responder->error(generation_error(service, status));
  }
  call->data[index] = {{"object", "embedding"},
                       {"index", index},
                       {"embedding", encode(std::move(values), call->base64)}};
  if (--call->unfinished > 0) return;
  call->over = true;
  call->responder->json(
      {{"object", "list"},
       {"data", std::move(call->data)},
       {"model", call->model.empty() ? "default" : call->model},
       {"system_fingerprint", call->fingerprint},
       {"usage", {{"prompt_tokens", call->tokens}, {"total_tokens", call->tokens}}}});
}

void submit(Service& service, const std::shared_ptr<EmbeddingCall>& call,
            std::vector<std::vector<TokenId>> prompts) {
  call->unfinished = prompts.size();
  call->data.resize(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    call->tokens += static_cast<int64_t>(prompts[i].size());
    call->ids.push_back("embd-" + random_hex(12));
    const Status submitted = service.parts.engine.submit_embedding(
        call->ids.back(), call->weights->version, std::move(prompts[i]),
        [&service, call, i, mailbox = service.mailbox](Status status, std::vector<float> values,
                                                       const std::string&) {
          mailbox->post([&service, call, i, status, values = std::move(values)]() mutable {
            one_done(service, call, i, status, std::move(values));
          });
        });
    if (!submitted.ok()) {
      cancel_all(service, *call);
      return call->responder->error(generation_error(service, submitted));
    }
  }
  call->responder->on_close([&service, call] { cancel_all(service, *call); });
}

}  // namespace

void embeddings(Service& service, RouteCall& route, const ResponderPtr& responder) {
  const auto call = std::make_shared<EmbeddingCall>();
  call->responder = responder;
  const int64_t width = service.parts.versions.current()->base->config().d_model;
  std::string ignored;
  if (const auto error = parse(route.body, width, *call, ignored)) return responder->error(*error);
  if (!ignored.empty()) responder->add_header("x-ds-ignored", ignored);
  service.quick.post([&service, call, mailbox = service.mailbox] {
    const auto found = service.parts.versions.find(service.version_ref(call->model));
    std::vector<std::vector<TokenId>> prompts;
    for (const std::string& text : call->texts) {
      prompts.push_back(service.parts.tokenizer->encode(text, false));
    }
    mailbox->post([&service, call, found, prompts = std::move(prompts)]() mutable {
      if (!found.ok()) return call->responder->error(generation_error(service, found.status()));
      call->weights = *found;
      call->fingerprint = (*found)->fingerprint;
      submit(service, call, std::move(prompts));
    });
  });
}

}  // namespace ds
