// SPDX-License-Identifier: Apache-2.0
#include "storage/record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "storage/import.h"

namespace ds {
namespace {

using testing::HasSubstr;

Json parse(const std::string& text) {
  auto json = parse_json(text);
  EXPECT_TRUE(json.ok()) << json.status().message() << "\n" << text;
  return json.ok() ? *json : Json();
}

/// Attachments that are good input of a task model: one FP32 zero each.
std::vector<std::string> numbers(size_t count) {
  return std::vector<std::string>(count, std::string(sizeof(float), '\0'));
}

Json checked(const std::string& text, size_t attachments = 0) {
  auto record = check_record(parse(text), numbers(attachments));
  EXPECT_TRUE(record.ok()) << record.status().message() << "\n" << text;
  return record.ok() ? *record : Json();
}

/// Refused, with `part` in the message.
void refused(const std::string& text, const std::string& part, size_t attachments = 0) {
  const auto record = check_record(parse(text), numbers(attachments));
  ASSERT_FALSE(record.ok()) << text;
  EXPECT_EQ(record.status().code(), Code::kInvalid);
  EXPECT_NE(record.status().message().find(part), std::string::npos)
      << record.status().message() << "\n"
      << text;
}

TEST(Record, DemonstrationsHaveOneSpelling) {
  const std::string messages =
      R"({"kind":"demonstration","messages":[{"role":"user","content":"q"},)"
      R"({"role":"assistant","content":"a"}]})";
  EXPECT_EQ(checked(R"({"kind":"demonstration","prompt":"q","completion":"a"})"), parse(messages));
  EXPECT_EQ(checked(messages), parse(messages));
  EXPECT_EQ(checked(R"({"kind":"demonstration","prompt":[{"role":"user","content":"q"}],
                        "completion":[{"role":"assistant","content":"a"}]})"),
            parse(messages));
  EXPECT_EQ(checked(R"({"kind":"demonstration","x":[1],"prompt":"q","completion":"a"})")["x"],
            parse("[1]"))
      << "unknown fields are kept";
  refused(R"({"kind":"demonstration"})", "\"messages\" is missing");
  refused(R"({"kind":"demonstration","messages":[]})", "\"messages\" is empty");
  refused(R"({"kind":"demonstration","messages":[{"role":"user","content":"q"}]})",
          "not ended by an assistant");
  refused(R"({"kind":"demonstration","messages":[{"role":"assistant","content":""}]})",
          "empty answer");
  refused(R"({"kind":"demonstration","prompt":"q"})", "not ended by an assistant");
  refused(R"({"kind":"demonstration","completion":"q"})", "\"prompt\" is missing");
  refused(R"({"kind":"demonstration","prompt":"q","messages":[]})", "both");
}

TEST(Record, MessagesAreCheckedByField) {
  const auto with = [](const std::string& first) {
    return R"({"kind":"demonstration","messages":[)" + first +
           R"(,{"role":"assistant","content":"a"}]})";
  };
  refused(with("5"), "\"messages[0]\" is number");
  refused(with(R"({"role":"boss","content":"x"})"), "messages[0].role");
  refused(with(R"({"role":7,"content":"x"})"), "messages[0]");
  refused(with(R"({"role":"user"})"), "messages[0].content");
  refused(with(R"({"role":"user","content":7})"), "messages[0].content");
  refused(with(R"({"role":"user","content":"x","weight":0.5})"), "weight");
  refused(with(R"({"role":"user","content":[{"type":"text"}]})"), "messages[0].content[0]");
  refused(with(R"({"role":"user","content":[{"type":"image","attachment":1}]})"), "attachment", 1);
  checked(with(R"({"role":"user","content":[{"type":"image","attachment":0}]})"), 1);
  checked(with(R"({"role":"assistant","content":null,"tool_calls":[{"id":"1"}]})"));
  EXPECT_EQ(
      checked(with(R"({"role":"assistant","content":"x","weight":0})"))["messages"][0]["weight"],
      0);
}

TEST(Record, Corrections) {
  checked(R"({"kind":"correction","response_id":"r","correction":"Lima"})");
  checked(R"({"kind":"correction","prompt":"capital?","correction":"Lima","rejected":"Quito"})");
  const Json whole = checked(R"({"kind":"correction","correction":"Lima","messages":
      [{"role":"user","content":"capital?"},{"role":"assistant","content":"Quito"}]})");
  EXPECT_EQ(whole["rejected"], "Quito") << "the answer at the end is the rejected one";
  EXPECT_EQ(whole["messages"].size(), 1u);
  refused(R"({"kind":"correction","correction":"Lima"})", "response_id");
  refused(R"({"kind":"correction","response_id":"r"})", "\"correction\" is missing");
  refused(R"({"kind":"correction","response_id":"r","correction":""})", "\"correction\" is empty");
  refused(R"({"kind":"correction","correction":"x","rejected":"y","messages":
      [{"role":"user","content":"q"},{"role":"assistant","content":"z"}]})",
          "expected one");
  refused(R"({"kind":"correction","correction":"x","messages":
      [{"role":"assistant","content":"z"}]})",
          "only the answer");
}

TEST(Record, Preferences) {
  const Json made = checked(R"({"kind":"preference","prompt":"q",
      "chosen":[{"role":"assistant","content":"a"}],"rejected":"b"})");
  EXPECT_EQ(made["chosen"], "a");
  EXPECT_EQ(made["messages"][0]["content"], "q");
  refused(R"({"kind":"preference","prompt":"q","chosen":"a","rejected":"a"})", "equal");
  refused(R"({"kind":"preference","prompt":"q","chosen":"a"})", "\"rejected\" is missing");
  refused(R"({"kind":"preference","chosen":"a","rejected":"b"})", "response_id");
  refused(
      R"({"kind":"preference","prompt":"q","chosen":[{"role":"user","content":"a"}],"rejected":"b"})",
      "not ended by an assistant");
}

TEST(Record, RatingsLabelsTextsRetractions) {
  checked(R"({"kind":"rating","response_id":"r","rating":-0.5})");
  refused(R"({"kind":"rating","response_id":"r","rating":1.5})", "from -1 to 1");
  refused(R"({"kind":"rating","response_id":"r","rating":true})", "\"rating\" is boolean");
  refused(R"({"kind":"rating","rating":1})", "response_id");
  checked(R"({"kind":"label","model":"digits","input":[0,0.5],"label":7})");
  checked(R"({"kind":"label","model":"digits","input":{"attachment":0},"label":7})", 1);
  refused(R"({"kind":"label","model":"digits","input":{"attachment":0},"label":7})", "attachment");
  refused(R"({"kind":"label","model":"../x","input":[1],"label":7})", "model");
  refused(R"({"kind":"label","model":"digits","input":[],"label":7})", "\"input\" is empty");
  refused(R"({"kind":"label","model":"digits","input":[1,"x"],"label":7})", "input[1]");
  refused(R"({"kind":"label","model":"digits","input":[1],"label":-1})", "label");
  Json endless = parse(R"({"kind":"label","model":"digits","input":[1],"label":1})");
  endless["input"][0] = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(check_record(endless).ok());
  checked(R"({"kind":"text","text":"t"})");
  refused(R"({"kind":"text","text":""})", "\"text\" is empty");
  checked(R"({"kind":"retract","target":"fb_0123456789abcdef0123"})");
  refused(R"({"kind":"retract","target":"fb_0123456789ABCDEF0123"})", "target");
  refused(R"({"kind":"retract","target":"7"})", "target");
}

TEST(Record, InputOfATaskModelIsFiniteFp32) {
  const auto with = [](const std::string& input, const std::vector<std::string>& attachments) {
    const auto read = check_record(
        parse(R"({"kind":"label","model":"digits","label":7,"input":)" + input + "}"), attachments);
    return read.ok() ? "accepted" : read.status().message();
  };
  const auto raw = [](float value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
  };
  const std::string two = raw(1) + raw(-2), third = R"({"attachment":2})";
  EXPECT_EQ(with(third, {"", "x", two}), "accepted");
  EXPECT_EQ(with(R"({"attachment":0,"dtype":"F32"})", {two, two}),
            "accepted");  // spare ones are kept
  EXPECT_EQ(with(R"({"attachment":-1})", {two}),
            "label: \"input.attachment\" is -1, expected the index of one of the 1 attachments");
  EXPECT_EQ(with(R"({"attachment":0,"dtype":"F16"})", {two}),
            "label: \"input.dtype\" is \"F16\", expected \"F32\"");
  for (const std::string& bytes : {two.substr(1), std::string()}) {
    EXPECT_EQ(with(third, {"", "", bytes}),
              "label: \"input.attachment 2\" is " + std::to_string(bytes.size()) +
                  " bytes, expected FP32 values, 4 bytes each, at least one");
  }
  EXPECT_EQ(with(third, {"", "", two + raw(NAN)}),
            "label: \"input.attachment 2 value 2\" is NaN, expected a finite FP32 number");
  EXPECT_THAT(with(third, {"", "", raw(-INFINITY)}), HasSubstr("value 0\" is infinite"));
  EXPECT_EQ(with("[0, 1e300]", {}), "label: \"input[1]\" is 1e+300, expected a finite FP32 number");
  EXPECT_EQ(with("[-3.4e38, 3.4e38]", {}), "accepted");
  EXPECT_EQ(with(third, {"", "", std::string(4 * ((1 << 20) + 1), '\0')}),
            "label: \"input\" is 1048577 numbers, expected at most 1048576");
}

TEST(Record, CommonFields) {
  refused("[]", "\"record\" is array");
  refused(R"({"text":"x"})", "\"kind\" is missing");
  refused(R"({"kind":"gossip"})", "gossip");
  refused(R"({"kind":"text","text":"x","domain":""})", "domain");
  refused(R"({"kind":"text","text":"x","source":"a\u0000b"})", "control");
  refused(R"({"kind":"text","text":"x","source":7})", "source");
  refused(R"({"kind":"text","text":"x","ttl_days":0})", "ttl_days");
  refused(R"({"kind":"text","text":"x","ts":[]})", "ts");
  refused(R"({"kind":"text","text":"x","joined":{}})", "joined");
  refused(R"({"kind":"text","text":"x","domain":")" + std::string(129, 'd') + "\"}", "129 bytes");
  checked(
      R"({"kind":"text","text":"x","domain":"d","source":"s","ts":"2026-01-01",)"
      R"("version":"v3","ttl_days":30})");
}

TEST(Record, Identities) {
  const Json a = parse(R"({"kind":"text","text":"x","n":1.0,"id":"1","seq":2,"ts":3})");
  const Json b = parse(R"({"ts":9,"n":1,"text":"x","kind":"text"})");
  EXPECT_EQ(draw_key(a), draw_key(b));
  EXPECT_EQ(draw_key(b), to_hex(sha256(R"({"kind":"text","n":1,"text":"x"})")));
  EXPECT_NE(draw_key(b), draw_key(b, {"image"}));
  EXPECT_NE(payload_hash(a, {}), payload_hash(b, {}));
  EXPECT_EQ(payload_hash(b, {}), sha256(R"({"kind":"text","n":1,"text":"x","ts":9})"));
  EXPECT_NE(payload_hash(b, {"ab", "c"}), payload_hash(b, {"a", "bc"}));
  EXPECT_NE(payload_hash(b, {""}), payload_hash(b, {}));
  EXPECT_EQ(feedback_id("acme", 3, 17), "fb_" + to_hex(sha256(R"(["acme",3,17])")).substr(0, 20));
  EXPECT_NE(feedback_id("a", 1, 11), feedback_id("a", 11, 1));
}

// --- import ---

std::vector<Json> imported(const std::string& line) {
  auto records = import_line(parse(line));
  EXPECT_TRUE(records.ok()) << records.status().message();
  if (!records.ok()) return {};
  for (const Json& record : *records) {
    const auto good = check_record(record);
    EXPECT_TRUE(good.ok()) << good.status().message() << "\n" << record.dump();
  }
  return *records;
}

TEST(Import, OpenAi) {
  const auto chat = imported(R"({"messages":[{"role":"system","content":"s"},
      {"role":"user","content":"q"},{"role":"assistant","content":"no","weight":0},
      {"role":"user","content":"q2"},{"role":"assistant","content":"a","weight":1}],
      "tools":[{"type":"function"}],"domain":"d"})");
  ASSERT_EQ(chat.size(), 1u);
  EXPECT_EQ(chat[0]["kind"], "demonstration");
  EXPECT_EQ(chat[0]["messages"][2]["weight"], 0) << "not to be learned; kept";
  EXPECT_EQ(chat[0]["tools"].size(), 1u);
  EXPECT_EQ(chat[0]["domain"], "d");
  const auto pair = imported(R"({"input":{"messages":[{"role":"user","content":"q"}],"tools":[]},
      "preferred_output":[{"role":"assistant","content":"a"}],
      "non_preferred_output":[{"role":"assistant","content":"b"}]})");
  EXPECT_EQ(pair.at(0)["kind"], "preference");
  EXPECT_EQ(check_record(pair[0])->at("chosen"), "a");
  EXPECT_EQ(check_record(pair[0])->at("rejected"), "b");
}

TEST(Import, Trl) {
  EXPECT_EQ(imported(R"({"text":"t"})").at(0)["kind"], "text");
  EXPECT_EQ(imported(R"({"prompt":"q","completion":"a"})").at(0)["messages"],
            parse(R"([{"role":"user","content":"q"},{"role":"assistant","content":"a"}])"));
  const auto dpo = imported(R"({"prompt":[{"role":"user","content":"q"}],
      "chosen":[{"role":"assistant","content":"a"}],
      "rejected":[{"role":"assistant","content":"b"}]})");
  EXPECT_EQ(dpo.at(0)["messages"][0]["content"], "q");
  const auto implicit =
      imported(R"({"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],
      "rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"b"}]})");
  EXPECT_EQ(implicit.at(0)["messages"].size(), 1u);
  EXPECT_EQ(implicit[0]["chosen"][0]["content"], "a");
  const auto text = imported(R"({"chosen":"The sky is blue","rejected":"The sky is green"})");
  EXPECT_EQ(text.at(0)["messages"][0]["content"], "The sky is");
  EXPECT_EQ(text[0]["chosen"], " blue");
  // The texts part inside a character: both keep it whole.
  const auto split = imported("{\"chosen\":\"ab \xc3\xa4\",\"rejected\":\"ab \xc3\xb6\"}");
  EXPECT_EQ(split.at(0)["chosen"], " \xc3\xa4");
  EXPECT_EQ(imported(R"({"prompt":"q","completion":"a","label":true})").at(0)["rating"], 1);
  EXPECT_EQ(imported(R"({"prompt":"q","completion":"a","label":false})").at(0)["rating"], -1);
  EXPECT_EQ(import_line(parse(R"({"prompt":"q","completions":[],"labels":[]})")).status().code(),
            Code::kUnsupported);
}

const char* const kOpenWebUi = R"({"id":"f","user_id":"u","version":0,"type":"rating",
 "data":{"rating":%s,"model_id":"m","sibling_model_ids":null,"reason":"accurate","comment":""},
 "meta":{"chat_id":"c","message_id":"a2"},"created_at":1700000000,
 "snapshot":{"chat":{"id":"c","chat":{"title":"t","history":{"currentId":"a2","messages":{
  "u1":{"id":"u1","parentId":null,"childrenIds":["a1"],"role":"user","content":"hi"},
  "a1":{"id":"a1","parentId":"u1","childrenIds":["u2"],"role":"assistant","content":"hello"},
  "u2":{"id":"u2","parentId":"a1","childrenIds":["a2","a3","a4"],"role":"user",
        "content":"capital?"},
  "a2":{"id":"a2","parentId":"u2","childrenIds":[],"role":"assistant","content":"Lima"},
  "a3":{"id":"a3","parentId":"u2","childrenIds":[],"role":"assistant","content":"Quito"},
  "a4":{"id":"a4","parentId":"u2","childrenIds":[],"role":"assistant","content":"LIMA",
        "annotation":{"rating":1}}}}}}}})";

std::string open_webui(const std::string& rating) {
  std::string line = kOpenWebUi;
  return line.replace(line.find("%s"), 2, rating);
}

TEST(Import, OpenWebUi) {
  for (const char* spelled : {"1", "\"1\""}) {
    const auto up = imported(open_webui(spelled));
    ASSERT_EQ(up.size(), 2u) << "the rating, and a pair with the sibling not rated alike";
    EXPECT_EQ(up[0]["kind"], "rating");
    EXPECT_EQ(up[0]["rating"], 1);
    EXPECT_EQ(up[0]["messages"].size(), 4u);
    EXPECT_EQ(up[0]["messages"][3]["content"], "Lima");
    EXPECT_EQ(up[0]["reason"], "accurate");
    EXPECT_EQ(up[0]["ts"], 1700000000);
    EXPECT_EQ(up[1]["chosen"], "Lima");
    EXPECT_EQ(up[1]["rejected"], "Quito");
    EXPECT_EQ(up[1]["messages"].size(), 3u);
  }
  const auto down = imported(open_webui("-1"));
  ASSERT_EQ(down.size(), 3u);
  EXPECT_EQ(down[0]["rating"], -1);
  EXPECT_EQ(down[1]["chosen"], "Quito");
  EXPECT_EQ(down[1]["rejected"], "Lima");
  EXPECT_FALSE(import_line(parse(open_webui("\"good\""))).ok());
}

TEST(Import, HostileLines) {
  // A cycle of parents ends; missing parts are named.
  Json cycle = parse(open_webui("1"));
  cycle["snapshot"]["chat"]["chat"]["history"]["messages"]["u1"]["parentId"] = "a2";
  EXPECT_LE(import_line(cycle)->at(0)["messages"].size(), 8u);
  for (
      const char* line :
      {"7", "[]", "{}", R"({"foo":1})", R"({"data":1,"snapshot":2})",
       R"({"data":{"rating":1},"snapshot":{},"meta":{}})", R"({"preferred_output":1})",
       R"({"chosen":1,"rejected":"x"})", R"({"chosen":"a","rejected":"b"})",
       R"({"data":{"rating":1},"meta":{"message_id":"x"},)"
        R"("snapshot":{"chat":{"chat":{"history":{"messages":{}}}}}})"}) {
    EXPECT_FALSE(import_line(parse(line)).ok()) << line;
  }
  // What import lets through, the check at the door does not.
  for (const char* line : {R"({"prompt":7,"completion":"a"})", R"({"prompt":{},"completion":[1]})",
                           R"({"prompt":7,"completion":"a","label":true})", R"({"messages":7})",
                           R"({"text":7})", R"({"chosen":[1],"rejected":[2],"prompt":3})"}) {
    const auto records = import_line(parse(line));
    if (records.ok()) {
      EXPECT_FALSE(check_record(records->at(0)).ok()) << line;
    }
  }
}

/// Every value of good lines replaced by every type in turn: refused or accepted, never thrown at.
TEST(Import, AnyValueOfAnyTypeIsSurvived) {
  const std::vector<Json> wrong = {
      nullptr,        true,         -1, 0.5, "", "x", Json::array(), {1, 2}, Json::array({nullptr}),
      Json::object(), {{"role", 5}}};
  std::vector<Json> lines = {
      parse(open_webui("-1")),
      parse(R"({"input":{"messages":[{"role":"user","content":"q"}]},
          "preferred_output":[{"role":"assistant","content":"a"}],
          "non_preferred_output":[{"role":"assistant","content":"b"}]})"),
      parse(R"({"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],
          "rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"b"}]})"),
      parse(R"({"prompt":"q","completion":"a","label":true})"),
      parse(R"({"kind":"correction","correction":"x","rejected":"y","response_id":"r",
          "messages":[{"role":"user","content":[{"type":"text","text":"t"}],"weight":1}]})"),
      parse(R"({"kind":"preference","prompt":"q","chosen":"a","rejected":"b"})"),
      parse(R"({"kind":"rating","prompt":"q","rating":1,"response_id":"r","ttl_days":3})"),
      parse(R"({"kind":"label","model":"m","input":[1],"label":1,"domain":"d","ts":1})")};
  int tried = 0;
  for (const Json& line : lines) {
    const Json leaves = line.flatten();
    for (const auto& [path, value] : leaves.items()) {
      // Each leaf, and each value on the way to it.
      for (Json::json_pointer at(path); !at.empty(); at = at.parent_pointer()) {
        for (const Json& other : wrong) {
          Json changed = line;
          changed[at] = other;
          tried += 1;
          const auto records = import_line(changed);
          if (!records.ok()) continue;
          for (const Json& record : *records) (void)check_record(record).ok();
        }
      }
    }
  }
  EXPECT_GT(tried, 1000);
}

}  // namespace
}  // namespace ds
