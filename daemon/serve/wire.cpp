// SPDX-License-Identifier: Apache-2.0
// Parsing of the data socket's messages.
#include "serve/wire.h"

#include <utility>

#include "storage/record.h"

namespace ds::wire {
namespace {

constexpr size_t kMaxIdBytes = 256;

Error bad(std::string message) { return {"bad_message", std::move(message)}; }

// Whatever can be read of the header's identities, so that the peer can tell what was refused.
void add_identity(const Json& header, Error& error) {
  if (const auto seq = get_int(header, "seq"); seq.ok()) error.seq = *seq;
  if (const auto id = get_string(header, "id"); id.ok() && id->size() <= kMaxIdBytes)
    error.id = *id;
}

Status check_name(const std::string& what, const std::string& name) {
  if (!name.empty() && name.size() <= kMaxIdBytes) return {};
  return invalid(what + ": " + std::to_string(name.size()) + " bytes, expected 1 to 256");
}

Result<Message> parse_hello(const Json& header) {
  Hello hello;
  DS_ASSIGN(hello.client, get_string(header, "client"));
  DS_TRY(check_name("client", hello.client));
  DS_ASSIGN(hello.epoch, get_int(header, "epoch"));
  if (hello.epoch < 0)
    return invalid("epoch: " + std::to_string(hello.epoch) + ", expected at least 0");
  return Message(std::move(hello));
}

Result<Message> parse_feedback(const Json& header, const std::vector<std::string_view>& frames) {
  Feedback feedback;
  Submission& submission = feedback.submission;
  DS_ASSIGN(submission.client, get_string(header, "client"));
  DS_TRY(check_name("client", submission.client));
  DS_ASSIGN(submission.epoch, get_int(header, "epoch"));
  if (submission.epoch < 0) {
    return invalid("epoch: " + std::to_string(submission.epoch) + ", expected at least 0");
  }
  DS_ASSIGN(submission.seq, get_int(header, "seq"));
  if (submission.seq < 1) {
    return invalid("seq: " + std::to_string(submission.seq) + ", expected at least 1");
  }
  const Json* record = find(header, "record");
  if (!record || !record->is_object()) {
    return invalid("record: " + std::string(record ? record->type_name() : "missing") +
                   ", expected an object");
  }
  submission.record = *record;
  for (size_t i = 1; i < frames.size(); ++i) submission.attachments.emplace_back(frames[i]);
  return Message(std::move(feedback));
}

Result<Message> parse_infer(const Json& header, const std::vector<std::string_view>& frames,
                            const Limits& limits) {
  Infer infer;
  DS_ASSIGN(infer.id, get_string(header, "id"));
  DS_TRY(check_name("id", infer.id));
  Fields fields(header);
  if (const Json* input = find(header, "input")) {
    infer.task_model = true;
    infer.generate.model = fields.text("model", "");
    if (infer.generate.model.empty()) return invalid("model: missing, input is for a task model");
    DS_ASSIGN(infer.input, read_input(*input, {frames.begin() + 1, frames.end()}));
    if (fields.error()) return invalid(fields.error()->message);
    return Message(std::move(infer));
  }
  read_sampling(fields, limits.vocab_size, infer.generate);
  infer.stream = fields.flag("stream", false);
  const std::string latency = fields.text("class", "interactive");
  if (latency == "batch") infer.generate.latency = LatencyClass::kBatch;
  if (latency != "batch" && latency != "interactive") {
    fields.fail("class", "'" + latency + "', expected interactive or batch");
  }
  if (fields.get("messages")) {
    infer.messages = read_messages(fields);
    infer.raw_messages = header["messages"];
  } else {
    infer.prompt = fields.text("prompt", "");
    if (infer.prompt.empty()) fields.fail("messages", "missing; so are prompt and input");
  }
  if (fields.error()) {
    const Code code =
        fields.error()->code == "unsupported_content" ? Code::kUnsupported : Code::kInvalid;
    return Status(code, fields.error()->message);
  }
  return Message(std::move(infer));
}

Result<Message> parse_cancel(const Json& header) {
  Cancel cancel;
  DS_ASSIGN(cancel.id, get_string(header, "id"));
  DS_TRY(check_name("id", cancel.id));
  return Message(std::move(cancel));
}

Result<Message> parse_op(const Json& header, const std::vector<std::string_view>& frames,
                         const Limits& limits) {
  DS_ASSIGN(const int64_t version, get_int(header, "v"));
  if (version != 1)
    return Message(
        Error{"bad_version", "v: " + std::to_string(version) + ", this daemon speaks 1"});
  DS_ASSIGN(const std::string op, get_string(header, "op"));
  if (op == "hello") return parse_hello(header);
  if (op == "feedback") return parse_feedback(header, frames);
  if (op == "infer") return parse_infer(header, frames, limits);
  if (op == "cancel") return parse_cancel(header);
  return Message(Error{
      "unknown_op", "op: '" + op.substr(0, 64) + "', expected hello, feedback, infer or cancel"});
}

}  // namespace

Message parse(const std::vector<std::string_view>& frames, const Limits& limits) {
  if (frames.empty()) return bad("a message without frames");
  if (frames[0].size() > limits.max_header_bytes) {
    return Error{"too_large", "the header has " + std::to_string(frames[0].size()) +
                                  " bytes, the limit is " +
                                  std::to_string(limits.max_header_bytes)};
  }
  Result<Json> header = parse_json(frames[0]);
  if (!header.ok()) return bad(header.status().message());
  if (!header->is_object()) {
    return bad("the header is " + std::string(header->type_name()) + ", expected an object");
  }
  Message message;
  const size_t attached = cost_bytes(frames) - frames[0].size();
  if (frames.size() - 1 > limits.max_attachments) {  // how many more is not kept
    message =
        Error{"too_large", "attachments: more than " + std::to_string(limits.max_attachments) +
                               ", which is the limit"};
  } else if (attached > limits.max_attachment_bytes) {
    message = Error{"too_large", "attachments: " + std::to_string(attached) +
                                     " bytes together, the limit is " +
                                     std::to_string(limits.max_attachment_bytes)};
  } else {
    Result<Message> parsed = parse_op(*header, frames, limits);
    if (parsed.ok()) {
      message = std::move(*parsed);
    } else if (parsed.status().code() == Code::kUnsupported) {
      message = Error{"unsupported", parsed.status().message()};
    } else {
      message = bad(parsed.status().message());
    }
  }
  if (Error* error = std::get_if<Error>(&message)) add_identity(*header, *error);
  return message;
}

size_t cost_bytes(const std::vector<std::string_view>& frames) {
  size_t bytes = 0;
  for (const std::string_view frame : frames) bytes += frame.size();
  return bytes;
}

Json encode(const Error& error) {
  Json out = {{"op", "error"}, {"code", error.code}, {"message", shortened(error.message)}};
  if (error.seq != 0) out["seq"] = error.seq;
  if (!error.id.empty()) out["id"] = error.id;
  if (error.expected_seq != 0) out["expected"] = error.expected_seq;
  if (error.retry_after_ms != 0) out["retry_after_ms"] = error.retry_after_ms;
  return out;
}

Json encode_ack(int64_t seq, const Ack& ack) {
  return {{"op", "ack"},  {"seq", seq},        {"offset", ack.offset},
          {"id", ack.id}, {"state", "stored"}, {"duplicate", ack.duplicate}};
}

Error refused(int64_t seq, const Refusal& refusal) {
  return {refusal.code, refusal.message, seq, "", refusal.expected_seq, refusal.retry_after_ms};
}

Error failed(const std::string& id, const Status& status) {
  Error error{std::string(code_name(status.code())), status.message(), 0, id};
  if (status.code() == Code::kUnavailable) error.code = "shutting_down";
  if (status.code() == Code::kBusy) error.retry_after_ms = 50;
  return error;
}

}  // namespace ds::wire
