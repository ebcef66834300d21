// SPDX-License-Identifier: Apache-2.0
// The OpenAI-compatible routes against a tiny model: shapes, ranges, streams, versions, traces.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "serve_fixture.h"

namespace ds {
namespace {

using test::eventually;
using test::HeldEngine;
using test::HttpAnswer;
using test::HttpClient;
using test::Served;
using test::sse_data;
using testing::HasSubstr;

Json chat(Json more = Json::object()) {
  more.update({{"messages", {{{"role", "user"}, {"content", "hello there"}}}},
               {"max_tokens", 8},
               {"temperature", 0}});
  return more;
}

class ServeOpenai : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    served = new Served();
    served->model.publish_up_to(2);
  }
  static void TearDownTestSuite() { delete served; }
  static HttpAnswer post(const std::string& path, const Json& body) {
    return served->tcp().post(path, body);
  }
  static std::vector<TokenId> ids(const std::string& text) {
    return served->model.model.tokenizer->encode(text, true);
  }
  static Served* served;
};
Served* ServeOpenai::served = nullptr;

TEST_F(ServeOpenai, ChatHasOpenaisShape) {
  const HttpAnswer answer = post(
      "/v1/chat/completions",
      chat({{"model", "default"}, {"user", "u1"}, {"colour", "red"}, {"metadata", {{"a", "b"}}}}));
  ASSERT_EQ(answer.status, 200) << answer.body;
  const Json body = answer.json();
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_TRUE(body["id"].get<std::string>().starts_with("chatcmpl-"));
  EXPECT_TRUE(body["created"].is_number_integer());
  EXPECT_EQ(body["model"], "default");
  EXPECT_TRUE(body["system_fingerprint"].get<std::string>().starts_with("ds-v2-"));
  EXPECT_EQ(body["choices"][0]["message"]["role"], "assistant");
  EXPECT_THAT((std::vector<std::string>{"stop", "length"}),
              testing::Contains(body["choices"][0]["finish_reason"].get<std::string>()));
  EXPECT_EQ(
      body["usage"]["total_tokens"].get<int>(),
      body["usage"]["prompt_tokens"].get<int>() + body["usage"]["completion_tokens"].get<int>());
  EXPECT_EQ(answer.headers.at("x-ds-ignored"), "colour");
  // Feedback can cite the answer as soon as it is seen.
  const auto trace = served->model.store->get_trace(body["id"]);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->answer, body["choices"][0]["message"]["content"]);
  EXPECT_EQ(trace->version, "v2");
  EXPECT_EQ(trace->source, "u1");
  EXPECT_EQ(trace->messages[0]["content"], "hello there");
}

TEST_F(ServeOpenai, StreamSaysTheSameAsOneAnswer) {
  const Json whole = post("/v1/chat/completions", chat()).json();
  for (const bool usage : {false, true}) {
    Json request = chat({{"stream", true}});
    if (usage) request["stream_options"] = {{"include_usage", true}};
    const HttpAnswer answer = post("/v1/chat/completions", request);
    EXPECT_EQ(answer.headers.at("content-type"), "text/event-stream");
    const std::vector<std::string> data = sse_data(answer.body);
    ASSERT_GE(data.size(), 3u);
    EXPECT_EQ(data.back(), "[DONE]");
    std::string text, id;
    Json last_choice;
    size_t usage_chunks = 0;
    for (size_t i = 0; i + 1 < data.size(); ++i) {
      const Json chunk = parse_json(data[i]).value();
      EXPECT_EQ(chunk["object"], "chat.completion.chunk");
      EXPECT_EQ(chunk["system_fingerprint"], whole["system_fingerprint"]);
      if (id.empty()) id = chunk["id"];
      EXPECT_EQ(chunk["id"], id);
      if (i == 0) {
        EXPECT_EQ(chunk["choices"][0]["delta"]["role"], "assistant");
      }
      if (chunk.contains("usage")) {
        ++usage_chunks;
        EXPECT_TRUE(chunk["choices"].empty());
        EXPECT_EQ(chunk["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
        continue;
      }
      last_choice = chunk["choices"][0];
      text += last_choice["delta"].value("content", "");
    }
    EXPECT_EQ(text, whole["choices"][0]["message"]["content"]);
    EXPECT_EQ(last_choice["finish_reason"], whole["choices"][0]["finish_reason"]);
    EXPECT_EQ(usage_chunks, usage ? 1u : 0u);
    EXPECT_TRUE(served->model.store->get_trace(id).ok());
  }
}

TEST_F(ServeOpenai, SeveralAnswersShareThePrompt) {
  Json request = chat({{"n", 3}, {"seed", 5}});
  request["temperature"] = 1;
  const Json body = post("/v1/chat/completions", request).json();
  ASSERT_EQ(body["choices"].size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(body["choices"][i]["index"], i);
  const Json again = post("/v1/chat/completions", request).json();
  EXPECT_EQ(again["choices"], body["choices"]);  // seeded
  request["n"] = 1;
  const Json one = post("/v1/chat/completions", request).json();
  EXPECT_EQ(one["usage"]["prompt_tokens"], body["usage"]["prompt_tokens"]);
  EXPECT_EQ(one["choices"][0], body["choices"][0]);
}

TEST_F(ServeOpenai, EveryVersionCanBeAsked) {
  const Json first = post("/v1/chat/completions", chat({{"model", "v1"}})).json();
  EXPECT_TRUE(first["system_fingerprint"].get<std::string>().starts_with("ds-v1-"));
  EXPECT_EQ(post("/v1/chat/completions", chat({{"model", "tiny"}})).status, 200);
  EXPECT_EQ(post("/v1/chat/completions", chat({{"model", "tiny@v1"}})).json()["system_fingerprint"],
            first["system_fingerprint"]);
  const HttpAnswer unknown = post("/v1/chat/completions", chat({{"model", "gpt-x"}}));
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(unknown.error("code"), "model_not_found");
  EXPECT_THAT(unknown.error("message"), HasSubstr("v2"));
}

TEST_F(ServeOpenai, ValuesOutOfRangeAre400AndNamed) {
  const std::pair<const char*, Json> cases[] = {{"temperature", -0.1},
                                                {"temperature", 2.1},
                                                {"temperature", "hot"},
                                                {"top_p", -0.1},
                                                {"top_p", 1.5},
                                                {"max_tokens", -1},
                                                {"max_tokens", 1.5},
                                                {"n", 0},
                                                {"n", 5},
                                                {"presence_penalty", 3},
                                                {"frequency_penalty", -3},
                                                {"seed", "x"},
                                                {"stop", Json::array({"a", "b", "c", "d", "e"})},
                                                {"stop", ""},
                                                {"stop", 5},
                                                {"logit_bias", {{"x", 1}}},
                                                {"logit_bias", {{"5", 101}}},
                                                {"logit_bias", {{"99999", 1}}},
                                                {"top_logprobs", 3},
                                                {"stream", "yes"},
                                                {"min_p", 2},
                                                {"top_k", -1},
                                                {"max_completion_tokens", -5},
                                                {"class", "fast"}};
  for (const auto& [name, value] : cases) {
    Json request = chat();
    request[name] = value;
    const HttpAnswer answer = post("/v1/chat/completions", request);
    EXPECT_EQ(answer.status, 400) << name << " " << value;
    EXPECT_EQ(answer.error("param"), name);
    EXPECT_EQ(answer.error("type"), "invalid_request_error");
  }
  // NaN is no JSON, and 1e999 no number.
  for (const char* number : {"NaN", "1e999"}) {
    EXPECT_EQ(
        served->tcp()
            .ask("POST", "/v1/chat/completions",
                 std::string(
                     "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"temperature\":") +
                     number + "}")
            .status,
        400);
  }
  Json huge = chat();
  huge["max_tokens"] = 9'000'000'000'000'000'000;
  huge["stop"] = Json::array({"a", "e", "i", "o"});
  EXPECT_EQ(post("/v1/chat/completions", huge).status, 200);
}

TEST_F(ServeOpenai, WhatIsNotSupportedSaysSo) {
  const std::pair<const char*, Json> cases[] = {{"tools", Json::array({{{"type", "function"}}})},
                                                {"response_format", {{"type", "json_object"}}},
                                                {"response_format", {{"type", "json_schema"}}},
                                                {"functions", Json::array({1})}};
  for (const auto& [name, value] : cases) {
    Json request = chat();
    request[name] = value;
    const HttpAnswer answer = post("/v1/chat/completions", request);
    EXPECT_EQ(answer.status, 400) << name;
    EXPECT_THAT(answer.error("message"), HasSubstr("not supported yet")) << name;
  }
  Json image = chat();
  image["messages"][0]["content"] = {{{"type", "image_url"}, {"image_url", {{"url", "data:"}}}}};
  EXPECT_THAT(post("/v1/chat/completions", image).error("message"), HasSubstr("no encoder"));
  Json parts = chat();
  parts["messages"][0]["content"] = {{{"type", "text"}, {"text", "hello "}},
                                     {{"type", "text"}, {"text", "there"}}};
  EXPECT_EQ(post("/v1/chat/completions", parts).json()["choices"],
            post("/v1/chat/completions", chat()).json()["choices"]);
  EXPECT_EQ(post("/v1/chat/completions",
                 chat({{"response_format", {{"type", "text"}}}, {"tools", Json::array()}}))
                .status,
            200);
}

TEST_F(ServeOpenai, BadMessagesAre400) {
  for (const Json& messages :
       {Json(), Json::array(), Json("hi"), Json::array({1}), Json::array({{{"role", "user"}}}),
        Json::array({{{"role", "robot"}, {"content", "x"}}})}) {
    EXPECT_EQ(post("/v1/chat/completions", {{"messages", messages}}).status, 400) << messages;
  }
  Json lengthy = chat();
  std::string words;
  for (int i = 0; i < 3000; ++i) words += " word" + std::to_string(i);
  lengthy["messages"][0]["content"] = words;
  const HttpAnswer too_long = post("/v1/chat/completions", lengthy);
  EXPECT_EQ(too_long.status, 400);
  EXPECT_THAT(too_long.error("message"), HasSubstr("context"));
}

TEST_F(ServeOpenai, LogprobsHaveOneEntryPerToken) {
  const Json body =
      post("/v1/chat/completions", chat({{"logprobs", true}, {"top_logprobs", 2}})).json();
  const Json& content = body["choices"][0]["logprobs"]["content"];
  ASSERT_FALSE(content.empty());
  for (const Json& token : content) {
    EXPECT_EQ(token["top_logprobs"].size(), 2u);
    EXPECT_LE(token["logprob"].get<double>(), 0);
    EXPECT_EQ(token["logprob"], token["top_logprobs"][0]["logprob"]);  // greedy
    // What is printed is an FP32 value.
    const double printed = token["logprob"].get<double>();
    EXPECT_LT(std::abs(printed - static_cast<float>(printed)), 1e-6);
    EXPECT_LE(dump_json(token["logprob"]).size(), 16u);
  }
}

TEST_F(ServeOpenai, PromptLogprobsByEcho) {
  const std::vector<TokenId> prompt = ids("one two three");
  const Json body = post("/v1/completions", {{"prompt", prompt},
                                             {"max_tokens", 0},
                                             {"echo", true},
                                             {"logprobs", 2},
                                             {"temperature", 0}})
                        .json();
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "one two three");
  EXPECT_EQ(choice["logprobs"]["tokens"].size(), prompt.size());
  EXPECT_EQ(choice["logprobs"]["token_logprobs"].size(), prompt.size());
  EXPECT_TRUE(choice["logprobs"]["token_logprobs"][0].is_null());
  EXPECT_TRUE(choice["logprobs"]["top_logprobs"][0].is_null());
  EXPECT_LT(choice["logprobs"]["token_logprobs"][1].get<double>(), 0);
  EXPECT_EQ(choice["logprobs"]["text_offset"][0], 0);
  EXPECT_EQ(body["usage"]["completion_tokens"], 0);
  EXPECT_EQ(body["usage"]["prompt_tokens"].get<size_t>(), prompt.size());
}

TEST_F(ServeOpenai, CompletionsTakeAllPromptForms) {
  const auto text_of = [](const Json& prompt) {
    const Json body =
        post("/v1/completions", {{"prompt", prompt}, {"max_tokens", 4}, {"temperature", 0}}).json();
    std::vector<std::string> texts;
    for (const Json& choice : body["choices"]) texts.push_back(choice["text"]);
    return texts;
  };
  const auto one = text_of("one two");
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(text_of(Json::array({"one two"})), one);
  EXPECT_EQ(text_of(ids("one two")), one);
  EXPECT_EQ(text_of(Json::array({ids("one two"), ids("one two")})),
            (std::vector<std::string>{one[0], one[0]}));
  for (const auto& [prompt, found] : std::vector<std::pair<Json, std::string>>{
           {{-1}, "prompt: prompt[0] is -1, expected a string"},
           {{5, 640}, "prompt: prompt[1] is 640, expected a string"},
           {{{5}, {5, 1.5}}, "prompt: prompt[1][1] is 1.5, expected"},
           {{{5}, true}, "prompt: prompt[1] is true, expected"},
           {{5, std::numeric_limits<uint64_t>::max()}, "prompt[1] is 18446744073709551615, "},
           {Json::array(), "prompt: got [], expected"},
           {std::vector<std::string>(129, "a"), "prompt: 129 prompts, expected at most 128"}}) {
    const HttpAnswer refused = post("/v1/completions", {{"prompt", prompt}});
    EXPECT_EQ(refused.status, 400);
    EXPECT_EQ(refused.error("param"), "prompt");
    EXPECT_THAT(refused.error("message"), HasSubstr(found));
  }
  EXPECT_EQ(post("/v1/completions", {{"prompt", ""}}).status, 400);
  EXPECT_EQ(post("/v1/completions", Json::object()).status, 400);
  const HttpAnswer stream = post("/completions", {{"prompt", "one two"},
                                                  {"max_tokens", 4},
                                                  {"temperature", 0},
                                                  {"stream", true},
                                                  {"echo", true}});
  std::string text;
  for (const std::string& data : sse_data(stream.body)) {
    if (data != "[DONE]") text += parse_json(data).value()["choices"][0]["text"].get<std::string>();
  }
  EXPECT_EQ(text, "one two" + one[0]);
}

TEST_F(ServeOpenai, EmbeddingsInBothEncodings) {
  const Json floats = post("/v1/embeddings", {{"input", {"hello", "there"}}}).json();
  ASSERT_EQ(floats["data"].size(), 2u);
  double norm = 0;
  for (const Json& v : floats["data"][0]["embedding"]) norm += v.get<double>() * v.get<double>();
  EXPECT_NEAR(norm, 1, 1e-5);
  const Json coded =
      post("/v1/embeddings", {{"input", "hello"}, {"encoding_format", "base64"}}).json();
  const std::string text = coded["data"][0]["embedding"];
  std::string bytes;
  uint32_t group = 0;
  int bits = 0;
  for (const char c : text) {
    if (c == '=') break;
    const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    group = group << 6 | static_cast<uint32_t>(digits.find(c));
    if ((bits += 6) >= 8) bytes += static_cast<char>(group >> (bits -= 8) & 255);
  }
  ASSERT_EQ(bytes.size(), 64 * sizeof(float));
  for (size_t i = 0; i < 64; ++i) {
    float value;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    EXPECT_EQ(value, floats["data"][0]["embedding"][i].get<float>());  // bit for bit
  }
  const HttpAnswer tokens = post("/v1/embeddings", {{"input", {{1, 2}}}});
  EXPECT_EQ(tokens.status, 400);
  EXPECT_THAT(tokens.error("message"), HasSubstr("check_embedding_ctx_length=False"));
  EXPECT_EQ(post("/v1/embeddings", {{"input", "a"}, {"dimensions", 32}}).status, 400);
  EXPECT_EQ(post("/v1/embeddings", {{"input", "a"}, {"dimensions", 64}}).status, 200);
  EXPECT_EQ(post("/v1/embeddings", {{"input", ""}}).status, 400);
  EXPECT_EQ(post("/v1/embeddings", {{"input", "a"}, {"model", "nope"}}).status, 404);
}

TEST_F(ServeOpenai, ModelsListDefaultFirst) {
  const Json models = served->tcp().get("/v1/models").json();
  EXPECT_EQ(models["object"], "list");
  EXPECT_EQ(models["data"][0]["id"], "default");
  EXPECT_EQ(models["data"][0]["ds"]["version"], "v2");
  EXPECT_EQ(models["data"][1]["id"], "v1");
  EXPECT_EQ(served->tcp().get("/v1/models/nope").status, 404);
}

// The client leaves while the engine stands still, so what is generated afterwards shows the
// cancel.
TEST(ServeDisconnect, AClosedConnectionCancels) {
  Served served;
  for (const bool stream : {true, false}) {
    HttpClient client = served.tcp();
    HeldEngine held(*served.engine);
    Json request =
        chat({{"stream", stream}, {"logit_bias", {{"0", -100}, {"1", -100}, {"2", -100}}}});
    request["max_tokens"] = 480;
    const std::string body = dump_json(request);
    client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " +
                std::to_string(body.size()) + "\r\n\r\n" + body);
    ASSERT_TRUE(eventually([&] { return served.engine->ps().size() == 2; }));
    client.close();
    // Counted when the connection has ended: 200 with a stream begun, else 499.
    const std::string gone = std::string("ds_http_requests_total{route=\"/v1/chat/completions\"") +
                             ",code=\"" + (stream ? "200" : "499") + "\"}";
    ASSERT_TRUE(eventually([&] { return served.metric(gone) == 1; }));
    held.release();
    ASSERT_TRUE(served.engine_empty());
  }
  EXPECT_LT(served.metric("ds_serve_generated_tokens_total"), 20);
  EXPECT_EQ(served.tcp().get("/health").status, 200);
}

TEST(ServeBusy, TooManyWaitingIs429) {
  Served served([](ServerOptions&, EngineOptions& engine) {
    engine.max_running = 1;
    engine.max_waiting = 1;
  });
  Json request = chat({{"n", 4}});
  request["max_tokens"] = 400;
  const HttpAnswer busy = served.tcp().post("/v1/chat/completions", request);
  EXPECT_EQ(busy.status, 429);
  EXPECT_EQ(busy.headers.at("retry-after"), "1");
  EXPECT_EQ(busy.error("type"), "rate_limit_error");
  EXPECT_TRUE(served.engine_empty());  // those that had got in were cancelled
}

TEST(ServeStop, AnswersUnderWayAreFinishedAndLateOnesRefused) {
  Served served;
  HttpClient client = served.tcp();
  Json request = chat({{"stream", true}, {"logit_bias", {{"0", -100}, {"1", -100}, {"2", -100}}}});
  request["max_tokens"] = 64;
  const std::string body = dump_json(request);
  client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " +
              std::to_string(body.size()) + "\r\n\r\n" + body);
  client.read_until("data: ");
  HttpClient follower = served.tcp();
  follower.send("GET /ds/v1/events?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n");
  follower.read_until(": following");
  served.server->stop(10'000);
  EXPECT_THAT(client.read_until("[DONE]"), HasSubstr("\"finish_reason\":\"length\""));
  EXPECT_TRUE(client.closed_by_server());
  EXPECT_TRUE(follower.closed_by_server());
}

}  // namespace
}  // namespace ds
