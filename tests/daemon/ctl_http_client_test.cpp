// SPDX-License-Identifier: Apache-2.0
// The client against answers that are whole, in pieces, cut, too large, slow, or no HTTP at all.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <fstream>

#include "ctl/http_client.h"
#include "ctl_fixture.h"

namespace ds::ctl {
namespace {

using test::Canned;
using test::FakeControl;
using testing::ElementsAre;
using testing::HasSubstr;

class HttpClientTest : public testing::Test {
 protected:
  Result<HttpResponse> fetch(const std::string& target, int64_t timeout_ms = 5000) {
    return client_.fetch({"GET", target, ""}, timeout_ms);
  }
  void raw(const std::string& target, const std::string& bytes) {
    Canned canned;
    canned.raw = bytes;
    daemon_.on("GET " + target, canned);
  }
  ScratchFolder run_;
  FakeControl daemon_{run_.path()};
  HttpClient client_{run_.path() + "/control.sock"};
};

TEST_F(HttpClientTest, ReadsContentLengthChunkedAndUntilClose) {
  const std::string body(100'000, 'x');
  daemon_.on("GET /length", Canned{200, body});
  daemon_.on("GET /chunked", Canned{200, body, "text/plain", true});
  raw("/close", "HTTP/1.1 200 OK\r\n\r\n" + body);
  for (const char* target : {"/length", "/chunked", "/close"}) {
    const auto response = fetch(target);
    ASSERT_TRUE(response.ok()) << target << response.status().message();
    EXPECT_EQ(response->body, body) << target;
  }
}

TEST_F(HttpClientTest, SendsBodiesWithTheirLength) {
  daemon_.on("POST /x", "{}");
  ASSERT_TRUE(client_.fetch({"POST", "/x", "{\"a\":1}"}, 5000).ok());
  ASSERT_TRUE(client_.fetch({"POST", "/x", ""}, 5000).ok());
  EXPECT_THAT(daemon_.requests(), ElementsAre("POST /x {\"a\":1}", "POST /x"));
}

TEST_F(HttpClientTest, RefusesWhatIsNotHttp) {
  raw("/smtp", "220 mail.example ESMTP\r\n\r\n");
  raw("/colon", "HTTP/1.1 200 OK\r\nno colon here\r\n\r\n");
  raw("/negative", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n");
  raw("/huge", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n");
  raw("/chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n");
  raw("/overrun", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n");
  raw("/overflow", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n");
  raw("/head", "HTTP/1.1 200 OK\r\nA: " + std::string(200'000, 'a'));
  for (const char* target :
       {"/smtp", "/colon", "/negative", "/huge", "/chunk", "/overrun", "/overflow", "/head"}) {
    EXPECT_EQ(fetch(target).status().code(), Code::kCorrupt) << target;
  }
}

TEST_F(HttpClientTest, ACutAnswerIsUnavailable) {
  raw("/head", "HTTP/1.1 200");
  raw("/body", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc");
  raw("/chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nabc");
  for (const char* target : {"/head", "/body", "/chunk"}) {
    EXPECT_EQ(fetch(target).status().code(), Code::kUnavailable) << target;
  }
}

TEST_F(HttpClientTest, GivesUpInTime) {
  Canned hang;
  hang.hang = true;
  daemon_.on("GET /hang", hang);
  EXPECT_EQ(fetch("/hang", 50).status().code(), Code::kDeadline);
}

TEST_F(HttpClientTest, SaysWhyItCannotConnect) {
  EXPECT_EQ(HttpClient(run_.path() + "/none.sock").fetch({}, 1000).status().code(),
            Code::kNotFound);
  EXPECT_EQ(HttpClient(std::string(300, 'x')).fetch({}, 1000).status().code(), Code::kInvalid);
  std::ofstream(run_.path() + "/file") << "no socket";
  EXPECT_EQ(unix_reachable(run_.path() + "/file", 1000).code(), Code::kUnavailable);
  EXPECT_TRUE(unix_reachable(run_.path() + "/control.sock", 1000).ok());
  EXPECT_EQ(tcp_reachable("localhost", 1000).code(), Code::kInvalid);
  EXPECT_EQ(tcp_reachable("127.0.0.1:99999", 1000).code(), Code::kInvalid);
}

TEST_F(HttpClientTest, StreamsUntilTheSinkHasEnough) {
  daemon_.on("GET /stream", Canned{200, std::string(700, 'y'), "text/event-stream", true});
  size_t got = 0;
  const auto response = client_.stream({"GET", "/stream", ""}, 5000, [&](std::string_view bytes) {
    got += bytes.size();
    return got < 20;
  });
  ASSERT_TRUE(response.ok());
  EXPECT_GE(got, 20u);
  EXPECT_LT(got, 700u);
}

TEST_F(HttpClientTest, AStreamThatIsRefusedKeepsItsBody) {
  daemon_.on("GET /stream", Canned{503, "{\"error\":1}"});
  const auto response = client_.stream({"GET", "/stream", ""}, 5000, [](std::string_view) {
    ADD_FAILURE() << "an error is no event";
    return true;
  });
  ASSERT_TRUE(response.ok());
  EXPECT_EQ(response->status, 503);
  EXPECT_EQ(response->body, "{\"error\":1}");
}

TEST(SseReaderTest, EventsSurviveAnyCut) {
  const std::string stream =
      ": hello\n\nid: 1\nevent: step\ndata: {\"a\":1}\n\ndata: one\ndata:two\r\n\r\nevent: "
      "empty\n\ndata: last\n\n";
  for (size_t piece = 1; piece < stream.size(); ++piece) {
    SseReader reader;
    std::vector<std::string> seen;
    for (size_t at = 0; at < stream.size(); at += piece) {
      ASSERT_TRUE(reader.feed(std::string_view(stream).substr(at, piece),
                              [&](std::string_view event, std::string_view data) {
                                seen.push_back(std::string(event) + "|" + std::string(data));
                                return true;
                              }));
    }
    EXPECT_THAT(seen, ElementsAre("step|{\"a\":1}", "message|one\ntwo", "message|last")) << piece;
  }
}

TEST(SseReaderTest, AnEndlessLineIsRefused) {
  SseReader reader;
  const std::string megabyte(1 << 20, 'x');
  bool fits = true;
  for (int i = 0; i < 6 && fits; ++i) {
    fits = reader.feed(megabyte, [](std::string_view, std::string_view) { return true; });
  }
  EXPECT_FALSE(fits);
}

TEST(UrlEncodeTest, KeepsOnlyUnreserved) {
  EXPECT_EQ(url_encode("a-B_1.~"), "a-B_1.~");
  EXPECT_EQ(url_encode("a b/c?&=%\n"), "a%20b%2Fc%3F%26%3D%25%0A");
}

}  // namespace
}  // namespace ds::ctl
