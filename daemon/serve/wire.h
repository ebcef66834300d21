// SPDX-License-Identifier: Apache-2.0
// Messages of the data socket: frames into checked structs, answers into JSON. Pure functions on
// bytes: whatever arrives gives a message or an error, never more.
//
// A message is one JSON header frame and binary attachment frames. A leading empty frame (REQ
// peers) is the transport's affair and not seen here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "serve/generation.h"
#include "storage/json.h"
#include "storage/replay_store.h"

namespace ds::wire {

struct Limits {
  size_t max_header_bytes = 2u << 20;
  size_t max_attachment_bytes = 16u << 20;  ///< all of a message together
  size_t max_attachments = 64;
  int64_t vocab_size = 0;
};

struct Hello {
  std::string client;
  int64_t epoch = 0;
};

struct Feedback {
  Submission submission;
};

struct Infer {
  std::string id;
  GenerateRequest generate;           ///< without prompt and id
  std::vector<ChatMessage> messages;  ///< chat; else `prompt`
  Json raw_messages;
  std::string prompt;
  bool stream = false;
  bool task_model = false;  ///< `input` was given: generate.model names it
  std::vector<float> input;
};

struct Cancel {
  std::string id;
};

/// A refusal as the peer sees it. `seq` or `id` of the message it answers, when they could be read.
struct Error {
  std::string code, message;
  int64_t seq = 0;  ///< 0 = none
  std::string id = {};
  int64_t expected_seq = 0, retry_after_ms = 0;
};

using Message = std::variant<Hello, Feedback, Infer, Cancel, Error>;

/// `frames`: header first, then attachments. Codes: bad_message (not JSON, wrong types, missing or
/// too many attachments), too_large, bad_version, unknown_op, unsupported.
Message parse(const std::vector<std::string_view>& frames, const Limits& limits);

/// How many bytes a message keeps in memory until it is answered.
size_t cost_bytes(const std::vector<std::string_view>& frames);

Json encode(const Error& error);
Json encode_ack(int64_t seq, const Ack& ack);
Error refused(int64_t seq, const Refusal& refusal);
Error failed(const std::string& id, const Status& status);

}  // namespace ds::wire
