// SPDX-License-Identifier: Apache-2.0
// The data socket as its peers see it: who may speak when, the order of answers, what each mistake
// gives, and what happens to a peer that does not read.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "serve_fixture.h"

namespace ds {
namespace {

using test::feedback;
using test::HeldEngine;
using test::HttpClient;
using test::Served;
using test::WirePeer;
using testing::AllOf;
using testing::HasSubstr;

class ServeWire : public testing::Test {
 protected:
  static void SetUpTestSuite() { served = new Served(); }
  static void TearDownTestSuite() { delete served; }
  static std::string data() { return served->server->endpoints().data; }
  static Json infer(const std::string& id, bool stream, int max_tokens = 6) {
    return {{"v", 1},
            {"op", "infer"},
            {"id", id},
            {"messages", {{{"role", "user"}, {"content", "hello there"}}}},
            {"max_tokens", max_tokens},
            {"temperature", 0},
            {"stream", stream},
            {"logit_bias", {{"0", -100}, {"1", -100}, {"2", -100}}}};
  }
  static Served* served;
};
Served* ServeWire::served = nullptr;

TEST_F(ServeWire, HelloTellsWhereTheClientStands) {
  WirePeer peer(data(), ZMQ_DEALER);
  const Json first = peer.hello("hello-1", 3);
  EXPECT_EQ(first["op"], "hello");
  EXPECT_EQ(first["store"], served->model.store->store_id());
  EXPECT_EQ(first["last_seq"], 0);
  EXPECT_EQ(first["version"], "v1");
  EXPECT_TRUE(first["limits"].is_object());
  EXPECT_EQ(peer.ask(feedback("hello-1", 3, 1))["op"], "ack");
  EXPECT_EQ(peer.hello("hello-1", 3)["last_seq"], 1);
  EXPECT_EQ(peer.hello("hello-1", 4)["last_seq"], 0);
}

TEST_F(ServeWire, NothingGoesBeforeHello) {
  WirePeer peer(data(), ZMQ_DEALER);
  const Json early = peer.ask(feedback("no-hello", 1, 1));
  EXPECT_EQ(early["code"], "no_hello");
  EXPECT_EQ(early["seq"], 1);
  EXPECT_EQ(peer.ask(infer("r1", false))["code"], "no_hello");
  EXPECT_EQ(peer.ask({{"v", 1}, {"op", "cancel"}, {"id", "r1"}})["id"], "r1");
  EXPECT_EQ(peer.hello("no-hello")["op"], "hello");
  EXPECT_EQ(peer.ask(feedback("no-hello", 1, 1))["op"], "ack");
}

TEST_F(ServeWire, SequenceRules) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("rules", 5);
  const Json ack = peer.ask(feedback("rules", 5, 1));
  EXPECT_EQ(ack["duplicate"], false);
  EXPECT_EQ(ack["state"], "stored");
  const Json again = peer.ask(feedback("rules", 5, 1));
  EXPECT_EQ(again["duplicate"], true);
  EXPECT_EQ(again["offset"], ack["offset"]);
  EXPECT_EQ(again["id"], ack["id"]);
  EXPECT_EQ(peer.ask(feedback("rules", 5, 1, "other"))["code"], "seq_conflict");
  const Json gap = peer.ask(feedback("rules", 5, 7));
  EXPECT_EQ(gap["code"], "seq_gap");
  EXPECT_EQ(gap["expected"], 2);
  EXPECT_EQ(gap["seq"], 7);
  EXPECT_EQ(peer.ask(feedback("rules", 6, 1))["op"], "ack");
  EXPECT_EQ(peer.ask(feedback("rules", 5, 1))["code"], "stale_epoch");
  Json bad = feedback("rules", 6, 2);
  bad["record"]["kind"] = "nonsense";
  EXPECT_EQ(peer.ask(bad)["code"], "bad_record");
}

TEST_F(ServeWire, AnswersComeOnceEachInOrder) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("order");
  constexpr int kRounds = 100;
  for (int i = 1; i <= kRounds; ++i) {
    peer.send(feedback("order", 1, i, "text " + std::to_string(i)));
    peer.send(std::vector<std::string>{"garbage"});  // answered at once, but not before its turn
    if (i % 10 == 0) peer.send(Json{{"v", 1}, {"op", "hello"}, {"client", "order"}, {"epoch", 1}});
  }
  for (int i = 1; i <= kRounds; ++i) {
    const Json ack = peer.read();
    ASSERT_EQ(ack["op"], "ack") << ack;
    ASSERT_EQ(ack["seq"], i);
    ASSERT_EQ(peer.read()["code"], "bad_message");
    if (i % 10 == 0) {
      ASSERT_EQ(peer.read()["op"], "hello");
    }
  }
  EXPECT_EQ(peer.hello("order")["last_seq"], kRounds);  // nothing else came in between
}

TEST_F(ServeWire, MistakesAreAnsweredAndTheConnectionGoesOn) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("mistakes");
  const auto code = [&](const std::vector<std::string>& frames) {
    peer.send(frames);
    const Json answer = peer.read();
    EXPECT_EQ(answer["op"], "error");
    return answer.value("code", "");
  };
  EXPECT_EQ(code({"not json"}), "bad_message");
  EXPECT_EQ(code({"[1,2]"}), "bad_message");
  EXPECT_EQ(code({std::string(100'000, '[')}), "bad_message");
  EXPECT_EQ(code({std::string("\xff\xfe\x00", 3)}), "bad_message");
  EXPECT_EQ(code({R"({"op":"hello"})"}), "bad_message");
  EXPECT_EQ(code({R"({"v":2,"op":"hello"})"}), "bad_version");
  EXPECT_EQ(code({R"({"v":1,"op":"dance"})"}), "unknown_op");
  EXPECT_EQ(code({R"({"v":1,"op":5})"}), "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"hello","client":"","epoch":1})"}), "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"hello","client":"x","epoch":-1})"}), "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"feedback","client":"mistakes","epoch":1,"seq":0,"record":{}})"}),
            "bad_message");
  EXPECT_EQ(
      code({R"({"v":1,"op":"feedback","client":"mistakes","epoch":1,"seq":"1","record":{}})"}),
      "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"feedback","client":"mistakes","epoch":1,"seq":1})"}),
            "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"infer"})"}), "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"infer","id":"a"})"}), "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"infer","id":"a","prompt":"x","temperature":-1})"}),
            "bad_message");
  EXPECT_EQ(code({R"({"v":1,"op":"infer","id":"a","prompt":"x","model":"nope"})"}), "not_found");
  EXPECT_EQ(code({R"({"v":1,"op":"infer","id":"a","model":"digits","input":{"attachment":0}})"}),
            "bad_message");
  EXPECT_EQ(
      code(
          {R"({"v":1,"op":"infer","id":"a","messages":[{"role":"user","content":[{"type":"image_url"}]}]})"}),
      "unsupported");
  EXPECT_EQ(code({R"({"v":1,"op":"cancel","id":"never"})"}), "not_found");
  std::vector<std::string> many = {R"({"v":1,"op":"hello","client":"x","epoch":1})"};
  many.resize(100, "a");
  EXPECT_EQ(code(many), "too_large");
  // What was sent is quoted in part only, and what was expected is not lost behind it.
  peer.send({{"v", 1},
             {"op", "infer"},
             {"id", "a"},
             {"prompt", "x"},
             {"class", std::string(1 << 20, 'u')}});
  const std::string long_class = peer.read()["message"];
  EXPECT_LT(long_class.size(), 1100u);
  EXPECT_THAT(long_class, AllOf(HasSubstr("class: 'uuu"), HasSubstr(" bytes] "),
                                HasSubstr("expected interactive or batch")));
  EXPECT_EQ(code({"\"" + std::string(1 << 20, 'u')}), "bad_message");
  // A label whose attachment did not come.
  Json label = feedback("mistakes", 1, 1);
  label["record"] = {
      {"kind", "label"}, {"model", "digits"}, {"input", {{"attachment", 0}}}, {"label", 1}};
  EXPECT_EQ(peer.ask(label)["code"], "bad_record");
  EXPECT_EQ(peer.ask(feedback("mistakes", 1, 1))["op"], "ack");
}

TEST_F(ServeWire, ARetractionNamesAnItemOfItsOwnSource) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("owner");
  const std::string id = peer.ask(feedback("owner", 1, 1))["id"];
  const auto retract = [&](const std::string& client, int64_t seq) {
    Json message = feedback(client, 1, seq);
    message["record"] = {{"kind", "retract"}, {"target", id}};
    return message;
  };
  peer.hello("stranger");
  const Json refused = peer.ask(retract("stranger", 1));
  EXPECT_EQ(refused["code"], "forbidden");
  EXPECT_THAT(refused["message"].get<std::string>(), HasSubstr(id + " is not of the source \"stranger\""));
  EXPECT_EQ(peer.ask(retract("owner", 2))["op"], "ack");
  // Over HTTP: TCP is a stranger too, the control socket is the admin's.
  const Json record = retract("x", 1)["record"];
  HttpClient tcp = served->tcp(), control = served->unix_socket();
  const auto answer = tcp.post("/ds/v1/feedback", record);
  EXPECT_EQ(answer.status, 403);
  EXPECT_EQ(answer.error("code"), "forbidden");
  EXPECT_EQ(tcp.ask("DELETE", "/ds/v1/feedback/" + id).status, 403);
  EXPECT_EQ(control.post("/ds/v1/feedback", record).status, 200);
  EXPECT_EQ(control.ask("POST", "/ds/v1/feedback", dump_json(record) + "\n",
                        {{"Content-Type", "application/jsonl"}})
                .json()["items"][0]["state"],
            "stored");
}

TEST_F(ServeWire, AHundredMegabyteHeaderGetsAnError) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("huge");
  peer.send(std::vector<std::string>{std::string(100'000'000, 'x')});
  EXPECT_EQ(peer.read()["code"], "too_large");
  EXPECT_EQ(peer.ask(feedback("huge", 1, 1))["op"], "ack");
}

TEST_F(ServeWire, ReqPeersGetTheirEmptyFrameBack) {
  WirePeer req(data(), ZMQ_REQ);  // would drop an answer without it
  EXPECT_EQ(req.hello("req")["op"], "hello");
  EXPECT_EQ(req.ask(feedback("req", 1, 1))["op"], "ack");
  EXPECT_EQ(req.ask(infer("r", false))["op"], "done");
  WirePeer dealer(data(), ZMQ_DEALER);
  dealer.send(std::vector<std::string>{"", R"({"v":1,"op":"hello","client":"d","epoch":1})"});
  const auto frames = dealer.receive();
  ASSERT_TRUE(frames);
  ASSERT_EQ(frames->size(), 2u);
  EXPECT_EQ(frames->front(), "");
  dealer.send(std::vector<std::string>{""});
  EXPECT_EQ(dealer.read()["code"], "bad_message");
}

TEST_F(ServeWire, InferStreamsTokensThenDone) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("infer");
  const Json whole = peer.ask(infer("r0", false));
  ASSERT_EQ(whole["op"], "done") << whole;
  EXPECT_EQ(whole["finish_reason"], "length");
  EXPECT_EQ(whole["version"], "v1");
  EXPECT_EQ(whole["usage"]["completion_tokens"], 6);
  peer.send(infer("r1", true));
  std::string text;
  Json message = peer.read();
  for (; message["op"] == "token"; message = peer.read()) {
    EXPECT_EQ(message["id"], "r1");
    text += message["text"].get<std::string>();
  }
  EXPECT_EQ(message["op"], "done");
  EXPECT_EQ(message["text"], text);
  EXPECT_EQ(text, whole["text"]);
  const auto trace = served->model.store->get_trace(message["response_id"]);
  ASSERT_TRUE(trace.ok());
  EXPECT_EQ(trace->source, "infer");
  EXPECT_EQ(trace->answer, text);
  EXPECT_EQ(
      peer.ask(
          {{"v", 1}, {"op", "infer"}, {"id", "p"}, {"prompt", "one two"}, {"max_tokens", 2}})["op"],
      "done");
}

TEST_F(ServeWire, CancelIsAnsweredAndEndsTheInfer) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("cancel");
  peer.send(infer("long", true, 480));
  EXPECT_EQ(peer.read()["op"], "token");
  peer.send(Json{{"v", 1}, {"op", "cancel"}, {"id", "long"}});
  bool cancelled = false, done = false;
  while (!cancelled || !done) {
    const Json message = peer.read();
    if (message.is_null()) break;
    EXPECT_EQ(message["id"], "long");
    cancelled |= message["op"] == "cancelled";
    if (message["op"] == "done") {
      done = true;
      EXPECT_EQ(message["finish_reason"], "cancelled");
    }
  }
  EXPECT_TRUE(cancelled && done);
  EXPECT_TRUE(served->engine_empty());
}

TEST_F(ServeWire, TaskModelsByNumbersOrAttachment) {
  WirePeer peer(data(), ZMQ_DEALER);
  peer.hello("tasks");
  const Json numbers =
      peer.ask({{"v", 1}, {"op", "infer"}, {"id", "t"}, {"model", "digits"}, {"input", {1, 2, 3}}});
  EXPECT_EQ(numbers["op"], "done");
  EXPECT_EQ(numbers["label"], 3);
  EXPECT_EQ(numbers["version"], "digits@v1");
  const float values[] = {0.5f, -1.0f};
  peer.send(std::vector<std::string>{
      R"({"v":1,"op":"infer","id":"u","model":"digits","input":{"attachment":0}})",
      std::string(reinterpret_cast<const char*>(values), sizeof values)});
  EXPECT_EQ(peer.read()["scores"], Json({0.5, -1.0}));
  const Json spoiled = peer.ask(
      {{"v", 1}, {"op", "infer"}, {"id", "n"}, {"model", "digits"}, {"input", {1, 1e300}}});
  EXPECT_EQ(spoiled["code"], "bad_message");
  EXPECT_EQ(spoiled["id"], "n");
  EXPECT_EQ(spoiled["message"], "\"input[1]\" is 1e+300, expected a finite FP32 number");
}

TEST_F(ServeWire, EventsArePublished) {
  WirePeer subscriber(served->server->endpoints().events, ZMQ_SUB);
  zmq_setsockopt(subscriber.socket(), ZMQ_SUBSCRIBE, "step", 4);
  std::optional<std::vector<std::string>> frames;
  // A subscription takes effect some time after it was made.
  for (int i = 0; i < 200 && !frames; ++i) {
    served->events.publish("gate", {{"i", i}});
    served->events.publish("step", {{"i", i}});
    frames = subscriber.receive(50);
  }
  ASSERT_TRUE(frames);
  EXPECT_EQ(frames->at(0), "step");
  EXPECT_EQ(parse_json(frames->at(1)).value()["topic"], "step");
}

TEST(ServeWireLimits, APeerWithTooMuchUnderWayIsBusy) {
  Served served([](ServerOptions& options, EngineOptions&) { options.peer_inflight_items = 2; });
  WirePeer peer(served.server->endpoints().data, ZMQ_DEALER),
      other(served.server->endpoints().data, ZMQ_DEALER);
  peer.hello("busy");
  other.hello("other");
  const auto infer = [](int i) {
    return Json{{"v", 1},
                {"op", "infer"},
                {"id", "r" + std::to_string(i)},
                {"prompt", "one two"},
                {"max_tokens", 3},
                {"logit_bias", {{"0", -100}, {"1", -100}, {"2", -100}}}};
  };
  HeldEngine held(*served.engine);
  for (int i = 0; i < 3; ++i) peer.send(infer(i));
  const Json busy = peer.read();
  EXPECT_EQ(busy["code"], "busy");
  EXPECT_EQ(busy["id"], "r2");
  EXPECT_EQ(busy["retry_after_ms"], 50);
  EXPECT_EQ(other.ask(feedback("other", 1, 1))["op"], "ack");  // somebody else's limit
  EXPECT_EQ(peer.ask(infer(0))["code"], "conflict");
  held.release();
  EXPECT_EQ(peer.read()["op"], "done");
  EXPECT_EQ(peer.read()["op"], "done");
}

// limits.max_record counts the record, not the way in which a client writes it down.
TEST(ServeWireLimits, AnOversizeRecordIsRefusedAndTheConnectionGoesOn) {
  const auto served = Served::with_settings({{"limits.max_record", "1MiB"}});
  WirePeer peer(served->server->endpoints().data, ZMQ_DEALER);
  EXPECT_EQ(peer.hello("large")["limits"]["record_bytes"], 1 << 20);
  const size_t around = dump_json(feedback("large", 1, 1, "")["record"]).size();
  const std::string fits((1 << 20) - around, 'x');
  const Json refused = peer.ask(feedback("large", 1, 1, fits + "x"));
  EXPECT_EQ(refused["code"], "bad_record");
  EXPECT_EQ(refused["seq"], 1);
  EXPECT_EQ(refused["message"], "the record has 1048577 bytes, the limit is 1048576");
  EXPECT_EQ(peer.ask(feedback("large", 1, 1, fits))["op"], "ack");
  // Half a million Cyrillic letters, escaped: 3 MB on the wire, 1 MB as a record.
  std::string escaped;
  for (size_t i = 0; i < fits.size() / 2; ++i) escaped += "\\u0430";
  std::string header = dump_json(feedback("large", 1, 2, "@"));
  header.replace(header.find('@'), 1, escaped);
  peer.send(std::vector<std::string>{header});
  EXPECT_EQ(peer.read()["op"], "ack");
  // Far too large to be read at all.
  const Json huge = peer.ask(feedback("large", 1, 3, std::string(4 << 20, 'x')));
  EXPECT_EQ(huge["code"], "too_large");
  EXPECT_THAT(huge["message"].get<std::string>(), HasSubstr("the limit is 3211264"));
  EXPECT_EQ(peer.ask(feedback("large", 1, 3))["op"], "ack");
}

TEST(ServeWireLimits, ASmallRecordLimitLeavesPromptsAlone) {
  Config config;
  ASSERT_TRUE(config.set("limits.max_record", "1KiB", "flag").ok());
  EXPECT_EQ(server_options(config, "/run")->max_wire_header_bytes, ServerOptions().max_wire_header_bytes);
  ASSERT_TRUE(config.set("limits.max_record", "64MiB", "flag").ok());
  const auto large = server_options(config, "/run");
  EXPECT_GT(large->max_wire_header_bytes, 3u * (64u << 20));
  EXPECT_GT(large->max_frame_bytes, large->max_wire_header_bytes);
}

// A stopped reader: what it asked for is cancelled and thrown away, others are served meanwhile.
TEST(ServeWireLimits, APeerThatDoesNotReadIsDropped) {
  Served served([](ServerOptions& options, EngineOptions&) {
    options.peer_queue_bytes = 64 << 10;
    options.stalled_reader_ms = 200;
  });
  const std::string data = served.server->endpoints().data;
  WirePeer good(data, ZMQ_DEALER);
  good.hello("good");
  void* context = zmq_ctx_new();
  void* stuck = zmq_socket(context, ZMQ_DEALER);
  const int one = 1, none = 0, small = 4096;
  zmq_setsockopt(stuck, ZMQ_RCVHWM, &one, sizeof one);
  zmq_setsockopt(stuck, ZMQ_RCVBUF, &small, sizeof small);
  zmq_setsockopt(stuck, ZMQ_LINGER, &none, sizeof none);
  ASSERT_EQ(zmq_connect(stuck, data.c_str()), 0);
  const std::string hello = R"({"v":1,"op":"hello","client":"stuck","epoch":1})";
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  int64_t seq = 0;
  while (served.metric("ds_wire_peers_dropped_total") == 0) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    zmq_send(stuck, hello.data(), hello.size(), ZMQ_DONTWAIT);
    if (++seq % 500 == 0) {
      ASSERT_EQ(good.ask(feedback("good", 1, seq / 500))["op"], "ack");
    }
  }
  EXPECT_EQ(good.hello("good")["op"], "hello");
  zmq_close(stuck);
  zmq_ctx_term(context);
}

TEST(ServeWireTcp, LoopbackTcpWorksWithItsRealPort) {
  Served served([](ServerOptions& options, EngineOptions&) {
    options.data_endpoints = {"tcp://127.0.0.1:*"};
  });
  WirePeer peer(served.server->endpoints().data, ZMQ_DEALER);
  EXPECT_EQ(peer.hello("tcp")["op"], "hello");
}

}  // namespace
}  // namespace ds
