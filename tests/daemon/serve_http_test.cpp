// SPDX-License-Identifier: Apache-2.0
// HTTP as such: framing, limits, errors, who may do what, and the daemon's own routes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "serve_fixture.h"

namespace ds {
namespace {

using test::feedback;
using test::HttpAnswer;
using test::HttpClient;
using test::Served;
using testing::HasSubstr;

class ServeHttp : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    served = new Served([](ServerOptions& options, EngineOptions&) {
      options.max_body_bytes = 64 << 10;
      options.http_hosts = {"box.example"};
    });
    served->model.publish_up_to(3);
  }
  static void TearDownTestSuite() { delete served; }
  static HttpAnswer admin(const std::string& method, const std::string& path,
                          const Json& body = nullptr) {
    HttpClient client = served->unix_socket();
    return client.ask(method, path, body.is_null() ? "" : dump_json(body));
  }
  static Served* served;
};
Served* ServeHttp::served = nullptr;

TEST_F(ServeHttp, HealthReadyAndKeepAlive) {
  HttpClient client = served->tcp();
  EXPECT_EQ(client.get("/health").json(), Json({{"status", "ok"}}));
  const HttpAnswer ready = client.get("/ready");  // the same connection
  EXPECT_EQ(ready.status, 200);
  EXPECT_EQ(ready.json()["ready"], true);
  EXPECT_EQ(ready.headers.at("content-type"), "application/json");
}

/// Not ready from the failure of the GPU to the moment when the CPU serves, and degraded from then
/// on.
TEST(ServeDevice, HealthAndReadyFollowTheGpu) {
  test::Served served;
  HttpClient client = served.tcp();
  EXPECT_EQ(client.get("/ds/v1/status").json()["device"],
            Json({{"name", "test"}, {"state", "ok"}}));
  served.device.lose("an illegal address");
  const HttpAnswer lost = client.get("/ready");
  EXPECT_EQ(lost.status, 503);
  EXPECT_EQ(lost.error("code"), "device_lost");
  EXPECT_EQ(lost.headers.at("retry-after"), "1");
  EXPECT_EQ(client.get("/health").json()["status"], "degraded");
  served.device.lose("a later one");
  served.device.serve_on_host();
  EXPECT_EQ(client.get("/ready").json(),
            Json({{"ready", true}, {"version", "v1"}, {"degraded", true}}));
  const Json health = client.get("/health").json();
  EXPECT_EQ(health["status"], "degraded");
  EXPECT_EQ(health["device"]["state"], "cpu_serves");
  EXPECT_EQ(health["device"]["reason"], "an illegal address");
}

TEST_F(ServeHttp, HeadHasNoBody) {
  HttpClient client = served->tcp();
  EXPECT_EQ(client.ask("HEAD", "/health").status, 200);
  EXPECT_EQ(client.get("/health").status, 200);  // nothing of a body was left in between
}

TEST_F(ServeHttp, UnknownPathIs404Json) {
  const HttpAnswer answer = served->tcp().get("/v1/nonsense");
  EXPECT_EQ(answer.status, 404);
  EXPECT_EQ(answer.error("code"), "unknown_url");
  EXPECT_EQ(served->tcp().ask("POST", "/v1/responses", "{}").status, 404);
  EXPECT_THAT(served->tcp().ask("POST", "/v1/responses", "{}").error("message"),
              HasSubstr("/v1/chat/completions"));
}

TEST_F(ServeHttp, WrongMethodIs405AndNamesTheRightOne) {
  for (const char* path : {"/v1/chat/completions", "/chat/completions"}) {
    const HttpAnswer answer = served->tcp().get(path);
    EXPECT_EQ(answer.status, 405);
    EXPECT_EQ(answer.headers.at("allow"), "POST");
    EXPECT_THAT(answer.error("message"), HasSubstr("use POST"));
  }
}

TEST_F(ServeHttp, PlannedRoutesAre501AndSayWhatIsMissing) {
  for (const char* path : {"/v1/files", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/x/events",
                           "/ds/v1/plugins", "/ds/v1/plugins/x", "/ds/v1/tools/x", "/ds/v1/drift", "/"}) {
    const HttpAnswer answer = served->tcp().get(path);
    EXPECT_EQ(answer.status, 501) << path;
    EXPECT_THAT(answer.error("message"), HasSubstr("not built yet: ")) << path;
  }
}

TEST_F(ServeHttp, BodyOverTheLimitIs413) {
  HttpClient client = served->tcp();
  client.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65537\r\n\r\n");
  const HttpAnswer answer = client.read();
  EXPECT_EQ(answer.status, 413);
  EXPECT_THAT(answer.error("message"), HasSubstr("65536"));
  EXPECT_EQ(answer.headers.at("connection"), "close");
}

TEST_F(ServeHttp, ChunkedBodyOverTheLimitIs413) {
  HttpClient client = served->tcp();
  client.send(
      "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 5; ++i) client.send("4000\r\n" + std::string(0x4000, 'x') + "\r\n");
  EXPECT_EQ(client.read().status, 413);
}

TEST_F(ServeHttp, HeaderOverTheLimitIs431) {
  HttpClient client = served->tcp();
  client.send("GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + std::string(20'000, 'a') +
              "\r\n\r\n");
  EXPECT_EQ(client.read().status, 431);
}

TEST_F(ServeHttp, GarbageIs400) {
  HttpClient client = served->tcp();
  client.send("\x16\x03\x01 this is not HTTP\r\n\r\n");
  EXPECT_EQ(client.read().status, 400);
  EXPECT_TRUE(client.closed_by_server());
}

TEST_F(ServeHttp, BadJsonIs400) {
  const HttpAnswer answer = served->tcp().ask("POST", "/v1/completions", "{\"prompt\": ");
  EXPECT_EQ(answer.status, 400);
  EXPECT_EQ(answer.error("code"), "bad_json");
  EXPECT_EQ(served->tcp().ask("POST", "/v1/completions", "[1]").status, 400);
  EXPECT_EQ(served->tcp().ask("POST", "/v1/completions", std::string(50'000, '[')).status, 400);
}

TEST_F(ServeHttp, ExpectContinueIsAnswered) {
  HttpClient client = served->tcp();
  const std::string body = R"({"text":"a"})";
  client.send(
      "POST /ds/v1/tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: "
      "100-continue\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n");
  EXPECT_EQ(client.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.send(body);
  EXPECT_EQ(client.read().status, 200);
}

TEST_F(ServeHttp, EarlyNextRequestIsAnsweredInOrder) {
  HttpClient client = served->tcp();
  client.send(
      "GET /ds/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
      "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ready HTTP/1.1\r\nHost: "
      "localhost\r\n\r\n");
  EXPECT_TRUE(client.read().json().contains("serving"));
  EXPECT_TRUE(client.read().json().contains("status"));
  EXPECT_TRUE(client.read().json().contains("ready"));
}

TEST_F(ServeHttp, OldHttpClosesAfterTheAnswer) {
  HttpClient client = served->tcp();
  client.send("GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(client.read().status, 200);
  EXPECT_TRUE(client.closed_by_server());
}

TEST_F(ServeHttp, HostAndOriginAreChecked) {
  struct Case {
    const char *host, *origin;
    int status;
  };
  const Case cases[] = {{"localhost", "", 200},
                        {"LOCALHOST:8471", "", 200},
                        {"127.0.0.1:1", "", 200},
                        {"[::1]:8471", "", 200},
                        {"box.example", "", 200},
                        {"evil.example", "", 403},
                        {"localhost.evil.example", "", 403},
                        {"", "", 403},
                        {"localhost", "http://localhost:8471", 200},
                        {"localhost", "https://box.example", 200},
                        {"localhost", "http://evil.example", 403},
                        {"localhost", "http://127.0.0.1.evil.example", 403},
                        {"localhost", "null", 403}};
  for (const Case& c : cases) {
    std::map<std::string, std::string> headers = {{"Host", c.host}};
    if (*c.origin) headers["Origin"] = c.origin;
    EXPECT_EQ(served->tcp().ask("GET", "/health", "", headers).status, c.status)
        << c.host << " " << c.origin;
  }
  // The UNIX socket is out of a browser's reach.
  EXPECT_EQ(served->unix_socket().ask("GET", "/health", "", {{"Host", "evil.example"}}).status,
            200);
}

TEST_F(ServeHttp, AdminNeedsTheControlSocketOrAToken) {
  const std::pair<const char*, const char*> routes[] = {{"POST", "/ds/v1/versions/rollback"},
                                                        {"POST", "/ds/v1/versions/promote"},
                                                        {"POST", "/ds/v1/versions/pin"},
                                                        {"POST", "/ds/v1/versions/unpin"},
                                                        {"POST", "/ds/v1/learn/step"},
                                                        {"POST", "/ds/v1/learn/pause"},
                                                        {"POST", "/ds/v1/learn/resume"},
                                                        {"POST", "/ds/v1/replay/verify"},
                                                        {"POST", "/ds/v1/config"},
                                                        {"POST", "/ds/v1/models"},
                                                        {"POST", "/ds/v1/backup"},
                                                        {"POST", "/ds/v1/tokens"},
                                                        {"DELETE", "/ds/v1/feedback/fb_x"},
                                                        {"DELETE", "/ds/v1/requests/x"}};
  for (const auto& [method, path] : routes) {
    const HttpAnswer answer = served->tcp().ask(method, path);
    EXPECT_EQ(answer.status, 403) << path;
    EXPECT_EQ(answer.error("type"), "permission_error") << path;
    // Without keys, an unknown bearer changes nothing.
    EXPECT_EQ(served->tcp().ask(method, path, "", {{"Authorization", "Bearer nonsense"}}).status,
              403);
  }
  EXPECT_EQ(served->tcp().ask("GET", "/health", "", {{"Authorization", "Bearer nonsense"}}).status,
            200);
  const Json token = admin("POST", "/ds/v1/tokens").json();
  const std::map<std::string, std::string> bearer = {
      {"Authorization", "Bearer " + token["token"].get<std::string>()}};
  EXPECT_EQ(served->tcp().ask("POST", "/ds/v1/learn/pause", "", bearer).status, 200);
  EXPECT_EQ(served->tcp().ask("POST", "/ds/v1/learn/resume", "", bearer).status, 200);
}

TEST_F(ServeHttp, SocketFilesAreForTheOwnerOnly) {
  for (const char* name : {"/control.sock", "/data.sock", "/events.sock"}) {
    struct stat info {};
    ASSERT_EQ(stat((served->run.path() + name).c_str(), &info), 0) << name;
    EXPECT_EQ(info.st_mode & 0777, 0600u) << name;
  }
}

TEST_F(ServeHttp, ReadRolesWorkOverTcp) {
  for (const char* path :
       {"/metrics", "/v1/models", "/models", "/v1/models/default", "/v1/models/tiny",
        "/v1/models/v2", "/ds/v1/versions", "/ds/v1/versions/v1", "/ds/v1/learn", "/ds/v1/replay",
        "/ds/v1/config", "/ds/v1/status", "/ds/v1/ps", "/ds/v1/events", "/ds/v1/models",
        "/ds/v1/models/default", "/ds/v1/models/default/versions", "/ds/v1/feedback",
        "/ds/v1/feedback-stats"}) {
    EXPECT_EQ(served->tcp().get(path).status, 200) << path;
  }
}

TEST_F(ServeHttp, StatusSaysWhatServesAndWhen) {
  const int64_t before_ms = system_clock_seam().unix_ms();
  const Json status = served->tcp().get("/ds/v1/status").json();
  EXPECT_GE(status["now_ms"], before_ms);
  EXPECT_LE(status["now_ms"], system_clock_seam().unix_ms());
  EXPECT_EQ(status["data_dir"], served->run.path());
  EXPECT_EQ(status["model"]["path"], served->model.path);
  EXPECT_EQ(status["model"]["sha256"], served->model.model.base->sha256());
}

TEST_F(ServeHttp, VersionsRollBackPromoteAndPin) {
  EXPECT_EQ(served->tcp().get("/ds/v1/versions").json()["current"], "v3");
  // Without `to`: the parent.
  EXPECT_EQ(admin("POST", "/ds/v1/versions/rollback").json(),
            Json({{"current", "v2"}, {"pinned", "v2"}}));
  EXPECT_EQ(admin("POST", "/ds/v1/versions/rollback", {{"to", "v1"}}).json()["current"], "v1");
  EXPECT_EQ(served->tcp().get("/ready").json()["version"], "v1");
  EXPECT_EQ(admin("POST", "/ds/v1/versions/rollback").status, 409);
  EXPECT_EQ(admin("POST", "/ds/v1/versions/rollback", {{"to", "v9"}}).status, 404);
  EXPECT_EQ(admin("POST", "/ds/v1/versions/rollback", {{"to", "soon"}}).status, 400);
  EXPECT_EQ(admin("POST", "/ds/v1/versions/unpin").json()["pinned"], nullptr);
  EXPECT_EQ(admin("POST", "/ds/v1/versions/pin").json()["pinned"], "v1");
  EXPECT_EQ(admin("POST", "/ds/v1/versions/promote").status, 400);
  EXPECT_EQ(admin("POST", "/ds/v1/versions/promote", {{"to", "v3"}}).json(),
            Json({{"current", "v3"}, {"pinned", nullptr}}));
  EXPECT_EQ(admin("GET", "/ds/v1/versions/v2").json()["parent"], "v1");
  const Json diff = admin("GET", "/ds/v1/versions/diff?a=v1&b=v3").json();
  EXPECT_EQ(diff["a"], "v1");
  EXPECT_EQ(diff["weight_hash"].size(), 2u);
}

TEST_F(ServeHttp, FeedbackGoesInAndIsFound) {
  HttpClient client = served->tcp();
  const Json ack =
      client.post("/ds/v1/feedback", {{"kind", "text"}, {"text", "hello"}, {"source", "desk"}})
          .json();
  EXPECT_EQ(ack["state"], "stored");
  EXPECT_EQ(ack["duplicate"], false);
  const Json item = client.get("/ds/v1/feedback/" + ack["id"].get<std::string>()).json();
  EXPECT_EQ(item["offset"], ack["offset"]);
  EXPECT_EQ(item["source"], "desk");
  EXPECT_EQ(item["record"]["text"], "hello");
  EXPECT_EQ(item["fate"][0]["state"], "stored");
  const Json listed = client.get("/ds/v1/feedback?source=desk&newest=1&limit=1").json();
  EXPECT_EQ(listed["items"][0]["id"], ack["id"]);
  EXPECT_EQ(client.get("/ds/v1/feedback/fb_nonsense").status, 404);
  EXPECT_EQ(client.get("/ds/v1/feedback?limit=0").status, 400);
  EXPECT_EQ(admin("DELETE", "/ds/v1/feedback/" + ack["id"].get<std::string>()).json()["state"],
            "reverted");
  EXPECT_EQ(admin("DELETE", "/ds/v1/feedback/fb_x?wait=0").status, 202);
}

TEST_F(ServeHttp, FeedbackEnvelopeFollowsTheSequenceRules) {
  const auto post = [](int64_t seq, const char* text) {
    return served->tcp().post("/ds/v1/feedback", {{"client", "envelope"},
                                                  {"epoch", 2},
                                                  {"seq", seq},
                                                  {"record", {{"kind", "text"}, {"text", text}}}});
  };
  EXPECT_EQ(post(1, "one").json()["duplicate"], false);
  EXPECT_EQ(post(1, "one").json()["duplicate"], true);
  EXPECT_EQ(post(1, "other").status, 409);
  EXPECT_EQ(post(1, "other").error("code"), "seq_conflict");
  EXPECT_EQ(post(1, "other").headers.at("x-should-retry"), "false");
  const Json gap = post(5, "five").json();
  EXPECT_EQ(gap["error"]["code"], "seq_gap");
  EXPECT_EQ(gap["error"]["expected"], 2);
  EXPECT_EQ(served->tcp()
                .post("/ds/v1/feedback", {{"client", "half"}, {"record", {{"kind", "text"}}}})
                .status,
            400);
  EXPECT_EQ(served->tcp().post("/ds/v1/feedback", {{"kind", "nonsense"}}).status, 400);
}

TEST_F(ServeHttp, JsonlGivesOneOutcomePerRecordInOrder) {
  std::string body;
  for (int i = 0; i < 700; ++i) {
    body += i == 300 ? "not json\n"
                     : dump_json({{"kind", "text"}, {"text", "line " + std::to_string(i)}}) + "\n";
  }
  body +=
      "\n"
      R"({"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]})";
  const Json items =
      served->tcp()
          .ask("POST", "/ds/v1/feedback", body, {{"Content-Type", "application/x-ndjson"}})
          .json()["items"];
  ASSERT_EQ(items.size(), 701u);
  EXPECT_THAT(items[300]["error"]["message"].get<std::string>(), HasSubstr("line 301"));
  EXPECT_EQ(items[700]["state"], "stored");
  int64_t before = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i == 300) continue;
    EXPECT_GT(items[i]["offset"], before);
    before = items[i]["offset"];
  }
}

TEST_F(ServeHttp, TokenizeRoundTrip) {
  HttpClient client = served->tcp();
  const Json ids = client.post("/ds/v1/tokenize", {{"text", "hello <|im_start|>"}}).json();
  EXPECT_EQ(ids["ids"].back(), 1);  // special tokens are parsed
  EXPECT_EQ(client.post("/ds/v1/detokenize", ids).json()["text"], "hello <|im_start|>");
  EXPECT_EQ(client.post("/ds/v1/detokenize", {{"ids", {-1}}}).status, 400);
  EXPECT_EQ(client.post("/ds/v1/detokenize", {{"ids", {100'000}}}).status, 400);
}

TEST_F(ServeHttp, LearnConfigAndTaskModels) {
  EXPECT_EQ(admin("POST", "/ds/v1/learn/step", {{"wait", false}}).json()["waited"], false);
  EXPECT_EQ(admin("POST", "/ds/v1/learn/pause").json()["state"], "paused");
  EXPECT_EQ(admin("POST", "/ds/v1/learn/resume").json()["state"], "idle");
  EXPECT_EQ(
      admin("POST", "/ds/v1/config", {{"name", "learn.min_items"}, {"value", 4}}).json()["value"],
      4);
  EXPECT_EQ(admin("POST", "/ds/v1/config", {{"name", "serve.context"}, {"value", 64}}).status / 100,
            4);
  EXPECT_EQ(admin("POST", "/ds/v1/backup", {{"path", "/x"}}).status, 501);
  EXPECT_EQ(admin("POST", "/ds/v1/replay/verify").json()["ok"], true);
  const Json done =
      served->tcp().post("/ds/v1/infer", {{"model", "digits"}, {"input", {1, 2.5}}}).json();
  EXPECT_EQ(done["label"], 2);
  EXPECT_EQ(served->tcp().post("/ds/v1/infer", {{"model", "cats"}, {"input", {1}}}).status, 404);
  EXPECT_EQ(served->tcp().post("/ds/v1/infer", {{"model", "digits"}, {"input", {"a"}}}).status,
            400);
}

TEST_F(ServeHttp, MetricsCountRoutesNotPaths) {
  served->tcp().get("/ds/v1/versions/v1");
  served->tcp().get("/ds/v1/versions/v2");
  const std::string text = served->tcp().get("/metrics").body;
  EXPECT_THAT(text, HasSubstr("ds_build_info{version="));
  EXPECT_THAT(text, HasSubstr("ds_weights_version_info{model=\"tiny\",version=\"v3\"} 1"));
  EXPECT_THAT(text, HasSubstr("route=\"/ds/v1/versions/{}\""));
  EXPECT_EQ(text.find("/ds/v1/versions/v1\""), std::string::npos);
}

TEST_F(ServeHttp, EventsAreListedAndFollowed) {
  served->events.publish("gate", {{"passed", true}});
  const Json listed = served->tcp().get("/ds/v1/events?topic=gate").json();
  ASSERT_FALSE(listed["items"].empty());
  EXPECT_EQ(listed["items"].back()["passed"], true);
  const int64_t last = served->tcp().get("/ds/v1/events").json()["items"].back()["number"];
  HttpClient client = served->tcp();
  client.send("GET /ds/v1/events?follow=1&topic=gate,step&since=" + std::to_string(last - 1) +
              " HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(client.read(true).headers.at("content-type"), "text/event-stream");
  served->events.publish("drift", {{"n", 1}});
  served->events.publish("step", {{"loss", 0.5}});
  const std::string stream = client.read_until("\"loss\":0.5");
  EXPECT_EQ(stream.find("drift"), std::string::npos);
  EXPECT_THAT(stream, HasSubstr("event: step\n"));
}

TEST(ServeLimits, SlowHeaderIs408) {
  Served served([](ServerOptions& options, EngineOptions&) { options.header_timeout_ms = 50; });
  HttpClient client = served.tcp();
  client.send("GET /health HT");
  EXPECT_EQ(client.read().status, 408);
  EXPECT_TRUE(client.closed_by_server());
}

TEST(ServeLimits, IdleConnectionIsClosed) {
  Served served([](ServerOptions& options, EngineOptions&) { options.idle_timeout_ms = 50; });
  HttpClient client = served.tcp();
  EXPECT_TRUE(client.closed_by_server());
}

TEST(ServeLimits, ConnectionsOverTheLimitAre503ButTheControlSocketStaysFree) {
  Served served([](ServerOptions& options, EngineOptions&) { options.max_connections = 2; });
  HttpClient one = served.tcp(), two = served.tcp();
  EXPECT_EQ(one.get("/health").status, 200);
  EXPECT_EQ(two.get("/health").status, 200);
  HttpClient three = served.tcp();
  const HttpAnswer refused = three.read();
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.headers.at("retry-after"), "1");
  EXPECT_EQ(served.unix_socket().get("/health").status, 200);
}

TEST(ServeSettings, ConfiguredNamesAreAcceptedAndOthersAre403) {
  const auto served = Served::with_settings({{"auth.origins", "Box.example, , app.example"}});
  const auto status = [&](const std::map<std::string, std::string>& headers) {
    return served->tcp().ask("GET", "/health", "", headers).status;
  };
  EXPECT_EQ(status({{"Host", "box.example:8471"}}), 200);
  EXPECT_EQ(status({{"Host", "BOX.example"}, {"Origin", "https://app.example"}}), 200);
  EXPECT_EQ(status({{"Host", "other.example"}}), 403);
  EXPECT_EQ(status({{"Host", "localhost"}, {"Origin", "https://other.example"}}), 403);
  EXPECT_EQ(status({{"Host", "box.example.evil"}}), 403);
  EXPECT_EQ(status({{"Host", ""}}), 403);
  EXPECT_EQ(served->tcp().ask("GET", "/health", "", {{"Host", "other.example"}}).error("code"),
            "foreign_host");
}

TEST(ServeSettings, OriginsAreHostNames) {
  for (const char* wrong : {"https://box.example", "box.example:8471", "*", "a b"}) {
    Config config;
    ASSERT_TRUE(config.set("auth.origins", wrong, "flag").ok());
    const auto options = server_options(config, "/run");
    EXPECT_EQ(options.status().code(), Code::kInvalid) << wrong;
    EXPECT_THAT(options.status().message(), HasSubstr(wrong));
  }
}

TEST(ServeStart, RefusesWhatOthersCouldReachAndWhatOthersHold) {
  Served served;
  const auto start = [&](const std::string& http, std::vector<std::string> data,
                         const std::string& run) {
    ServerParts parts{*served.engine,     *served.model.versions, *served.model.store,
                      served.model.files, served.config,          served.model.metrics,
                      served.events,      system_clock_seam()};
    parts.tokenizer = served.model.model.tokenizer;
    ServerOptions options;
    options.run_dir = run;
    options.http_address = http;
    options.data_endpoints = std::move(data);
    return Server::start(std::move(parts), options);
  };
  const ScratchFolder other;
  EXPECT_EQ(start("0.0.0.0:0", {}, other.path()).status().code(), Code::kPermission);
  EXPECT_EQ(start("", {"tcp://*:0"}, other.path()).status().code(), Code::kPermission);
  EXPECT_EQ(start("", {"tcp://0.0.0.0:0"}, other.path()).status().code(), Code::kPermission);
  EXPECT_THAT(start("", {"tcp://10.0.0.1:5"}, other.path()).status().message(), HasSubstr("CURVE"));
  EXPECT_EQ(start("", {"pgm://x"}, other.path()).status().code(), Code::kInvalid);
  EXPECT_EQ(start("127.0.0.1", {}, other.path()).status().code(), Code::kInvalid);
  EXPECT_EQ(start(served.server->endpoints().http, {}, other.path()).status().code(), Code::kIo);
  // A second daemon must not take over the sockets of a live one.
  EXPECT_EQ(start("", {}, served.run.path()).status().code(), Code::kConflict);
  EXPECT_EQ(served.unix_socket().get("/health").status, 200);
  EXPECT_TRUE(start("", {"tcp://127.0.0.1:*"}, other.path()).ok());
}

}  // namespace
}  // namespace ds
